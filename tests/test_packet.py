# SPDX-License-Identifier: Apache-2.0
"""Packets in Python: golden bytes, there and back, and every refusal named."""

import struct
from contextlib import suppress
from dataclasses import replace

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from vmth.errors import StreamError, UsageError
from vmth.packet import (
    Ack,
    AckStatus,
    Desc,
    Header,
    Limits,
    PacketKind,
    PageForm,
    decode_acks,
    decode_descriptors,
    decode_header,
    encode_acks,
    encode_packet,
)

SEED = 0x5EED5EED5EED5EED
LIMITS = Limits(block_npages=[10, 78, 1516], channel=1)

DESCRIPTORS = [
    Desc(5, 3, PageForm.NORMAL, payload_bytes=3 * 4096),
    Desc(100, 7, PageForm.ZERO),
    Desc(200, 900, PageForm.HOLE),
    Desc(1500, 1, PageForm.FREE),
    Desc(1501, 2, PageForm.SAME),
    Desc(
        1510,
        1,
        PageForm.DEDUP,
        base_block=1,
        base_page=77,
        result=(0x1122334455667788, 0x99AABBCCDDEEFF00),
    ),
    Desc(
        1511, 1, PageForm.DELTA, payload_bytes=300, result=(0x0102030405060708, 0x090A0B0C0D0E0F10)
    ),
    Desc(1512, 4, PageForm.ZSTD, payload_bytes=5000),
]
ACK = Ack(9, (0xAABBCCDDEEFF0011, 0x2233445566778899), AckStatus.MISSED, block=2)
MISSED = Desc(42, 1, PageForm.SAME)


def golden_pages() -> bytes:
    """The protocol's bytes, made from docs/protocol.md's tables without the code under test.

    csrc/tests/test_packet.c has the same bytes written out.
    """
    desc = b"".join(
        [
            struct.pack("<QIBBH", 5, 3, 1, 0, 0),
            struct.pack("<QIBBH", 100, 7, 2, 0, 0),
            struct.pack("<QIBBH", 200, 900, 3, 0, 0),
            struct.pack("<QIBBH", 1500, 1, 4, 0, 0),
            struct.pack("<QIBBH", 1501, 2, 5, 0, 0),
            struct.pack("<QIBBHIHHQ", 1510, 1, 6, 0, 0, 0, 1, 0, 77),
            struct.pack("<QQ", 0x1122334455667788, 0x99AABBCCDDEEFF00),
            struct.pack("<QIBBHIHHQ", 1511, 1, 7, 0, 0, 300, 0, 0, 0),
            struct.pack("<QQ", 0x0102030405060708, 0x090A0B0C0D0E0F10),
            struct.pack("<QIBBHIHHQ", 1512, 4, 8, 0, 0, 5000, 0, 0, 0),
        ]
    )
    payload = 3 * 4096 + 300 + 5000
    header = b"VMTP" + struct.pack(
        "<BBHIHHQIIIIQQ", 1, 0, 2, 3, 1, 0, 0x0102030405060708, len(desc), payload, 8, 0, 919, 0
    )
    return header + struct.pack("<Q", xxhash.xxh64_intdigest(header + desc, SEED)) + desc


def golden_acks() -> bytes:
    desc = struct.pack("<QQQII", 9, 0xAABBCCDDEEFF0011, 0x2233445566778899, 2, 2)
    desc += struct.pack("<QIBBH", 42, 1, 5, 0, 0)
    header = b"VMTP" + struct.pack("<BBHIHHQIIIIQQ", 4, 0, 0, 3, 1, 0, 9, len(desc), 0, 1, 0, 1, 0)
    return header + struct.pack("<Q", xxhash.xxh64_intdigest(header + desc, SEED)) + desc


def test_golden_checksums_are_those_of_the_c_test() -> None:
    assert golden_pages()[56:64].hex() == "24ba57c53d78835a"
    assert golden_acks()[56:64].hex() == "af12e95b8e34be75"


def encoded() -> bytes:
    return encode_packet(
        PacketKind.PAGES,
        0x0102030405060708,
        DESCRIPTORS,
        block=2,
        round_=3,
        channel=1,
        checksum_seed=SEED,
    )


def test_pages_encode_to_the_golden_bytes() -> None:
    assert encoded() == golden_pages()


