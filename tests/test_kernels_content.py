# SPDX-License-Identifier: Apache-2.0
"""The content hash against hashlib, for every implementation."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import PAGE_SIZES, U8, aligned, each_kernel

from vmth import kernels

content_kernel = each_kernel("content")

KEY = bytes(range(32))


def oracle(pages: U8, page_bytes: int, key: bytes) -> list[bytes]:
    return [
        hashlib.blake2b(page.tobytes(), digest_size=16, key=key).digest()
        for page in pages.reshape(-1, page_bytes)
    ]


def digests(pages: U8, page_bytes: int, key: bytes) -> list[bytes]:
    out = np.zeros((len(pages) // page_bytes, 2), dtype=np.uint64)
    kernels.content_hash(pages, page_bytes, key, out)
    return [row.tobytes() for row in out]


def random_pages(nbytes: int, seed: int, offset: int = 0) -> U8:
    pages = aligned(nbytes, offset)
    pages[:] = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)
    return pages


@pytest.mark.parametrize("page_bytes", PAGE_SIZES)
def test_it_is_keyed_blake2b(content_kernel: str, page_bytes: int) -> None:
    pages = random_pages((9 if page_bytes <= 65536 else 2) * page_bytes, page_bytes)
    assert digests(pages, page_bytes, KEY) == oracle(pages, page_bytes, KEY)


def test_every_number_of_pages(content_kernel: str) -> None:
    """Full lanes, lanes that stay empty, and more than one native call takes at once."""
    pages = random_pages(131 * 4096, 1)
    want = oracle(pages, 4096, KEY)
    for npages in [*range(20), *range(60, 70), 127, 128, 129, 131]:
        assert digests(pages[: npages * 4096], 4096, KEY) == want[:npages], npages


def test_every_alignment(content_kernel: str) -> None:
    want = oracle(random_pages(5 * 4096, 2), 4096, KEY)
    for offset in range(64):
        assert digests(random_pages(5 * 4096, 2, offset), 4096, KEY) == want, offset


def test_every_byte_of_a_page_and_of_the_key_counts(content_kernel: str) -> None:
    page = random_pages(4096, 3)
    seen = {digests(page, 4096, KEY)[0]}
    for position in range(4096):
        page[position] ^= 1 << (position % 8)
        seen.add(digests(page, 4096, KEY)[0])
        page[position] ^= 1 << (position % 8)
    for position in range(32):
        key = bytearray(KEY)
        key[position] ^= 1 << (position % 8)
        seen.add(digests(page, 4096, bytes(key))[0])
    assert len(seen) == 1 + 4096 + 32


@given(
    key=st.binary(min_size=32, max_size=32), seed=st.integers(0, 2**32), npages=st.integers(1, 9)
)
def test_any_key_and_content(key: bytes, seed: int, npages: int) -> None:
    pages = random_pages(npages * 4096, seed)
    want = oracle(pages, 4096, key)
    default = kernels.kernels()["content"][0]
    for name in kernels.kernels()["content"]:
        kernels.select("content", name)
        assert digests(pages, 4096, key) == want, name
    kernels.select("content", default)


def test_golden(content_kernel: str) -> None:
    """Both ends of a migration and every index on a disk must agree on these for ever."""
    index = np.arange(65536, dtype=np.uint64)
    content = (
        (index * np.uint64(31) + (index >> np.uint64(8)) * np.uint64(17)) & np.uint64(255)
    ).astype(np.uint8)
    golden = {
        (4096, bytes(32)): "90336561bcded5b7446fd3a3db00b1ac",
        (4096, KEY): "f3c5faa6b4c4c5e9783628722dba8cb7",
        (65536, KEY): "a21d7c90d3064de3d8ab72294d0a6e75",
    }
    for (page_bytes, key), want in golden.items():
        assert digests(content[:page_bytes], page_bytes, key)[0].hex() == want


def test_what_does_not_fit_is_refused() -> None:
    pages = np.zeros(8192, dtype=np.uint8)
    out = np.zeros((2, 2), dtype=np.uint64)
    for page_bytes in (0, 1, 2048, 4097, 4 << 20, -4096):
        with pytest.raises(ValueError, match="page size"):
            kernels.content_hash(pages, page_bytes, KEY, out)
    for key in (b"", KEY[:-1], KEY + b"x"):
        with pytest.raises(ValueError, match=f"32 bytes, not {len(key)}"):
            kernels.content_hash(pages, 4096, key, out)
    with pytest.raises(ValueError, match="rows"):
        kernels.content_hash(pages, 4096, KEY, out[:1])
    assert not out.any()
