# SPDX-License-Identifier: Apache-2.0
"""The memory of a guest that has just left, as a raw file: what a destination can reuse when the
guest comes back (docs/reuse.md).

    file    | block 0 | block 1 | ...      in block-table order, back to back; zero pages are holes

It is written once the guest is known to run at the destination, so it is no downtime, and before
the source guest is freed. The file appears when it is whole, in place of one that was there.
Whatever fails here is a note: the guest has moved.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from vmth import kernels
from vmth.atomic import AtomicFile
from vmth.guest import CanReadMemory, Guest
from vmth.memory import MappedBlock, Memory
from vmth.stats import KeptMemory
from vmth.types import RamBlock

__all__ = ["KeptImage", "file_pieces"]

log = logging.getLogger(__name__)

PAGE_BYTES = 4096
PIECE_BYTES = 4 << 20


class KeptImage:
    """One file, if there is to be any (``path``). A context manager: entering it raises
    RefusedError where the file cannot be made, leaving it without ``write`` leaves no file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.result: KeptMemory | None = None  #: after ``write``
        self._file: AtomicFile | None = None

    @property
    def notes(self) -> list[str]:
        """What is weaker than asked."""
        if self.result is None:
            return []
        if self.result.error:
            return [f"{self.path}: the memory was not kept: {self.result.error}"]
        return [f"{self.path}: left out: {what}" for what in self.result.missing]

    def __enter__(self) -> Self:
        if self.path is not None:
            self._file = AtomicFile(self.path, replace=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.__exit__(kind, value, traceback)

    def write(self, guest: Guest, memory: Sequence[MappedBlock]) -> None:
        """All of a paused guest's memory. Never raises: ``result.error`` says what failed."""
        if self._file is None or self.result is not None:
            return
        begun_ns, sink = time.monotonic_ns(), _Sink(self._file, [each.block for each in memory])
        error = ""
        try:
            sink.write(guest, memory)
        except Exception as failure:
            log.exception("%s: the memory of the guest was not kept", self.path)
            error = str(failure) or type(failure).__name__
        self.result = KeptMemory(
            path=str(self.path),
            memory_bytes=sink.length_bytes,
            stored_bytes=sink.stored_bytes,
            missing=tuple(sink.missing),
            duration_ns=time.monotonic_ns() - begun_ns,
            error=error,
        )


class _Sink:
    """Puts stretches of blocks at their places; zero pages stay holes."""

    def __init__(self, file: AtomicFile, blocks: Sequence[RamBlock]) -> None:
        self._file = file
        lengths = np.array([block.used_length for block in blocks], dtype=np.int64)
        self._begins = np.cumsum(lengths) - lengths
        self._lengths = lengths
        self.length_bytes = int(lengths.sum())
        self.stored_bytes = 0
        self.missing: list[str] = []

    def write(self, guest: Guest, memory: Sequence[MappedBlock]) -> None:
        self._file.extend(self.length_bytes)
        for number, mapped in enumerate(memory):
            for offset, data in _pieces(mapped):
                self.take(number, offset, data)
        elsewhere = [number for number, mapped in enumerate(memory) if mapped.hostless]
        if elsewhere and isinstance(guest, CanReadMemory):
            self.missing += guest.read_memory(elsewhere, self.take)
        elif elsewhere:
            self.missing += [f"ramblock {memory[number].block.idstr!r}" for number in elsewhere]
        self._file.publish()

    def take(self, block: int, offset: int, data: Memory) -> None:
        """Bytes ``offset`` on of a block; whole pages."""
        if offset < 0 or offset + len(data) > self._lengths[block] or offset % PAGE_BYTES:
            raise ValueError(f"{len(data)} bytes at {offset:#x} are outside of block {block}")
        words, _ = kernels.zero_scan(data, PAGE_BYTES)
        npages = len(data) // PAGE_BYTES
        is_zero = np.unpackbits(words.view(np.uint8), count=npages, bitorder="little").view(bool)
        edges = np.flatnonzero(np.diff(~is_zero, prepend=False, append=False)) * PAGE_BYTES
        at = int(self._begins[block]) + offset
        for begin, end in edges.reshape(-1, 2).tolist():
            self._file.write_at(data[begin:end].data, at + begin)
            self.stored_bytes += end - begin


def _pieces(mapped: MappedBlock) -> Iterator[tuple[int, Memory]]:
    """(offset, bytes) of all of a block that this process has and that is no hole."""
    block = mapped.block
    if mapped.hostless:
        return
    if block.mapping.fd is not None:
        # Not through the mapping: reading a hole there would give it a page.
        yield from file_pieces(block.mapping.fd, block.mapping.offset, block.used_length)
        return
    for offset in range(0, block.used_length, PIECE_BYTES):
        yield offset, mapped.view[offset : offset + PIECE_BYTES]


def file_pieces(fd: int, begin: int, length: int) -> Iterator[tuple[int, Memory]]:
    """(offset, bytes) of bytes [begin, begin + length) of a file but its holes, whole pages;
    offsets count from ``begin``. Each is valid until the next. Raises OSError."""
    room: Memory = np.empty(PIECE_BYTES, dtype=np.uint8)
    at = 0
    while at < length:
        try:
            at = max(at, os.lseek(fd, begin + at, os.SEEK_DATA) - begin)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole follows
                return
            if error.errno != errno.EINVAL:  # a file that knows no holes
                raise
        at = at // PAGE_BYTES * PAGE_BYTES
        if at >= length:
            return
        nbytes = min(PIECE_BYTES, length - at)
        _fill(fd, room[:nbytes], begin + at)
        yield at, room[:nbytes]
        at += nbytes


def _fill(fd: int, room: Memory, offset: int) -> None:
    done = 0
    while done < len(room):
        got = os.preadv(fd, [room[done:].data], offset + done)
        if got == 0:
            raise OSError(errno.EIO, f"memory ends at {offset + done}")
        done += got
