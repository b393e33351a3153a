# SPDX-License-Identifier: Apache-2.0
"""The rounds of a QEMU: its stream's pages go out as they come, and QEMU is told when it may stop.

    pass 1          pass 2     pass 3   END
    |------ 1 ms ------------->|- user's limit ->|  QEMU's downtime-limit: raised when ours fits
    |---- round 0 --|- round 1-|- 2 -|- last ----|  a barrier where QEMU begins anew, and before
                                                    a page would go out twice: a round's end, or
                                                    not (PagesAgain)

QEMU runs the rounds and stops its guest by itself when it expects to send the rest within its
downtime limit. That stays at 1 ms until the forecast over *our* link, with all that is queued here,
fits the user's limit, and goes back there when it does not fit any more. Pages cannot be asked for
again: damage ends the migration, and the guest runs on at the source.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from vmth.channel.pump import CanPump, PumpLimits, PumpStop
from vmth.errors import MigrationError, NotConvergedError, StreamError, VerificationError
from vmth.events import DirtyLimited, GuestPaused, RoundFinished, RoundStarted, Throttled
from vmth.guest import Guest
from vmth.policy.forecast import first_handover_ns
from vmth.policy.interface import Action, CanForesee, Decision, OnStall, RoundView
from vmth.qemu.dirty_limit import ThrottleWay
from vmth.qemu.lent_ahead import LentAhead
from vmth.qemu.page_stream import PageStream, PumpedStream
from vmth.qemu.pages_again import PagesAgain, without_ends
from vmth.qemu.queue_bounds import QueueBounds
from vmth.qemu.ram import PageKind, Runs
from vmth.qemu.state_store import StateStore
from vmth.qemu.steering import Helm, room_in_downtime_bytes
from vmth.qemu.stop_orders import StopOrders
from vmth.qemu.stream import (
    DeviceState,
    Event,
    PassThrough,
    RamPages,
    RawBytes,
    SectionKind,
    SectionStarted,
    StreamFinished,
)
from vmth.qemu.stream_connection import NEAR_PATIENCE_S, PATIENCE_S
from vmth.qemu.unsent import send_unsent_as_holes
from vmth.rounds import FinalPass, RoundTools
from vmth.state_streams import STATE_MAX_BYTES
from vmth.stats import RoundStats, TransferCounters, round_stats
from vmth.units import format_duration

__all__ = ["StreamPass"]

#: How often a wait looks at the time and at what QEMU tells.
LOOK_S = 0.05
LOOK_NS = 50_000_000
#: Last pages that take so many times the downtime limit, or their forecast, are given up.
LATE_FACTOR = 10
ROUNDS_KEPT = 1000
#: Left of a pass, near whose end QEMU may stop its guest.
NEAR_BYTES = 64 << 20
#: Device state written and loaded, seal and ``cont``: 15 to 25 ms with 7.2 and 10.0.
HANDOVER_NS = 20_000_000
#: Pages that multifd has brought twice: when so many wait (4 MiB), they land before the next one.
#: Fewer where QEMU may stop its guest meanwhile: it counts them as sent.
MOST_AGAIN_PAGES = 1024
MOST_AGAIN_AT_END_PAGES = 64
PUMP_NS = 20_000_000  #: without a look at anything else
PUMP_PATIENCE_NS = 500_000


class _Landing(enum.Enum):
    """Of the last pages, after which only state comes."""

    NOT_YET = enum.auto()
    ASKED = enum.auto()  #: the barrier behind them
    DONE = enum.auto()


@dataclass(slots=True)
class StreamPass:
    """``RoundEngine`` over one stream, whose block list was read already. One thread."""

    guest: Guest
    tools: RoundTools
    stream: PageStream
    helm: Helm
    throttle: ThrottleWay = ThrottleWay.NONE
    rounds: list[RoundStats] = field(default_factory=list)  #: the first, and the last ROUNDS_KEPT
    notes: list[str] = field(default_factory=list)
    #: All bytes behind ram's END.
    state: StateStore = field(default_factory=lambda: StateStore(2 * STATE_MAX_BYTES))
    taken_back_ns: int = 0  #: a QEMU that has stopped its guest is not called back
    throttle_percent: int = 0
    dirty_limit_bps: int = 0  #: to which QEMU holds its vCPUs; 0: not
    was_running: bool = False
    _round: int = 0
    _round_started_ns: int = 0
    _idle_ns: int = 0  #: of this round
    _waiting: bool = False  #: the last wait brought nothing
    _before: TransferCounters = field(default_factory=TransferCounters)
    _lent: LentAhead = field(init=False)
    _pumping: tuple[CanPump, PumpedStream] | None = None
    _all_pages: int = field(init=False)
    _seen_pages: int = 0  #: of this round, a page that came twice once
    _again: PagesAgain = field(init=False)
    _near_end: bool = False  #: of QEMU's pass, as far as is known
    _passes: int = 0
    _pass_ends_at: int = 0  #: bytes given out at which QEMU's pass has begun; 0: none is awaited
    _started_ns: int = 0
    _looked_ns: int = 0
    _bounds: QueueBounds = field(default_factory=QueueBounds)
    _limited_at_ns: int = 0
    _stop: StopOrders = field(init=False)
    _ended_ns: int = 0  #: ram's END section was there: the guest has stopped
    _pause_limit_ns: int = 0
    _landing: _Landing = _Landing.NOT_YET
    _filled: bool = False  #: what QEMU has never sent was sent as holes

    def __post_init__(self) -> None:
        self._again = PagesAgain(self.tools.page_bytes)
        self._stop = StopOrders(self.helm, self.tools.tuning)
        sender, stream = self.tools.sender, self.stream
        self._lent = LentAhead(sender, self._check_late)
        if isinstance(sender, CanPump) and isinstance(stream, PumpedStream):
            self._pumping = sender, stream
        self._all_pages = sum(block.npages for block in self.guest.blocks)

    def run(self) -> FinalPass:
        """Returns when all pages have landed and all state is here: QEMU then waits, its guest
        stopped, for SHUT."""
        self._started_ns = self._looked_ns = self.tools.clock()
        self._passes = self.helm.passes
        self._begin_round()
        while not self._take(self._next_event()):
            self._pump()
            self._look()
        self.was_running = self.tools.pause_guest()
        self._land_all()
        stopped_ns = min(self.helm.stopped_ns or self._ended_ns, self._ended_ns)
        return FinalPass(
            tuple(self.rounds), self.was_running, stopped_ns, self._ended_ns, self.tools.clock()
        )

    @property
    def guest_stopped(self) -> bool:
        return bool(self._ended_ns) or self.helm.stopped_ns is not None

    def resend(self, block: int, pages: Sequence[int]) -> None:
        """QEMU sends no page again once its guest has stopped."""
        raise VerificationError(
            f"the digests differ in {len(pages)} pages of ramblock "
            f"{self.guest.blocks[block].idstr!r}: QEMU cannot be asked for them again"
        )

    def let_go(self) -> None:
        """Of the dirty limit, which takes QEMU up to a second: a stopped guest is let go by
        ``close()``. Auto-converge ends with its migration."""
        if self.dirty_limit_bps and not self.guest_stopped:
            self._hold_dirty_rate(0)

    def close(self) -> None:
        """Nothing is tracked here."""
        if self.dirty_limit_bps:
            self._hold_dirty_rate(0)

    # -- what the stream brings --------------------------------------------------------------------

    def _next_event(self) -> Event | None:
        """QEMU may bring nothing for seconds: it waits for vCPUs that a limit lets sleep before it
        knows what is dirty. That says nothing about the link."""
        idle = self._waiting and self._all_landed()
        began_ns = self.tools.clock()
        event = self.stream.next_event(LOOK_S)
        self._waiting = event is None
        if idle:
            self._idle_ns += self.tools.clock() - began_ns
        return event

    def _all_landed(self) -> bool:
        sender = self.tools.sender
        counters = sender.counters()
        return self._lent.all_read() and counters.acked_bytes == counters.wire_bytes

    def _take(self, event: Event | None) -> bool:
        """True when all is here."""
        match event:
            case RamPages():
                self._send(event)
            case RawBytes():
                self._keep(event.data)
            case SectionStarted() if event.kind is SectionKind.END:
                self._guest_stopped()
            case PassThrough():
                self._state_begins(event)
            case DeviceState():
                raise MigrationError("a device of the source sends state before memory is complete")
            case StreamFinished():
                return True
        return False

    def _send(self, event: RamPages) -> None:
        runs, data = event.runs, event.data
        worst = int(runs["kind"].max(initial=0))
        if worst > PageKind.PAGE:
            raise StreamError(
                f"pages of the source: received {PageKind(worst).name}, allowed ZERO and PAGE: "
                "its capability is switched off for a migration"
            )
        runs = runs[self._queue(runs, data) :]
        while len(runs):
            if event.channel is None or self.helm.passes != self._passes or self._pass_ends_at:
                self._next_round()
            elif len(self._again) >= self._most_again():
                self._land_kept()
            elif self._keep_for_next(runs[0], data):
                runs = runs[1:]
            else:
                self._next_round()
            runs = runs[self._queue(runs, data) :]
        if not self._near_end and self._left_bytes() < NEAR_BYTES:
            self._near_end = True
            self.stream.wait_for_more(0 if self._ended_ns else NEAR_PATIENCE_S)
            self._bound_ahead(self.tools.clock())
        if not self._pass_ends_at:  # else what is left is not QEMU's pass's
            self._stop.left(self._left_bytes)

    def _pump(self) -> None:
        """Far from a pass's end, while QEMU may not stop its guest, pages go without events."""
        while self._pumping is not None and self._plain_sailing():
            sender, stream = self._pumping
            pages = (self._left_bytes() - NEAR_BYTES) // self.tools.page_bytes
            most = self._lent.limit_bytes
            limits = PumpLimits(PUMP_NS, PUMP_PATIENCE_NS, pages, most, most // 2)
            pumped = stream.pump_pages(sender, self._round, limits)
            if pumped is None:
                return
            self._seen_pages += pumped.pages
            self._waiting = self._waiting and not pumped.read_bytes
            if pumped.ticket:
                self._lent.pumped(pumped.ticket)
            if pumped.stop is not PumpStop.TIME:
                return
            self._look()

    def _plain_sailing(self) -> bool:
        helm = self.helm
        stops = not self._stop.nothing_allowed or helm.stopped_ns is not None
        if stops or self._near_end or self._ended_ns:
            return False
        begun = self._pass_ends_at or helm.passes != self._passes
        return not begun and self._left_bytes() > NEAR_BYTES

    def _queue(self, runs: Runs, data: memoryview) -> int:
        """How many of the runs: up to the first with a page that went out since the barrier."""
        queued, ticket = self.tools.sender.send_pages(runs, data, self._round)
        if queued:
            npages = runs["npages"][:queued]
            self._hold_back(ticket, int(npages @ runs["nbytes"][:queued]))
            self._seen_pages += int(npages.sum())
        return queued

    def _keep_for_next(self, run: Runs, data: memoryview) -> bool:
        """A run with a page that went out already: queue the others, unless such a page is not at
        its ends."""
        npages = int(run["npages"])
        for first, last in ((True, False), (False, True), (True, True)):
            rest = without_ends(run, first, last)
            if len(rest) and not self._queue(rest, data):
                continue
            ends = ([0] if first else []) + ([npages - 1] if last and npages > int(first) else [])
            for at in ends:
                self._again.keep(run, at, data)
            return True
        return False

    def _most_again(self) -> int:
        return MOST_AGAIN_AT_END_PAGES if self._stop.allowed else MOST_AGAIN_PAGES

    def _land_kept(self) -> None:
        """In the midst of a round: nothing is known that the policy could be asked about."""
        self._land()
        self._send_kept()

    def _send_kept(self) -> None:
        """First of all behind a barrier."""
        runs, data = self._again.take()
        if len(runs):
            queued, ticket = self.tools.sender.send_pages(runs, data, self._round)
            assert queued == len(runs)
            self._hold_back(ticket, len(data))

    def _left_bytes(self) -> int:
        """Of this round, if QEMU dirtied nothing meanwhile, and what waits for its end."""
        npages = self._expected_pages() - self._seen_pages + len(self._again)
        return npages * self.tools.page_bytes

    def _hold_back(self, ticket: int, nbytes: int) -> None:
        """The bytes stay until they were read; not more than the bound is read ahead."""
        self.stream.in_use(partial(self._lent.wait, ticket))
        self._lent.add(ticket, nbytes)

    def _keep(self, data: memoryview) -> None:
        nbytes = len(self.state) + len(data)
        if nbytes > STATE_MAX_BYTES:
            raise MigrationError(
                f"device state: received {nbytes} bytes, allowed {STATE_MAX_BYTES}"
            )
        self.state.add(data)

    def _guest_stopped(self) -> None:
        """QEMU stops its guest before it sends the last pages."""
        self._ended_ns = self.tools.clock()
        self.stream.wait_for_more(0)  # so does the guest
        self._pause_limit_ns = LATE_FACTOR * max(
            self.tools.tuning.downtime_limit_ns,
            self.rounds[-1].expected_downtime_ns if self.rounds else 0,
        )
        self.tools.emit(GuestPaused(self._ended_ns))

    def _state_begins(self, event: PassThrough) -> None:
        if not self._ended_ns:
            raise MigrationError(f"what the source sends cannot be moved: {event.reason}")
        if self._landing is _Landing.NOT_YET:
            self._landing = _Landing.ASKED

    def _land_last(self) -> None:
        """The last pages, and then those that were kept, land while the state is read."""
        if not self._fill_unsent(1) or not self.tools.sender.barrier(self._round, 1):
            return
        self._landed()
        if not len(self._again):
            self._landing = _Landing.DONE
            return
        self._end_round()
        self._begin_round(len(self._again))
        self._land_last()

    def _fill_unsent(self, timeout_ns: int) -> bool:
        """What QEMU has never sent goes behind its last pages, once; False: they are still read."""
        if not self._filled:
            sender = self.tools.sender
            if not sender.wait_read(self._lent.last_ticket, timeout_ns):
                return False
            self._filled = True
            unsent = send_unsent_as_holes(sender, self.guest.blocks, self._round)
            if unsent:
                told = f"{unsent} pages were not sent by QEMU, free in its guest: now zeros"
                self.notes.append(told)
        return True

    def _land_all(self) -> None:
        """All is here. The seal goes out behind the last pages where nothing was kept of them."""
        while not self._fill_unsent(LOOK_NS):
            self._check_late()
        landed = self._landing is _Landing.DONE or len(self._again) > 0
        ahead = None if landed else self.tools.seal_ahead
        if ahead is not None:
            while not self.tools.sender.sent(self._round, LOOK_NS):
                self._check_late()
            self._pause_limit_ns += ahead.last_pages_sent()  # it is for pages
        self._finish_round()
        if ahead is not None and len(self._again):
            ahead.pages_missed()
        while len(self._again):
            self._begin_round(len(self._again))
            self._finish_round()

    # -- rounds ------------------------------------------------------------------------------------

    def _begin_round(self, npages: int | None = None) -> None:
        """With so many pages; None: those that QEMU says are left."""
        expected = self._expected_pages() if npages is None else npages
        self._round_started_ns = self.tools.clock()
        self._before = self.tools.sender.counters()
        if self._near_end and not self._ended_ns:
            self.stream.wait_for_more(PATIENCE_S)
        self._seen_pages, self._near_end, self._idle_ns = 0, False, 0
        self.tools.emit(RoundStarted(self._round_started_ns, self._round, expected))
        self._send_kept()

    def _expected_pages(self) -> int:
        return self._remaining_pages() if self._round else self._all_pages

    def _next_round(self) -> None:
        """A round that had nothing but what was kept goes on instead."""
        if self._seen_pages == 0:
            self._land_kept()
            return
        self._finish_round()
        self._begin_round()

    def _land(self) -> None:
        """Everything so far has landed, and each page may go out again."""
        while not self.tools.sender.barrier(self._round, LOOK_NS):
            self._check_late()
        self._landed()

    def _landed(self) -> None:
        self._lent.landed()
        self._again.keep_missed(self.tools.sender, self.guest.blocks)

    def _finish_round(self) -> None:
        if self._landing is not _Landing.DONE:
            self._land()
        self._end_round()

    def _end_round(self) -> None:
        """While the guest runs, the policy is asked."""
        tools = self.tools
        stopped = bool(self._ended_ns)
        self._pass_ends_at = 0
        stats = round_stats(
            self._round,
            self._before,
            tools.sender.counters(),
            tools.clock() - self._round_started_ns,
            0 if stopped else self._remaining_pages(),
            tools.page_bytes,
            stopped and self._round_started_ns >= self._ended_ns,
            self._idle_ns,
        )
        self._round += 1
        self.rounds.append(stats)
        if len(self.rounds) > ROUNDS_KEPT:
            del self.rounds[1]
        if stopped or self.helm.stopped_ns is not None:
            tools.emit(RoundFinished(tools.clock(), stats, None))
            return  # nothing is left to decide, and the guest waits
        view, policy = self._view(), tools.policy
        decision = policy.decide(view)
        self.rounds[-1] = replace(
            stats,
            expected_downtime_ns=decision.forecast.total_ns,
            forecast=policy.foresee(view, decision) if isinstance(policy, CanForesee) else None,
        )
        tools.emit(RoundFinished(tools.clock(), self.rounds[-1], decision))
        self._steer(decision, view)

    def _remaining_pages(self) -> int:
        """That QEMU has not sent yet."""
        return self.helm.remaining_bytes // self.tools.page_bytes

    def _steer(self, decision: Decision, view: RoundView) -> None:
        """What the policy decided, in QEMU's terms. Auto-converge throttles by itself."""
        tuning = self.tools.tuning
        if decision.action is Action.GIVE_UP:
            raise NotConvergedError(decision.reason)
        if self._stop.told_now:
            return  # that order stands
        if decision.action is not Action.SWITCH_OVER:
            self._stop.allow_nothing()  # before a limit, which takes QEMU up to a second
        elif decision.forecast.total_ns > tuning.downtime_limit_ns:
            self._stop.now()
        elif self.dirty_limit_bps:
            self._stop.allow_near_end(room_in_downtime_bytes(decision, view), view)
        else:
            self._stop.allow(room_in_downtime_bytes(decision, view))
        if decision.action is Action.THROTTLE and self.throttle is ThrottleWay.DIRTY_LIMIT:
            self._hold_dirty_rate(int(decision.dirty_limit_bps))

    def _hold_dirty_rate(self, rate_bps: int) -> None:
        self._limited_at_ns = self.tools.clock()
        self.dirty_limit_bps = rate_bps
        self.helm.hold_dirty_rate(rate_bps)
        self.tools.emit(DirtyLimited(self._limited_at_ns, rate_bps))

    # -- between events ----------------------------------------------------------------------------

    def _look(self) -> None:
        """What QEMU and the clock say; seldom, since most events come every few hundred us."""
        if self._landing is _Landing.ASKED:
            self._land_last()
        if self.helm.passes != self._passes:
            self._passes = self.helm.passes
            self._pass_ends_at = self.stream.given_out_bytes + self.stream.unread_bytes
        if 0 < self._pass_ends_at <= self.stream.given_out_bytes:
            self._pass_ends_at = 0
            if self.helm.stopped_ns is None and not self._ended_ns and self._seen_pages:
                self._next_round()
        now_ns = self.tools.clock()
        if now_ns - self._looked_ns < LOOK_NS:
            return
        self._looked_ns = now_ns
        self._check_late()
        self._bound_ahead(now_ns)
        self._show_throttle()
        if self.tools.tuning.switchover_requested:
            self._stop.now()

    def _check_late(self) -> None:
        """Raises what ends the wait: a cancel, the peer, QEMU's refusal, or the time."""
        self.tools.check()
        self.helm.check()
        now_ns, tuning = self.tools.clock(), self.tools.tuning
        if self._ended_ns:
            if now_ns - self._ended_ns > self._pause_limit_ns and not self._stop.told_now:
                raise NotConvergedError(
                    f"the last pages have not landed {format_duration(self._pause_limit_ns)} after "
                    f"the pause (limit {format_duration(tuning.downtime_limit_ns)}): the link is "
                    "slower than it was"
                )
        elif 0 < tuning.timeout_ns < now_ns - self._started_ns:
            if tuning.on_stall is not OnStall.PAUSE:
                raise NotConvergedError(
                    f"the timeout of {format_duration(tuning.timeout_ns)} came in round "
                    f"{self._round}"
                )
            self._stop.now()

    def _bound_ahead(self, now_ns: int) -> None:
        tools = self.tools
        bounds = self._bounds.look(
            now_ns,
            tools.sender.counters(),
            (self._round_started_ns, self._before.acked_bytes),
            max((stats.bandwidth_bps for stats in self.rounds[-4:]), default=0.0),
            self._near_end,
            tools.tuning.downtime_limit_ns,
        )
        if bounds is not None:
            tools.sender.set_window(bounds.window_bytes)
            self._lent.limit_bytes = bounds.ahead_bytes
            self.stream.limit_read(bounds.ahead_bytes // 2)

    def _show_throttle(self) -> None:
        if self.helm.throttle_percent != self.throttle_percent:
            self.throttle_percent = self.helm.throttle_percent
            self.tools.emit(Throttled(self.tools.clock(), self.throttle_percent))

    def _view(self) -> RoundView:
        counters, tuning = self.tools.sender.counters(), self.tools.tuning
        return RoundView(
            now_ns=self.tools.clock(),
            started_ns=self._started_ns,
            rounds=tuple(self.rounds),
            dirty_pages=self._remaining_pages() + len(self._again),
            page_bytes=self.tools.page_bytes,
            memory_bytes=sum(block.used_length for block in self.guest.blocks),
            queued_bytes=max(0, counters.wire_bytes - counters.acked_bytes),
            rtt_ns=counters.rtt_ns,
            state_bytes=tuning.state_bytes,
            bandwidth_limit_bps=tuning.bandwidth_bps,
            downtime_limit_ns=tuning.downtime_limit_ns,
            timeout_ns=tuning.timeout_ns,
            on_stall=tuning.on_stall,
            throttle_percent=self.throttle_percent,
            can_throttle=self.throttle is not ThrottleWay.NONE,
            failed_rechecks=0,
            switchover_requested=tuning.switchover_requested,
            job_started_ns=self.tools.job_started_ns,
            handover_ns=first_handover_ns(HANDOVER_NS, self.tools.journal_ns),
            streamed=True,
            takes_rate=self.throttle is ThrottleWay.DIRTY_LIMIT,
            dirty_limit_bps=self.dirty_limit_bps,
            limited_at_ns=self._limited_at_ns,
            base_rtt_ns=counters.base_rtt_ns,
            delta_cache_pages=self.tools.delta_cache_pages,
            handover_trips=4 if len(self._again) else 3 if self.tools.seal_ahead is None else 2,
        )
