# SPDX-License-Identifier: Apache-2.0
"""Digests computed anew from guest memory, and the search for pages in which two ends differ.

Both ends of a paused migration can hash all of their memory again; comparing that with the peer's
catches what the running digest cannot: a dirty source that missed a write. Memory that was never
populated is counted as zero pages without being touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmth import kernels
from vmth.dirty.populated import populated_bits
from vmth.guest import CanReportPopulated, Guest
from vmth.types import RamBlock, bitmap_words

__all__ = [
    "REQUEST_PAGES",
    "TABLE_PAGES",
    "Area",
    "MemoryDigests",
    "Pending",
    "areas",
    "differing_pages",
    "pack_digests",
    "unpack_digests",
]

U64 = npt.NDArray[np.uint64]

#: Pages behind one sub-digest of the first look.
COARSE_PAGES = 4096
#: Pages of one request that hashes memory: 256 MiB, a quarter of a second or less.
REQUEST_PAGES = 65536
#: Pages of one request to the table: 65,536 sub-digests, which is 1 MiB on the wire for 1 TiB.
TABLE_PAGES = 65536 * COARSE_PAGES
_RUNS_CAP = 1024


@dataclass(frozen=True, slots=True)
class Area:
    """Pages [page, page + npages) of one block."""

    block: int
    page: int
    npages: int


def areas(blocks: Sequence[RamBlock], pages: int = REQUEST_PAGES) -> Iterator[Area]:
    """All of memory in pieces of one request each."""
    for index, block in enumerate(blocks):
        for page in range(0, block.npages, pages):
            yield Area(index, page, min(pages, block.npages - page))


class MemoryDigests:
    """Hashes guest memory as it is now. The guest is paused; ``views`` are its blocks' bytes."""

    def __init__(
        self,
        guest: Guest,
        views: Sequence[npt.NDArray[np.uint8]],
        page_bytes: int,
        hash_seed: int,
    ) -> None:
        self._guest = guest
        self._views = views
        self._page_bytes = page_bytes
        self._seed = hash_seed
        self._zero = np.empty((1, 2), dtype=np.uint64)
        kernels.page_hash(np.zeros(page_bytes, dtype=np.uint8), page_bytes, hash_seed, self._zero)

    def hashes(self, area: Area) -> U64:
        """(npages, 2): the hash of every page of the area."""
        table = np.repeat(self._zero, area.npages, axis=0)
        for first, n in self._populated_runs(area):
            low, high = first * self._page_bytes, (first + n) * self._page_bytes
            at = first - area.page
            kernels.page_hash(
                self._views[area.block][low:high], self._page_bytes, self._seed, table[at : at + n]
            )
        return table

    def subdigests(self, area: Area, step: int) -> U64:
        """One digest every ``step`` pages; with step 1 the page hashes themselves."""
        table = self.hashes(area)
        if step == 1:
            return table
        return np.array(
            [
                kernels.digest_of(area.block, area.page + at, table[at : at + step])[:2]
                for at in range(0, area.npages, step)
            ],
            dtype=np.uint64,
        )

    def _populated_runs(self, area: Area) -> Iterator[tuple[int, int]]:
        # Of the whole block, as its readers want it; what is not touched takes no memory.
        bits = np.zeros(bitmap_words(self._guest.blocks[area.block].npages), dtype=np.uint64)
        if isinstance(self._guest, CanReportPopulated):
            self._guest.populated(area.block, area.page, area.npages, bits)
        else:
            populated_bits(self._guest.blocks[area.block], area.page, area.npages, bits)
        end = area.page + area.npages
        runs = np.empty((_RUNS_CAP, 2), dtype=np.uint64)
        at = area.page
        while at < end:
            count, at = kernels.bitmap_runs(bits, end, at, runs)
            yield from ((first, n) for first, n in runs[:count].tolist())


#: Waits for the peer's digests.
Pending = Callable[[], U64]


def differing_pages(
    blocks: Sequence[RamBlock],
    ours: Callable[[Area, int], U64],
    theirs: Callable[[Area, int], Pending],
    limit: int,
    pages: int = REQUEST_PAGES,
) -> Iterator[tuple[int, int]]:
    """(block, page) of at most ``limit`` pages in which two ends differ: first one digest for every
    COARSE_PAGES, in requests of ``pages``, then the page hashes of those that differ."""
    found = 0
    for area in areas(blocks, pages):
        coarse = _differ(ours, theirs, area, COARSE_PAGES)
        for index in np.flatnonzero(coarse).tolist():
            first = area.page + index * COARSE_PAGES
            fine = Area(area.block, first, min(COARSE_PAGES, area.page + area.npages - first))
            for page in np.flatnonzero(_differ(ours, theirs, fine, 1)).tolist():
                yield area.block, first + page
                found += 1
                if found >= limit:
                    return


def _differ(
    ours: Callable[[Area, int], U64],
    theirs: Callable[[Area, int], Pending],
    area: Area,
    step: int,
) -> npt.NDArray[np.bool_]:
    pending = theirs(area, step)  # asked first: both ends compute at the same time
    mine = ours(area, step)
    different: npt.NDArray[np.bool_] = np.any(mine != pending(), axis=1)
    return different


def pack_digests(digests: U64) -> bytes:
    """Little-endian lo, hi pairs for the wire."""
    return digests.astype("<u8", copy=False).tobytes()


def unpack_digests(data: bytes) -> U64:
    """The inverse; a length that is no multiple of 16 was refused when the message was decoded."""
    return np.frombuffer(data, dtype="<u8").reshape(-1, 2).astype(np.uint64, copy=False)
