# SPDX-License-Identifier: Apache-2.0
"""The round loop on fakes, without socket, clock or sleep: its order, and what it does then."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmth.channel.fake import FakeLink
from vmth.dirty.fake import FakeDirtySource
from vmth.errors import NotConvergedError, VerificationError
from vmth.events import Event, GuestResumed, RepairStarted, Throttled
from vmth.guest import StateStream
from vmth.memory_pass import CHUNK_BYTES
from vmth.policy.fixed import FixedRoundsPolicy
from vmth.policy.interface import Action, Decision, Forecast, OnStall, RoundView
from vmth.precopy import PreCopy
from vmth.stats import ChannelCounters
from vmth.tuning import Tuning
from vmth.types import Bitmap, Gpa, Mapping, RamBlock

PAGE = 4096
NOTHING = Forecast(0, 0, 0, 0)
READY_NS = 1_000_000_000


class LoopGuest:
    """Arrays, a scripted dirty source, and a log of everything that was called."""

    def __init__(self, npages: Sequence[int], *, fetch_clears: bool = False) -> None:
        self.memory = [np.zeros((n, PAGE), dtype=np.uint8) for n in npages]
        self.populated_pages: set[tuple[int, int]] = set()
        self.blocks = [
            RamBlock(f"b{index}", n * PAGE, Gpa(index << 40), Mapping(address=PAGE))
            for index, n in enumerate(npages)
        ]
        self.source = FakeDirtySource(self.blocks, fetch_clears=fetch_clears)
        self.dirty = [self.source]
        self.log: list[str] = []
        self.running = True

    def write(self, block: int, page: int, value: int) -> None:
        assert self.running
        self.memory[block][page, 7] = value
        self.populated_pages.add((block, page))
        self.source.write(block, page)

    def populated(self, block: int, page: int, npages: int, out: Bitmap) -> None:
        self.log.append(f"populated {block} {page} {npages}")
        for index in range(page, page + npages):
            if (block, index) in self.populated_pages:
                out[index // 64] |= np.uint64(1 << (index % 64))

    def pause(self) -> bool:
        self.log.append("pause")
        was, self.running = self.running, False
        return was

    def resume(self) -> None:
        self.log.append("resume")
        self.running = True

    def throttle(self, percent: int) -> None:
        self.log.append(f"throttle {percent}")

    def save_state(self, write: Callable[[StateStream], None]) -> None:
        raise AssertionError("not the loop's business")

    def load_state(self, streams: Iterable[StateStream]) -> None:
        raise AssertionError("not the loop's business")

    def release(self) -> None:
        raise AssertionError("not the loop's business")


class ScriptedPolicy:
    """Answers from two lists; the last answer repeats."""

    def __init__(self, decide: Sequence[Decision], recheck: Sequence[Decision] = ()) -> None:
        self.views: list[RoundView] = []
        self._decide = deque(decide)
        self._recheck = deque(recheck or [Decision(Action.SWITCH_OVER, "fits", NOTHING)])

    def decide(self, view: RoundView) -> Decision:
        self.views.append(view)
        return self._decide.popleft() if len(self._decide) > 1 else self._decide[0]

    def recheck(self, view: RoundView, forecast: Forecast) -> Decision:
        self.views.append(view)
        return self._recheck.popleft() if len(self._recheck) > 1 else self._recheck[0]


def answer(action: Action, **options: int) -> Decision:
    return Decision(action, f"scripted {action.value}", NOTHING, **options)


class Loop:
    def __init__(
        self, guest: LoopGuest, policy: ScriptedPolicy | FixedRoundsPolicy, live: bool = True
    ) -> None:
        self.guest = guest
        self.arrived = [np.full_like(array, 0xEE) for array in guest.memory]
        self.link = FakeLink(guest.memory, self.arrived)
        self.events: list[Event] = []
        self.ready: list[bool] = []  #: at each call, did the guest run?
        self.now = 0
        self.precopy = PreCopy(
            guest=guest,
            sender=self.link.sender,
            policy=policy,
            tuning=Tuning(0, 300_000_000, 0, OnStall.PAUSE),
            clock=self.clock,
            emit=self.events.append,
            page_bytes=PAGE,
            live=live,
            get_ready=self.get_ready,
            pause_guest=guest.pause,
            resume_guest=guest.resume,
        )

    def get_ready(self) -> None:
        """It takes a while, in which the guest runs."""
        self.ready.append(self.guest.running)
        self.now += READY_NS

    def clock(self) -> int:
        self.now += 1000
        return self.now

    def check_equal(self) -> None:
        assert not self.guest.running
        for ours, theirs in zip(self.guest.memory, self.arrived, strict=True):
            assert np.array_equal(ours, theirs)
        assert self.link.sender.digest() == self.link.receiver.digest()
        assert self.link.sender.digest()[2] == sum(len(array) for array in self.guest.memory)


def test_rounds_tell_how_the_dirty_set_grew_but_for_the_first_and_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guest = LoopGuest([100])
    loop = Loop(guest, FixedRoundsPolicy(3))
    sender = loop.link.sender
    send, barrier = sender.send, sender.barrier
    ends_ns = 0

    def slowly(block: int, page: int, npages: int, bitmap: Bitmap, round_: int) -> None:
        nonlocal ends_ns
        send(block, page, npages, bitmap, round_)
        ends_ns = loop.now + 60_000_000
        for dirtied in range(round_, 8) if guest.running else ():
            guest.write(0, dirtied, round_ + 1)

    def later(round_: int, timeout_ns: int = 0) -> bool:
        loop.now += timeout_ns
        return loop.now > ends_ns and barrier(round_, timeout_ns)

    monkeypatch.setattr(sender, "send", slowly)
    monkeypatch.setattr(sender, "barrier", later)
    for page in range(8):
        guest.write(0, page, 1)
    loop.precopy.run()
    loop.check_equal()
    grew = [[pages for _, pages in stats.dirty_growth] for stats in loop.precopy.rounds]
    assert grew[0] == grew[-1] == [] and loop.precopy.rounds[-1].paused
    for number, pages in enumerate(grew[1:-1], 1):
        assert len(pages) > 2 and set(pages) == {8 - number}


def test_order_of_one_chunk_is_rearm_populated_send() -> None:
    guest = LoopGuest([100])
    guest.write(0, 3, 1)
    loop = Loop(guest, FixedRoundsPolicy(1))
    calls: list[str] = []
    sender = loop.link.sender
    send, rearm, populated = sender.send, guest.source.rearm, guest.populated

    def logged_send(block: int, page: int, n: int, bitmap: Bitmap, round_: int) -> None:
        calls.append("send")
        send(block, page, n, bitmap, round_)

    def logged_rearm(block: int, page: int, n: int) -> None:
        calls.append("rearm")
        rearm(block, page, n)

    def logged_populated(block: int, page: int, n: int, out: Bitmap) -> None:
        calls.append("populated")
        populated(block, page, n, out)

    sender.send = logged_send  # type: ignore[method-assign,assignment]
    guest.source.rearm = logged_rearm  # type: ignore[method-assign,assignment]
    guest.populated = logged_populated  # type: ignore[method-assign,assignment]
    loop.precopy.run()
    loop.check_equal()
    assert calls[:4] == ["populated", "rearm", "populated", "send"]  # the first one is the hint


def test_a_page_populated_after_the_hint_is_not_lost() -> None:
    guest = LoopGuest([64])
    loop = Loop(guest, FixedRoundsPolicy(1))
    rearm = guest.source.rearm

    def write_then_rearm(block: int, page: int, n: int) -> None:
        guest.memory[0][9, 0] = 77  # a write whose report this very re-arming takes back
        guest.populated_pages.add((0, 9))
        rearm(block, page, n)

    guest.source.rearm = write_then_rearm  # type: ignore[method-assign,assignment]
    loop.precopy.run()
    loop.check_equal()


def test_memory_that_was_never_populated_is_rearmed_and_not_read() -> None:
    guest = LoopGuest([2048])
    loop = Loop(guest, FixedRoundsPolicy(2))
    final = loop.precopy.run()
    loop.check_equal()
    assert final.rounds[0].hole_pages == 2048
    assert final.rounds[0].normal_pages == final.rounds[0].zero_pages == 0
    assert ("rearm", 0, 0, 2048) in guest.source.calls


@pytest.mark.parametrize("live", [True, False])
def test_blocks_of_odd_sizes(live: bool) -> None:
    guest = LoopGuest([1, 63, 64, 65, CHUNK_BYTES // PAGE + 1])
    for block, array in enumerate(guest.memory):
        guest.write(block, len(array) - 1, block + 1)
        guest.write(block, 0, block + 101)
    loop = Loop(guest, FixedRoundsPolicy(1), live=live)
    final = loop.precopy.run()
    loop.check_equal()
    assert sum(stats.pages for stats in final.rounds) >= sum(map(len, guest.memory))


def test_cold_mode_pauses_first_and_tracks_nothing() -> None:
    guest = LoopGuest([64])
    guest.write(0, 1, 1)
    loop = Loop(guest, FixedRoundsPolicy(5), live=False)
    final = loop.precopy.run()
    loop.precopy.close()
    loop.check_equal()
    assert guest.log[0] == "pause"
    assert guest.source.calls == []
    assert [stats.paused for stats in final.rounds] == [True]


def test_a_last_set_that_grew_resumes_the_guest_and_goes_on() -> None:
    guest = LoopGuest([64])
    policy = ScriptedPolicy(
        [answer(Action.SWITCH_OVER)],
        [answer(Action.CONTINUE), answer(Action.CONTINUE), answer(Action.SWITCH_OVER)],
    )
    loop = Loop(guest, policy)
    resume = guest.resume
    written = iter(range(1, 99))

    def resume_and_write() -> None:
        resume()
        guest.write(0, 5, next(written))

    loop.precopy.resume_guest = resume_and_write
    final = loop.precopy.run()
    loop.check_equal()
    assert guest.log.count("pause") == 3
    assert loop.ready == [True] * 3
    assert guest.log.count("resume") == 2
    assert sum(isinstance(event, GuestResumed) for event in loop.events) == 2
    assert [view.failed_rechecks for view in policy.views] == [0, 0, 1, 1, 2, 2]
    assert final.was_running


def test_what_is_done_before_the_pause_is_no_downtime() -> None:
    guest = LoopGuest([64])
    loop = Loop(guest, FixedRoundsPolicy(2))
    final = loop.precopy.run()
    assert loop.ready == [True]
    assert loop.now > READY_NS > loop.now - final.pause_started_ns


@pytest.mark.parametrize("fetch_clears", [True, False])
def test_a_write_just_before_the_pause_is_in_the_last_set(fetch_clears: bool) -> None:
    guest = LoopGuest([64], fetch_clears=fetch_clears)
    loop = Loop(guest, FixedRoundsPolicy(2))

    def write_then_pause() -> bool:
        guest.write(0, 33, 99)
        return guest.pause()

    loop.precopy.pause_guest = write_then_pause
    final = loop.precopy.run()
    loop.check_equal()
    assert final.rounds[-1].normal_pages == 1


def test_what_a_dirty_source_did_more_weakly_is_told() -> None:
    guest = LoopGuest([64])
    counts = iter(range(1, 9))
    guest.source.notes = lambda: [f"{next(counts)} overflows"]  # type: ignore[attr-defined]
    loop = Loop(guest, FixedRoundsPolicy(2))
    loop.precopy.run()
    assert loop.precopy.notes == ["3 overflows"]


def test_throttle_is_set_and_let_go() -> None:
    guest = LoopGuest([64])
    policy = ScriptedPolicy(
        [
            answer(Action.THROTTLE, throttle_percent=20),
            answer(Action.THROTTLE, throttle_percent=30),
            answer(Action.SWITCH_OVER),
        ]
    )
    loop = Loop(guest, policy)
    loop.precopy.run()
    loop.check_equal()
    loop.precopy.close()
    assert [line for line in guest.log if "throttle" in line] == [
        "throttle 20",
        "throttle 30",
        "throttle 0",
    ]
    assert [event.percent for event in loop.events if isinstance(event, Throttled)] == [20, 30, 0]
    assert [view.throttle_percent for view in policy.views[:3]] == [0, 20, 30]


@pytest.mark.parametrize("paused", [False, True])
def test_giving_up_says_why(paused: bool) -> None:
    give_up = [answer(Action.GIVE_UP)]
    policy = ScriptedPolicy(
        [answer(Action.SWITCH_OVER)] if paused else give_up, give_up if paused else ()
    )
    guest = LoopGuest([64])
    loop = Loop(guest, policy)
    with pytest.raises(NotConvergedError, match="scripted give-up"):
        loop.precopy.run()
    assert loop.precopy.paused is paused
    loop.precopy.close()
    assert guest.source.calls[-1] == ("stop",)


@pytest.mark.parametrize("live", [True, False])
def test_pages_damaged_on_the_way_are_sent_again(live: bool) -> None:
    guest = LoopGuest([256])
    for page in range(200):
        guest.write(0, page, page + 1)
    loop = Loop(guest, FixedRoundsPolicy(1), live=live)
    loop.link.damage |= {(0, 5), (0, 150)}
    loop.precopy.run()
    loop.check_equal()
    assert loop.link.sender.counters().missed_pages > 0
    if not live:
        assert any(isinstance(event, RepairStarted) for event in loop.events)


def test_a_link_that_always_damages_is_given_up_while_paused() -> None:
    class Always(set[tuple[int, int]]):
        def discard(self, item: object) -> None:
            pass

    guest = LoopGuest([64])
    guest.write(0, 5, 1)
    loop = Loop(guest, FixedRoundsPolicy(1), live=False)
    loop.link.damage = Always({(0, 5)})
    with pytest.raises(VerificationError, match="still arrive damaged after 3 repairs"):
        loop.precopy.run()


def test_what_is_in_flight_is_bounded_once_the_link_is_known() -> None:
    guest = LoopGuest([1024])
    for page in range(1024):
        guest.write(0, page, 1)
    loop = Loop(guest, FixedRoundsPolicy(2))
    loop.precopy.run()
    best_bps = max(stats.bandwidth_bps for stats in loop.precopy.rounds)
    assert loop.link.sender.window_bytes == max(256 << 10, int(best_bps * 0.03))


@pytest.mark.parametrize(("rtt_ms", "trips"), [(1, 1), (4, 1), (5, 2), (100, 2)])
def test_a_far_link_may_hold_more_than_a_round_has_shown(
    monkeypatch: pytest.MonkeyPatch, rtt_ms: int, trips: int
) -> None:
    guest = LoopGuest([1024])
    for page in range(1024):
        guest.write(0, page, 1)
    loop = Loop(guest, FixedRoundsPolicy(1), live=False)
    counted, rtt_ns = loop.link.sender.counters, rtt_ms * 1_000_000
    monkeypatch.setattr(
        loop.link.sender,
        "counters",
        lambda: replace(counted(), rtt_ns=rtt_ns, base_rtt_ns=rtt_ns),
    )
    loop.precopy.run()
    best_bps = max(stats.bandwidth_bps for stats in loop.precopy.rounds)
    room = best_bps * (trips * rtt_ms + 30) / 1e3
    assert loop.link.sender.window_bytes == pytest.approx(max(256 << 10, room), abs=1)


def test_while_the_windows_grow_the_rounds_set_none(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = LoopGuest([64])
    guest.write(0, 5, 1)
    loop = Loop(guest, FixedRoundsPolicy(2))
    counters = loop.link.sender.counters
    growing = (ChannelCounters(0, wire_bytes=1, opening=True),)
    monkeypatch.setattr(loop.link.sender, "counters", lambda: replace(counters(), channels=growing))
    loop.precopy.run()
    assert loop.link.sender.window_bytes == 0


Write = tuple[int, int, int]
writes = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 129), st.integers(1, 255)), max_size=6
)


@settings(max_examples=150, deadline=None)
@example(  # a write between the fetch and re-arming, which nobody was told of
    before=[],
    moments=[[]] * 10 + [[(1, 0, 1)], [(1, 1, 1)]],
    fetch_clears=False,
    rounds=2,
    grows=0,
)
@given(
    before=writes,
    moments=st.lists(writes, min_size=1, max_size=12),
    fetch_clears=st.booleans(),
    rounds=st.integers(1, 3),
    grows=st.integers(0, 2),
)
def test_no_write_is_lost_whenever_it_happens(
    before: list[Write],
    moments: list[list[Write]],
    fetch_clears: bool,
    rounds: int,
    grows: int,
) -> None:
    """Writes strike before each call that the loop makes to its fakes, while the guest runs."""
    guest = LoopGuest([130, 130], fetch_clears=fetch_clears)
    for write in before:
        guest.write(*write)
    decide = [answer(Action.CONTINUE)] * (rounds - 1) + [answer(Action.SWITCH_OVER)]
    recheck = [answer(Action.CONTINUE)] * grows + [answer(Action.SWITCH_OVER)]
    loop = Loop(guest, ScriptedPolicy(decide, recheck))
    pending = deque(moments)

    def struck(call: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*arguments: object) -> object:
            if guest.running and pending:
                for write in pending.popleft():
                    guest.write(*write)
            return call(*arguments)

        return wrapper

    for owner, names in (
        (guest.source, ("fetch", "rearm")),
        (guest, ("populated", "pause")),
        (loop.link.sender, ("send", "send_holes", "barrier", "take_missed")),
    ):
        for name in names:
            setattr(owner, name, struck(cast(Callable[..., object], getattr(owner, name))))
    loop.precopy.pause_guest = guest.pause
    loop.precopy.run()
    loop.check_equal()


@pytest.mark.parametrize("taken_back", [False, True])
def test_after_round_1_it_is_known_which_pages_it_sent_as_well(taken_back: bool) -> None:
    guest = LoopGuest([64, 200])
    on, over = answer(Action.CONTINUE), answer(Action.SWITCH_OVER)
    policy = ScriptedPolicy(
        [over if taken_back else on, on, on, over], [on, over] if taken_back else [over]
    )
    loop = Loop(guest, policy)
    writes = {0: [(0, 3), (1, 150)], 1: [(0, 3), (1, 9), (1, 20)], 2: [(0, 3)]}
    barrier = loop.link.sender.barrier

    def barrier_and_write(round_: int, timeout_ns: int = -1) -> bool:
        for block, page in writes.pop(round_, []):
            guest.write(block, page, round_ + 1)
        return barrier(round_, timeout_ns)

    loop.link.sender.barrier = barrier_and_write  # type: ignore[method-assign]
    pause = loop.precopy.pause_guest

    def write_and_pause() -> bool:
        if taken_back:
            guest.write(1, 20, len(loop.events) % 200)
        return pause()

    loop.precopy.pause_guest = write_and_pause
    loop.precopy.run()
    loop.check_equal()
    told = [(view.dirty_pages, view.resent_pages) for view in policy.views]
    if taken_back:  # (1, 20) came with the pause, and round 1 sent it
        assert told == [(2, None), (3, None), (3, 2), (1, None), (0, None), (1, None)]
    else:
        assert told == [(2, None), (3, 1), (1, None), (0, None), (0, None)]


def test_at_the_pause_it_is_no_longer_known_which_pages_round_1_sent() -> None:
    """The set has grown by then."""
    policy = ScriptedPolicy([answer(Action.CONTINUE), answer(Action.SWITCH_OVER)])
    loop = Loop(LoopGuest([64]), policy)
    loop.precopy.run()
    loop.check_equal()
    told = [(view.rounds[-1].round, view.resent_pages) for view in policy.views]
    assert told == [(0, None), (1, 0), (1, None)]


def test_numbers_of_a_round_add_up() -> None:
    guest = LoopGuest([300])
    for page in range(100):
        guest.write(0, page, 1 if page % 2 else 0)
    loop = Loop(guest, FixedRoundsPolicy(1))
    final = loop.precopy.run()
    first = final.rounds[0]
    assert (first.normal_pages, first.zero_pages, first.hole_pages) == (50, 50, 200)
    assert first.pages == 300
    assert first.bytes > 50 * PAGE
    assert first.bandwidth_bps == pytest.approx(first.bytes * 1e9 / first.duration_ns)
    assert final.landed_ns >= final.paused_ns >= final.pause_started_ns
    u64: npt.NDArray[np.uint64] = loop.link.sender.hashes(0, 0, 300)
    assert u64.any(axis=1).all()
