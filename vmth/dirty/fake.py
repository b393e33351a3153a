# SPDX-License-Identifier: Apache-2.0
"""A dirty source without memory, for tests of whatever drives one: ours and an embedder's."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from vmth._native import _kernels
from vmth.errors import UsageError
from vmth.types import Bitmaps, RamBlock, new_bitmaps

__all__ = ["FakeDirtySource", "Write"]

#: (block, page, npages)
Write = tuple[int, int, int]


class FakeDirtySource:
    """Reports the writes it is told of. ``write`` may come from any thread.

    ``fetch_clears``: a page is reported once and ``rearm`` does nothing (userfaultfd, KVM's ring);
    otherwise it is reported until it is re-armed (KVM's log). ``script`` holds for each coming
    fetch the writes that happen just before it; afterwards only ``write`` adds any.
    """

    def __init__(
        self,
        blocks: Sequence[RamBlock],
        *,
        fetch_clears: bool = False,
        script: Iterable[Sequence[Write]] = (),
    ) -> None:
        self.calls: list[
            tuple[str | int, ...]
        ] = []  #: ("start",), ("rearm", 0, 64, 2), ... in order
        self.started = False
        self._blocks = tuple(blocks)
        self._fetch_clears = fetch_clears
        self._script = deque(script)
        self._failures: dict[str, Exception] = {}
        self._lock = threading.Lock()  # guards _dirty, _reported and started
        self._dirty = new_bitmaps(blocks)
        self._reported = new_bitmaps(blocks)  # by a fetch: rearm clears no others

    def write(self, block: int, page: int, npages: int = 1) -> None:
        """The guest writes these pages; seen only while the source is started."""
        if page < 0 or npages < 0 or page + npages > self._blocks[block].npages:
            raise UsageError(
                f"pages [{page}, {page + npages}) of block {block}, "
                f"which has {self._blocks[block].npages}"
            )
        with self._lock:
            if self.started:
                _kernels.bitmap_set_range(self._dirty[block], page, npages)

    def fail_next(self, method: str, error: Exception) -> None:
        """Let the next call of ``method`` raise ``error`` and do nothing else."""
        self._failures[method] = error

    def start(self) -> None:
        self._called("start")
        if self.started:
            raise UsageError("the fake source is started already")
        with self._lock:
            self._dirty = new_bitmaps(self._blocks)
            self._reported = new_bitmaps(self._blocks)
            self.started = True

    def fetch(self, bitmaps: Bitmaps) -> None:
        self._called("fetch")
        self._require_started()
        for write in self._script.popleft() if self._script else ():
            self.write(*write)
        with self._lock:
            for into, dirty, reported in zip(bitmaps, self._dirty, self._reported, strict=True):
                np.bitwise_or(into, dirty, out=into)
                np.bitwise_or(reported, dirty, out=reported)
                if self._fetch_clears:
                    dirty[:] = 0

    def peek(self, bitmaps: Bitmaps) -> bool:
        """Without the script's writes, which come with a fetch."""
        self._called("peek")
        self._require_started()
        with self._lock:
            for into, dirty in zip(bitmaps, self._dirty, strict=True):
                np.bitwise_or(into, dirty, out=into)
        return True

    def rearm(self, block: int, page: int, npages: int) -> None:
        self._called("rearm", block, page, npages)
        self._require_started()
        if not self._fetch_clears:
            with self._lock:
                kept = self._reported[block].copy()
                _kernels.bitmap_clear_range(kept, page, npages)
                self._dirty[block] &= ~(self._reported[block] ^ kept)
                self._reported[block] = kept

    def stop(self) -> None:
        self._called("stop")
        with self._lock:
            self.started = False

    def _called(self, method: str, *arguments: int) -> None:
        self.calls.append((method, *arguments))
        error = self._failures.pop(method, None)
        if error is not None:
            raise error

    def _require_started(self) -> None:
        if not self.started:
            raise UsageError("the fake source is not started")
