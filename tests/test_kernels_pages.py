# SPDX-License-Identifier: Apache-2.0
"""Zero pages, page hashes and the checksum against NumPy and xxhash, for every implementation."""

import numpy as np
import pytest
import xxhash
from kernel_cases import PAGE_SIZES, U8, U64, aligned, bits_of, each_kernel

from vmth import kernels

zero_kernel = each_kernel("zero")
hash_kernel = each_kernel("hash")

SEEDS = [0, 1, 0x9E3779B97F4A7C15, 2**64 - 1]


def oracle_hashes(pages: U8, page_bytes: int, seed: int) -> U64:
    values = [
        xxhash.xxh3_128_intdigest(page.tobytes(), seed) for page in pages.reshape(-1, page_bytes)
    ]
    return np.array([(v & (2**64 - 1), v >> 64) for v in values], dtype=np.uint64).reshape(-1, 2)


def hashes(pages: U8, page_bytes: int, seed: int) -> U64:
    out = np.zeros((len(pages) // page_bytes, 2), dtype=np.uint64)
    kernels.page_hash(pages, page_bytes, seed, out)
    return out


def test_zero_at_every_length_and_alignment(zero_kernel: str) -> None:
    for offset in range(64):
        for nbytes in range(0, 1024 + 64, 64):
            data = aligned(nbytes, offset)
            assert kernels.is_zero(data)


def test_one_byte_at_every_position(zero_kernel: str) -> None:
    for offset in (0, 1, 17, 63):
        data = aligned(1088, offset)
        for position in range(len(data)):
            data[position] = 1 << (position % 8)
            assert not kernels.is_zero(data), (offset, position)
            data[position] = 0


def test_bytes_around_do_not_count(zero_kernel: str) -> None:
    for offset in range(64):
        memory = np.full(4096 + 192, 0xFF, dtype=np.uint8)
        data = memory[64 + offset : 64 + offset + 4096]
        data[:] = 0
        assert kernels.is_zero(data)


@pytest.mark.parametrize("page_bytes", PAGE_SIZES)
def test_zero_scan_and_partition(zero_kernel: str, page_bytes: int) -> None:
    npages = 70 if page_bytes <= 16384 else 3
    rng = np.random.default_rng(page_bytes)
    pages = aligned(npages * page_bytes, 8)
    want = rng.random(npages) < 0.5
    for page in np.flatnonzero(~want):
        pages[page * page_bytes + int(rng.integers(page_bytes))] = 1
    words, nzero = kernels.zero_scan(pages, page_bytes)
    assert nzero == want.sum()
    assert (bits_of(words, npages) == want).all()
    assert not bits_of(words, 64 * len(words))[npages:].any()

    ids = rng.permutation(npages).astype(np.uint64)
    before = ids.copy()
    nnormal = kernels.zero_partition(pages, page_bytes, ids)
    assert nnormal == npages - nzero
    assert (ids[:nnormal] == before[~want[before]]).all()
    assert (ids[nnormal:] == before[want[before]]).all()


@pytest.mark.parametrize("page_bytes", PAGE_SIZES)
def test_page_hash_is_xxh3_128(hash_kernel: str, page_bytes: int) -> None:
    npages = 3 if page_bytes <= 65536 else 1
    pages = aligned(npages * page_bytes, 0)
    pages[:] = np.random.default_rng(page_bytes).integers(0, 256, len(pages), dtype=np.uint8)
    for seed in SEEDS:
        assert (hashes(pages, page_bytes, seed) == oracle_hashes(pages, page_bytes, seed)).all()


def test_page_hash_at_every_alignment(hash_kernel: str) -> None:
    content = np.random.default_rng(2).integers(0, 256, 8192, dtype=np.uint8)
    want = oracle_hashes(content, 4096, 5)
    for offset in range(64):
        pages = aligned(8192, offset)
        pages[:] = content
        assert (hashes(pages, 4096, 5) == want).all(), offset


def test_every_byte_of_a_page_counts(hash_kernel: str) -> None:
    page = np.random.default_rng(3).integers(0, 256, 4096, dtype=np.uint8)
    seen = {tuple(hashes(page, 4096, 1)[0])}
    for position in range(4096):
        page[position] ^= 1 << (position % 8)
        seen.add(tuple(hashes(page, 4096, 1)[0]))
        page[position] ^= 1 << (position % 8)
    assert len(seen) == 4097


@pytest.mark.parametrize("page_bytes", [4096, 8192, 65536, 2 << 20])
def test_fused_equals_the_two_alone(hash_kernel: str, page_bytes: int) -> None:
    """Zero prefixes of every kind: none, within a block, whole blocks, all but the end."""
    prefixes = [0, 1, 63, 64, 256, 1000, 1024, 1025, 3071, 3072, page_bytes - 1, page_bytes]
    pages = aligned(len(prefixes) * page_bytes, 0)
    rng = np.random.default_rng(page_bytes)
    for i, prefix in enumerate(prefixes):
        rest = pages[i * page_bytes + prefix : (i + 1) * page_bytes]
        rest[:] = rng.integers(1, 256, len(rest), dtype=np.uint8)
    for zero_name in kernels.kernels()["zero"]:
        kernels.select("zero", zero_name)
        out = np.zeros((len(prefixes), 2), dtype=np.uint64)
        words, nzero = kernels.page_hash_zero(pages, page_bytes, 9, out)
        assert (out == oracle_hashes(pages, page_bytes, 9)).all(), zero_name
        assert nzero == 1 and words.tolist() == [1 << (len(prefixes) - 1)]
    kernels.select("zero", kernels.kernels()["zero"][0])


def test_fused_marks_many_pages(hash_kernel: str) -> None:
    npages = 130
    pages = aligned(npages * 4096, 0)
    want = np.random.default_rng(1).random(npages) < 0.5
    pages.reshape(npages, 4096)[~want, 77] = 1
    out = np.zeros((npages, 2), dtype=np.uint64)
    words, nzero = kernels.page_hash_zero(pages, 4096, 3, out)
    assert nzero == want.sum() and (bits_of(words, npages) == want).all()
    assert (out == oracle_hashes(pages, 4096, 3)).all()


def test_golden_hashes(hash_kernel: str) -> None:
    """Both ends of a migration, of any build, must agree on these values for ever."""
    index = np.arange(65536, dtype=np.uint64)
    content = (
        (index * np.uint64(31) + (index >> np.uint64(8)) * np.uint64(17)) & np.uint64(255)
    ).astype(np.uint8)
    golden = {
        (4096, 0): (0xD98C68F2019713DD, 0xED994646A8B27883),
        (4096, 0x9E3779B97F4A7C15): (0x8B7EC95DBB47CF69, 0x711260E3FB5DAB9D),
        (65536, 0): (0x8BC557B383829BDF, 0xD50EEEB42D0351C7),
        (65536, 0x9E3779B97F4A7C15): (0x061B542F105C9387, 0x7839A71FA5EB8874),
    }
    for (page_bytes, seed), want in golden.items():
        got = hashes(content[:page_bytes], page_bytes, seed)[0]
        assert (int(got[0]), int(got[1])) == want


def test_checksum_is_xxh64_at_every_length() -> None:
    data = np.random.default_rng(4).integers(0, 256, 300, dtype=np.uint8)
    for length in range(300):
        for seed in SEEDS:
            want = xxhash.xxh64_intdigest(data[:length].tobytes(), seed)
            assert kernels.checksum64(data[:length], seed) == want


@pytest.mark.parametrize("page_bytes", [0, 1, 2048, 4095, 4097, 6144, 4 << 20, -4096])
def test_page_sizes_outside_the_range_are_refused(page_bytes: int) -> None:
    pages = np.zeros(8192, dtype=np.uint8)
    out = np.zeros((2, 2), dtype=np.uint64)
    with pytest.raises(ValueError, match="page size"):
        kernels.zero_scan(pages, page_bytes)
    with pytest.raises(ValueError, match="page size"):
        kernels.page_hash(pages, page_bytes, 0, out)
    with pytest.raises(ValueError, match="page size"):
        kernels.page_hash_zero(pages, page_bytes, 0, out)
    with pytest.raises(ValueError, match="page size"):
        kernels.zero_partition(pages, page_bytes, np.zeros(1, dtype=np.uint64))


def test_shapes_that_do_not_fit_are_refused() -> None:
    pages = np.zeros(8192, dtype=np.uint8)
    with pytest.raises(ValueError, match="whole number"):
        kernels.zero_scan(pages[:-1], 4096)
    with pytest.raises(ValueError, match="rows"):
        kernels.page_hash(pages, 4096, 0, np.zeros((1, 2), dtype=np.uint64))
    with pytest.raises(ValueError, match="columns"):
        kernels.page_hash(pages, 4096, 0, np.zeros((2, 3), dtype=np.uint64))
    with pytest.raises(ValueError, match="outside"):
        kernels.zero_partition(pages, 4096, np.array([0, 2], dtype=np.uint64))
    with pytest.raises(ValueError, match="64"):
        kernels.is_zero(pages[:65])


def test_nothing_is_no_error() -> None:
    none = np.zeros(0, dtype=np.uint8)
    out = np.zeros((0, 2), dtype=np.uint64)
    kernels.page_hash(none, 4096, 0, out)
    words, nzero = kernels.page_hash_zero(none, 4096, 0, out)
    assert len(words) == 0 and nzero == 0
    assert kernels.zero_partition(none, 4096, np.zeros(0, dtype=np.uint64)) == 0
    assert kernels.is_zero(none)
