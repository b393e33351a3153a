# SPDX-License-Identifier: Apache-2.0
"""The round loop: everything once, then what was dirtied meanwhile, until the rest fits.

It reads as the algorithm and owns no socket, thread or clock: the guest, the page sender, the
policy and the clock are handed in, so it runs on fakes. How one round goes over memory is
vmth/memory_pass.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from vmth import kernels
from vmth.channel.interface import PageSender
from vmth.dirty.growth import DirtyGrowth
from vmth.errors import NotConvergedError, VerificationError
from vmth.events import (
    Event,
    GuestPaused,
    GuestResumed,
    RepairStarted,
    RoundFinished,
    RoundStarted,
    Throttled,
)
from vmth.guest import CanNote, Guest, expected_state_bytes
from vmth.guest_throttle import GuestThrottle
from vmth.memory_pass import MemoryPass
from vmth.policy.forecast import HANDOVER_NS, first_handover_ns, known_downtime_ns
from vmth.policy.interface import Action, CanForesee, Decision, OnStall, Policy, RoundView
from vmth.rounds import FinalPass, RoundTools, SealAhead
from vmth.stats import RoundStats, round_stats
from vmth.tuning import Tuning
from vmth.types import Bitmap, new_bitmaps
from vmth.units import format_duration

__all__ = ["PreCopy", "make_precopy"]

#: How often a wait for a round's end looks at the time.
LOOK_EVERY_NS = 100_000_000
#: Last pages that take so many times the downtime limit, or their forecast, are given up.
LATE_FACTOR = 10
ROUNDS_KEPT = 1000
#: Repair passes of damaged pages while paused before giving up.
MAX_REPAIRS = 3
FAR_NS, FAR_TRIPS = 5_000_000, 2
#: Two packets of the smallest size, so that one is on the way while the other is read.
MIN_WINDOW_BYTES = 256 << 10


@dataclass(slots=True)
class PreCopy:
    """One pass over one guest. Not reusable; one thread."""

    guest: Guest
    sender: PageSender
    policy: Policy
    tuning: Tuning
    clock: Callable[[], int]
    emit: Callable[[Event], None]
    page_bytes: int
    live: bool
    get_ready: Callable[[], None]  #: for the pause, while the guest runs still
    pause_guest: Callable[[], bool]  #: guest.pause(), by way of the handover's table
    resume_guest: Callable[[], None]
    job_started_ns: int | None = None
    journal_ns: int = 0  #: what a durable record takes here
    seal_ahead: SealAhead | None = None
    delta_cache_pages: int = 0  #: of which both ends keep a base; 0: not known
    handover_ns: int = 0  #: what the last handovers took; 0: not known
    rounds: list[RoundStats] = field(default_factory=list)  #: the first, and the last ROUNDS_KEPT
    paused: bool = False
    was_running: bool = False
    notes: list[str] = field(default_factory=list)  #: of the dirty sources, as of the last fetch
    throttle: GuestThrottle = field(init=False)
    _todo: list[Bitmap] = field(default_factory=list)
    _resent: list[Bitmap] = field(default_factory=list)  #: what round 1 sends, while it does
    _resent_pages: int | None = None  #: see RoundView
    taken_back_ns: int = 0  #: pauses that ended with the guest running here again
    _next_round: int = 0
    _dirty_pages: int = 0  #: set bits of _todo
    _pause_started_ns: int = 0
    _pause_limit_ns: int = 0  #: how long the last pages may take; 0: as long as they need
    _failed_rechecks: int = 0
    _started_ns: int = 0
    _closed: bool = False
    _pass: MemoryPass = field(init=False)
    _growth: DirtyGrowth = field(init=False)

    def __post_init__(self) -> None:
        self.throttle = GuestThrottle(self.guest)
        self._growth = DirtyGrowth(self.guest, self.clock)
        self._pass = MemoryPass(self.guest, self.sender, self.page_bytes, self._check_late)

    def run(self) -> FinalPass:
        """Returns with the guest paused and all pages landed. Tracking goes on, since stopping it
        would be downtime: call ``close()`` when the guest runs somewhere again. After an exception
        the caller resumes the guest if it is paused."""
        self.tuning.state_bytes = expected_state_bytes(self.guest)
        self._started_ns = self.clock()
        return self._run_live() if self.live else self._run_cold()

    @property
    def throttle_percent(self) -> int:
        return self.throttle.percent

    def let_go(self) -> None:
        if self.throttle_percent:
            with contextlib.suppress(Exception):  # close() tries again, and tells
                self._throttle(0)

    def close(self) -> None:
        """Let the throttle go and stop the dirty sources: all of them, whatever one raises; the
        first error is raised then. Only the first call does anything."""
        if self._closed or not self.live:
            return
        self._closed = True
        steps: list[Callable[[], None]] = [source.stop for source in self.guest.dirty]
        if self.throttle_percent:
            steps.insert(0, lambda: self._throttle(0))
        first: Exception | None = None
        for step in steps:
            try:
                step()
            except Exception as error:
                first = first or error
        if first is not None:
            raise first

    def _run_cold(self) -> FinalPass:
        pause_started_ns = self._pause()
        paused_ns = self.clock()
        self._everything()
        self._send_last()
        return self._final(pause_started_ns, paused_ns)

    def _run_live(self) -> FinalPass:
        for source in self.guest.dirty:
            source.start()
        self.throttle.begin()
        self._everything()
        while True:
            decision = self._send_round()
            assert decision is not None
            if decision.action is Action.CONTINUE:
                continue
            if decision.action is Action.THROTTLE:
                self._throttle(decision.throttle_percent)
                continue
            if decision.action is Action.GIVE_UP:
                raise NotConvergedError(decision.reason)
            final = self._switch_over(decision)
            if final is not None:
                return final

    def _switch_over(self, decision: Decision) -> FinalPass | None:
        """Pause, look again at what is left, and send it; None when it had grown too much."""
        pause_started_ns = self._pause()
        self._fetch()
        self._resent_pages = None  # it was of the set before
        paused_ns = self.clock()
        view = self._view()
        verdict = self.policy.recheck(view, decision.forecast)
        if verdict.action is Action.GIVE_UP:
            raise NotConvergedError(verdict.reason)
        if verdict.action is not Action.SWITCH_OVER:
            self._failed_rechecks += 1
            self._resume(verdict.reason)
            return None
        self._pause_limit_ns = max(
            LATE_FACTOR * self.tuning.downtime_limit_ns, LATE_FACTOR * verdict.forecast.total_ns
        )
        self._send_last()
        return self._final(pause_started_ns, paused_ns, known_downtime_ns(view))

    def _final(self, pause_started_ns: int, paused_ns: int, known_ns: int = 0) -> FinalPass:
        rounds, landed_ns = tuple(self.rounds), self.clock()
        return FinalPass(rounds, self.was_running, pause_started_ns, paused_ns, landed_ns, known_ns)

    # -- one round -------------------------------------------------------------------------------

    def _send_last(self) -> None:
        """While paused: the seal goes out behind the last pages where it may."""
        ahead = self.seal_ahead
        if ahead is not None:
            ahead.stays_paused()
        self._send_round(ahead)
        if ahead is not None and self._dirty_pages:
            ahead.pages_missed()
        self._send_missed()

    def _send_round(self, ahead: SealAhead | None = None) -> Decision | None:
        """Send ``_todo``, wait until it has landed, fetch what was dirtied meanwhile. Returns the
        policy's decision while the guest runs."""
        number = self._next_round
        self._next_round += 1
        started_ns = self.clock()
        before = self.sender.counters()
        self.emit(RoundStarted(started_ns, number, self._dirty_pages))
        if number == 1 and not self.paused:
            self._resent = [bitmap.copy() for bitmap in self._todo]
        self._pass.rearm = self.live and not self.paused
        self._pass.send(self._todo, number)
        if ahead is not None:
            while not self.sender.sent(number, LOOK_EVERY_NS):
                self._check_late()
            state_ns = ahead.last_pages_sent()
            if self._pause_limit_ns:  # it is for pages
                self._pause_limit_ns += state_ns
        if number > 0 and not self.paused:
            self._growth.begin(started_ns)
        while not self.sender.barrier(number, self._growth.wait_ns(LOOK_EVERY_NS)):
            self._check_late()
            self._growth.look()
        landed_ns = self.clock()
        growth = self._growth.end()
        for bitmap in self._todo:
            bitmap.fill(0)
        if not self.paused:
            self._fetch()
        self.sender.take_missed(self._todo)
        self._count()
        self._count_resent()
        stats = round_stats(
            number,
            before,
            self.sender.counters(),
            landed_ns - started_ns,
            self._dirty_pages,
            self.page_bytes,
            self.paused,
        )
        stats = replace(stats, dirty_growth=growth)
        self.rounds.append(stats)
        if len(self.rounds) > ROUNDS_KEPT:
            del self.rounds[1]
        self._bound_queue()
        if self.paused:
            self.emit(RoundFinished(self.clock(), stats, None))
            return None
        view = self._view()
        decision = self.policy.decide(view)
        stats = replace(
            stats,
            expected_downtime_ns=decision.forecast.total_ns,
            forecast=self.policy.foresee(view, decision)
            if isinstance(self.policy, CanForesee)
            else None,
        )
        self.rounds[-1] = stats
        self.emit(RoundFinished(self.clock(), stats, decision))
        return decision

    def _check_late(self) -> None:
        """Raises NotConvergedError when what goes on now has no time left: the timeout where that
        cancels, or last pages that take far longer than forecast while the guest is paused."""
        now_ns, tuning = self.clock(), self.tuning
        if self.paused:
            if 0 < self._pause_limit_ns < now_ns - self._pause_started_ns:
                raise NotConvergedError(
                    f"the last pages have not landed {format_duration(self._pause_limit_ns)} after "
                    f"the pause (limit {format_duration(tuning.downtime_limit_ns)}): the link is "
                    "slower than it was"
                )
        elif (
            tuning.on_stall is OnStall.CANCEL and 0 < tuning.timeout_ns < now_ns - self._started_ns
        ):
            raise NotConvergedError(
                f"the timeout of {format_duration(tuning.timeout_ns)} came in round "
                f"{self._next_round - 1}"
            )

    def _send_missed(self) -> None:
        """While paused: pages that arrived damaged go again, a bounded number of times."""
        for _ in range(MAX_REPAIRS):
            if self._dirty_pages == 0:
                return
            self.emit(RepairStarted(self.clock(), self._dirty_pages))
            self._send_round()
        if self._dirty_pages:
            raise VerificationError(
                f"{self._dirty_pages} pages still arrive damaged after {MAX_REPAIRS} repairs"
            )

    def resend(self, block: int, pages: Sequence[int]) -> None:
        """While paused, after ``run()``: send these pages again and wait until they have landed."""
        self._todo = new_bitmaps(self.guest.blocks)
        for page in pages:
            # Whatever was acknowledged: the digests say that it is not there.
            self.sender.forget(block, page, 1)
            kernels.bitmap_set_range(self._todo[block], page, 1)
        self._count()
        self.emit(RepairStarted(self.clock(), len(pages)))
        self._send_round()
        self._send_missed()

    # -- the guest -------------------------------------------------------------------------------

    def _pause(self) -> int:
        self.get_ready()
        self._pause_started_ns = self.clock()
        self.was_running = self.pause_guest()
        self.paused = True
        self.emit(GuestPaused(self.clock()))
        return self._pause_started_ns

    def _resume(self, reason: str) -> None:
        self.resume_guest()
        self.paused = False
        self.taken_back_ns += self.clock() - self._pause_started_ns
        self.emit(GuestResumed(self.clock(), reason))

    def _throttle(self, percent: int) -> None:
        if self.throttle.set(percent):
            self.emit(Throttled(self.clock(), percent, self.throttle.vcpu_percents))

    def _fetch(self) -> None:
        self.notes = []
        for source in self.guest.dirty:
            source.fetch(self._todo)
            if isinstance(source, CanNote):
                self.notes += source.notes()
        self._count()

    def _bound_queue(self) -> None:
        """What is in flight at the pause is downtime: at most a tenth of the limit beyond what the
        link needs (bandwidth x RTT). Far ones get twice that: a round has the time in it that TCP
        took to get up to speed."""
        counters = self.sender.counters()
        if counters.opening:  # little is in flight, and the rounds do not tell the link
            return
        best_bps = max(stats.bandwidth_bps for stats in self.rounds)
        rtt_ns, base_ns = counters.rtt_ns, counters.base_rtt_ns
        trip_ns = FAR_TRIPS * base_ns if base_ns >= FAR_NS else rtt_ns
        in_flight_ns = trip_ns + self.tuning.downtime_limit_ns // 10
        self.sender.set_window(max(MIN_WINDOW_BYTES, int(best_bps * in_flight_ns / 1e9)))

    # -- numbers ---------------------------------------------------------------------------------

    def _everything(self) -> None:
        self._todo = new_bitmaps(self.guest.blocks)
        for block, bitmap in zip(self.guest.blocks, self._todo, strict=True):
            kernels.bitmap_set_range(bitmap, 0, block.npages)
        self._count()

    def _count(self) -> None:
        self._dirty_pages = sum(
            kernels.bitmap_count(bitmap, 0, block.npages)
            for block, bitmap in zip(self.guest.blocks, self._todo, strict=True)
        )

    def _count_resent(self) -> None:
        """After round 1: what it sent is known to be rewritten, and its bases are kept."""
        self._resent_pages = None
        if self._resent:
            self._resent_pages = self._dirty_pages - sum(
                kernels.bitmap_merge(resent, todo, block.npages)
                for block, resent, todo in zip(
                    self.guest.blocks, self._resent, self._todo, strict=True
                )
            )
            self._resent = []

    def _view(self) -> RoundView:
        counters = self.sender.counters()
        return RoundView(
            now_ns=self.clock(),
            started_ns=self._started_ns,
            rounds=tuple(self.rounds),
            dirty_pages=self._dirty_pages,
            page_bytes=self.page_bytes,
            memory_bytes=sum(block.used_length for block in self.guest.blocks),
            queued_bytes=max(0, counters.wire_bytes - counters.acked_bytes),
            rtt_ns=counters.rtt_ns,
            state_bytes=self.tuning.state_bytes,
            bandwidth_limit_bps=self.tuning.bandwidth_bps,
            downtime_limit_ns=self.tuning.downtime_limit_ns,
            timeout_ns=self.tuning.timeout_ns,
            on_stall=self.tuning.on_stall,
            throttle_percent=self.throttle_percent,
            can_throttle=self.throttle.possible,
            failed_rechecks=self._failed_rechecks,
            switchover_requested=self.tuning.switchover_requested,
            job_started_ns=self.job_started_ns,
            journal_ns=self.journal_ns,
            base_rtt_ns=counters.base_rtt_ns,
            handover_trips=3 if self.seal_ahead is None else 2,
            resent_pages=self._resent_pages,
            delta_cache_pages=self.delta_cache_pages,
            handover_ns=self._handover_ns(),
        )

    def _handover_ns(self) -> int:
        """What the last ones took must leave room for pages, or a few slow ones would keep all
        guests here, and nothing else be learned."""
        usual_ns = first_handover_ns(HANDOVER_NS, self.journal_ns)
        most_ns = max(usual_ns, self.tuning.downtime_limit_ns // 2)
        return min(self.handover_ns, most_ns)


def make_precopy(guest: Guest, tools: RoundTools) -> PreCopy:
    """The engine of every guest whose memory can be mapped."""
    return PreCopy(
        guest=guest,
        sender=tools.sender,
        policy=tools.policy,
        tuning=tools.tuning,
        clock=tools.clock,
        emit=tools.emit,
        page_bytes=tools.page_bytes,
        live=tools.live,
        get_ready=tools.get_ready,
        pause_guest=tools.pause_guest,
        resume_guest=tools.resume_guest,
        job_started_ns=tools.job_started_ns,
        journal_ns=tools.journal_ns,
        seal_ahead=tools.seal_ahead,
        delta_cache_pages=tools.delta_cache_pages,
        handover_ns=tools.handover_ns,
    )
