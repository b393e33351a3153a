# SPDX-License-Identifier: Apache-2.0
"""Page frames: runs of pages gathered from a stream, packed into records and unpacked again.

    payload of a PAGES record:   runs u32, data pages u32 | RUN16 x runs | data pages, packed or raw

A run is {page, npages, block, kind}; a data run's pages lie in the data in the order of the runs, a
zero run has none. Runs of a frame rise by block and page: a page stands in a frame at most once,
and one of a later frame takes the place of an earlier one's. No I/O; pages are moved by whole runs,
and looked at by native code only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vmth import kernels
from vmth.errors import StreamError
from vmth.qemu.image.codec import Packer, Unpacker
from vmth.qemu.image.layout import (
    FRAME_HEAD,
    MAX_CONTENT_BYTES,
    MAX_FRAME_RUNS,
    RUN16,
    Kind,
    RecordHead,
    Seal,
    damaged,
)
from vmth.qemu.image.meta import Meta
from vmth.qemu.ram import PageKind, Runs

__all__ = ["FRAME_BYTES", "Frame", "FrameBuilder", "Hashes", "check_runs", "zero_hash"]

#: Data bytes of a frame. Larger frames compress a little better, but a page is read by its frame. A
#: raw one fits 256 KiB with its runs: the checksum is over a power of two.
FRAME_BYTES = 252 << 10

Hashes: TypeAlias = npt.NDArray[np.uint64]
Pages: TypeAlias = npt.NDArray[np.uint8]
Runs16: TypeAlias = npt.NDArray[Any]
#: What the index says of a frame: its runs, which were checked, and how many data pages they have.
Listed: TypeAlias = tuple[Runs16, int]

#: A run's length fits 32 bits.
MAX_RUN_PAGES = 1 << 31
ZERO, PAGE = int(PageKind.ZERO), int(PageKind.PAGE)


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """Pages of one record. ``data``: one row a data page, in the order of the runs."""

    runs: Runs16
    data: Pages = field(repr=False)

    @property
    def npages(self) -> int:
        return int(self.runs["npages"].sum(dtype=np.uint64))

    def hashes(self) -> Hashes:
        """Of the data pages; the GIL is released."""
        out = np.empty((len(self.data), 2), dtype=np.uint64)
        if len(self.data):
            kernels.page_hash(self.data.reshape(-1), self.data.shape[1], 0, out)
        return out

    def each_run(self) -> Iterator[tuple[int, int, int, int]]:
        """(block, page, npages, row of its first page in ``data``, or -1 for a zero run)"""
        row = 0
        for page, npages, block, kind in self.runs.tolist():
            if kind == PAGE:
                yield block, page, npages, row
                row += npages
            else:
                yield block, page, npages, -1

    def record(self, sequence: int, packer: Packer, seal: Seal) -> memoryview:
        """The whole record, in ``seal``'s buffer."""
        codec, packed = packer.pack(self.data.reshape(-1).data)
        head = FRAME_HEAD.pack(len(self.runs), len(self.data))
        runs = self.runs.view(np.uint8).data
        nbytes = len(head) + len(runs) + len(packed)
        return seal.make(
            RecordHead(Kind.PAGES, codec, sequence, nbytes, self.data.size), head, runs, packed
        )

    @classmethod
    def unpack(
        cls,
        head: RecordHead,
        payload: memoryview,
        listed: Listed,
        page_bytes: int,
        unpacker: Unpacker,
        where: str,
    ) -> Frame:
        """A checked record's frame, which must hold what the index says that it does. ``data`` is
        the frame's own, unless the record is raw: then it refers to ``payload``. StreamError for
        anything else."""
        runs, data_pages = listed
        said = FRAME_HEAD.pack(len(runs), data_pages) + runs.tobytes()
        if payload[: len(said)] != said:
            damaged(where, "runs", "others", "those of the index")
        if head.content_bytes != data_pages * page_bytes:
            damaged(where, "content bytes", head.content_bytes, data_pages * page_bytes)
        packed = payload[len(said) :]
        content = unpacker.unpack(head.codec, packed, head.content_bytes, where)
        return cls(runs, np.frombuffer(content, dtype=np.uint8).reshape(data_pages, page_bytes))


