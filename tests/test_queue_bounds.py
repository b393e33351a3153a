# SPDX-License-Identifier: Apache-2.0
"""The bounds of what may be under way: a link of any length is filled within seconds, and a stop
finds little more than the link itself holds. Links are simulated in steps of a millisecond."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from vmth.qemu.queue_bounds import (
    GROWTH,
    KEPT_NS,
    MIN_AHEAD_BYTES,
    MIN_WINDOW_BYTES,
    MOST_QUEUED_NS,
    NEAR_GROWTH,
    NEAR_QUEUED_NS,
    QueueBounds,
)
from vmth.stats import ChannelCounters, TransferCounters

MS = 1_000_000
LIMIT_NS = 300 * MS
LOOK_MS = 50


@dataclass
class FarLink:
    """A sender that always has more, held by its window; a queue in front of the link."""

    bps: float
    rtt_ms: int
    window: float = 4 << 20
    sent: float = 0.0
    acked: float = 0.0
    now_ms: int = 0
    on_the_way: list[tuple[int, float]] = field(default_factory=list)  #: (due, bytes)
    opening_ms: int = 0
    near: bool = False
    buffer_ms: int = 0  #: of the link's queue; what does not fit is sent when it does
    queued: float = 0.0
    bounds: QueueBounds = field(default_factory=QueueBounds)
    most_queued: float = 0.0

    def run(self, ms: int) -> float:
        """bytes/s that landed."""
        before = self.acked
        for _ in range(ms):
            self.now_ms += 1
            while self.on_the_way and self.on_the_way[0][0] <= self.now_ms:
                self.acked += self.on_the_way.pop(0)[1]
            room = max(0.0, self.window - (self.sent - self.acked))
            rate = self.bps / 1000
            taken = min(room, rate + max(0.0, self.buffer_ms * rate - self.queued))
            self.sent += taken
            nbytes = min(rate, self.queued + taken)
            self.queued += taken - nbytes
            self.on_the_way.append((self.now_ms + max(1, self.rtt_ms), nbytes))
            if self.now_ms % LOOK_MS == 0:
                self._look()
        return (self.acked - before) / ms * 1000

    def _look(self) -> None:
        opening = self.now_ms <= self.opening_ms
        told = self.bounds.look(
            self.now_ms * MS,
            TransferCounters(
                acked_bytes=int(self.acked),
                wire_bytes=int(self.sent),
                rtt_ns=int(self.rtt_ms * MS + self.queued / self.bps * 1e9),
                base_rtt_ns=self.rtt_ms * MS,
                channels=(ChannelCounters(0, wire_bytes=1, opening=opening),),
            ),
            (0, 0),
            0.0,
            self.near,
            LIMIT_NS,
        )
        if told is not None:
            self.window = told.window_bytes
            self.most_queued = max(self.most_queued, told.ahead_bytes)


@pytest.mark.parametrize("bps", [1e6, 12.5e6, 125e6, 1.25e9])
@pytest.mark.parametrize("rtt_ms", [0, 1, 20, 100, 250])
@pytest.mark.parametrize("start", [64 << 10, 4 << 20, 64 << 20])
def test_a_link_of_any_length_is_filled(bps: float, rtt_ms: int, start: int) -> None:
    link = FarLink(bps, rtt_ms, window=start)
    link.run(max(2500, 40 * rtt_ms))
    assert link.run(1000) > 0.95 * bps
    # And a stop finds no more than was meant, however fast the link seemed.
    holds = bps * max(1, rtt_ms) / 1000
    queued = bps * MOST_QUEUED_NS / 1e9
    assert link.window <= max(MIN_WINDOW_BYTES, 1.1 * (GROWTH * holds + queued))
    assert link.most_queued <= max(MIN_AHEAD_BYTES, 1.1 * 2 * queued)


@pytest.mark.parametrize("rtt_ms", [1, 50])
def test_little_more_than_the_link_holds_is_under_way_near_the_end(rtt_ms: int) -> None:
    link = FarLink(125e6, rtt_ms)
    link.run(3000)
    link.near = True
    assert link.run(1000) > 0.95 * 125e6
    room = 125e6 * (NEAR_GROWTH * rtt_ms * MS + NEAR_QUEUED_NS) / 1e9
    assert link.window <= max(MIN_WINDOW_BYTES, 1.1 * room)


@pytest.mark.parametrize("near", [False, True])
def test_a_window_does_not_feed_on_the_queue_that_it_makes(near: bool) -> None:
    """Before a link with a deep buffer the round trip has our own queue in it."""
    link = FarLink(12.5e6, 50, buffer_ms=2000)
    link.run(5000)
    link.near = near
    assert link.run(20_000) > 0.95 * 12.5e6
    holds = 12.5e6 * 0.05
    growth, most_ns = (NEAR_GROWTH, NEAR_QUEUED_NS) if near else (GROWTH, MOST_QUEUED_NS)
    assert link.window <= 1.1 * (growth * holds + 12.5e6 * most_ns / 1e9)
    assert link.queued <= 1.2 * holds


def test_a_qemu_that_is_silent_at_first_says_nothing_of_the_link() -> None:
    link = FarLink(0.001, 50, window=64 << 20)
    link.run(3000)
    assert link.window == 64 << 20
    link.bps, link.queued = 125e6, 0.0
    link.run(2000)
    assert link.run(1000) > 0.95 * 125e6


def test_a_link_that_got_slower_is_believed_after_a_while() -> None:
    link = FarLink(125e6, 50)
    link.run(3000)
    fast = link.window
    link.bps = 25e6
    link.run(KEPT_NS // MS + 1000)
    # What the whole round has brought so far still counts, of which most was the fast time's.
    assert link.window < 0.7 * fast


def test_what_lands_while_the_windows_open_tells_nothing() -> None:
    link = FarLink(125e6, 50, window=100_000, opening_ms=1000)
    link.run(1000)
    assert link.window == 100_000
    assert link.bounds.most_bps == 0
    link.window = 64 << 20
    link.run(60)
    assert link.window == 64 << 20  # two round trips tell the rate, not one
    link.run(2000)
    assert link.run(1000) > 0.95 * 125e6


@pytest.mark.parametrize("near", [False, True])  # a small guest is near its end at once
@pytest.mark.parametrize("rtt_ms", [20, 100])
def test_nothing_is_bounded_while_tcp_gets_up_to_speed(rtt_ms: int, near: bool) -> None:
    """Its window doubles with each round trip: what landed meanwhile is not the link's rate."""
    link = FarLink(125e6, rtt_ms, window=64 << 20, near=near)
    tcp = 80_000.0
    while tcp < 125e6 * rtt_ms / 1000:
        link.bps = tcp / rtt_ms * 1000
        link.run(rtt_ms)
        assert link.window == 64 << 20
        tcp *= 2
    link.bps = 125e6
    link.run(20 * rtt_ms)
    assert link.window < 64 << 20
    assert link.run(1000) > 0.95 * 125e6
