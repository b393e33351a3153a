# SPDX-License-Identifier: Apache-2.0
"""A block's pages in a mapped-ram file: page p lies at pages_offset + p, a bitmap says which do.

    block record | ... | bitmap (u64 words, little-endian) | ... | pages, each in its place | next
                       ^ bitmap_offset                          ^ pages_offset (1 MiB aligned)

A page whose bit is clear is zero; the file may have a hole there or bytes left over from before.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vmth.errors import StreamError
from vmth.qemu.ram import RUN, PageKind, Runs
from vmth.qemu.stream.events import MappedPages
from vmth.qemu.stream.window import ShortError

__all__ = ["MappedRegion"]

MAX_BITMAP_BYTES = 1 << 30
NO_RUNS: Runs = np.empty(0, dtype=RUN)


class MappedRegion:
    """Walks from the end of a block's record to the begin of the next.

    Raises StreamError if bitmap or pages overlap what is before them.
    """

    def __init__(self, mapped: MappedPages, used_length: int, position: int) -> None:
        page_bytes = mapped.page_bytes
        npages = -(-used_length // page_bytes)
        self._bitmap_bytes = -(-npages // 64) * 8
        self._used_length, self._mapped, self._npages = used_length, mapped, npages
        self._bits: npt.NDArray[np.uint8] | None = None
        self._page = 0
        self.finished = False
        if used_length % page_bytes or self._bitmap_bytes > MAX_BITMAP_BYTES:
            raise StreamError(
                f"mapped-ram block of {used_length} bytes, allowed a multiple of {page_bytes} and "
                f"{MAX_BITMAP_BYTES} bytes of bitmap"
            )
        if mapped.bitmap_offset < position:
            raise StreamError(
                f"mapped-ram bitmap: received offset {mapped.bitmap_offset}, allowed at least "
                f"{position}"
            )
        if mapped.pages_offset < mapped.bitmap_offset + self._bitmap_bytes:
            raise StreamError(
                f"mapped-ram pages: received offset {mapped.pages_offset}, allowed at least "
                f"{mapped.bitmap_offset + self._bitmap_bytes}"
            )

    def step(self, view: memoryview, position: int, block: int) -> tuple[int, Runs]:
        """Use bytes of ``view``, which is at ``position`` of the file. (used, runs found in it)"""
        if self._bits is None:
            if position < self._mapped.bitmap_offset:
                return min(len(view), self._mapped.bitmap_offset - position), NO_RUNS
            if len(view) < self._bitmap_bytes:
                raise ShortError(self._bitmap_bytes)
            words = np.frombuffer(view[: self._bitmap_bytes], dtype=np.uint8).copy()
            self._bits = words
            self.finished = self._npages == 0
            return self._bitmap_bytes, NO_RUNS
        if position < self._mapped.pages_offset:
            return min(len(view), self._mapped.pages_offset - position), NO_RUNS
        return self._pages(view, block)

    def _pages(self, view: memoryview, block: int) -> tuple[int, Runs]:
        assert self._bits is not None
        page_bytes = self._mapped.page_bytes
        count = min(len(view) // page_bytes, self._npages - self._page)
        if count == 0:
            raise ShortError(page_bytes)
        first = self._page
        bits = np.unpackbits(self._bits[first // 8 : (first + count + 7) // 8], bitorder="little")[
            first % 8 : first % 8 + count
        ]
        edges = np.flatnonzero(np.diff(bits)) + 1
        begins = np.concatenate(([0], edges)).astype(np.uint64)
        ends = np.concatenate((edges, [count])).astype(np.uint64)
        there = bits[begins] == 1
        runs = np.zeros(len(begins), dtype=RUN)
        runs["page"] = begins + np.uint64(first)
        runs["npages"] = ends - begins
        runs["block"] = block
        runs["kind"] = np.where(there, PageKind.PAGE, PageKind.ZERO)
        runs["at"] = np.where(there, begins * np.uint64(page_bytes), 0)
        runs["stride"] = runs["nbytes"] = np.where(there, page_bytes, 0)
        self._page += count
        self.finished = self._page == self._npages
        return count * page_bytes, runs
