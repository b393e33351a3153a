# SPDX-License-Identifier: Apache-2.0
"""One pass over guest memory: which pages go out, in which order, and what is done before each.

    span    1 GiB    asked as a whole in round 0: never populated, it is one run of holes
    chunk   64 MiB   re-armed, then asked what of it was ever populated, then hashed and sent

That order is fixed (docs/invariants.md). A page that is populated after it was asked about was
written after it was re-armed, so a dirty source reports it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vmth import kernels
from vmth.channel.interface import PageSender
from vmth.dirty.populated import populated_bits
from vmth.guest import CanReportPopulated, Guest
from vmth.types import Bitmap, Bitmaps, bitmap_words

__all__ = ["CHUNK_BYTES", "MemoryPass"]

#: Re-armed and queued at once. Small keeps the time between re-arming and reading short.
CHUNK_BYTES = 64 << 20
#: Asked first in round 0: a span that was never populated is one run of holes.
SPAN_BYTES = 1 << 30
_RUNS_CAP = 4096


@dataclass(slots=True)
class MemoryPass:
    """Sends rounds of one guest; one thread. ``check`` is called before a chunk and may raise."""

    guest: Guest
    sender: PageSender
    page_bytes: int
    check: Callable[[], None]
    rearm: bool = False  #: re-arm what is read: while the guest runs and is tracked
    _populated_bits: Bitmap = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))

    def __post_init__(self) -> None:
        largest = max(block.npages for block in self.guest.blocks)
        self._populated_bits = np.zeros(bitmap_words(largest), dtype=np.uint64)

    def send(self, todo: Bitmaps, number: int) -> None:
        """Queue every page whose bit is set; in round 0 only those that were ever populated, and
        the rest as holes."""
        for block, bitmap in enumerate(todo):
            self._send_block(block, bitmap, number)

    def _send_block(self, block: int, todo: Bitmap, number: int) -> None:
        npages = self.guest.blocks[block].npages
        span_pages = SPAN_BYTES // self.page_bytes
        for first in range(0, npages, span_pages):
            n = min(span_pages, npages - first)
            if number == 0 and self._is_hole(block, first, n):
                continue
            if number > 0 and kernels.bitmap_count(todo, first, n) == 0:
                continue  # the paused guest waits for each chunk that is looked at
            self._send_span(block, todo, first, n, number)

    def _send_span(self, block: int, todo: Bitmap, start: int, length: int, number: int) -> None:
        chunk_pages = CHUNK_BYTES // self.page_bytes
        for first in range(start, start + length, chunk_pages):
            self.check()
            n = min(chunk_pages, start + length - first)
            if kernels.bitmap_count(todo, first, n) == 0:
                continue
            self._rearm(block, first, n)
            if number == 0:
                self._send_populated(block, first, n)
            else:
                self.sender.send(block, first, n, todo, number)

    def _is_hole(self, block: int, first: int, n: int) -> bool:
        """Send a span as holes if nothing in it was ever populated. The first look is a hint; after
        re-arming, the second one counts."""
        if self._any_populated(block, first, n):
            return False
        self._rearm(block, first, n)
        if self._any_populated(block, first, n):
            return False
        self.sender.send_holes(block, np.array([[first, n]], dtype=np.uint64), 0)
        return True

    def _any_populated(self, block: int, first: int, n: int) -> bool:
        """Asked by chunks: where there is data, the first of them usually tells."""
        chunk_pages = CHUNK_BYTES // self.page_bytes
        return any(
            bool(self._populated(block, at, min(chunk_pages, first + n - at)).any())
            for at in range(first, first + n, chunk_pages)
        )

    def _send_populated(self, block: int, first: int, n: int) -> None:
        populated = self._populated(block, first, n)
        self.sender.send_holes(block, _clear_runs(populated, first, n), 0)
        self.sender.send(block, first, n, self._populated_bits, 0)

    def _populated(self, block: int, first: int, n: int) -> Bitmap:
        """The words of ``_populated_bits`` for pages [first, first + n); ``first`` is a multiple of
        64."""
        out = self._populated_bits
        words = out[first // 64 : (first + n + 63) // 64]
        words.fill(0)
        if isinstance(self.guest, CanReportPopulated):
            self.guest.populated(block, first, n, out)
        else:
            populated_bits(self.guest.blocks[block], first, n, out)
        return words

    def _rearm(self, block: int, first: int, n: int) -> None:
        if self.rearm:
            for source in self.guest.dirty:
                source.rearm(block, first, n)


def _clear_runs(words: Bitmap, first: int, n: int) -> npt.NDArray[np.uint64]:
    """Runs of clear bits among the first ``n``, as {page, npages} with ``first`` added."""
    inverted = np.invert(words)
    found: list[npt.NDArray[np.uint64]] = []
    start = 0
    while start < n:
        out = np.empty((_RUNS_CAP, 2), dtype=np.uint64)
        count, start = kernels.bitmap_runs(inverted, n, start, out)
        found.append(out[:count])
    runs = np.concatenate(found) if found else np.empty((0, 2), dtype=np.uint64)
    runs[:, 0] += np.uint64(first)
    return runs
