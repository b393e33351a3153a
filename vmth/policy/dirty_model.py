# SPDX-License-Identifier: Apache-2.0
"""How many pages a guest dirties in a time: fitted to what the rounds have left, and to what was
seen of the newest one while it went on.

Rounds tell one number each. Between them writes are modelled as uniform over a working set: in a
time t they dirty ``W (1 - e^(-w t / W))`` distinct pages, with the first-touch rate ``w`` and the
working set ``W`` fitted to two rounds of different length. It is linear where writes are few and
saturates where they repeat.

Where the dirty source can be looked at (``CanPeek``), the newest round tells its course, which is
taken as it is: a guest that goes over its memory in turns dirties in proportion until it has been
everywhere, and none of that is uniform.

    pages |              _____ W      T: the end of the newest round
        W |          _o-'             o: seen meanwhile
          |       o                   up to the first: uniform, through it and a later one
          |    o                      behind the end: uniform, through the rounds' ends
          +----+--+----+--- t
                       T

Up to the first look the set grows in proportion where the looks tell that it is written to in
turns. Looks that all come near the round's end (a large set's: nothing is looked at before all of
it is queued) tell no more than the end. Pure: no clock, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vmth.stats import RoundStats

__all__ = ["DirtyModel", "SeenGrowth", "UniformWrites", "fit_dirty_model"]

NS = 1_000_000_000
#: What was seen tells from so many pages on: fewer come and go by chance.
ENOUGH_PAGES = 256
#: Two samples tell the curvature if one took so many times as long...
LONGER = 1.2
#: ...and the same working set if it has no more pages than that.
SAME_SET = 1.02
#: Nearly all of a set is dirty where no more than that is left.
LEFT = 0.005
#: Of two looks one comes so much later, too: a guest rests for moments.
APART_NS = 20_000_000


class DirtyModel(Protocol):
    """Distinct pages dirtied in a time."""

    @property
    def first_touch_pps(self) -> float:
        """Pages/s while nothing is dirty yet. Infinite where every round dirtied the whole working
        set, so that nothing is known but that it is fast."""

    @property
    def working_set_pages(self) -> float:
        """Infinite where that is not to be seen yet."""

    def dirty_pages(self, duration_ns: float) -> float:
        """Expected distinct pages after ``duration_ns`` > 0."""

    def most_pps(self, duration_ns: float) -> float:
        """The most pages/s over that time, or a longer one of which it is known."""

    def slowed(self, share: float) -> DirtyModel:
        """Of the guest that runs for that share of the time."""


@dataclass(frozen=True, slots=True)
class UniformWrites:
    """See the module. ``working_set_pages`` is infinite for the linear model, ``first_touch_pps``
    where all of the set is dirtied at once."""

    first_touch_pps: float
    working_set_pages: float

    def dirty_pages(self, duration_ns: float) -> float:
        touched = self.first_touch_pps * duration_ns / NS
        if math.isinf(self.working_set_pages):
            return touched
        return -self.working_set_pages * math.expm1(-touched / self.working_set_pages)

    def most_pps(self, duration_ns: float) -> float:
        return self.dirty_pages(duration_ns) / duration_ns * NS

    def slowed(self, share: float) -> UniformWrites:
        return UniformWrites(self.first_touch_pps * share, self.working_set_pages)


@dataclass(frozen=True, slots=True)
class SeenGrowth:
    """``points``: (ns, pages), both rising, of which the last is the round's end."""

    head: UniformWrites  #: before the first point
    points: tuple[tuple[float, float], ...]
    tail: UniformWrites  #: behind the last one

    @property
    def first_touch_pps(self) -> float:
        return self.head.first_touch_pps

    @property
    def working_set_pages(self) -> float:
        return self.tail.working_set_pages

    def dirty_pages(self, duration_ns: float) -> float:
        if duration_ns <= self.points[0][0]:
            return self.head.dirty_pages(duration_ns)
        for (from_ns, first), (until_ns, last) in zip(self.points, self.points[1:], strict=False):
            if duration_ns <= until_ns:
                return first + (last - first) * (duration_ns - from_ns) / (until_ns - from_ns)
        return self.tail.dirty_pages(duration_ns)

    def most_pps(self, duration_ns: float) -> float:
        """A guest that was quiet at first and is not any more is judged by what it has become."""
        rates = [pages / ns * NS for ns, pages in self.points if ns > duration_ns]
        return max(self.dirty_pages(duration_ns) / duration_ns * NS, *rates, 0.0)

    def slowed(self, share: float) -> SeenGrowth:
        points = tuple((ns / share, pages) for ns, pages in self.points)
        return SeenGrowth(self.head.slowed(share), points, self.tail.slowed(share))


