# SPDX-License-Identifier: Apache-2.0
"""The rounds over a QEMU's stream on fakes: streams written by hand, page channels in memory, a
helm that notes its orders. No socket, no clock, no QEMU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import qemu_streams as s
from hypothesis import given, settings
from hypothesis import strategies as st

from vmth.channel.fake import FakeLink
from vmth.errors import (
    CancelledError,
    MigrationError,
    NotConvergedError,
    StreamError,
    VerificationError,
)
from vmth.events import DirtyLimited, Event, GuestPaused, RoundFinished, Throttled
from vmth.guest import StateStream
from vmth.policy.interface import Action, Decision, Forecast, OnStall, RoundView
from vmth.qemu import stream as q
from vmth.qemu import stream_pass
from vmth.qemu.dirty_limit import ThrottleWay
from vmth.qemu.ram import MAX_BLOCKS
from vmth.qemu.stream_pass import LOOK_NS, StreamPass
from vmth.rounds import RoundTools
from vmth.tuning import Tuning
from vmth.types import Gpa, Mapping, RamBlock

LIMIT_NS = 300_000_000
NOTHING = Forecast(0, 0, 0, 0)
LATE = Forecast(LIMIT_NS, LIMIT_NS, 0, 0)
MACHINE = "pc-q35-7.2"
DEVICES = b"".join((s.full(7, "timer", s.TRICKY), b"\x00", s.description([("timer", 59)])))


class StreamGuest:
    """Only blocks and a pause: what the pass needs."""

    dirty = ()

    def __init__(self, blocks: Sequence[tuple[str, int]]) -> None:
        self.blocks = [RamBlock(name, length, Gpa(0), Mapping()) for name, length in blocks]
        self.paused = False

    def pause(self) -> bool:
        self.paused = True
        return True

    def resume(self) -> None:
        raise AssertionError("not the pass's business")

    def save_state(self, write: Callable[[StateStream], None]) -> None:
        raise AssertionError("not the pass's business")

    def load_state(self, streams: Iterable[StateStream]) -> None:
        raise AssertionError("not the pass's business")

    def release(self) -> None:
        raise AssertionError("not the pass's business")


@dataclass
class FakeHelm:
    passes: int = 1
    remaining_bytes: int = 0
    throttle_percent: int = 0
    stopped_ns: int | None = None
    allowed: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    trouble: Exception | None = None

    def hold_dirty_rate(self, rate_bps: int) -> None:
        self.held.append(rate_bps)

    def allow_downtime(self, limit_ns: int) -> None:
        self.allowed.append(limit_ns)

    def check(self) -> None:
        if self.trouble is not None:
            raise self.trouble


class FakeStream:
    """The events of some bytes, fed in pieces from one buffer that is overwritten as soon as the
    pass may expect. ``before(n)`` runs before piece n is read; None in ``pieces``: silence."""

    def __init__(self, pieces: Sequence[bytes | None], before: Callable[[int], None]) -> None:
        self._reader = q.StreamReader(opaque_devices=True)
        self._pieces = deque(pieces)
        self._before = before
        self._read = 0
        self._buffer = bytearray()
        self._until: Callable[[], object] | None = None
        self.given_out_bytes = self._fed = 0
        self.read_bytes = 0  #: last limit

    @property
    def unread_bytes(self) -> int:
        return self._fed - self.given_out_bytes

    def in_use(self, until: Callable[[], object]) -> None:
        self._until = until

    def limit_read(self, nbytes: int) -> None:
        self.read_bytes = nbytes

    def next_event(self, timeout_s: float) -> q.Event | None:
        while (event := self._reader.next_event()) is None:
            self.given_out_bytes = self._fed
            if not self._pieces:
                return q.StreamFinished()
            self._before(self._read)
            self._read += 1
            piece = self._pieces.popleft()
            if piece is None:
                return None
            if self._until is not None:
                self._until()
            self._buffer[:] = bytes([0xA5]) * len(self._buffer)
            self._buffer = bytearray(piece)
            self._fed += len(piece)
            self._reader.feed(self._buffer)
        return event


class ScriptedPolicy:
    """Answers from a list; the last answer repeats."""

    def __init__(self, *answers: Decision) -> None:
        self.views: list[RoundView] = []
        self._answers = deque(answers or [Decision(Action.CONTINUE, "scripted", NOTHING)])

    def decide(self, view: RoundView) -> Decision:
        self.views.append(view)
        return self._answers.popleft() if len(self._answers) > 1 else self._answers[0]

    def recheck(self, view: RoundView, forecast: Forecast) -> Decision:
        raise AssertionError("QEMU has stopped its guest for good")


class World:
    """One pass over ``pieces`` behind a head that lists ``blocks``."""

    def __init__(
        self,
        pieces: Sequence[bytes | None],
        *,
        policy: ScriptedPolicy | None = None,
        blocks: Sequence[tuple[str, int]] = s.BLOCKS,
        tuning: Tuning | None = None,
        before: Callable[[int], None] = lambda piece: None,
    ) -> None:
        self.guest = StreamGuest(blocks)
        shapes = [(block.npages, s.PAGE) for block in self.guest.blocks]
        self.arrived = [np.full(shape, 0xEE, dtype=np.uint8) for shape in shapes]
        self.link = FakeLink(
            [np.zeros(shape, dtype=np.uint8) for shape in shapes],
            self.arrived,
            hostless=frozenset(range(len(shapes))),
        )
        self.helm = FakeHelm()
        self.events: list[Event] = []
        self.now_ns = 0
        self.cancelled = False
        self.policy = policy or ScriptedPolicy()
        self.stream = FakeStream(
            [s.header(MACHINE) + s.start(s.block_list(blocks) + s.eos()), *pieces], before
        )
        self.tools = RoundTools(
            sender=self.link.sender,
            policy=self.policy,
            tuning=tuning or Tuning(0, LIMIT_NS, 0, OnStall.PAUSE),
            clock=self.clock,
            emit=self.events.append,
            page_bytes=s.PAGE,
            live=True,
            pause_guest=self.guest.pause,
            resume_guest=self.guest.resume,
            check=self.check,
        )
        self.engine = StreamPass(self.guest, self.tools, self.stream, self.helm)

    def clock(self) -> int:
        self.now_ns += 1000
        return self.now_ns

    def check(self) -> None:
        if self.cancelled:
            raise CancelledError("cancelled by the caller")

    def page(self, block: int, page: int) -> bytes:
        return bytes(self.arrived[block][page])


def every_page(blocks: Sequence[tuple[str, int]] = s.BLOCKS) -> bytes:
    """Each page of each block once."""
    records = b"".join(
        s.normal(page, name, 1000 * index + page)
        for index, (name, length) in enumerate(blocks)
        for page in range(length // s.PAGE)
    )
    return s.part(records + s.eos())


END = s.end(s.normal(3, "pc.ram", 777) + s.eos())


def test_all_that_the_stream_says_lands_and_the_guest_is_paused() -> None:
    world = World([every_page(), s.part(s.zero(5, "pc.ram") + s.eos()), END, DEVICES])
    final = world.engine.run()
    assert world.guest.paused and final.was_running
    assert world.page(0, 3) == s.page_of(777)
    assert world.page(0, 5) == bytes(s.PAGE)
    assert world.page(1, 2) == s.page_of(1002)
    assert bytes(world.engine.state) == DEVICES
    sender, receiver = world.link.sender.digest(), world.link.receiver.digest()
    assert sender == receiver and sender[2] == 67
    # Page 5 went out twice: a barrier before that. The last pages went with it.
    assert [stats.pages for stats in final.rounds] == [67, 2]
    assert [stats.paused for stats in final.rounds] == [False, False]
    assert [type(event) for event in world.events if isinstance(event, GuestPaused)]


def test_the_round_that_begins_with_the_last_pages_is_the_paused_one() -> None:
    world = World([every_page(), END, DEVICES])
    final = world.engine.run()
    assert [(stats.pages, stats.paused) for stats in final.rounds] == [(67, False), (1, True)]
    assert world.policy.views == []  # nothing is left to decide


def test_downtime_begins_when_qemu_said_stop() -> None:
    world = World([every_page(), END, DEVICES], before=lambda piece: note(piece))

    def note(piece: int) -> None:
        if piece == 2:
            world.helm.stopped_ns = world.clock()

    final = world.engine.run()
    assert world.helm.stopped_ns == final.pause_started_ns < final.paused_ns < final.landed_ns


@pytest.mark.parametrize("landed", [True, False])
def test_silence_of_qemu_says_nothing_about_the_link(landed: bool) -> None:
    """Three waits of 50 ms bring nothing; the pages land in the first of them, or not at all."""

    def before(piece: int) -> None:
        if piece == 2 and landed:
            world.link.sender.wait_read(world.engine._ahead[-1][0])
        world.now_ns += 50_000_000 if piece in (2, 3, 4) else 0

    again = s.part(s.zero(5, "pc.ram") + s.eos())
    world = World([every_page(), None, None, None, again, END, DEVICES], before=before)
    first, last = world.engine.run().rounds
    assert first.idle_ns == pytest.approx(100_000_000 if landed else 0, abs=100_000)
    assert first.duration_ns > 150_000_000
    sending_ns = first.duration_ns - first.idle_ns
    assert first.bandwidth_bps == pytest.approx(first.bytes * 1e9 / sending_ns)
    assert last.idle_ns == 0


def test_a_pass_of_qemus_is_a_round() -> None:
    parts = [s.part(s.normal(page, "pc.ram") + s.eos()) for page in (10, 11, 12)]

    def before(piece: int) -> None:
        if piece == 2:
            world.helm.passes, world.helm.remaining_bytes = 2, 40 * s.PAGE

    world = World([*parts, END, DEVICES], before=before)
    final = world.engine.run()
    assert [stats.pages for stats in final.rounds] == [2, 2]
    assert final.rounds[0].dirty_pages == 40
    assert world.policy.views[0].dirty_pages == 40


def test_a_pass_without_pages_is_none() -> None:
    def before(piece: int) -> None:
        world.helm.passes += 1

    empty = s.part(s.eos())
    world = World([empty, empty, every_page(), END, DEVICES], before=before)
    assert all(stats.pages for stats in world.engine.run().rounds)


def test_no_barrier_is_made_of_a_pass_while_the_guest_is_stopped() -> None:
    def before(piece: int) -> None:
        if piece == 1:
            world.helm.passes, world.helm.stopped_ns = 2, world.clock()

    parts = [s.part(s.normal(page, "pc.ram") + s.eos()) for page in (10, 11)]
    world = World([*parts, s.end(s.eos()), DEVICES], before=before)
    assert len(world.engine.run().rounds) == 1


@pytest.mark.parametrize(
    ("forecast", "allowed"), [(NOTHING, LIMIT_NS), (LATE, 0)], ids=["fits", "too late"]
)
def test_qemu_may_stop_when_the_policy_says_so(forecast: Forecast, allowed: int) -> None:
    policy = ScriptedPolicy(
        Decision(Action.CONTINUE, "scripted", NOTHING),
        Decision(Action.SWITCH_OVER, "scripted", forecast),
    )
    passes = [every_page(), every_page(), every_page()]
    world = World([*passes, END, DEVICES], policy=policy)
    orders: list[int] = []
    decide = policy.decide

    def decided(view: RoundView) -> Decision:
        orders.append(len(world.helm.allowed))
        return decide(view)

    policy.decide = decided  # type: ignore[method-assign]
    world.engine.run()
    assert orders[:2] == [0, 0]  # nothing was allowed before the second decision
    assert world.helm.allowed[0] == allowed
    if not allowed:
        assert world.helm.allowed == [0]  # said once


def test_what_cannot_converge_is_given_up() -> None:
    policy = ScriptedPolicy(Decision(Action.GIVE_UP, "it does not shrink", LATE))
    world = World([every_page(), every_page(), END, DEVICES], policy=policy)
    with pytest.raises(NotConvergedError, match="it does not shrink"):
        world.engine.run()
    assert not world.guest.paused


@pytest.mark.parametrize("on_stall", list(OnStall))
def test_the_timeout(on_stall: OnStall) -> None:
    def before(piece: int) -> None:
        world.now_ns += 2 * LOOK_NS

    tuning = Tuning(0, LIMIT_NS, 3 * LOOK_NS, on_stall)
    world = World([None, None, every_page(), END, DEVICES], tuning=tuning, before=before)
    if on_stall is OnStall.PAUSE:
        world.engine.run()
        assert world.helm.allowed == [0]
    else:
        with pytest.raises(NotConvergedError, match="timeout of 150ms came in round 0"):
            world.engine.run()


def test_a_switchover_that_is_asked_for_is_ordered() -> None:
    def before(piece: int) -> None:
        world.now_ns += 2 * LOOK_NS
        world.tools.tuning.switchover_requested = True

    world = World([None, every_page(), END, DEVICES], before=before)
    world.engine.run()
    assert world.helm.allowed == [0]


@pytest.mark.parametrize("kind", ["cancel", "order"])
def test_silence_is_no_reason_not_to_look(kind: str) -> None:
    def before(piece: int) -> None:
        world.now_ns += 2 * LOOK_NS
        world.cancelled = kind == "cancel"
        world.helm.trouble = MigrationError("no such limit") if kind == "order" else None

    world = World([None, every_page()], before=before)
    with pytest.raises(MigrationError, match=r"cancelled by the caller|no such limit"):
        world.engine.run()


def test_a_cancel_ends_the_wait_for_a_barrier() -> None:
    def before(piece: int) -> None:
        if piece == 2:
            world.link.late_barriers = 1000
            world.cancelled = True

    world = World([every_page(), every_page()], before=before)
    with pytest.raises(CancelledError):
        world.engine.run()


def test_last_pages_that_do_not_land_are_given_up() -> None:
    def before(piece: int) -> None:
        if piece == 3:
            world.link.late_barriers = 1000
            world.now_ns += 11 * LIMIT_NS

    world = World([every_page(), END, DEVICES], before=before)
    with pytest.raises(NotConvergedError, match=r"have not landed 3s after the pause"):
        world.engine.run()


def test_damage_cannot_be_repaired() -> None:
    world = World([every_page(), every_page(), END, DEVICES])
    world.link.damage.add((0, 9))
    with pytest.raises(VerificationError, match="arrived damaged: QEMU cannot be asked"):
        world.engine.run()
    assert not world.guest.paused


def test_pages_that_differ_at_the_seal_cannot_be_sent_again() -> None:
    world = World([every_page(), END, DEVICES])
    world.engine.run()
    with pytest.raises(VerificationError, match=r"in 2 pages of ramblock 'pc\.ram'"):
        world.engine.resend(0, [1, 2])


def test_pages_that_qemu_leaves_out_arrive_as_zeros() -> None:
    pages = [0, 1, 5, 63]
    records = b"".join(s.normal(page, "pc.ram") for page in pages)
    world = World([s.part(records + s.eos()), s.end(s.eos()), DEVICES])
    world.engine.run()
    sender, receiver = world.link.sender.digest(), world.link.receiver.digest()
    assert sender == receiver and sender[2] == 67
    assert world.link.sender.counters().hole_pages == 67 - len(pages)
    assert world.page(0, 2) == bytes(s.PAGE) and world.page(0, 63) == s.page_of(63)
    assert world.engine.notes == ["63 pages were not sent by QEMU, free in its guest: now zeros"]


@pytest.mark.parametrize(
    ("piece", "error", "fault"),
    [
        (s.part(s.record(1, s.XBZRLE, b"\1\0\1\0", "pc.ram") + s.eos()), StreamError, "XBZRLE"),
        (
            s.part(s.record(1, s.COMPRESS, s.u32(1) + b"x", "pc.ram") + s.eos()),
            StreamError,
            "COMPRESS",
        ),
        (s.start(b"", "dirty-bitmap", 1, 9), MigrationError, "iterable section 'dirty-bitmap'"),
        (s.full(9, "virtio-mem", b"early") + s.part(s.eos()), MigrationError, "before memory is"),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(
    piece: bytes, error: type[Exception], fault: str
) -> None:
    world = World([piece, every_page(), END, DEVICES])
    with pytest.raises(error, match=fault):
        world.engine.run()
    assert not world.guest.paused


def test_qemus_throttle_is_shown() -> None:
    def before(piece: int) -> None:
        world.now_ns += 2 * LOOK_NS
        world.helm.throttle_percent = 30

    world = World([None, every_page(), END, DEVICES], before=before)
    world.engine.run()
    assert world.engine.throttle_percent == 30
    assert [event.percent for event in world.events if isinstance(event, Throttled)] == [30]


def test_a_dirty_limit_is_set_as_decided_and_let_go() -> None:
    limiting = Decision(Action.THROTTLE, "scripted", NOTHING, dirty_limit_bps=5e6)
    more = Decision(Action.CONTINUE, "scripted", NOTHING)
    world = World([every_page()] * 3 + [END, DEVICES], policy=ScriptedPolicy(limiting, more))
    world.engine.throttle = ThrottleWay.DIRTY_LIMIT
    world.engine.run()
    first, second = world.policy.views[:2]
    assert first.takes_rate and first.can_throttle and not first.throttled
    assert second.dirty_limit_bps == 5e6 and 0 < second.limited_at_ns < second.now_ns
    assert world.helm.held == [5_000_000]
    world.engine.let_go()
    assert world.helm.held == [5_000_000]  # a stopped guest is not kept waiting for that
    for _ in range(2):
        world.engine.close()
    assert world.helm.held == [5_000_000, 0]
    told = [event.rate_bps for event in world.events if isinstance(event, DirtyLimited)]
    assert told == [5_000_000, 0]


def test_a_guest_that_was_given_up_is_let_go_at_once() -> None:
    answers = [
        Decision(Action.THROTTLE, "scripted", NOTHING, dirty_limit_bps=5e6),
        Decision(Action.GIVE_UP, "hopeless", NOTHING),
    ]
    world = World([every_page()] * 4 + [END, DEVICES], policy=ScriptedPolicy(*answers))
    world.engine.throttle = ThrottleWay.DIRTY_LIMIT
    with pytest.raises(NotConvergedError, match="hopeless"):
        world.engine.run()
    world.engine.let_go()
    assert world.helm.held == [5_000_000, 0]
    world.engine.close()
    assert world.helm.held == [5_000_000, 0]


def test_auto_converge_is_left_to_qemu() -> None:
    throttling = Decision(Action.THROTTLE, "scripted", NOTHING, throttle_percent=40)
    world = World([every_page()] * 2 + [END, DEVICES], policy=ScriptedPolicy(throttling))
    world.engine.throttle = ThrottleWay.AUTO_CONVERGE
    world.engine.run()
    world.engine.close()
    assert world.policy.views[0].can_throttle and not world.policy.views[0].takes_rate
    assert world.helm.held == []


def test_the_queue_is_bounded_by_the_downtime_limit() -> None:
    def before(piece: int) -> None:
        world.now_ns += 2 * LOOK_NS

    world = World([every_page(), None, None, every_page(), END, DEVICES], before=before)
    world.engine.run()
    stats = [event.stats for event in world.events if isinstance(event, RoundFinished)]
    assert world.link.sender.window_bytes >= 256 << 10
    assert world.stream.read_bytes == world.link.sender.window_bytes // 2
    assert stats[0].bytes > 0


def test_less_is_queued_where_qemu_may_stop_its_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_pass, "NEAR_BYTES", 20 * s.PAGE)
    monkeypatch.setattr(stream_pass, "MIN_WINDOW_BYTES", 1)
    windows: list[tuple[int, int]] = []  # (pieces read, bytes that may be under way)
    read = 0

    def before(piece: int) -> None:
        nonlocal read
        read = piece
        world.helm.remaining_bytes = 64 * s.PAGE
        world.now_ns += 2 * LOOK_NS if piece in (1, 4) else 0

    def note(nbytes: int) -> None:
        windows.append((read, nbytes))

    def pages(first: int, end: int) -> bytes:
        return s.part(b"".join(s.normal(page, "pc.ram") for page in range(first, end)) + s.eos())

    parts = [every_page(), None, pages(0, 40), None, pages(40, 64), END, DEVICES]
    world = World(parts, before=before)
    monkeypatch.setattr(world.link.sender, "set_window", note)
    world.engine.run()
    assert [pieces for pieces, _ in windows][-2:] == [4, 5]
    far, near = (nbytes for _, nbytes in windows[-2:])
    assert 3.9 < far / near < 4.1


def test_more_blocks_than_a_stream_may_list() -> None:
    blocks = [(f"b{index}", s.PAGE) for index in range(300)]
    assert len(blocks) < MAX_BLOCKS
    world = World([every_page(blocks), s.end(s.eos()), DEVICES], blocks=blocks)
    world.engine.run()
    assert world.page(299, 0) == s.page_of(1000 * 299)


BLOCK_PAGES = [(name, length // s.PAGE) for name, length in s.BLOCKS]
WRITES = st.lists(
    st.tuples(
        st.integers(0, 1).flatmap(
            lambda block: st.tuples(st.just(block), st.integers(0, BLOCK_PAGES[block][1] - 1))
        ),
        st.integers(0, 50),
    ),
    max_size=60,
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(WRITES, st.integers(1_000, 40_000))
def test_the_last_content_of_every_page_arrives(
    writes: list[tuple[tuple[int, int], int]], cut: int
) -> None:
    """However pages repeat and however the bytes are cut."""
    records = [
        s.normal(page, s.BLOCKS[block][0], seed) if seed else s.zero(page, s.BLOCKS[block][0])
        for (block, page), seed in writes
    ]
    data = every_page() + b"".join(s.part(record + s.eos()) for record in records)
    data += s.end(s.eos()) + DEVICES
    world = World([data[at : at + cut] for at in range(0, len(data), cut)])
    world.engine.run()
    expected = {
        (block, page): s.page_of(1000 * block + page)
        for block, (_, npages) in enumerate(BLOCK_PAGES)
        for page in range(npages)
    }
    for place, seed in writes:
        expected[place] = s.page_of(seed) if seed else bytes(s.PAGE)
    for (block, page), content in expected.items():
        assert world.page(block, page) == content
    assert world.link.sender.digest() == world.link.receiver.digest()
