# SPDX-License-Identifier: Apache-2.0
"""Finds the contents of a file: a hash and a place for each, in the order of the hashes.

Zero pages are left out, of equal pages the first one stays. With more contents than are allowed
those with the lowest hashes stay: hashes are random, so these lie all over the file, and any
smaller number of rows of a finished index is again what a smaller limit would have kept.

    pieces -> workers: read, hash -> gathered rows -> sorted, repeats dropped, cut -> ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vmth import kernels
from vmth.reuse.content import PageFile, Piece
from vmth.reuse.layout import Built

__all__ = ["Rows", "find_contents"]

U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]

WORKERS = 2
#: Rows gathered before they are sorted into what there is, at least.
LEAST_GATHERED = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """``hashes``, shape (n, 2), rise strictly; row i's content is at page ``places[i]``."""

    hashes: U64 = field(repr=False)
    places: U64 = field(repr=False)
    built: Built


def find_contents(
    file: PageFile,
    key: bytes,
    limit: int,
    progress: Callable[[int, int], None] = lambda _done, _pages: None,
) -> Rows:
    """Read all of ``file``; at most ``limit`` rows. ``progress`` is called now and then with the
    pages that are behind and all pages, and may raise. Raises RefusedError if it cannot be read.

    Memory: up to six times what the rows take (24 bytes each), and a few pieces.
    """
    gathered = _Gathered(limit)
    for first, hashes, is_zero in _hashed(file.pieces(), key, file.page_bytes):
        gathered.add(first, hashes, is_zero)
        progress(first + len(is_zero), file.npages)
    return gathered.finish(file.npages)


def _hashed(
    pieces: Iterator[Piece], key: bytes, page_bytes: int
) -> Iterator[tuple[int, U64, npt.NDArray[np.bool_]]]:
    """(number of a piece's first page, a row a page, which pages are zeros: rows without meaning)

    in the order of the pieces; a bounded number is on the way."""

    def read_and_hash(piece: Piece) -> tuple[int, U64, npt.NDArray[np.bool_]]:
        first, data = piece()
        words, _ = kernels.zero_scan(data, page_bytes)
        npages = len(data) // page_bytes
        is_zero = np.unpackbits(words.view(np.uint8), count=npages, bitorder="little").view(bool)
        hashes = np.zeros((npages, 2), dtype=np.uint64)
        edges = np.flatnonzero(np.diff(~is_zero, prepend=False, append=False))
        for begin, end in edges.reshape(-1, 2).tolist():
            run = data[begin * page_bytes : end * page_bytes]
            kernels.content_hash(run, page_bytes, key, hashes[begin:end])
        return first, hashes, is_zero

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="vmth-index") as pool:
        flying: deque[Future[tuple[int, U64, npt.NDArray[np.bool_]]]] = deque()
        try:
            for piece in pieces:
                flying.append(pool.submit(read_and_hash, piece))
                if len(flying) > 2 * WORKERS:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class _Gathered:
    """The rows so far: ``limit`` of them sorted, and some that wait to be sorted in."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._hashes: U64 = np.zeros((0, 2), dtype=np.uint64)
        self._places: U64 = np.zeros(0, dtype=np.uint64)
        self._waiting: list[tuple[U64, U64]] = []
        self._nwaiting = 0
        self._pages = self._zero = self._repeated = self._left = 0

    def add(self, first: int, hashes: U64, is_zero: npt.NDArray[np.bool_]) -> None:
        self._pages += len(is_zero)
        self._zero += int(is_zero.sum())
        wanted = ~is_zero
        if self._left:  # what is above the last row now will never be below it
            top = self._hashes[-1] if len(self._hashes) else np.zeros(2, dtype=np.uint64)
            above = (hashes[:, 0] > top[0]) | ((hashes[:, 0] == top[0]) & (hashes[:, 1] > top[1]))
            self._left += int((above & wanted).sum())
            wanted &= ~above
        rows = np.flatnonzero(wanted)
        if len(rows) == 0:
            return
        self._waiting.append((hashes[rows], rows.astype(np.uint64) + np.uint64(first)))
        self._nwaiting += len(rows)
        if self._nwaiting >= max(LEAST_GATHERED, len(self._places)):
            self._sort_in()

    def _sort_in(self) -> None:
        hashes = np.concatenate([self._hashes, *(rows for rows, _ in self._waiting)])
        places = np.concatenate([self._places, *(rows for _, rows in self._waiting)])
        self._waiting.clear()
        self._nwaiting = 0
        # Stable: of equal contents the first place stays.
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        hashes, places = hashes[order], places[order]
        new = np.ones(len(places), dtype=bool)
        new[1:] = (hashes[1:] != hashes[:-1]).any(axis=1)
        kept = np.flatnonzero(new)
        self._repeated += len(places) - len(kept)
        self._left += max(0, len(kept) - self._limit)
        kept = kept[: self._limit]
        self._hashes, self._places = hashes[kept], places[kept]

    def finish(self, npages: int) -> Rows:
        self._sort_in()
        built = Built(
            pages=self._pages,
            hole_pages=npages - self._pages,
            zero_pages=self._zero,
            repeated_pages=self._repeated,
            left_pages=self._left,
            limit=self._limit,
        )
        return Rows(self._hashes, self._places, built)
