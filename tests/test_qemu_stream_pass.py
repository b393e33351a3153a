# SPDX-License-Identifier: Apache-2.0
"""The rounds over a QEMU's stream on fakes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import qemu_streams as s
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_pass_world import (
    DEVICES,
    END,
    LATE,
    LIMIT_NS,
    ScriptedPolicy,
    World,
    every_page,
)

from vmth.channel.fake import FakeLink
from vmth.errors import (
    CancelledError,
    MigrationError,
    NotConvergedError,
    StreamError,
    VerificationError,
)
from vmth.events import GuestPaused, RoundFinished, Throttled
from vmth.policy.interface import Action, Decision, OnStall
from vmth.qemu import queue_bounds, stream_pass, unsent
from vmth.qemu.ram import MAX_BLOCKS
from vmth.qemu.stream_connection import NEAR_PATIENCE_S, PATIENCE_S
from vmth.qemu.stream_pass import LOOK_NS
from vmth.stats import ChannelCounters, TransferCounters
from vmth.tuning import Tuning
from vmth.types import Gpa, Mapping, RamBlock


def test_all_that_the_stream_says_lands_and_the_guest_is_paused() -> None:
    world = World([every_page(), s.part(s.zero(5, "pc.ram") + s.eos()), END, DEVICES])
    final = world.engine.run()
    assert world.guest.paused and final.was_running
    assert world.page(0, 3) == s.page_of(777)
    assert world.page(0, 5) == bytes(s.PAGE)
    assert world.page(1, 2) == s.page_of(1002)
    assert world.engine.state.copy() == DEVICES
    sender, receiver = world.link.sender.digest(), world.link.receiver.digest()
    assert sender == receiver and sender[2] == 67
    # Page 5 went out twice: a barrier before that. The last pages went with it.
    assert [stats.pages for stats in final.rounds] == [67, 2]
    assert [stats.paused for stats in final.rounds] == [False, False]
    assert [type(event) for event in world.events if isinstance(event, GuestPaused)]


def test_nothing_is_waited_for_that_makes_the_guest_wait() -> None:
    world = World([every_page(), END, DEVICES])
    world.engine.run()
    near, *_, stopped = world.stream.patience
    assert 0 == stopped < near < PATIENCE_S


def test_each_pass_begins_as_patient_as_the_first() -> None:
    def before(piece: int) -> None:
        if piece == 2:
            world.helm.passes, world.helm.remaining_bytes = 2, 40 * s.PAGE

    world = World(
        [every_page(), s.part(s.zero(5, "pc.ram") + s.eos()), END, DEVICES], before=before
    )
    world.engine.run()
    assert world.stream.patience == [NEAR_PATIENCE_S, PATIENCE_S, NEAR_PATIENCE_S, 0]


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
            world.link.sender.wait_read(world.engine._lent.last_ticket)
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
    # The last round has the holes of what was not sent.
    assert [(stats.pages - stats.hole_pages, stats.hole_pages) for stats in final.rounds] == [
        (2, 0),
        (2, 63),
    ]
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


@pytest.mark.parametrize("together", [1, 7, unsent.TABLE_PAGES])
def test_pages_that_qemu_leaves_out_arrive_as_zeros(
    monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """However many hashes are looked at together."""
    monkeypatch.setattr(unsent, "TABLE_PAGES", together)
    pages = [0, 1, 5, 63]
    records = b"".join(s.normal(page, "pc.ram") for page in pages)
    world = World([s.part(records + s.eos()), s.end(s.eos()), DEVICES])
    world.engine.run()
    sender, receiver = world.link.sender.digest(), world.link.receiver.digest()
    assert sender == receiver and sender[2] == 67
    assert world.link.sender.counters().hole_pages == 67 - len(pages)
    assert world.page(0, 2) == bytes(s.PAGE) and world.page(0, 63) == s.page_of(63)
    assert world.engine.notes == ["63 pages were not sent by QEMU, free in its guest: now zeros"]


def test_without_a_digest_nothing_is_known_of_what_was_left_out() -> None:
    blocks = [RamBlock("pc.ram", 4 * s.PAGE, Gpa(0), Mapping())]
    memory = [np.zeros((4, s.PAGE), dtype=np.uint8)]
    link = FakeLink(memory, memory, digest=False, hostless=frozenset({0}))
    assert unsent.send_unsent_as_holes(link.sender, blocks, 0) == 0
    assert link.sender.counters().hole_pages == 0


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


def test_the_queue_is_bounded_by_the_downtime_limit() -> None:
    def before(piece: int) -> None:
        world.now_ns += 2 * LOOK_NS

    world = World([every_page(), None, None, every_page(), END, DEVICES], before=before)
    world.engine.run()
    stats = [event.stats for event in world.events if isinstance(event, RoundFinished)]
    assert world.link.sender.window_bytes >= 256 << 10
    assert world.stream.read_bytes == world.link.sender.window_bytes // 2
    assert stats[0].bytes > 0


def test_what_lands_while_the_windows_grow_sets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little lands in that time: a window made of it would be small for ever."""
    windows: list[tuple[int, int]] = []  # (pieces read, bytes that may be under way)
    read, landed = 0, 0

    def before(piece: int) -> None:
        nonlocal read
        read = piece
        world.now_ns += 1000 * LOOK_NS if piece == 1 else 2 * LOOK_NS

    def counters() -> TransferCounters:
        nonlocal landed
        landed += 100_000_000 if read > 3 else 0
        channels = (ChannelCounters(0, wire_bytes=1, opening=read < 4),)
        return replace(counted(), acked_bytes=landed, rtt_ns=10_000_000, channels=channels)

    pieces = [every_page(), None, None, None, None, None, None, every_page(), END, DEVICES]
    world = World(pieces, before=before)
    counted = world.link.sender.counters
    monkeypatch.setattr(world.link.sender, "counters", counters)
    monkeypatch.setattr(
        world.link.sender, "set_window", lambda nbytes: windows.append((read, nbytes))
    )
    world.engine.run()
    assert windows and min(windows)[0] >= 4
    assert windows[0][1] > 1_000_000


def test_less_is_queued_where_qemu_may_stop_its_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_pass, "NEAR_BYTES", 20 * s.PAGE)
    monkeypatch.setattr(queue_bounds, "MIN_WINDOW_BYTES", 1)
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
