# SPDX-License-Identifier: Apache-2.0
"""Reads the memory of a stopped QEMU's guest, block by block.

    shared backend      through QEMU's own open file
    any other block     QEMU writes it into a pipe (pmemsave) where the guest has it at an address

What the guest has at no address (video memory, parts behind a ROM) is not read that way.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import os
import re
import select
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vmth.errors import GuestError, VmthError
from vmth.kept_image import file_pieces
from vmth.memory import Memory
from vmth.qemu.landing import open_shared
from vmth.qemu.qmp import Qmp
from vmth.types import RamBlock
from vmth.units import format_size

__all__ = ["ranges_in", "read_guest_memory"]

PAGE_BYTES = 4096
#: Of one command: QEMU's main loop does nothing else meanwhile.
PIECE_BYTES = 16 << 20
PIPE_BYTES = 1 << 20
#: For QEMU to write one piece.
PIECE_S = 60.0
LOOK_MS = 200
_RANGE_LINE = re.compile(
    r"\s+(?P<begin>[0-9a-f]{16})-(?P<end>[0-9a-f]{16}) \(prio -?\d+, (?:ram|rom)\): "
    r"(?P<name>\S+)(?: @(?P<offset>[0-9a-f]{16}))?(?: .*)?"
)

Take = Callable[[int, int, Memory], None]


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes [offset, offset + nbytes) of a memory region are at guest address ``gpa``."""

    region: str
    offset: int
    gpa: int
    nbytes: int


def read_guest_memory(
    qmp: Qmp, blocks: Sequence[RamBlock], wanted: Sequence[int], take: Take
) -> list[str]:
    """Give ``take`` (block number, offset, bytes) of ``blocks[number]`` for each ``wanted`` number,
    in whole pages, zeros or not; returns what could not be read. Raises VmthError, OSError.

    The guest is stopped. Memory: a piece.
    """
    with contextlib.ExitStack() as opened:
        places = open_shared(qmp, [blocks[number] for number in wanted], opened)
        beside = []
        for number, place in zip(wanted, places, strict=True):
            if place.fd is None:
                beside.append(number)
                continue
            for offset, data in file_pieces(place.fd, place.offset, blocks[number].used_length):
                take(number, offset, data)
    return _read_through_pipe(qmp, blocks, beside, take) if beside else []


def _read_through_pipe(
    qmp: Qmp, blocks: Sequence[RamBlock], wanted: Sequence[int], take: Take
) -> list[str]:
    ranges = ranges_in(str(qmp.execute("human-monitor-command", {"command-line": "info mtree -f"})))
    left_bytes, names = 0, []
    with _Pipe(qmp) as pipe:
        for number in wanted:
            block = blocks[number]
            left = block.used_length
            for part in _of_block(ranges, block):
                left -= part.nbytes
                for at in range(0, part.nbytes, PIECE_BYTES):
                    nbytes = min(PIECE_BYTES, part.nbytes - at)
                    take(number, part.offset + at, pipe.read(part.gpa + at, nbytes))
            if left > 0:
                left_bytes += left
                names.append(block.idstr)
    if not names:
        return []
    return [f"{format_size(left_bytes)} that are at no guest address, of {', '.join(names)}"]


def ranges_in(text: str) -> list[Range]:
    """Of "info mtree -f": the RAM that the processors see."""
    found: list[Range] = []
    wanted = False
    for line in text.splitlines():
        if line.startswith("FlatView"):
            wanted = False
        elif line.lstrip().startswith('AS "memory"'):
            wanted = True
        elif wanted and (match := _RANGE_LINE.fullmatch(line)):
            begin, end = int(match["begin"], 16), int(match["end"], 16)
            offset = int(match["offset"] or "0", 16)
            found.append(Range(match["name"], offset, begin, end + 1 - begin))
    return found


def _of_block(ranges: Sequence[Range], block: RamBlock) -> Iterator[Range]:
    """Its parts, cut to whole pages of what the block has."""
    name = block.idstr.rpartition("/")[2]  # without the device or the folder that has it
    for part in ranges:
        if part.region != name:
            continue
        end = min(part.offset + part.nbytes, block.used_length) // PAGE_BYTES * PAGE_BYTES
        begin = -(-part.offset // PAGE_BYTES) * PAGE_BYTES
        if begin < end:
            yield Range(part.region, begin, part.gpa + begin - part.offset, end - begin)


class _Pipe:
    """QEMU writes into one end, by its name; nothing touches the disk."""

    def __init__(self, qmp: Qmp) -> None:
        self._qmp = qmp
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> _Pipe:
        with contextlib.ExitStack() as undo:
            folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="vmth-memory-"))
            self._path = Path(folder) / "pipe"
            os.mkfifo(self._path, 0o600)
            self._worker = undo.enter_context(concurrent.futures.ThreadPoolExecutor(1, "vmth-pmem"))
            self._resources = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def read(self, gpa: int, nbytes: int) -> Memory:
        """Guest memory from ``gpa`` on. Raises GuestError if QEMU writes anything else."""
        room: Memory = np.empty(nbytes, dtype=np.uint8)
        # Open before QEMU is asked: it would wait for a reader, and we for its answer.
        fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # a smaller pipe is slower
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            answer = self._worker.submit(
                self._qmp.execute,
                "pmemsave",
                {"val": gpa, "size": nbytes, "filename": str(self._path)},
                timeout_s=PIECE_S,
            )
            done = self._fill(fd, room, answer)
        finally:
            os.close(fd)  # QEMU's next write fails
        try:
            answer.result()
        except VmthError as error:
            raise GuestError(f"QEMU does not write its memory at {gpa:#x}: {error}") from error
        if done != nbytes:
            raise GuestError(f"QEMU wrote {done} bytes of its memory at {gpa:#x}, not {nbytes}")
        return room

    def _fill(self, fd: int, room: Memory, answer: concurrent.futures.Future[object]) -> int:
        """Read until QEMU closes its end, or answers without having opened it."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        done = 0
        while done < len(room):
            if not poll.poll(LOOK_MS):
                if answer.done():
                    break
                continue
            got = os.readv(fd, [room[done:].data])
            if got == 0:
                break
            done += got
        return done
