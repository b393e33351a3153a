# SPDX-License-Identifier: Apache-2.0
"""Preambles and control frames: golden bytes, every bound, hostile and cut-up input."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmth.errors import StreamError, UsageError
from vmth.wire import messages as m
from vmth.wire.checks import MAX_DIGEST_BYTES, MAX_STATE_CHUNK_BYTES, RULES
from vmth.wire.framing import (
    MAX_BODY_BYTES,
    MAX_FEED_BYTES,
    FrameDecoder,
    FrameEncoder,
    Preamble,
    PreambleError,
    PreambleReply,
    PreambleStatus,
    choose_version,
)

GOLDEN = Path(__file__).parent / "golden" / "wire.txt"
ID = bytes(range(16))
TOKEN = bytes(range(16, 32))
BLOCK = m.BlockInfo("ram", 1 << 20, 0, 0, 4096, 4096, 1, -1)
OFFER = m.Offer(
    session_id=ID,
    mode=m.Mode.LIVE,
    page_size=4096,
    hash_algorithm=m.HashAlgorithm.XXH3_128,
    hash_seed=0x0123456789ABCDEF,
    channels=4,
    blocks=[BLOCK, m.BlockInfo("rom", 8192, 16384, 4 << 30, 4096, 2 << 20, 3, 1)],
    features=["hole", "zero"],
    audit=True,
    peer_timeout_ms=10_000,
    vmth_version="0.1.0",
    guest={"name": "vm1"},
)
MESSAGES: list[m.Message] = [
    OFFER,
    m.Accept(TOKEN, ID, ["zero"], "0.1.0"),
    m.Refuse(m.RefuseCode.MEMORY, "1 GiB needed, 512 MiB free"),
    m.Paused(1_700_000_000_000_000_000, True),
    m.State("cpu", 1, 0, b"registers", True),
    m.Seal(1, (1 << 64) - 1, 256, 1, 9, 0xDEADBEEF),
    m.Sealed(1, (1 << 64) - 1, 256),
    m.Mismatch(2, 3, 255),
    m.DigestRequest(m.DigestSource.TABLE, 0, 0, 256, 128),
    m.DigestReply(m.DigestSource.MEMORY, 0, 0, 256, 128, bytes(range(32))),
    m.Grant(TOKEN),
    m.Running(1_700_000_000_000_000_001),
    m.Released(),
    m.ReleasedSeen(),
    m.Abort(m.AbortCode.CANCELLED, "by the operator"),
    m.Aborted(TOKEN, "resume() raised"),
    m.Query(ID, TOKEN),
    m.Answer(ID, TOKEN, m.AnswerState.RUNNING, "since 12:00"),
    m.Ping(1),
    m.Pong((1 << 64) - 1),
    m.LastBarrier(7),
    m.PackedState("cpu", 1, 0, bytes.fromhex("28b52ffd2000"), 9, True),
    m.HandedOn([1, 2, 5]),
    m.ReuseFilter(ID + TOKEN, 4),
    m.ReusePart(5, 4, bytes.fromhex("00000200ffff3a"), True),
    m.RoundDone(3, 256, 12, 5_000_000),
]
PREAMBLES = [
    Preamble(m.Role.CONTROL, ID),
    Preamble(m.Role.PAGE, ID, 63, TOKEN),
    Preamble(m.Role.QUERY, ID, version_min=1, version_max=7),
]
REPLIES = [
    PreambleReply(PreambleStatus.OK, 1),
    PreambleReply(PreambleStatus.BUSY),
]


def frame(number: int, body: bytes, **wrong: Any) -> bytes:
    """A frame with a good checksum, whatever else may be wrong with it."""
    head = struct.pack(
        "<4sHHI",
        wrong.get("magic", b"VMc1"),
        number,
        wrong.get("reserved", 0),
        wrong.get("length", len(body)),
    )
    return head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))) + body


def drain(decoder: FrameDecoder) -> Iterator[m.Message]:
    while (message := decoder.next_message()) is not None:
        yield message


def decode(data: bytes) -> list[m.Message]:
    decoder = FrameDecoder()
    for at in range(0, len(data), MAX_FEED_BYTES):
        decoder.feed(data[at : at + MAX_FEED_BYTES])
    decoder.feed_eof()
    return list(drain(decoder))


def outcome(pieces: list[bytes]) -> tuple[list[m.Message], str, int]:
    """Messages, then the error if there was one, however the bytes were cut."""
    decoder = FrameDecoder()
    seen: list[m.Message] = []
    try:
        for piece in pieces:
            decoder.feed(piece)
            seen.extend(drain(decoder))
        decoder.feed_eof()
        seen.extend(drain(decoder))
    except StreamError as error:
        return seen, str(error), decoder.ignored
    return seen, "", decoder.ignored


def golden_lines() -> list[str]:
    encoder = FrameEncoder()
    lines = [f"{type(message).__name__} {encoder.encode(message).hex()}" for message in MESSAGES]
    lines += [f"Preamble.{one.role.name} {one.pack().hex()}" for one in PREAMBLES]
    lines += [f"PreambleReply.{one.status.name} {one.pack().hex()}" for one in REPLIES]
    return lines


def test_golden_bytes() -> None:
    assert golden_lines() == GOLDEN.read_text().splitlines()


def test_every_message_has_a_sample_and_a_rule_for_every_field() -> None:
    assert {type(message) for message in MESSAGES} == set(m.MESSAGE_TYPES.values())
    kinds: list[type[m.Message]] = [*m.MESSAGE_TYPES.values(), m.BlockInfo]
    for kind in kinds:
        assert set(RULES[kind]) == set(kind.__struct_fields__), kind


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_frames_decode_whole_byte_by_byte_and_with_trailing_data(message: m.Message) -> None:
    data = FrameEncoder().encode(message)
    assert decode(data) == [message]
    single = [data[at : at + 1] for at in range(len(data))]
    assert outcome(single) == ([message], "", 0)
    decoder = FrameDecoder()
    decoder.feed(data + data[:-1])
    assert list(drain(decoder)) == [message]
    decoder.feed(data[-1:])
    assert list(drain(decoder)) == [message]
    decoder.feed_eof()
    assert decoder.next_message() is None and decoder.at_eof


def test_every_flipped_byte_of_a_frame_is_an_error() -> None:
    data = FrameEncoder().encode(m.Query(ID, TOKEN))
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        with pytest.raises(StreamError):
            decode(bytes(damaged))


def test_every_truncation_of_a_frame_is_an_error() -> None:
    data = FrameEncoder().encode(m.Ping(7))
    for length in range(1, len(data)):
        with pytest.raises(StreamError, match=f"received {length} of "):
            decode(data[:length])
    assert decode(b"") == []


BAD_FRAMES = [
    (frame(0x13, b"\x91\x01", magic=b"HTTP"), "frame magic: received 48545450, allowed 564d6331"),
    (
        frame(0x13, b"", length=MAX_BODY_BYTES + 1),
        f"frame length: received {MAX_BODY_BYTES + 1} bytes, allowed {MAX_BODY_BYTES}",
    ),
    (frame(0x13, b"\x91\x01", reserved=1), "frame reserved bytes: received 0x0001, allowed 0"),
    (frame(0x1A, b""), "message type: received 0x001a, allowed 0x0001 to 0x0019"),
    (frame(0x00, b""), "message type: received 0x0000"),
    (frame(0x13, b"\x91\x01")[:-1] + b"\x02", "frame checksum: received 0x"),
    (frame(0x13, b"\x91\xa1x"), "Ping: Expected `int`, got `str` - at `number`"),
    (frame(0x13, b"\x90"), "Ping: Expected `array` of at least length 1, got 0"),
    (frame(0x13, b"\x92\x01\x01"), "Ping: Expected `array` of at most length 1, got 2"),
    (frame(0x13, b"\x91\x01\x01"), "Ping: MessagePack data is malformed"),
    (frame(0x13, b""), "Ping: Input data was truncated"),
    (frame(0x13, b"\x91\xff"), "Ping.number: received -1, allowed 0 to"),
    (frame(0x03, b"\x92\x01\xa1\xff"), "Refuse: "),
]


@pytest.mark.parametrize(("data", "text"), BAD_FRAMES, ids=[text for _, text in BAD_FRAMES])
def test_bad_frames_name_what_was_received_and_allowed(data: bytes, text: str) -> None:
    with pytest.raises(StreamError) as caught:
        decode(data)
    assert str(caught.value).startswith(text)


def test_an_error_is_final() -> None:
    decoder = FrameDecoder()
    decoder.feed(frame(0x1A, b""))
    for _ in range(2):
        with pytest.raises(StreamError, match="message type"):
            decoder.next_message()
        decoder.feed(FrameEncoder().encode(m.Ping(1)))


def test_unknown_types_with_bit_15_are_ignored_and_counted() -> None:
    decoder = FrameDecoder()
    decoder.feed(frame(0x8002, b"anything") * 2 + FrameEncoder().encode(m.Ping(1)))
    assert list(drain(decoder)) == [m.Ping(1)]
    assert decoder.ignored == 2


def test_the_buffer_is_bounded() -> None:
    decoder = FrameDecoder()
    with pytest.raises(UsageError, match=f"{MAX_FEED_BYTES} allowed"):
        decoder.feed(bytes(MAX_FEED_BYTES + 1))
    large = FrameEncoder().encode(m.State("ram", 1, 0, bytes(MAX_STATE_CHUNK_BYTES), False))
    decoder.feed(large[:MAX_FEED_BYTES])
    decoder.feed(large[MAX_FEED_BYTES:] + bytes(MAX_BODY_BYTES - MAX_FEED_BYTES))
    with pytest.raises(UsageError, match="take the messages first"):
        decoder.feed(b"x")
    decoder = FrameDecoder()
    decoder.feed_eof()
    with pytest.raises(UsageError, match="after feed_eof"):
        decoder.feed(b"x")


TOO_LONG = "x" * 256
LIMITS: list[tuple[m.Message, dict[str, Any], str]] = [
    (OFFER, {"session_id": ID[1:]}, "Offer.session_id: received 15 bytes, allowed 16 bytes"),
    (OFFER, {"mode": 0}, "Offer.mode: received 0, allowed 1 (LIVE), 2 (COLD)"),
    (OFFER, {"page_size": 5000}, "Offer.page_size: received 5000, allowed a power of two from"),
    (OFFER, {"page_size": 2048}, "Offer.page_size: received 2048, allowed a power of two from"),
    (OFFER, {"hash_algorithm": 3}, "Offer.hash_algorithm: received 3, allowed 1 (NONE), 2"),
    (OFFER, {"channels": 0}, "Offer.channels: received 0, allowed 1 to 64"),
    (OFFER, {"channels": 65}, "Offer.channels: received 65, allowed 1 to 64"),
    (OFFER, {"blocks": []}, "Offer.blocks: received 0 blocks, allowed 1 to 4096"),
    (OFFER, {"blocks": [BLOCK] * 4097}, "Offer.blocks: received 4097 blocks, allowed 1 to 4096"),
    (OFFER, {"blocks": [BLOCK] * 2}, "Offer.blocks: received idstr 'ram' twice, allowed each"),
    (OFFER, {"features": ["f"] * 65}, "Offer.features: received 65 features, allowed at most 64"),
    (OFFER, {"features": [""]}, "Offer.features: received a feature of 0 bytes, allowed 1 to 64"),
    (OFFER, {"features": ["é" * 33]}, "Offer.features: received a feature of 66 bytes, allowed"),
    (OFFER, {"peer_timeout_ms": 0}, "Offer.peer_timeout_ms: received 0, allowed 1 to"),
    (OFFER, {"guest": {str(n): "" for n in range(65)}}, "Offer.guest: received 65 entries, "),
    (OFFER, {"guest": {TOO_LONG: ""}}, "Offer.guest: received key of 256, value of 0 bytes"),
    (BLOCK, {"idstr": ""}, "BlockInfo.idstr: received 0 bytes, allowed 1 to 255 bytes"),
    (BLOCK, {"idstr": TOO_LONG}, "BlockInfo.idstr: received 256 bytes, allowed 1 to 255 bytes"),
    (BLOCK, {"used_length": 0}, "BlockInfo.used_length: received 0, allowed 1 to"),
    (BLOCK, {"used_length": 4097}, "BlockInfo.used_length: received 4097, allowed multiples of"),
    (BLOCK, {"gpa": (1 << 64) - 4096}, "BlockInfo.used_length: received 1048576, allowed 1 to"),
    (BLOCK, {"max_length": 4096}, "BlockInfo.max_length: received 4096, allowed 0 or at least"),
    (BLOCK, {"page_size": 0}, "BlockInfo.page_size: received 0, allowed a power of two"),
    (BLOCK, {"backing_page_size": 1}, "BlockInfo.backing_page_size: received 1, allowed a power"),
    (BLOCK, {"flags": 1 << 32}, "BlockInfo.flags: received 4294967296, allowed 0 to 4294967295"),
    (BLOCK, {"numa_node": -2}, "BlockInfo.numa_node: received -2, allowed -1 to 65535"),
    (MESSAGES[1], {"token": b""}, "Accept.token: received 0 bytes, allowed 16 bytes"),
    (MESSAGES[2], {"code": 8}, "Refuse.code: received 8, allowed 1 (BLOCKS), 2"),
    (MESSAGES[4], {"name": ""}, "State.name: received 0 bytes, allowed 1 to 255 bytes"),
    (
        MESSAGES[4],
        {"data": bytes(MAX_STATE_CHUNK_BYTES + 1)},
        "State.data: received 1048577 bytes, allowed 0 to 1048576 bytes",
    ),
    (MESSAGES[5], {"state_crc32": 1 << 32}, "Seal.state_crc32: received 4294967296, allowed 0"),
    (MESSAGES[8], {"source": 0}, "DigestRequest.source: received 0, allowed 1 (TABLE)"),
    (MESSAGES[8], {"block": 4096}, "DigestRequest.block: received 4096, allowed 0 to 4095"),
    (MESSAGES[8], {"npages": 0}, "DigestRequest.npages: received 0, allowed 1 to"),
    (MESSAGES[8], {"step": 0}, "DigestRequest.step: received 0, allowed 1 to"),
    (
        MESSAGES[8],
        {"npages": MAX_DIGEST_BYTES, "step": 1},
        "DigestRequest.step: received 1048576 steps, allowed at most 65536",
    ),
    (MESSAGES[9], {"digests": b""}, "DigestReply.digests: received 0 bytes, allowed 16 for each"),
    (MESSAGES[14], {"code": 0}, "Abort.code: received 0, allowed 1 (CANCELLED)"),
    (MESSAGES[14], {"reason": "x" * 4097}, "Abort.reason: received 4097 bytes, allowed 0 to 4096"),
    (MESSAGES[17], {"state": 5}, "Answer.state: received 5, allowed 1 (UNKNOWN), 2 (ABORTED)"),
    (
        MESSAGES[-4],
        {"blocks": [1, 1]},
        "HandedOn.blocks: received 1 after 1, allowed rising, below",
    ),
    (
        MESSAGES[-4],
        {"blocks": [-1]},
        "HandedOn.blocks: received -1 after -1, allowed rising, below",
    ),
    (MESSAGES[-4], {"blocks": [4096]}, "HandedOn.blocks: received 4096 after -1, allowed rising"),
    (MESSAGES[-3], {"key": b""}, "ReuseFilter.key: received 0 bytes, allowed 32 bytes"),
    (MESSAGES[-3], {"entries": (1 << 26) + 1}, "ReuseFilter.entries: received 67108865, allowed 0"),
    (MESSAGES[-2], {"count": 0, "last": False}, "ReusePart.count: received 0, allowed 1 to 16384"),
    (MESSAGES[-2], {"count": 16385}, "ReusePart.count: received 16385, allowed 0 to 16384"),
    (MESSAGES[-2], {"data": bytes(61441)}, "ReusePart.data: received 61441 bytes, allowed 0 to"),
]


@pytest.mark.parametrize(("good", "change", "text"), LIMITS, ids=[row[2] for row in LIMITS])
def test_bounds_hold_at_both_ends(good: m.Message, change: dict[str, Any], text: str) -> None:
    bad = msgspec.structs.replace(good, **change)
    if isinstance(bad, m.BlockInfo):
        bad, text = msgspec.structs.replace(OFFER, blocks=[bad]), "Offer.blocks[0]: " + text
    number = {kind: number for number, kind in m.MESSAGE_TYPES.items()}[type(bad)]
    for error, act in (
        (UsageError, lambda: FrameEncoder().encode(bad)),
        (StreamError, lambda: decode(frame(number, msgspec.msgpack.encode(bad)))),
    ):
        with pytest.raises(error) as caught:
            act()
        assert str(caught.value).startswith(text)


def test_an_offer_too_large_for_a_frame_is_our_mistake() -> None:
    blocks = [msgspec.structs.replace(BLOCK, idstr=f"{n:0255}") for n in range(4096)]
    with pytest.raises(UsageError, match="Offer: body of"):
        FrameEncoder().encode(msgspec.structs.replace(OFFER, blocks=blocks))


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.builds(
                frame,
                st.sampled_from([*m.MESSAGE_TYPES, 0x1A, 0x8002]),
                st.one_of(st.binary(max_size=40), st.just(msgspec.msgpack.encode(m.Ping(5)))),
            ),
            st.sampled_from(MESSAGES).map(FrameEncoder().encode),
        ),
        max_size=4,
    ).map(b"".join),
    st.lists(st.integers(1, 200), max_size=8),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_bytes_in_any_pieces_give_the_same_messages_or_the_same_error(
    data: bytes, cuts: list[int]
) -> None:
    pieces, rest = [], data
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    assert outcome([*pieces, rest]) == outcome([data])


@pytest.mark.parametrize("one", PREAMBLES, ids=lambda one: one.role.name)
def test_preambles_come_back(one: Preamble) -> None:
    assert Preamble.unpack(one.pack()) == one


@pytest.mark.parametrize("one", REPLIES, ids=lambda one: one.status.name)
def test_preamble_replies_come_back(one: PreambleReply) -> None:
    assert PreambleReply.unpack(one.pack()) == one


def resealed(data: bytes, at: int, new: bytes) -> bytes:
    data = data[:at] + new + data[at + len(new) :]
    return data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))


CONTROL = PREAMBLES[0].pack()
BAD_PREAMBLES = [
    (CONTROL[:-1], 7, "preamble: received 63 bytes, allowed 64"),
    (b"GET / HTTP/1.1\r\n".ljust(64, b" "), 7, "preamble magic: received 474554"),
    (CONTROL[:-1] + b"\0", 7, "preamble checksum: received"),
    (resealed(CONTROL, 8, b"\x02\0\x03\0"), 2, "protocol version: received 2 to 3, allowed 1 to 1"),
    (resealed(CONTROL, 8, b"\0\0\x03\0"), 7, "preamble versions: received 0 to 3"),
    (resealed(CONTROL, 8, b"\x02\0\x01\0"), 7, "preamble versions: received 2 to 1"),
    (resealed(CONTROL, 12, b"\0"), 6, "preamble role: received 0, allowed [1, 2, 3, 4]"),
    (resealed(CONTROL, 13, b"\1"), 7, "preamble reserved bytes: received 01"),
    (resealed(CONTROL, 48, b"\1"), 7, "preamble reserved bytes: received 0001"),
    (resealed(CONTROL, 14, b"\1"), 7, "preamble channel: received 1, allowed 0 to 0"),
    (resealed(PREAMBLES[1].pack(), 14, b"\x40"), 7, "preamble channel: received 64, allowed 0 to"),
    (resealed(CONTROL, 32, b"\1"), 7, "preamble token: received 01"),
]


@pytest.mark.parametrize(
    ("data", "status", "text"), BAD_PREAMBLES, ids=[text for *_, text in BAD_PREAMBLES]
)
def test_bad_preambles_say_what_to_answer(data: bytes, status: int, text: str) -> None:
    with pytest.raises(PreambleError) as caught:
        Preamble.unpack(data)
    assert str(caught.value).startswith(text)
    assert caught.value.status == status


OK_REPLY = REPLIES[0].pack()
BAD_REPLIES = [
    (OK_REPLY[:5], "preamble reply: received 5 bytes, allowed 32"),
    (resealed(OK_REPLY, 0, b"X"), "preamble reply magic: received 58"),
    (OK_REPLY[:-1] + b"\0", "preamble reply checksum"),
    (resealed(OK_REPLY, 10, b"\x08"), "preamble reply status: received 8, allowed [1, 2"),
    (resealed(OK_REPLY, 8, b"\x02"), "preamble reply version: received 2, allowed 1 to 1"),
    (resealed(REPLIES[1].pack(), 8, b"\x01"), "preamble reply version: received 1, allowed 0 to 0"),
    (resealed(OK_REPLY, 16, b"\x01"), "preamble reply reserved bytes: received 01"),
]


@pytest.mark.parametrize(("data", "text"), BAD_REPLIES, ids=[text for _, text in BAD_REPLIES])
def test_bad_preamble_replies(data: bytes, text: str) -> None:
    with pytest.raises(PreambleError) as caught:
        PreambleReply.unpack(data)
    assert str(caught.value).startswith(text)


def test_preambles_of_our_own_are_checked() -> None:
    with pytest.raises(UsageError, match="channel: 64 given, 0 to 63 allowed"):
        Preamble(m.Role.PAGE, ID, 64, TOKEN).pack()
    with pytest.raises(UsageError, match="session id: 3 bytes given"):
        Preamble(m.Role.CONTROL, b"abc").pack()


@given(st.binary(min_size=64, max_size=64))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_any_64_bytes_are_a_preamble_or_an_error(data: bytes) -> None:
    for tried in (data, resealed(b"VMTH\r\n\x1a\n" + data[8:], 0, b"")):
        try:
            preamble = Preamble.unpack(tried)
        except PreambleError:
            continue
        assert preamble.pack() == tried


@pytest.mark.parametrize(
    ("peer", "own", "expected"),
    [
        ((1, 1), (1, 1), 1),
        ((1, 3), (2, 2), 2),
        ((2, 4), (1, 3), 3),
        ((1, 1), (2, 3), 0),
        ((4, 5), (2, 3), 0),
    ],
)
def test_choose_version(peer: tuple[int, int], own: tuple[int, int], expected: int) -> None:
    assert choose_version(*peer, *own) == expected
