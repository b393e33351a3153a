# SPDX-License-Identifier: Apache-2.0
"""Every byte of two memories, compared without populating a page of either.

Both are memfds, read with ``preadv``: reading a hole through a mapping would give it a page. A
stretch that is a hole in both is skipped, since both read as zeros there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from vmth.errors import VerificationError
from vmth.types import RamBlock

__all__ = ["compare_memories"]

_CHUNK_BYTES = 4 << 20
_PAGE_BYTES = 4096


def compare_memories(blocks: Sequence[RamBlock], ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Bytes compared, holes included. ``ours`` and ``theirs`` are memfds, one a block; neither
    guest runs. Raises VerificationError naming the first page that differs, OSError where one
    cannot be read."""
    for index, block in enumerate(blocks):
        _compare_block(block, ours[index], theirs[index])
    return sum(block.used_length for block in blocks)


def _compare_block(block: RamBlock, ours: int, theirs: int) -> None:
    here, there = bytearray(_CHUNK_BYTES), bytearray(_CHUNK_BYTES)
    offset = 0
    while True:
        offset = min(_next_data(ours, offset), _next_data(theirs, offset))
        if offset >= block.used_length:
            return
        nbytes = min(_CHUNK_BYTES, block.used_length - offset)
        _read(ours, here, offset, nbytes)
        _read(theirs, there, offset, nbytes)
        if here != there:
            page = (offset + _first_difference(here, there)) // _PAGE_BYTES
            raise VerificationError(
                f"byte comparison: page {page} of ramblock {block.idstr!r} differs between "
                "the paused source and the destination"
            )
        offset += nbytes


def _next_data(fd: int, offset: int) -> int:
    """The first offset from ``offset`` on that is no hole; past the end when all that follows is
    one."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return 1 << 62


def _read(fd: int, into: bytearray, offset: int, nbytes: int) -> None:
    """Fill ``into``, which keeps its length, so that both buffers compare as wholes."""
    done = 0
    while done < nbytes:
        got = os.preadv(fd, [memoryview(into)[done:nbytes]], offset + done)
        if got == 0:
            raise OSError(
                errno.EIO, f"memory ends at {offset + done}, asked up to {offset + nbytes}"
            )
        done += got


def _first_difference(here: bytearray, there: bytearray) -> int:
    for at in range(0, len(here), _PAGE_BYTES):
        if here[at : at + _PAGE_BYTES] != there[at : at + _PAGE_BYTES]:
            return at
    return 0
