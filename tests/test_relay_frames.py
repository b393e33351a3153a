# SPDX-License-Identifier: Apache-2.0
"""The framing between two relays: golden bytes, round trips, and damage of every kind, by name."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from relay_world import TOKEN, frames_of

from vmth.errors import StreamError, UsageError
from vmth.qemu.relay import frames as f

SEED = f.frame_seed(TOKEN, f.HelloRole.CONNECTING)
PAGE = 4096

HELLO = f.Hello(
    f.HelloRole.CONNECTING, f.HelloStatus.GO_ON, 1, 1, 1, bytes(range(16)), TOKEN, 7, 4711
)
#: Spaces stand between the fields of the tables in docs/relay.md.
GOLDEN_HELLO = """
766d746872656c79 01 01 0100 0100 0100 000102030405060708090a0b0c0d0e0f
8877665544332211 0700000000000000 6712000000000000 a4468211fc247f19
"""
GOLDEN_FRAMES = """
564d5246 01 00 0000 0000000000000000 08000000 08000000 b58e1ffe148b2d26 e5cfa4259dd02f9b
5145564d00000003
564d5246 02 00 0000 0100000000000000 10000000 10000000 2fc8bf664fb10af6 51ed33d6fdbd3254
0800000000000000 0100000000000000
564d5246 03 00 0000 0200000000000000 10000000 10000000 41ae1f290aed0101 b61eddd154aa8a24
0c00000000000000 0100000000000000
564d5246 04 00 0000 0300000000000000 0c000000 0c000000 05c79850220a8a1c 1fc29a3e47411163
736f757263653a20676f6e65
"""


def reader_of(data: bytes, seed: int = SEED) -> f.FrameReader:
    """``take`` fails as the socket's does: a cut stream is not the reader's to judge."""
    at = 0

    def take(nbytes: int) -> memoryview:
        nonlocal at
        if at + nbytes > len(data):
            raise EOFError
        at += nbytes
        return memoryview(data)[at - nbytes : at]

    return f.FrameReader(seed, take)


def written(*payloads: bytes, compress: bool = False) -> bytes:
    """DATA of each payload, then END."""
    writer = f.FrameWriter(SEED, compress=compress)
    out = [b"".join(map(bytes, writer.data(payload))) for payload in payloads]
    return b"".join([*out, *writer.end()])


def oracle(payload: bytes) -> int:
    """The checksum by an implementation of another's."""
    whole = len(payload) // PAGE * PAGE
    joined = b"".join(
        xxhash.xxh3_128_intdigest(payload[at : at + PAGE], SEED).to_bytes(16, "little")
        for at in range(0, whole, PAGE)
    )
    return int(xxhash.xxh64_intdigest(joined + payload[whole:], SEED))


def test_golden_hello() -> None:
    assert f.encode_hello(HELLO) == bytes.fromhex(GOLDEN_HELLO)
    assert f.decode_hello(bytes.fromhex(GOLDEN_HELLO), f.HelloRole.CONNECTING) == HELLO


def test_golden_frames() -> None:
    writer = f.FrameWriter(SEED)
    made = [
        writer.data(b"QEVM\0\0\0\3"),
        writer.end(),
        writer.done(f.Totals(12, 1)),
        writer.reset("source: gone"),
    ]
    golden = bytes.fromhex(GOLDEN_FRAMES)
    assert b"".join(b"".join(map(bytes, frame)) for frame in made) == golden
    reader = reader_of(golden)
    data, end, done, reset = (reader.next_frame() for _ in range(4))
    assert (data.kind, bytes(data.payload)) == (f.FrameKind.DATA, b"QEVM\0\0\0\3")
    assert end.totals() == f.Totals(8, 1) == reader.totals
    assert done.totals() == f.Totals(12, 1)
    assert reset.reason() == "source: gone"


@pytest.mark.parametrize("nbytes", [1, 100, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE + 17, 256 << 10])
def test_payload_check_is_what_the_document_says(nbytes: int) -> None:
    payload = random.Random(nbytes).randbytes(nbytes)
    assert f.payload_check(payload, SEED) == oracle(payload)


