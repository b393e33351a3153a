# SPDX-License-Identifier: Apache-2.0
"""The digest of all the memory that an image holds: of each page what was stored last.

That of docs/digest.md with seed 0, blocks numbered in the order of the stream's list: two images of
the same memory have the same digest. Pages that an image does not hold are not part of it.
"""

from __future__ import annotations

import numpy as np

from vmth import kernels
from vmth.errors import RefusedError
from vmth.qemu.image.frames import Frame, Hashes, zero_hash
from vmth.qemu.image.layout import End, damaged
from vmth.qemu.image.meta import Meta
from vmth.types import Bitmap, bitmap_words

__all__ = ["DigestTable", "FrameDigest", "digest_text"]

_MASK = (1 << 128) - 1


class _Digest:
    """A sum to which parts are added; parts are of different pages."""

    def __init__(self) -> None:
        self._sum = 0
        self.pages = 0

    def add(self, part: tuple[int, int, int]) -> None:
        lo, hi, pages = part
        self._sum = (self._sum + (hi << 64 | lo)) & _MASK
        self.pages += pages

    @property
    def value(self) -> tuple[int, int, int]:
        """(lo, hi, pages)"""
        return self._sum & (1 << 64) - 1, self._sum >> 64, self.pages


class DigestTable:
    """16 bytes and a bit a page: pages may come again, the last one counts. One thread."""

    def __init__(self, meta: Meta) -> None:
        sizes = [meta.npages(i) for i in range(len(meta.blocks))]
        try:
            # Untouched parts take no memory.
            self._tables: list[Hashes] = [np.zeros((n, 2), dtype=np.uint64) for n in sizes]
            self._seen: list[Bitmap] = [np.zeros(bitmap_words(n), dtype=np.uint64) for n in sizes]
        except MemoryError:
            raise RefusedError(
                f"no memory for the digest's table of {16 * sum(sizes)} bytes"
            ) from None
        self._zero = np.array(zero_hash(meta.page_bytes), dtype=np.uint64)
        self.superseded_pages = 0

    def take(self, frame: Frame, hashes: Hashes) -> None:
        """A frame in its place of the order; ``hashes`` are those of its data pages."""
        for block, page, npages, row in frame.each_run():
            seen = self._seen[block]
            self.superseded_pages += kernels.bitmap_count(seen, page, npages)
            kernels.bitmap_set_range(seen, page, npages)
            new = self._zero if row < 0 else hashes[row : row + npages]
            self._tables[block][page : page + npages] = new

    def digest(self) -> tuple[int, int, int]:
        """(lo, hi, pages)"""
        total = _Digest()
        for block, table in enumerate(self._tables):
            total.add(kernels.digest_of(block, 0, table))
        return total.value


class FrameDigest:
    """Recomputes the digest from frames in which each page comes once. One thread."""

    def __init__(self, page_bytes: int) -> None:
        self._zero = zero_hash(page_bytes)
        self._digest = _Digest()

    def take(self, frame: Frame, hashes: Hashes) -> None:
        """``hashes`` are those of the frame's data pages."""
        for block, page, npages, row in frame.each_run():
            if row < 0:
                self._digest.add(kernels.digest_fill_of(block, page, npages, *self._zero))
            else:
                self._digest.add(kernels.digest_of(block, page, hashes[row : row + npages]))

    def compare(self, end: End) -> None:
        """After the last frame. Raises StreamError if it is not what the image says."""
        said = (end.digest_lo, end.digest_hi, end.digest_pages)
        if self._digest.value != said:
            damaged(
                "image", "digest of memory", digest_text(*self._digest.value), digest_text(*said)
            )


def digest_text(lo: int, hi: int, pages: int) -> str:
    return f"{hi:016x}{lo:016x} of {pages} pages"