def test_golden_bytes_decode_to_the_pages() -> None:
    header = decode_header(golden_pages(), LIMITS)
    assert replace(header, checksum=0) == Header(
        PacketKind.PAGES,
        0x0102030405060708,
        block=2,
        round=3,
        channel=1,
        desc_bytes=208,
        payload_bytes=3 * 4096 + 5300,
        ndesc=8,
        npages=919,
    )
    assert decode_descriptors(golden_pages(), LIMITS, checksum_seed=SEED) == DESCRIPTORS
    assert (
        decode_descriptors(golden_pages() + b"payload", LIMITS, checksum_seed=SEED) == DESCRIPTORS
    )


def test_acks_there_and_back() -> None:
    data = encode_acks(9, [ACK], [MISSED], round_=3, channel=1, checksum_seed=SEED)
    assert data == golden_acks()
    assert decode_acks(data, LIMITS, checksum_seed=SEED) == ([ACK], [MISSED])


def test_barrier_and_end_are_a_header_alone() -> None:
    for kind in (PacketKind.BARRIER, PacketKind.END):
        data = encode_packet(kind, 7, round_=2, channel=1)
        assert len(data) == 64
        header = decode_header(data, LIMITS)
        assert (header.kind, header.seq, header.round) == (kind, 7, 2)


def refusal(data: bytes, limits: Limits = LIMITS) -> str:
    with pytest.raises(StreamError) as raised:
        decode_descriptors(data, limits, checksum_seed=SEED)
    return str(raised.value)


def reseal(data: bytes) -> bytes:
    """The checksum made right again, as a peer with a bug would."""
    checksum = xxhash.xxh64_intdigest(data[:56] + data[64:], SEED)
    return data[:56] + struct.pack("<Q", checksum) + data[64:]


@pytest.mark.parametrize(
    ("at", "change", "said"),
    [
        (0, b"X", "magic: received"),
        (4, b"\x09", "kind: received 9, allowed 4"),
        (4, b"\x00", "kind: received 0, allowed 4"),
        (5, b"\x01", "flags: received 1, allowed 0"),
        (6, b"\x03", "block: received 3, allowed 2"),
        (12, b"\x00", "channel: received 0, allowed 1"),
        (14, b"\x01", "reserved: received 1, allowed 0"),
        (16, bytes(8), "seq: received 0, allowed 1"),
        (27, b"\x01", "desc_bytes: received 16777424, allowed 1048576"),
        (31, b"\x01", "payload_bytes: received 16794804, allowed 8388608"),
        (32, b"\x0e", "ndesc: received 14, allowed 13"),
        (32, b"\x07", "desc_bytes: received 208, allowed 176"),
        (40, b"\x98", "npages: received 920, allowed 919"),
        (28, b"\xb5", "payload_bytes: received 17589, allowed 17588"),
        (64 + 12, b"\x0a", "desc.form: received 10, allowed 9"),
        (64 + 13, b"\x01", "desc.flags: received 1, allowed 0"),
        (64 + 16 + 8, b"\x00", "desc.npages: received 0, allowed 1"),
        (64 + 32 + 11, b"\xff", "desc.npages: received 4278190980, allowed 1316"),
        (64 + 7, b"\x01", "desc.page: received 72057594037927941, allowed 1515"),
    ],
)
def test_refusals_name_field_received_and_allowed(at: int, change: bytes, said: str) -> None:
    data = golden_pages()
    changed = data[:at] + change + data[at + len(change) :]
    assert said in refusal(reseal(changed))


def test_a_form_that_was_not_negotiated_is_refused() -> None:
    narrow = replace(LIMITS, forms=frozenset({PageForm.NORMAL, PageForm.ZERO}))
    assert "not negotiated" in refusal(golden_pages(), narrow)


@pytest.mark.parametrize(
    ("payloads", "said"),
    [
        ((0, 0, 9), None),
        ((0, 12288, 9), None),
        ((0, 12289, 1), "desc.payload_bytes: received 12289, allowed 12288"),
        ((7, 0, 0), "desc.payload_bytes: received 0, allowed 12288"),
    ],
)
def test_a_frame_ends_at_a_payload(payloads: tuple[int, ...], said: str | None) -> None:
    descriptors = [
        Desc(100 * i, i + 1, PageForm.ZSTD, payload_bytes=nbytes)
        for i, nbytes in enumerate(payloads)
    ]
    descriptors[2] = replace(descriptors[2], npages=1)
    data = encode_packet(PacketKind.PAGES, 1, descriptors, block=2, channel=1, checksum_seed=SEED)
    if said is None:
        assert decode_descriptors(data, LIMITS, checksum_seed=SEED) == descriptors
    else:
        assert said in refusal(data)


