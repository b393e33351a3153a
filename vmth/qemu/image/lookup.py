# SPDX-License-Identifier: Apache-2.0
"""The index of an image in memory: where each frame is, and which frame has a page last. No I/O."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from vmth.errors import RefusedError
from vmth.qemu.image.frames import PAGE, ZERO, Frame, Hashes, Listed, Runs16, check_runs
from vmth.qemu.image.layout import (
    FRAME_HEAD,
    INDEX_FRAME,
    INDEX_HEAD,
    MAX_FRAMES,
    RECORD_BYTES,
    RUN16,
    End,
    damaged,
)
from vmth.qemu.image.meta import Meta

__all__ = ["PageIndex"]

#: A frame takes at least this in the file, beside its runs.
FRAME_MIN_BYTES = RECORD_BYTES + FRAME_HEAD.size


class PageIndex:
    """Filled by ``add`` from the file's INDEX records, then read only (by any thread)."""

    def __init__(self, meta: Meta, file_bytes: int) -> None:
        self._meta = meta
        self._file_bytes = file_bytes
        self._parts: list[tuple[Runs16, Runs16]] = []
        self._count = self._nruns = 0
        self._offsets: npt.NDArray[np.uint64] = np.zeros(1, dtype=np.uint64)
        self._data_pages: npt.NDArray[np.uint32] = np.zeros(0, dtype=np.uint32)
        self._first_run: npt.NDArray[np.uint64] = np.zeros(1, dtype=np.uint64)
        #: Of all frames, in the order of the file.
        self.runs: Runs16 = np.zeros(0, dtype=RUN16)
        self._maps: dict[int, npt.NDArray[np.uint32]] = {}
        self._lock = threading.Lock()

    def add(self, content: memoryview, where: str) -> None:
        """One INDEX record's content. What is kept is bounded by the file's own length: each frame
        and each run that is listed also lies there. Raises StreamError."""
        if len(content) < INDEX_HEAD.size:
            damaged(where, "bytes of the index", len(content), f"at least {INDEX_HEAD.size}")
        nframes, nruns = INDEX_HEAD.unpack_from(content)
        ends = INDEX_HEAD.size + nframes * INDEX_FRAME.itemsize
        wants = ends + nruns * RUN16.itemsize
        if len(content) != wants:
            damaged(where, "bytes of the index", len(content), wants)
        self._count += nframes
        self._nruns += nruns
        takes = self._count * FRAME_MIN_BYTES + self._nruns * RUN16.itemsize
        if takes > self._file_bytes or self._count > MAX_FRAMES:
            damaged(where, "bytes of all frames listed", takes, f"at most {self._file_bytes}")
        frames = np.frombuffer(content[INDEX_HEAD.size : ends], dtype=INDEX_FRAME).copy()
        runs = np.frombuffer(content[ends:], dtype=RUN16).copy()
        self._check(frames, runs, where)
        self._parts.append((frames, runs))

    def _check(self, frames: Runs16, runs: Runs16, where: str) -> None:
        said = int(frames["nruns"].sum(dtype=np.uint64))
        if said != len(runs):
            damaged(where, "runs of the index", len(runs), said)
        if len(frames) == 0 or int(frames["nruns"].min()) == 0:
            damaged(where, "runs of a frame", 0, "at least 1")
        starts = np.zeros(len(frames), dtype=np.intp)
        starts[1:] = np.cumsum(frames["nruns"], dtype=np.intp)[:-1]
        check_runs(runs, starts, frames["data_pages"], self._meta, where)

    def finish(self, end: End, pages_offset: int) -> None:
        """After the last record: frames lie back to back from ``pages_offset`` to the state."""
        where = "index"
        if self._count != end.frames:
            damaged(where, "frames", self._count, end.frames)
        frames = np.concatenate([np.zeros(0, dtype=INDEX_FRAME), *(f for f, _ in self._parts)])
        self.runs = np.concatenate([self.runs, *(r for _, r in self._parts)])
        self._parts.clear()
        state = np.array([end.state_offset], dtype=np.uint64)
        self._offsets = np.concatenate([frames["offset"], state])
        self._data_pages = frames["data_pages"].copy()
        self._first_run = np.concatenate(
            [np.zeros(1, dtype=np.uint64), np.cumsum(frames["nruns"], dtype=np.uint64)]
        )
        if int(self._offsets[0]) != pages_offset:
            damaged(where, "place of the first frame", int(self._offsets[0]), pages_offset)
        if not (self._offsets[1:] > self._offsets[:-1]).all():
            damaged(where, "places of frames", "not rising", "rising")
        data = self.runs["kind"] == PAGE
        normal = int(self.runs["npages"][data].sum(dtype=np.uint64))
        zero = int(self.runs["npages"].sum(dtype=np.uint64)) - normal
        if (normal, zero) != (end.normal_pages, end.zero_pages):
            damaged(
                where, "normal and zero pages", (normal, zero), (end.normal_pages, end.zero_pages)
            )
        if normal + zero - end.superseded_pages != end.digest_pages:
            damaged(
                where,
                "superseded pages",
                end.superseded_pages,
                f"{normal + zero} stored less {end.digest_pages} of the digest",
            )

    # ---- after that ----------------------------------------------------------------------------

    def place(self, number: int) -> tuple[int, int]:
        """(offset, bytes) of a frame's record."""
        at = int(self._offsets[number])
        return at, int(self._offsets[number + 1]) - at

    def listed(self, number: int) -> Listed:
        """What a frame must hold."""
        first, last = int(self._first_run[number]), int(self._first_run[number + 1])
        return self.runs[first:last], int(self._data_pages[number])

    def data_places(self) -> npt.NDArray[np.uint64]:
        """A row for each frame that has data pages, in the order of the file: number of the first
        among all data pages, pages, offset and bytes of what holds them, number of the frame.
        Raises StreamError."""
        npages = self._data_pages.astype(np.uint64)
        runs = np.diff(self._first_run)
        head = np.uint64(RECORD_BYTES + FRAME_HEAD.size) + runs * np.uint64(RUN16.itemsize)
        offset = self._offsets[:-1] + head
        if not (offset <= self._offsets[1:]).all():
            damaged("index", "bytes of a frame", "less than its runs take", "its runs and pages")
        nbytes = self._offsets[1:] - offset
        first = np.cumsum(npages, dtype=np.uint64) - npages
        numbers = np.arange(len(npages), dtype=np.uint64)
        rows = np.column_stack([first, npages, offset, nbytes, numbers])
        return np.ascontiguousarray(rows[npages > 0])

    def newest(self, block: int, page: int) -> int | None:
        """The number of the frame that has the page last."""
        number = int(self._map(block)[page])
        return number - 1 if number else None

    def newest_of(self, number: int, frame: Frame, hashes: Hashes) -> tuple[Frame, Hashes]:
        """The frame without those of its pages that a later one has."""
        runs: list[tuple[int, int, int, int]] = []
        rows: list[npt.NDArray[np.int64]] = []
        for block, page, npages, row in frame.each_run():
            mine = self._map(block)[page : page + npages] == number + 1
            edges = np.flatnonzero(np.diff(mine, prepend=False, append=False))
            kind = ZERO if row < 0 else PAGE
            for first, last in edges.reshape(-1, 2).tolist():
                runs.append((page + first, last - first, block, kind))
                if row >= 0:
                    rows.append(np.arange(row + first, row + last))
        kept = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        return Frame(np.array(runs, dtype=RUN16), frame.data[kept]), hashes[kept]

    def _map(self, block: int) -> npt.NDArray[np.uint32]:
        """For each page of a block the number of its newest frame and one, or 0."""
        with self._lock:
            if block not in self._maps:
                self._maps[block] = self._build(block)
            return self._maps[block]

    def _build(self, block: int) -> npt.NDArray[np.uint32]:
        npages = self._meta.npages(block)
        try:
            table = np.zeros(npages, dtype=np.uint32)
        except MemoryError:
            raise RefusedError(f"no memory for a table of {4 * npages} bytes") from None
        mine = np.flatnonzero(self.runs["block"] == block)
        numbers = np.searchsorted(self._first_run, mine, side="right")
        runs = self.runs[mine]
        pages, counts = runs["page"].tolist(), runs["npages"].tolist()
        for number, page, count in zip(numbers.tolist(), pages, counts, strict=True):
            table[page : page + count] = number
        return table
