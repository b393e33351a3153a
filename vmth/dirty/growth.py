# SPDX-License-Identifier: Apache-2.0
"""How the dirty set grows while a round's pages are on their way, by looking at it a few times.

    round  |--- pages are re-armed, queued ---|--- under way --------------------|
    looks                                     o (10 ms or later) o  o   o    o     o

Not before all of the round's pages are re-armed: those that wait for that count as dirty. Each look
comes a quarter later than the one before, near enough to tell a set that is nearly all dirty from
one that grows; and no sooner than fifty times what that one took, which was a pass over the dirty
log or the page table.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from vmth import kernels
from vmth.guest import CanPeek, Guest
from vmth.types import Bitmap, new_bitmaps

__all__ = ["DirtyGrowth"]

log = logging.getLogger(__name__)

#: The first look, and later for more memory: a look takes as long as there is memory.
FIRST_NS = 10_000_000
FIRST_NS_PER_GIB = 1_000_000
#: Looks take at most one part in so many of a round.
COST_PARTS = 50
GIB = 1 << 30


@dataclass(slots=True)
class DirtyGrowth:
    """Of one guest whose rounds one thread makes; see ``RoundStats.dirty_growth``."""

    guest: Guest
    clock: Callable[[], int]
    _seen: list[tuple[int, int]] = field(default_factory=list)
    _possible: bool = True
    _began_ns: int = 0
    _due_ns: int | None = None  #: the next look; None: none in this round
    _bitmaps: list[Bitmap] = field(default_factory=list)

    def begin(self, started_ns: int) -> None:
        """Of a round that began then, all pages are re-armed."""
        self._began_ns = started_ns
        if self._possible:
            used_bytes = sum(block.used_length for block in self.guest.blocks)
            first_ns = FIRST_NS + used_bytes * FIRST_NS_PER_GIB // GIB
            self._due_ns = max(started_ns + first_ns, self.clock())

    def end(self) -> tuple[tuple[int, int], ...]:
        """What was seen of the round that ends; nothing is looked at until another begins."""
        seen, self._seen, self._due_ns = tuple(self._seen), [], None
        return seen

    def wait_ns(self, most_ns: int) -> int:
        """How long to wait for the round's end before ``look()`` is worth a call."""
        if self._due_ns is None:
            return most_ns
        return max(1, min(most_ns, self._due_ns - self.clock()))

    def look(self) -> None:
        """Look, if it is time. Raises nothing: whoever fetches next learns what is wrong."""
        now_ns = self.clock()
        if self._due_ns is None or now_ns < self._due_ns:
            return
        pages = self._peek()
        if pages is None:
            self._possible, self._due_ns = False, None
            return
        took_ns = self.clock() - now_ns
        self._seen.append((now_ns - self._began_ns, pages))
        self._due_ns = now_ns + max((now_ns - self._began_ns) // 4, COST_PARTS * took_ns)

    def _peek(self) -> int | None:
        if not self._bitmaps:
            self._bitmaps = new_bitmaps(self.guest.blocks)
        for bitmap in self._bitmaps:
            bitmap.fill(0)
        for source in self.guest.dirty:
            try:
                if not (isinstance(source, CanPeek) and source.peek(self._bitmaps)):
                    return None
            except Exception as error:  # an embedder's may raise anything
                log.info("a dirty source cannot be looked at: %s", error)
                return None
        return sum(
            kernels.bitmap_count(bitmap, 0, block.npages)
            for block, bitmap in zip(self.guest.blocks, self._bitmaps, strict=True)
        )
