# SPDX-License-Identifier: Apache-2.0
"""Dirty bitmaps against NumPy, for every implementation."""

import threading

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import U64, bits_of, each_kernel, words_of

from vmth import kernels

bitmap_kernel = each_kernel("bitmap")

SIZES = [1, 2, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1000, 4096, 5001]
DENSITIES = [0.0, 0.01, 0.3, 0.5, 0.9, 0.99, 1.0]


def random_bits(npages: int, density: float, seed: int) -> npt.NDArray[np.bool_]:
    return np.random.default_rng(seed).random(npages) < density


def oracle_runs(bits: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], bits, [False])).astype(np.int8)))
    return [(int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def runs(words: U64, npages: int, start: int = 0, room: int = 64) -> list[tuple[int, int]]:
    """All runs through calls with ``room`` entries each."""
    out = np.empty((room, 2), dtype=np.uint64)
    found: list[tuple[int, int]] = []
    while True:
        n, resume = kernels.bitmap_runs(words, npages, start, out)
        found += [(int(page), int(length)) for page, length in out[:n]]
        if resume == npages:
            return found
        assert n == room and resume > start
        start = resume


@pytest.mark.parametrize("npages", SIZES)
def test_runs_are_those_of_numpy(bitmap_kernel: str, npages: int) -> None:
    for seed, density in enumerate(DENSITIES):
        bits = random_bits(npages, density, seed)
        words = words_of(bits)
        want = oracle_runs(bits)
        for room in (1, 2, 3, 33, 40, 300, 10_000):
            assert runs(words, npages, room=room) == want, (density, room)


@pytest.mark.parametrize("npages", SIZES)
def test_bits_past_the_end_are_ignored(bitmap_kernel: str, npages: int) -> None:
    words = np.full((npages + 63) // 64, 2**64 - 1, dtype=np.uint64)
    assert runs(words, npages) == [(0, npages)]
    assert kernels.bitmap_count(words, 0, npages) == npages
    into = np.zeros_like(words)
    assert kernels.bitmap_merge(into, words, npages) == npages
    assert bits_of(into, len(into) * 64).sum() == npages
    live = words.copy()
    fetched = np.zeros_like(words)
    assert kernels.bitmap_fetch_and_clear(live, fetched, npages) == npages
    assert not bits_of(live, npages).any()
    assert bits_of(live, len(live) * 64)[npages:].all()


def test_runs_from_every_start(bitmap_kernel: str) -> None:
    npages = 700
    bits = random_bits(npages, 0.4, 7)
    bits[60:330] = True  # a run over whole words
    words = words_of(bits)
    for start in range(0, npages + 1, 3):
        rest = bits.copy()
        rest[:start] = False
        assert runs(words, npages, start) == oracle_runs(rest), start


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 128, 200])
def test_one_run_at_every_position(bitmap_kernel: str, length: int) -> None:
    npages = 640
    for page in range(npages - length + 1):
        words = np.zeros(10, dtype=np.uint64)
        kernels.bitmap_set_range(words, page, length)
        assert runs(words, npages) == [(page, length)]
        assert kernels.bitmap_count(words, 0, npages) == length


def test_one_empty_page_at_every_position(bitmap_kernel: str) -> None:
    npages = 640
    for page in range(npages):
        words = np.full(10, 2**64 - 1, dtype=np.uint64)
        kernels.bitmap_clear_range(words, page, 1)
        want = [(0, page), (page + 1, npages - page - 1)]
        assert runs(words, npages) == [run for run in want if run[1]]


def test_alternating_bits_fill_the_room_exactly(bitmap_kernel: str) -> None:
    words = np.full(64, 0x5555555555555555, dtype=np.uint64)
    want = [(page, 1) for page in range(0, 4096, 2)]
    for room in (31, 32, 33, 34, 35, 36, 64, 280, 281, 2047, 2048, 2049):
        assert runs(words, 4096, room=room) == want, room


def test_counts_of_every_range(bitmap_kernel: str) -> None:
    bits = random_bits(300, 0.5, 3)
    words = words_of(bits)
    total = np.concatenate(([0], np.cumsum(bits)))
    for page in range(0, 301, 7):
        for npages in range(301 - page):
            want = total[page + npages] - total[page]
            assert kernels.bitmap_count(words, page, npages) == want


@pytest.mark.parametrize("nwords", [1, 3, 7, 8, 9, 15, 16, 17, 40, 100])
def test_merge_and_count_of_whole_words(bitmap_kernel: str, nwords: int) -> None:
    rng = np.random.default_rng(nwords)
    a = rng.integers(0, 2**64, nwords, dtype=np.uint64)
    b = rng.integers(0, 2**64, nwords, dtype=np.uint64)
    into = a.copy()
    added = kernels.bitmap_merge(into, b, 64 * nwords)
    assert (into == a | b).all()
    assert added == np.bitwise_count(b & ~a).sum()
    assert kernels.bitmap_count(into, 0, 64 * nwords) == np.bitwise_count(into).sum()


def test_ranges_against_numpy() -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        npages = int(rng.integers(1, 400))
        page = int(rng.integers(0, npages))
        length = int(rng.integers(0, npages - page + 1))
        bits = random_bits(npages, 0.5, int(rng.integers(2**32)))
        words = words_of(bits)
        kernels.bitmap_set_range(words, page, length)
        bits[page : page + length] = True
        assert (bits_of(words, npages) == bits).all()
        kernels.bitmap_clear_range(words, page, length // 2)
        bits[page : page + length // 2] = False
        assert (bits_of(words, npages) == bits).all()


def test_fetch_and_clear_moves_bits_once() -> None:
    live = words_of(random_bits(1000, 0.3, 1))
    into = words_of(random_bits(1000, 0.3, 2))
    before, want = live.copy(), live | into
    assert kernels.bitmap_fetch_and_clear(live, into, 1000) == np.bitwise_count(before).sum()
    assert (into == want).all() and not live.any()
    assert kernels.bitmap_fetch_and_clear(live, into, 1000) == 0


def test_two_fetchers_share_every_bit() -> None:
    """Each bit of the live bitmap goes to exactly one of two fetchers that run at once."""
    nwords = 1 << 14
    parts = [np.zeros(nwords, dtype=np.uint64) for _ in range(2)]
    live = np.full(nwords, 2**64 - 1, dtype=np.uint64)
    counts = [0, 0]

    def fetch(i: int) -> None:
        counts[i] = kernels.bitmap_fetch_and_clear(live, parts[i], 64 * nwords)

    threads = [threading.Thread(target=fetch, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == 64 * nwords
    assert not (parts[0] & parts[1]).any()
    assert ((parts[0] | parts[1]) == np.uint64(2**64 - 1)).all()


@settings(max_examples=30)
@given(bits=st.lists(st.booleans(), max_size=200))
def test_bytes_there_and_back(bits: list[bool]) -> None:
    array = np.array(bits, dtype=np.bool_)
    words = words_of(array)
    data = kernels.bitmap_to_bytes(words, len(bits))
    assert data == np.packbits(array, bitorder="little").tobytes()
    back = np.zeros_like(words)
    kernels.bitmap_from_bytes(back, data, len(bits))
    assert (back == words).all()


def test_bytes_leave_bits_past_the_end_alone() -> None:
    words = np.full(1, 2**64 - 1, dtype=np.uint64)
    kernels.bitmap_from_bytes(words, b"\0\0", 10)
    assert words[0] == 2**64 - 1 - 1023
    assert kernels.bitmap_to_bytes(np.full(1, 2**64 - 1, dtype=np.uint64), 10) == b"\xff\x03"


@pytest.mark.slow
def test_a_terabyte_guest_needs_bounded_room(bitmap_kernel: str) -> None:
    npages = 1 << 28
    words = np.zeros(npages // 64, dtype=np.uint64)
    want = [(0, 1), (63, 2), (12345, 1000), (npages // 2, 1 << 20), (npages - 1, 1)]
    for page, length in want:
        kernels.bitmap_set_range(words, page, length)
    assert runs(words, npages, room=2) == want


@pytest.mark.parametrize(
    ("npages", "start", "shape"),
    [
        (129, 0, (1, 2)),
        (-1, 0, (1, 2)),
        (128, 129, (1, 2)),
        (128, -1, (1, 2)),
        (128, 0, (0, 2)),
        (128, 0, (1, 3)),
    ],
)
def test_runs_refuse_what_does_not_fit(npages: int, start: int, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError):
        kernels.bitmap_runs(np.zeros(2, dtype=np.uint64), npages, start, np.zeros(shape, np.uint64))


def test_ranges_refuse_what_does_not_fit() -> None:
    words = np.zeros(2, dtype=np.uint64)
    for page, npages in ((0, 129), (128, 1), (-1, 1), (2**64, 1), (1, 2**64)):
        with pytest.raises(ValueError):
            kernels.bitmap_count(words, page, npages)
        with pytest.raises(ValueError):
            kernels.bitmap_set_range(words, page, npages)
        with pytest.raises(ValueError):
            kernels.bitmap_clear_range(words, page, npages)
    with pytest.raises(ValueError):
        kernels.bitmap_merge(words, np.zeros(1, dtype=np.uint64), 65)
    with pytest.raises(ValueError):
        kernels.bitmap_from_bytes(words, b"\0" * 8, 65)
    with pytest.raises(ValueError):
        kernels.bitmap_to_bytes(words, 129)
