# SPDX-License-Identifier: Apache-2.0
"""The never-populated rule: which pages may hold something other than zeros, without touching any.

Ask *after* the write tracking of the range was armed: a page that was not populated then reads as
zeros, and whatever writes it later is reported as a write.

- Shared memory (``Mapping.fd`` on tmpfs or a memfd): a page is populated unless the file has a hole
  there (SEEK_DATA). The page table is not asked: a page written through another mapping or by
  ``pwrite`` is not in ours. Holes come in the file's folios, so neighbours of a written page may
  count as populated, and so may pages that were reserved (fallocate) but never written, and all of
  a file for which as much is allocated as it is long.
- Private anonymous memory (``Mapping.address``): populated if present or swapped. A page that maps
  the kernel's page of zeros was only read, so it is not populated. While a userfaultfd tracks the
  memory, an armed entry without a page looks like swap, and everything counts as populated:
  ``UffdWpSource.populated`` knows better.
- Any other mapping is always populated: a disk file, hugetlbfs, shared memory without its fd.
"""

from __future__ import annotations

import errno

from vmth._native import _kernels, _sys
from vmth.dirty.mappings import MappingKind, mapping_kind
from vmth.errors import UsageError
from vmth.guest import CanReportPopulated, Guest
from vmth.types import Bitmap, Mapping, RamBlock, bitmap_words, new_bitmaps

__all__ = ["check_range", "maybe_nonzero", "or_bits", "populated_bits"]


def maybe_nonzero(guest: Guest) -> list[Bitmap]:
    """A bitmap a block, with a bit set for each page that may hold something other than zeros: as
    the guest says, if it does, else as its mappings tell. Raises what ``populated_bits`` raises."""
    bitmaps = new_bitmaps(guest.blocks)
    for index, (block, bitmap) in enumerate(zip(guest.blocks, bitmaps, strict=True)):
        if isinstance(guest, CanReportPopulated):
            guest.populated(index, 0, block.npages, bitmap)
        elif block.mapping != Mapping():  # without memory here, nothing is known or left out
            populated_bits(block, 0, block.npages, bitmap)
    return bitmaps


def populated_bits(block: RamBlock, page: int, npages: int, out: Bitmap) -> None:
    """Set bit (page + i) of ``out``, a bitmap of the whole block, for every page i of
    [page, page + npages) that may hold something other than zeros; other bits stay.

    Touches no memory; on shared memory it moves the file position of the block's fd. Thread-safe
    for different ``out``. Raises UsageError for pages outside of the block or an address that is
    not mapped, OSError if the kernel does not answer (bits may then be missing: treat all pages as
    populated).
    """
    check_range(block, page, npages, out)
    if npages == 0:
        return
    mapping = block.mapping
    first = page * block.tracking_page_size
    if block.tracking_page_size != _sys.PAGE_BYTES:
        _kernels.bitmap_set_range(out, page, npages)
    elif mapping.fd is not None:
        if _sys.populated_file_is_exact(mapping.fd):
            _sys.populated_file(mapping.fd, mapping.offset + first, npages, out, page)
        else:
            _kernels.bitmap_set_range(out, page, npages)
    elif mapping.address is not None:
        _populated_address(block, mapping.address + first, page, npages, out)
    else:
        raise UsageError(f"ramblock {block.idstr!r}: neither fd nor address is set")


def _populated_address(block: RamBlock, address: int, page: int, npages: int, out: Bitmap) -> None:
    kind = mapping_kind(address, npages * _sys.PAGE_BYTES)
    if kind is MappingKind.UNMAPPED:
        raise UsageError(f"ramblock {block.idstr!r}: {address:#x} is {kind.value}")
    if kind is not MappingKind.PRIVATE_ANONYMOUS:
        _kernels.bitmap_set_range(out, page, npages)
        return
    try:
        _sys.populated_anon(address, npages, out, page)
    except OSError as error:
        if error.errno != errno.ENOTTY:  # Linux before 6.7: nothing is known
            raise
        _kernels.bitmap_set_range(out, page, npages)


def check_range(block: RamBlock, page: int, npages: int, bitmap: Bitmap) -> None:
    """Raise UsageError unless the pages lie in the block and the block's bits in the bitmap."""
    if page < 0 or npages < 0 or page + npages > block.npages:
        raise UsageError(
            f"ramblock {block.idstr!r}: pages [{page}, {page + npages}) of {block.npages}"
        )
    if len(bitmap) * 64 < block.npages:
        raise UsageError(
            f"ramblock {block.idstr!r}: {block.npages} pages, a bitmap of {len(bitmap) * 64} bits"
        )


def or_bits(out: Bitmap, bits: Bitmap, page: int, npages: int) -> None:
    """OR bits [page, page + npages) of one whole-block bitmap into another."""
    if npages > 0:
        words = slice(page // 64, bitmap_words(page + npages))
        part = bits[words].copy()
        _kernels.bitmap_clear_range(part, 0, page % 64)
        _kernels.bitmap_merge(out[words], part, page % 64 + npages)