@given(st.lists(st.binary(min_size=1, max_size=3 * PAGE), max_size=6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_what_was_written_is_read(payloads: list[bytes], compress: bool) -> None:
    payloads = [payload * (1 + len(payload) % 5) for payload in payloads]
    reader = reader_of(written(*payloads, compress=compress))
    for payload in payloads:
        frame = reader.next_frame()
        assert frame.kind is f.FrameKind.DATA and bytes(frame.payload) == payload
    end = reader.next_frame()
    assert end.kind is f.FrameKind.END and end.totals() == reader.totals
    assert reader.totals == f.Totals(sum(map(len, payloads)), len(payloads))


def test_compression_is_used_where_it_helps() -> None:
    text, noise, short = b"page " * 9000, random.Random(1).randbytes(45000), b"request"
    sizes = [len(frame) for frame in frames_of(written(text, noise, short, compress=True))]
    assert sizes[0] < len(text) // 10
    assert sizes[1:3] == [len(noise) + f.HEADER_BYTES, len(short) + f.HEADER_BYTES]


def expect(reader: f.FrameReader, payloads: list[bytes]) -> None:
    """These as DATA, and then END."""
    for payload in payloads:
        assert bytes(reader.next_frame().payload) == payload
    assert reader.next_frame().kind is f.FrameKind.END


@given(st.data(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_no_flipped_bit_gets_through(data: st.DataObject, compress: bool) -> None:
    payloads = [b"text " * 500, random.Random(2).randbytes(5000), b"x"]
    whole = bytearray(written(*payloads, compress=compress))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    reader = reader_of(bytes(whole))
    with pytest.raises(f.DamageError, match=r"^frame \d"):
        expect(reader, payloads)


def meddled(change: Callable[[list[bytes]], None]) -> bytes:
    frames = frames_of(written(b"one", b"two", b"three"))
    change(frames)
    return b"".join(frames)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("missing", lambda frames: frames.pop(1), "frame 1 is missing: received frame 2"),
        ("repeated", lambda frames: frames.insert(1, frames[0]), "frame 0 is repeated"),
        ("swapped", lambda frames: frames.insert(0, frames.pop(1)), "frame 0 is missing"),
        ("first lost", lambda frames: frames.pop(0), "frame 0 is missing"),
        (
            "payload of another frame",
            lambda frames: frames.insert(0, frames.pop(0)[:40] + frames[0][40:43]),
            "frame 0: the payload of 3 bytes is damaged",
        ),
        ("garbage", lambda frames: frames.insert(0, b"\xff" * 40), "frame 0: its header is damag"),
    ],
)
def test_frames_out_of_place_are_named(
    name: str, change: Callable[[list[bytes]], None], message: str
) -> None:
    reader = reader_of(meddled(change))
    with pytest.raises(f.DamageError, match=message):
        expect(reader, [b"one", b"two", b"three"])


def test_frames_of_another_connection_or_direction_are_refused() -> None:
    for seed in (SEED + 1, f.frame_seed(TOKEN, f.HelloRole.LISTENING)):
        with pytest.raises(f.DamageError, match="its header is damaged"):
            reader_of(written(b"data"), seed).next_frame()


def forged(
    kind: int = 1,
    flags: int = 0,
    *,
    wire: bytes = b"x",
    raw_bytes: int | None = None,
    mark: int = 0,
) -> bytes:
    """A frame whose checksums are right and whose fields are not."""
    head = f.HEADER.pack(
        mark or f.MARK,
        kind,
        flags,
        0,
        0,
        len(wire),
        len(wire) if raw_bytes is None else raw_bytes,
        f.payload_check(wire, SEED),
    )
    return head + f.check_of(head, SEED).to_bytes(8, "little") + wire


BOMB = zstandard.ZstdCompressor().compress(bytes(8 << 20))


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (forged(mark=1), "received mark 0x1"),
        (forged(kind=0), "received kind 0"),
        (forged(kind=5), "received kind 5"),
        (forged(flags=2), "flags 0x2"),
        (forged(wire=b""), "received 0 bytes for 0, allowed 1 to 262144"),
        (forged(wire=bytes(f.MAX_FRAME_BYTES + 1)), "received 262145 bytes"),
        (forged(raw_bytes=2), "received 1 bytes for 2"),
        (forged(flags=1, raw_bytes=1 << 30), "allowed 1 to 262144"),
        (forged(flags=1, wire=BOMB, raw_bytes=f.MAX_FRAME_BYTES), "its zstd frame says 8388608"),
        (forged(flags=1, raw_bytes=2), "its zstd frame"),
    ],
)
def test_forged_fields_are_refused(frame: bytes, message: str) -> None:
    with pytest.raises(f.DamageError, match=message):
        reader_of(frame).next_frame()


def test_totals_of_a_wrong_length() -> None:
    with pytest.raises(f.DamageError, match="END: received 1 bytes, allowed 16"):
        reader_of(forged(kind=2)).next_frame().totals()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"QEVM\0\0\0\3" + data[8:], "received b'QEVM.*vmth relay with --peer"),
        (lambda data: data[:30] + b"\xff" + data[31:], "its checksum differs"),
        (lambda data: _rehashed(data, 8, 2), "received role 2, allowed 1"),
        (lambda data: _rehashed(data, 9, 0), "received status 0, allowed 1, 2"),
        (lambda data: _rehashed(data, 32, 0, 8), "received token 0"),
        (lambda data: _rehashed(data, 10, 2), "received versions 2 to 1, allowed 1 to 1"),
        (lambda data: _rehashed(data, 12, 0), "received versions 1 to 0"),
    ],
)
def test_hellos_are_checked(change: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(StreamError, match=message):
        f.check_hello(f.decode_hello(change(f.encode_hello(HELLO)), f.HelloRole.CONNECTING))


def _rehashed(data: bytes, at: int, value: int, nbytes: int = 1) -> bytes:
    head = data[:at] + value.to_bytes(nbytes, "little") + data[at + nbytes : 56]
    return head + f.check_of(head, 0).to_bytes(8, "little")


def test_without_zstandard(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = written(b"text " * 1000, compress=True)
    monkeypatch.setattr(f, "zstandard", None)
    with pytest.raises(UsageError, match="not installed"):
        f.FrameWriter(SEED, compress=True)
    with pytest.raises(f.DamageError, match="frame 0 is compressed: zstandard is not installed"):
        reader_of(packed).next_frame()
