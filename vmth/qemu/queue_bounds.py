# SPDX-License-Identifier: Apache-2.0
"""How much may be under way, and how much may wait to be, so that little is when QEMU stops.

What is queued at the pause is downtime: at most a tenth of its limit, and no more than some
milliseconds, beyond what the link itself holds (bandwidth x RTT). How fast the link is shows in
what it acknowledges, but a window, a slow reader or a QEMU that waits makes it look slower than it
is, and a window made of that would hold it there: on a far link a round trip brings a window's
worth, whatever the link could carry. For what the link holds the most of the last seconds counts,
therefore, and some times that, so that it can grow. Pure: time is an argument.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from vmth.stats import TransferCounters

__all__ = ["START_AHEAD_BYTES", "Bounds", "QueueBounds"]

#: Read of QEMU and not read by the page channels yet, at least; until the link is known, at most.
MIN_AHEAD_BYTES = 256 << 10
START_AHEAD_BYTES = 4 << 20
MIN_WINDOW_BYTES = 256 << 10
#: What may be under way when the guest is stopped: far from a pass's end, where only an order stops
#: it, and near it, where QEMU does.
MOST_QUEUED_NS = 8_000_000
NEAR_QUEUED_NS = 2_000_000
#: So many times what a round trip brought may be under way on a far link. On others the queue is
#: room enough to grow, and more than needed costs the caches.
GROWTH = 2.0
NEAR_GROWTH = 1.25
#: A rate is of at least so long, and of two round trips: acknowledgements come in bursts.
MEASURED_NS = 20_000_000
#: From so far on TCP takes a second to get up to speed: nothing is bounded before it has.
FAR_NS = 5_000_000
#: It has when in so many times the time of a rate it did not grow by a quarter.
SETTLES = 3
GROWS = 1.25
#: The most of so long counts.
KEPT_NS = 10_000_000_000
_SECOND_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Bounds:
    window_bytes: int  #: under way: given to sockets and not landed
    ahead_bytes: int  #: read of QEMU, and not under way yet


@dataclass(slots=True)
class QueueBounds:
    """Of one migration; one thread. Looked at several times a second."""

    _opened: tuple[int, int] = (0, 0)  #: as below, while the channels' windows last grew
    _marks: deque[tuple[int, int]] = field(default_factory=deque)  #: (ns, bytes acknowledged)
    _most: deque[tuple[int, float]] = field(default_factory=deque)  #: (ns, bytes/s), falling
    _grew: tuple[int, float] = (0, 0.0)  #: (ns, bytes/s)
    _settled: bool = False

    def look(
        self,
        now_ns: int,
        counters: TransferCounters,
        round_began: tuple[int, int],
        late_bps: float,
        near: bool,
        downtime_limit_ns: int,
    ) -> Bounds | None:
        """None: not enough is known to bound anything anew. ``round_began``: (ns, bytes that had
        been acknowledged); ``late_bps``: the most of the last rounds; ``near``: QEMU may stop its
        guest soon."""
        if counters.opening:  # little is under way, and what lands does not tell the link
            self._opened = now_ns, counters.acked_bytes
            self._marks.clear()
            self._marks.append(self._opened)
            return None
        acked_bytes, rtt_ns = counters.acked_bytes, counters.rtt_ns
        self._see(now_ns, acked_bytes, rtt_ns)
        began_ns, began_bytes = max(round_began, self._opened)
        lasted_ns = now_ns - began_ns
        far = counters.base_rtt_ns >= FAR_NS
        if lasted_ns < MEASURED_NS or (far and not self._up_to_speed(now_ns, rtt_ns)):
            return None
        bps = max(late_bps, (acked_bytes - began_bytes) * _SECOND_NS / lasted_ns)
        most_ns = min(downtime_limit_ns // 10, NEAR_QUEUED_NS if near else MOST_QUEUED_NS)
        queued = bps * most_ns / _SECOND_NS
        trip = bps * rtt_ns / _SECOND_NS
        if far:
            # Not the round trip as it is now: that has what is queued in it.
            most = max(bps, self.most_bps) * (NEAR_GROWTH if near else GROWTH)
            trip = most * counters.base_rtt_ns / _SECOND_NS
        return Bounds(
            max(MIN_WINDOW_BYTES, int(trip + queued)),
            # A far link holds much, but not of what has not gone out.
            max(MIN_AHEAD_BYTES, int(queued + min(trip, queued))),
        )

    @property
    def most_bps(self) -> float:
        """What landed in a second, at most, of late; 0: not known yet."""
        return self._most[0][1] if self._most else 0.0

    def _up_to_speed(self, now_ns: int, rtt_ns: int) -> bool:
        """Once and for all."""
        grew_ns, grew_bps = self._grew
        if self.most_bps > GROWS * grew_bps:
            self._grew = now_ns, self.most_bps
        elif grew_bps:
            self._settled |= now_ns - grew_ns >= SETTLES * max(MEASURED_NS, 2 * rtt_ns)
        return self._settled

    def _see(self, now_ns: int, acked_bytes: int, rtt_ns: int) -> None:
        marks, most, span_ns = self._marks, self._most, max(MEASURED_NS, 2 * rtt_ns)
        marks.append((now_ns, acked_bytes))
        while len(marks) > 2 and now_ns - marks[1][0] >= span_ns:
            marks.popleft()
        began_ns, began_bytes = marks[0]
        if now_ns - began_ns < span_ns:
            return
        rate = (acked_bytes - began_bytes) * _SECOND_NS / (now_ns - began_ns)
        while most and most[-1][1] <= rate:
            most.pop()
        most.append((now_ns, rate))
        while len(most) > 1 and now_ns - most[0][0] > KEPT_NS:
            most.popleft()
