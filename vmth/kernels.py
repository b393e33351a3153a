# SPDX-License-Identifier: Apache-2.0
"""The native kernels on NumPy arrays: bitmaps, zero pages, page hashes, the memory digest.

Units: bitmaps are ``uint64`` words, LSB first, bit b of word w is page 64 * w + b; page sizes are
bytes, powers of two from 4096 to 2 MiB; hashes are ``uint64`` pairs (lo, hi), (0, 0) marks a page
without a valid hash. Buffers are C-contiguous, belong to the caller and are not kept.

Threads: every function releases the GIL; calls on different buffers may run at once, and so may
calls that only read. Errors: ``UsageError`` for an unknown kernel, ``ValueError`` for a size, page
or shape that does not fit the buffer, ``OverflowError`` for an integer outside its C type; then
nothing has been written.

Each kernel family (``kernels()``) has several implementations with one answer. The environment
variable ``VMTH_KERNEL`` ("hash=avx2,zero=scalar"), read when this module is imported, demands one:
an implementation that cannot run here raises ``UsageError``, it is never replaced in silence.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from vmth._native import _codec, _kernels, _xfer
from vmth.errors import UsageError

__all__ = [
    "bitmap_clear_range",
    "bitmap_count",
    "bitmap_fetch_and_clear",
    "bitmap_from_bytes",
    "bitmap_merge",
    "bitmap_runs",
    "bitmap_set_range",
    "bitmap_to_bytes",
    "checksum64",
    "content_hash",
    "digest_fill_of",
    "digest_of",
    "is_zero",
    "kernels",
    "page_hash",
    "page_hash_zero",
    "select",
    "select_all",
    "selected",
    "zero_partition",
    "zero_scan",
]

U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]


def bitmap_count(words: U64, page: int, npages: int) -> int:
    """Set bits among pages [page, page + npages)."""
    return _kernels.bitmap_count(words, page, npages)


def bitmap_merge(into: U64, other: U64, npages: int) -> int:
    """``into |= other`` for the first ``npages`` bits; returns how many became set."""
    return _kernels.bitmap_merge(into, other, npages)


def bitmap_fetch_and_clear(live: U64, into: U64, npages: int) -> int:
    """``into |= live; live = 0``, each word exchanged atomically: a writer that sets bits in
    ``live`` with atomic OR meanwhile loses none. Returns the bits fetched.
    """
    return _kernels.bitmap_fetch_and_clear(live, into, npages)


def bitmap_set_range(words: U64, page: int, npages: int) -> None:
    """Set the bits of pages [page, page + npages)."""
    _kernels.bitmap_set_range(words, page, npages)


def bitmap_clear_range(words: U64, page: int, npages: int) -> None:
    """Clear the bits of pages [page, page + npages)."""
    _kernels.bitmap_clear_range(words, page, npages)


def bitmap_runs(words: U64, npages: int, start: int, out: U64) -> tuple[int, int]:
    """Write the runs of set bits from page ``start`` on into ``out``: rows {page, npages}.

    Returns (runs written, first page not examined); the second is ``npages`` when done, else pass
    it as ``start`` of the next call. A run that meets the end of the room is left for that call
    whole. Rows of ``out`` past those written hold nothing of meaning.
    """
    return _kernels.bitmap_runs(words, npages, start, out)


def bitmap_from_bytes(words: U64, data: bytes, npages: int) -> None:
    """Little-endian bytes (QEMU's received bitmap, our wire) into the first ``npages`` bits."""
    _kernels.bitmap_from_bytes(words, data, npages)


def bitmap_to_bytes(words: U64, npages: int) -> bytes:
    """The first ``npages`` bits as (npages + 7) // 8 little-endian bytes."""
    return _kernels.bitmap_to_bytes(words, npages)


def is_zero(data: U8) -> bool:
    """Whether all bytes are zero; the length is a multiple of 64."""
    return _kernels.is_zero(data)


def zero_scan(pages: U8, page_bytes: int) -> tuple[U64, int]:
    """(bitmap of the pages that are zero, their number)."""
    return _kernels.zero_scan(pages, page_bytes)


def zero_partition(memory: U8, page_bytes: int, ids: U64) -> int:
    """Reorder the page numbers ``ids`` in place: normal pages first, zero pages after, each in
    their order. Returns the number of normal pages.
    """
    return _kernels.zero_partition(memory, page_bytes, ids)


def page_hash(pages: U8, page_bytes: int, seed: int, out: U64) -> None:
    """XXH3-128 with ``seed`` of each page into ``out``, shape (npages, 2): lo, hi."""
    _kernels.page_hash(pages, page_bytes, seed, out)


def page_hash_zero(pages: U8, page_bytes: int, seed: int, out: U64) -> tuple[U64, int]:
    """``page_hash`` and ``zero_scan`` in one pass over memory; returns what ``zero_scan`` does."""
    return _kernels.page_hash_zero(pages, page_bytes, seed, out)


def content_hash(pages: U8, page_bytes: int, key: bytes, out: U64) -> None:
    """BLAKE2b with a 16-byte digest and the 32-byte ``key`` of each page into ``out``, shape
    (npages, 2): the memory of a row is the digest, as ``hashlib.blake2b`` returns it.
    """
    _kernels.content_hash(pages, page_bytes, key, out)


def checksum64(data: U8, seed: int) -> int:
    """XXH64 of any bytes: the checksum of packet headers and descriptors."""
    return _kernels.checksum64(data, seed)


def digest_of(block: int, page: int, table: U64) -> tuple[int, int, int]:
    """The digest (lo, hi, valid pages) of pages [page, page + len(table)) with these hashes."""
    return _kernels.digest_of(block, page, table)


def digest_fill_of(block: int, page: int, npages: int, lo: int, hi: int) -> tuple[int, int, int]:
    """The digest of pages [page, page + npages) that all have the hash (lo, hi)."""
    return _kernels.digest_fill_of(block, page, npages, lo, hi)


def kernels() -> dict[str, list[str]]:
    """For each kernel family the implementations that this build and CPU can run, default first."""
    return _kernels.kernels()


def select(family: str, name: str) -> None:
    """Run implementation ``name`` for ``family`` from now on, here and in the page channels.

    Raises ``UsageError`` that tells apart an unknown family, an unknown name, one that is not in
    this build, and one that this CPU cannot run; then nothing has changed.
    """
    try:
        _kernels.select(family, name)
        # Their own copies of the same code on the same CPU: what went here goes there.
        _codec.select(family, name)
        _xfer.select_kernel(family, name)
    except (ValueError, _xfer.TransferError) as error:
        raise UsageError(str(error)) from None


def selected(family: str) -> str:
    """The implementation that ``family`` runs now. Raises ``UsageError`` for an unknown family."""
    try:
        return _kernels.selected(family)
    except ValueError as error:
        raise UsageError(str(error)) from None


def select_all(demand: str) -> None:
    """Apply a demand like "hash=avx2,zero=scalar"; empty asks for nothing.

    Raises ``UsageError`` at the first part that cannot be met; parts before it are in force.
    """
    for part in filter(None, demand.split(",")):
        family, equals, name = part.partition("=")
        if not equals:
            raise UsageError(f"kernel demand {part!r}: write family=name, e.g. hash=scalar")
        select(family.strip(), name.strip())


select_all(os.environ.get("VMTH_KERNEL", ""))
