# SPDX-License-Identifier: Apache-2.0
"""Forms on buffers: zstd frames against python-zstandard, deltas against their definition."""

import os
from contextlib import suppress

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import each_kernel

from vmth.codec import (
    MAX_LEVEL,
    MIN_LEVEL,
    Codec,
    ContentIndex,
    apply_delta,
    encode_delta,
    promising,
)
from vmth.errors import StreamError, UsageError

PAGE = 4096
TEXT = (b"The page lands in guest memory, and is hashed there. " * 400)[: 4 * PAGE]
#: docs/protocol.md has this delta, csrc/tests/test_delta.c as well.
GOLDEN_DELTA = bytes.fromhex("0001aa c701 04 1011ca12 b21e 01 ff")

delta_kernel = each_kernel("delta")


def numbers(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def delta_by_definition(base: bytes, now: bytes) -> bytes:
    changed = [at for at in range(len(now)) if base[at] != now[at]]
    runs: list[list[int]] = []
    for at in changed:
        if runs and at - runs[-1][1] < 3:
            runs[-1][1] = at + 1
        else:
            runs.append([at, at + 1])
    out, last = b"", 0
    for start, end in runs:
        out += numbers(start - last) + numbers(end - start) + now[start:end]
        last = end
    return out


def golden_pages() -> tuple[bytes, bytes]:
    base = bytes(at & 255 for at in range(PAGE))
    now = bytearray(base)
    now[0], now[200:202], now[203], now[4094] = 0xAA, b"\x10\x11", 0x12, 0xFF
    return base, bytes(now)


def test_golden_delta() -> None:
    base, now = golden_pages()
    assert encode_delta(base, now) == GOLDEN_DELTA == delta_by_definition(base, now)
    page = bytearray(base)
    apply_delta(page, GOLDEN_DELTA)
    assert page == now


CHANGES = st.lists(
    st.tuples(st.integers(0, 4 * PAGE - 1), st.binary(min_size=1, max_size=70)), max_size=60
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES, big=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_any_change_there_and_back(
    delta_kernel: str, changes: list[tuple[int, bytes]], big: bool, seed: int
) -> None:
    size = 4 * PAGE if big else PAGE
    base = np.random.default_rng(seed).bytes(size)
    now = bytearray(base)
    for at, content in changes:
        at %= size
        now[at : at + len(content)] = content[: size - at]
    delta = encode_delta(base, now, 2 * size)
    assert delta == delta_by_definition(base, bytes(now))
    assert encode_delta(base, now, len(delta)) == delta
    assert not delta or encode_delta(base, now, len(delta) - 1) is None
    page = bytearray(base)
    apply_delta(page, delta)
    assert page == now


@settings(max_examples=60)
@given(delta=st.binary(max_size=200))
def test_any_bytes_are_a_delta_or_refused(delta: bytes) -> None:
    page = bytearray(PAGE)
    with suppress(StreamError):
        apply_delta(page, delta)
    assert len(page) == PAGE


def test_a_refused_delta_is_named() -> None:
    with pytest.raises(StreamError, match="3 bytes are no delta of a page of 4096"):
        apply_delta(bytearray(PAGE), bytes.fromhex("000311"))


def test_sizes_of_deltas() -> None:
    with pytest.raises(UsageError, match="2048"):
        encode_delta(bytes(2048), bytes(2048))
    with pytest.raises(UsageError, match="a base of 4096 bytes for a page of 8192"):
        encode_delta(bytes(4096), bytes(8192))


@pytest.mark.parametrize("level", [MIN_LEVEL, 1, 3, 12, MAX_LEVEL])
def test_frames_are_those_of_zstandard(level: int) -> None:
    codec = Codec()
    frame = codec.compress(TEXT, level)
    assert frame is not None and len(frame) < len(TEXT) // 4
    assert zstandard.get_frame_parameters(frame).content_size == len(TEXT)
    assert zstandard.ZstdDecompressor().decompress(frame) == TEXT
    theirs = zstandard.ZstdCompressor(level=level).compress(TEXT)
    assert codec.decompress(theirs, len(TEXT)) == TEXT
    assert codec.held_bytes > 0


@settings(max_examples=30)
@given(
    content=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=30),
    seed=st.integers(0, 2**32 - 1),
    level=st.sampled_from([-3, 1, 5]),
)
def test_any_pages_there_and_back(content: list[bytes], seed: int, level: int) -> None:
    generator = np.random.default_rng(seed)
    pieces = [content[at] for at in generator.integers(0, len(content), 4 * PAGE)]
    pages = b"".join(pieces)[: 4 * PAGE]
    codec = Codec()
    frame = codec.compress(pages, level)
    if frame is not None:
        assert codec.decompress(frame, len(pages)) == pages


def test_what_does_not_fit_is_not_compressed() -> None:
    codec = Codec()
    assert codec.compress(os.urandom(PAGE), 1) is None
    assert codec.compress(TEXT, 1, 10) is None
    assert codec.compress(TEXT, 1, 0) is None
    assert codec.compress(b"", 1) is None
    for level in (0, MIN_LEVEL - 1, MAX_LEVEL + 1):
        with pytest.raises(UsageError, match=f"level {level}: allowed are -10 to 19"):
            codec.compress(TEXT, level)


def test_a_frame_must_be_one_and_whole() -> None:
    codec = Codec()
    frame = codec.compress(TEXT, 1)
    assert frame is not None
    streamed = zstandard.ZstdCompressor(write_content_size=False).compress(TEXT)
    skippable = bytes.fromhex("502a4d18 04000000 00000000")
    for bad in (frame[:-1], frame + b"\0", frame + frame, b"", streamed, skippable + frame):
        with pytest.raises(StreamError, match=f"not one zstd frame of {len(TEXT)} bytes"):
            codec.decompress(bad, len(TEXT))
    for wrong in (0, PAGE, len(TEXT) + PAGE):
        with pytest.raises(StreamError):
            codec.decompress(frame, wrong)
    assert codec.decompress(frame, len(TEXT)) == TEXT


def test_promising_pages() -> None:
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz0123456789", dtype=np.uint8)
    generator = np.random.default_rng(7)
    assert promising(TEXT[:PAGE])
    assert promising(bytes(generator.choice(letters, PAGE)))
    assert promising(generator.bytes(256) * 16)
    assert not promising(generator.bytes(PAGE))
    random_pages = zstandard.ZstdCompressor().compress(bytes(generator.choice(letters, 8 * PAGE)))
    assert not promising(random_pages[100 : 100 + PAGE])
    with pytest.raises(UsageError, match="100 bytes are no page"):
        promising(bytes(100))


@settings(max_examples=30)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["insert", "forget"]), st.integers(0, 40), st.integers(0, 5)),
        max_size=120,
    )
)
def test_the_index_is_lossy_but_never_wrong(steps: list[tuple[str, int, int]]) -> None:
    index = ContentIndex(512)  # 32 entries for 41 contents
    told: dict[int, tuple[int, int]] = {}
    for what, number, page in steps:
        content = (number * 0x9E3779B97F4A7C15 % 2**64, number + 1)
        place = index.find(content)
        assert place is None or place == told[number]
        if what == "insert":
            index.insert(content, number % 3, page)
            if place is None:
                told[number] = (number % 3, page)
            assert index.find(content) == told[number]
        elif place is not None:
            index.forget(content, *place)
            assert index.find(content) is None
            del told[number]


def test_index_sizes() -> None:
    with pytest.raises(UsageError, match="63 bytes, at least 64"):
        ContentIndex(63)
