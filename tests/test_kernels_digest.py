# SPDX-License-Identifier: Apache-2.0
"""The memory digest against a reference in Python integers, written from docs/digest.md."""

import numpy as np
import pytest

from vmth import kernels

M64 = 2**64 - 1
C1, C2, C3, C4 = 0x6A09E667F3BCC909, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1


def rotl(value: int, bits: int) -> int:
    return (value << bits | value >> (64 - bits)) & M64


def fold(a: int, b: int) -> int:
    product = a * b
    return (product & M64) ^ product >> 64


def place_key(block: int, page: int) -> int:
    key = ((page ^ rotl(block, 40)) + C1) & M64
    key = (key ^ key >> 32) * C2 & M64
    key = (key ^ key >> 29) * C3 & M64
    return key ^ key >> 32


def mix(block: int, page: int, lo: int, hi: int) -> int:
    key = place_key(block, page)
    lo ^= key
    hi = (hi + fold(lo ^ C2, key ^ C4)) & M64
    lo = (lo + fold(hi ^ rotl(key, 32), C1)) & M64
    return hi << 64 | lo


def unmix(block: int, page: int, term: int) -> tuple[int, int]:
    key = place_key(block, page)
    lo, hi = term & M64, term >> 64
    lo = (lo - fold(hi ^ rotl(key, 32), C1)) & M64
    hi = (hi - fold(lo ^ C2, key ^ C4)) & M64
    return lo ^ key, hi


def value(digest: tuple[int, int, int]) -> int:
    return digest[1] << 64 | digest[0]


def test_digest_is_the_sum_of_the_mixed_hashes() -> None:
    rng = np.random.default_rng(1)
    table = rng.integers(0, 2**64, (100, 2), dtype=np.uint64)
    table[::7] = 0
    for block, page in ((0, 0), (3, 1 << 20), (4095, (1 << 40) - 100), (2**32 - 1, 2**64 - 100)):
        want, valid = 0, 0
        for i, (lo, hi) in enumerate(table.tolist()):
            if lo or hi:
                want += mix(block, page + i, lo, hi)
                valid += 1
        got = kernels.digest_of(block, page, table)
        assert value(got) == want % 2**128 and got[2] == valid


def test_golden_terms() -> None:
    """Both ends must agree on these values for ever; docs/digest.md has them too."""
    for (block, page, lo, hi), want in GOLDEN.items():
        got = kernels.digest_fill_of(block, page, 1, lo, hi)
        assert value(got) == want == mix(block, page, lo, hi)


def test_mix_can_be_undone() -> None:
    rng = np.random.default_rng(2)
    for _ in range(1000):
        block, page, lo, hi = (int(v) for v in rng.integers(0, 2**64, 4, dtype=np.uint64))
        block %= 4096
        term = value(kernels.digest_fill_of(block, page, 1, lo, hi))
        assert unmix(block, page, term) == (lo, hi)


def test_pages_that_change_places_show() -> None:
    rng = np.random.default_rng(3)
    hashes = rng.integers(0, 2**64, (2, 2), dtype=np.uint64)
    for hash_pair in (
        hashes,
        np.array([[1, 0], [2, 0]], np.uint64),
        np.array([[0, 1], [0, 2]], np.uint64),
    ):
        for page in [0, 1, 2**20, 2**40]:
            straight = value(kernels.digest_of(0, page, hash_pair))
            assert straight != value(kernels.digest_of(0, page, hash_pair[::-1].copy()))
            assert straight != value(kernels.digest_of(1, page, hash_pair))


def test_places_never_share_a_key() -> None:
    keys = {place_key(block, page) for block in range(64) for page in range(256)}
    assert len(keys) == 64 * 256


def test_a_fill_is_the_same_as_a_table_of_one_hash() -> None:
    table = np.full((50, 2), 7, dtype=np.uint64)
    assert kernels.digest_fill_of(2, 30, 50, 7, 7) == kernels.digest_of(2, 30, table)
    assert kernels.digest_fill_of(2, 30, 50, 0, 0) == (0, 0, 0)
    assert kernels.digest_of(2, 30, table[:0]) == (0, 0, 0)


def test_every_input_bit_changes_about_half_of_the_term() -> None:
    rng = np.random.default_rng(4)
    flipped = []
    for _ in range(20):
        page, lo, hi = (int(v) for v in rng.integers(0, 2**40, 3, dtype=np.uint64))
        before = value(kernels.digest_fill_of(1, page, 1, lo, hi))
        for bit in range(40):
            after = value(kernels.digest_fill_of(1, page ^ 1 << bit, 1, lo, hi))
            flipped.append((before ^ after).bit_count())
    assert 60 < np.mean(flipped) < 68 and min(flipped) > 20


def test_digests_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="columns"):
        kernels.digest_of(0, 0, np.zeros((2, 3), dtype=np.uint64))
    with pytest.raises(OverflowError):
        kernels.digest_of(2**32, 0, np.zeros((2, 2), dtype=np.uint64))


GOLDEN = {
    (0, 0, 1, 0): 0xCF2B1EC8F235A2CF4CD3024402483E15,
    (0, 1, 1, 0): 0x6671990716BF8E61C2682C48CFD92FE9,
    (1, 0, 1, 0): 0x2A0C85F2FC1AFDE360846A67E3D8BFFE,
    (5, 123456789, 0x0123456789ABCDEF, 0xFEDCBA9876543210): 0xB5565FBA31E7D4E27108A106C9585547,
    (4095, (1 << 40) - 1, 2**64 - 1, 2**64 - 1): 0xEB9A2C3CDB5EB67F0FD5E822635F645E,
}