def fit_dirty_model(rounds: Sequence[RoundStats]) -> DirtyModel:
    """Fit these rounds: the newest fixes the level, the most different one the curvature, unless
    the newest was looked at while it went on.

    Without two rounds of clearly different length, or when the longer one dirtied less (the
    workload changed), the newest round alone gives a linear model.
    """
    samples = [
        (float(round_.duration_ns), float(round_.dirty_pages))
        for round_ in rounds
        if round_.duration_ns > 0
    ]
    if not samples:
        return UniformWrites(0.0, math.inf)
    newest = samples[-1]
    ends = _through(newest, max(samples, key=lambda sample: abs(math.log(sample[0] / newest[0]))))
    seen = _rising(rounds[-1].dirty_growth, newest) if rounds[-1].duration_ns > 0 else ()
    if not seen or seen[0][0] * LONGER > newest[0]:
        return ends
    points = (*seen, newest)
    return SeenGrowth(_head(points), points, ends)


def _head(points: Sequence[tuple[float, float]]) -> UniformWrites:
    """Neither a set that is flat at first and grows later is uniform (it was not all dirty at once)
    nor one of which nothing is left when much was just before: it is written to in turns."""
    first, end = points[0], points[-1]
    apart_ns = max(LONGER * first[0], first[0] + APART_NS)
    second = next((point for point in points if point[0] >= apart_ns), end)
    head = _through(first, second)
    late = math.isinf(head.first_touch_pps) and end[1] > SAME_SET * first[1]
    if late or _in_turns(first, second, end):
        return UniformWrites(first[1] / first[0] * NS, math.inf)
    return head


def _in_turns(
    first: tuple[float, float], second: tuple[float, float], end: tuple[float, float]
) -> bool:
    """Uniform writes that have been nearly everywhere at the second look had left little at the
    first: of n times the time that leaves a share of s, 1/n of it leaves s to the 1/n."""
    if second == end or second[1] < (1 - LEFT) * end[1]:
        return False
    left = math.pow(LEFT, first[0] / second[0])
    return first[1] < (1 - left) / SAME_SET * end[1]


def _through(level: tuple[float, float], other: tuple[float, float]) -> UniformWrites:
    """Two samples of (ns, pages): the first is met exactly."""
    level_ns, level_pages = level
    short_ns, short_pages = min(level, other)
    long_ns, long_pages = max(level, other)
    linear = UniformWrites(level_pages / level_ns * NS, math.inf)
    if long_ns < LONGER * short_ns or short_pages == 0 or long_pages < 0.98 * short_pages:
        return linear
    ratio = long_pages / short_pages
    if ratio <= SAME_SET:
        return UniformWrites(math.inf, level_pages)
    rate = _solve_saturation(ratio, long_ns / NS, short_ns / NS)
    working_set = level_pages / -math.expm1(-rate * level_ns / NS)
    return UniformWrites(rate * working_set, working_set)


def _rising(
    seen: Sequence[tuple[int, int]], end: tuple[float, float]
) -> tuple[tuple[float, float], ...]:
    """What of it tells: enough pages, each more than the one before and no more than at the end,
    which was counted exactly. A look may miss pages, and they show again."""
    points: list[tuple[float, float]] = []
    before_ns, before_pages = 0.0, float(ENOUGH_PAGES - 1)
    for ns, pages in seen:
        if before_ns < ns < end[0] and before_pages < pages <= end[1]:
            points.append((float(ns), float(pages)))
            before_ns, before_pages = float(ns), float(pages)
    return tuple(points)


def _solve_saturation(ratio: float, long_s: float, short_s: float) -> float:
    """a (1/s) with (1 - e^(-a long)) / (1 - e^(-a short)) == ratio. The left side falls from
    long/short at a = 0 to 1 at infinity; halve the interval of log(a). A ratio at or above
    long/short gives the lowest a, at which the model is as good as linear."""
    low, high = 1e-6 / long_s, 50.0 / short_s
    for _ in range(60):
        middle = math.sqrt(low * high)
        if math.expm1(-middle * long_s) / math.expm1(-middle * short_s) > ratio:
            low = middle
        else:
            high = middle
    return low