def test_a_delta_may_be_packed() -> None:
    packed = Desc(9, 1, PageForm.DELTA, payload_bytes=30, result=(1, 2), packed=True)
    data = encode_packet(PacketKind.PAGES, 1, [packed], block=2, channel=1, checksum_seed=SEED)
    assert data[64 + 13] == 1
    assert decode_descriptors(data, LIMITS, checksum_seed=SEED) == [packed]


def test_reuse_has_a_hash_a_page_as_payload() -> None:
    run = Desc(1500, 16, PageForm.REUSE, payload_bytes=16 * 16)
    data = encode_packet(PacketKind.PAGES, 1, [run], block=2, channel=1, checksum_seed=SEED)
    assert data[64:] == struct.pack("<QIBBH", 1500, 16, 9, 0, 0)
    assert decode_descriptors(data, LIMITS, checksum_seed=SEED) == [run]
    short = replace(run, payload_bytes=16 * 15)
    data = encode_packet(PacketKind.PAGES, 1, [short], block=2, channel=1, checksum_seed=SEED)
    assert "payload_bytes: received 240, allowed 256" in refusal(data)


def test_every_cut_is_refused() -> None:
    data = golden_pages()
    for length in range(len(data)):
        refusal(data[:length])


def test_every_flipped_byte_is_refused() -> None:
    data = golden_pages()
    for at in range(len(data)):
        refusal(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])


def test_acks_are_checked() -> None:
    def said(acks: list[Ack], missed: list[Desc]) -> str:
        data = encode_acks(9, acks, missed, channel=1, checksum_seed=SEED)
        with pytest.raises(StreamError) as raised:
            decode_acks(data, LIMITS, checksum_seed=SEED)
        return str(raised.value)

    landed = Ack(1)
    assert "desc_bytes: received 48, allowed 32" in said([landed], [MISSED])
    assert "ack.seq" in said([replace(landed, seq=0)], [])
    assert "ack.block: received 3, allowed 2" in said([replace(ACK, block=3)], [])
    assert "ack.block" in said([replace(landed, block=1)], [])
    assert "desc.page" in said([replace(ACK, block=0)], [MISSED])
    assert "desc.form: received 2, allowed 5" in said([ACK], [Desc(1, 1, PageForm.ZERO)])
    with pytest.raises(StreamError, match="kind: received 1, allowed 4"):
        decode_acks(golden_pages(), LIMITS, checksum_seed=SEED)


def test_encoding_refuses_what_has_no_form() -> None:
    with pytest.raises(UsageError, match=r"desc.form"):
        encode_packet(PacketKind.PAGES, 1, [Desc(0, 1, 99)])  # type: ignore[arg-type]


RUNS = st.builds(
    Desc,
    page=st.integers(0, 700),
    npages=st.integers(1, 700),
    form=st.sampled_from([PageForm.ZERO, PageForm.HOLE, PageForm.FREE, PageForm.SAME]),
)


@settings(max_examples=30)
@given(descriptors=st.lists(RUNS, min_size=1, max_size=40), seq=st.integers(1, 2**64 - 1))
def test_any_packet_there_and_back(descriptors: list[Desc], seq: int) -> None:
    data = encode_packet(PacketKind.PAGES, seq, descriptors, block=2, channel=1, checksum_seed=SEED)
    assert decode_header(data, LIMITS).seq == seq
    assert decode_descriptors(data, LIMITS, checksum_seed=SEED) == descriptors


@given(data=st.binary(max_size=300))
@settings(max_examples=30)
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    for prefix in (b"", golden_pages()[:64], golden_pages()[:80], golden_acks()[:64]):
        for decode in (decode_descriptors, decode_acks):
            with suppress(StreamError):
                decode(reseal((prefix + data).ljust(64, b"\0")), LIMITS, checksum_seed=SEED)