def check_runs(
    runs: Runs16, starts: npt.NDArray[np.intp], data_pages: Runs16, meta: Meta, where: str
) -> None:
    """Runs of several frames: frame i's begin at ``starts[i]``, and say ``data_pages[i]``.

    Every run lies in its block, those of a frame rise, and data pages are as many as they say;
    otherwise StreamError. Every frame has at least one run.
    """
    lengths = np.array([meta.npages(i) for i in range(len(meta.blocks))], dtype=np.uint64)
    if int(runs["block"].max()) >= len(lengths):
        damaged(where, "block of a run", int(runs["block"].max()), f"below {len(lengths)}")
    kinds = runs["kind"]
    if not np.isin(kinds, (ZERO, PAGE)).all():
        damaged(where, "kind of a run", sorted(set(kinds.tolist())), (ZERO, PAGE))
    npages, of_block = runs["npages"].astype(np.uint64), lengths[runs["block"]]
    fits = (npages >= 1) & (runs["page"] <= of_block) & (npages <= of_block - runs["page"])
    if not fits.all():
        bad = runs[int(np.argmin(fits))]
        block = int(bad["block"])
        damaged(
            where,
            f"run of block {meta.blocks[block].idstr!r}",
            f"page {bad['page']} and {bad['npages']} pages",
            f"at least 1 page within {int(lengths[block])}",
        )
    rises = np.ones(len(runs), dtype=bool)
    rises[1:] = np.where(
        runs["block"][1:] == runs["block"][:-1],
        runs["page"][1:] >= runs["page"][:-1] + npages[:-1],
        runs["block"][1:] > runs["block"][:-1],
    )
    rises[starts] = True
    if not rises.all():
        damaged(where, "order of runs", runs[int(np.argmin(rises))].tolist(), "rising")
    said = np.add.reduceat(np.where(kinds == PAGE, npages, np.uint64(0)), starts)
    if not np.array_equal(said, data_pages):
        bad_frame = int(np.argmax(said != data_pages))
        damaged(where, "data pages of a frame", int(data_pages[bad_frame]), int(said[bad_frame]))


def zero_hash(page_bytes: int) -> tuple[int, int]:
    """The hash (lo, hi) of a page of zeros."""
    out = np.empty((1, 2), dtype=np.uint64)
    kernels.page_hash(np.zeros(page_bytes, dtype=np.uint8), page_bytes, 0, out)
    return int(out[0, 0]), int(out[0, 1])


class FrameBuilder:
    """Gathers runs of a stream into frames. What ``add`` is given is copied: it may be reused."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._cap_pages = min(FRAME_BYTES, MAX_CONTENT_BYTES) // page_bytes
        self._runs: list[tuple[int, int, int, int]] = []
        self._data = self._room()
        self._rows = 0

    def _room(self) -> Pages:
        return np.empty((self._cap_pages, self._page_bytes), dtype=np.uint8)

    def add(self, runs: Runs, data: memoryview) -> Iterator[Frame]:
        """The frames that became full. Raises StreamError for pages that are not plain or zero."""
        for page, npages, at, stride, nbytes, block, kind in runs.tolist():
            if kind == ZERO:
                for done in range(0, npages, MAX_RUN_PAGES):
                    yield from self._add_zero(block, page + done, min(MAX_RUN_PAGES, npages - done))
            elif kind == PAGE and nbytes == self._page_bytes:
                yield from self._add_data(block, page, npages, data, at, stride)
            else:
                raise StreamError(
                    f"page {page} of block {block}: received form {kind} of {nbytes} bytes, "
                    f"allowed {ZERO} or {PAGE} of {self._page_bytes}"
                )

    def flush(self) -> Iterator[Frame]:
        """What is left, if anything."""
        if self._runs:
            yield self._take()

    def _add_zero(self, block: int, page: int, npages: int) -> Iterator[Frame]:
        if not self._extends(block, page, npages, ZERO):
            if len(self._runs) == MAX_FRAME_RUNS or self._goes_back(block, page):
                yield self._take()
            self._runs.append((page, npages, block, ZERO))

    def _add_data(
        self, block: int, page: int, npages: int, data: memoryview, at: int, stride: int
    ) -> Iterator[Frame]:
        done = 0
        if self._goes_back(block, page):
            yield self._take()
        while done < npages:
            if self._rows == self._cap_pages or len(self._runs) == MAX_FRAME_RUNS:
                yield self._take()
            n = min(npages - done, self._cap_pages - self._rows)
            self._data[self._rows : self._rows + n] = np.ndarray(
                (n, self._page_bytes), np.uint8, data, at + done * stride, (stride, 1)
            )
            self._rows += n
            if not self._extends(block, page + done, n, PAGE):
                self._runs.append((page + done, n, block, PAGE))
            done += n

    def _goes_back(self, block: int, page: int) -> bool:
        """Is this page before the end of the last run? A new pass over memory begins so."""
        if not self._runs:
            return False
        last_page, last_npages, last_block, _ = self._runs[-1]
        return (block, page) < (last_block, last_page + last_npages)

    def _extends(self, block: int, page: int, npages: int, kind: int) -> bool:
        """Make the last run longer, if these pages follow it."""
        if not self._runs:
            return False
        last_page, last_npages, last_block, last_kind = self._runs[-1]
        if (last_block, last_kind, last_page + last_npages) != (block, kind, page):
            return False
        if last_npages + npages > MAX_RUN_PAGES:
            return False
        self._runs[-1] = (last_page, last_npages + npages, block, kind)
        return True

    def _take(self) -> Frame:
        frame = Frame(np.array(self._runs, dtype=RUN16), self._data[: self._rows])
        self._runs, self._rows, self._data = [], 0, self._room()
        return frame
