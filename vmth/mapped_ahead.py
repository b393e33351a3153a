# SPDX-License-Identifier: Apache-2.0
"""Shared memory that is mapped while nobody waits for it.

A mapping that is made for a transfer gets its page tables while the pages land, at 50 to 110 us for
each MiB (``csrc/xfer/prefault.hpp``). Made before, they cost that transfer nothing.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable

from vmth.memory import make_page_tables, map_shared

__all__ = ["MappedAhead"]

#: Of one step, about a millisecond, for which ``take()`` may wait.
PIECE_BYTES = 8 << 20


class MappedAhead:
    """``MadeMapping`` of bytes [offset, offset + nbytes) of a file, whole pages. Any thread.

    Like every mapping it keeps the memory of a file that everybody else has let go of: ``close()``
    one that is not wanted any more. Raises OSError if the kernel does not map it, ValueError for a
    file that is too short.
    """

    def __init__(self, fd: int, offset: int, nbytes: int) -> None:
        status = os.fstat(fd)
        self._place = (status.st_dev, status.st_ino, offset, nbytes)
        self._lock = threading.Lock()
        self._wanted = False  #: a lock that is let go and taken again keeps others waiting
        self._complete = False
        self._mapped: mmap.mmap | None = map_shared(fd, offset, nbytes, writable=True)

    def is_of(self, fd: int, offset: int, nbytes: int) -> bool:
        """The same bytes of the same file, by whatever descriptor?"""
        status = os.fstat(fd)
        return self._place == (status.st_dev, status.st_ino, offset, nbytes)

    def populate(self, goes_on: Callable[[], bool] = lambda: True) -> bool:
        """Make page tables of what is in memory, as long as ``goes_on()`` and nobody wants it;
        holes stay holes. True if all has its page tables then. One thread; not for a file on a
        disk, which would be read."""
        nbytes, whole = self._place[3], True
        for at in range(0, nbytes, PIECE_BYTES):
            with self._lock:
                if self._wanted or self._mapped is None or not goes_on():
                    return False
                try:
                    whole &= make_page_tables(self._mapped, at, min(PIECE_BYTES, nbytes - at))
                except OSError:  # an older kernel: they are made when pages land
                    return False
        with self._lock:
            self._complete = whole
        return whole

    def take(self) -> tuple[mmap.mmap, bool] | None:
        self._wanted = True
        with self._lock:
            mapped, self._mapped = self._mapped, None
            return None if mapped is None else (mapped, self._complete)

    def close(self) -> None:
        """Let go of it, unless somebody has it. Idempotent."""
        self.take()
