# SPDX-License-Identifier: Apache-2.0
"""Pages that multifd brings twice in a round (QEMU before 8.0) cost one round, not one each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import qemu_streams as s
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stream_pass_world import DEVICES, END, LIMIT_NS, NOTHING, ScriptedPolicy, World

from vmth.events import RoundStarted
from vmth.policy.interface import Action, Decision, OnStall
from vmth.policy.standard import StandardPolicy
from vmth.qemu import stream_pass
from vmth.stats import RoundStats
from vmth.tuning import Tuning

CHANNEL = 0
#: END's own page.
LAST = 3


def records(first: int, npages: int, seed: int) -> bytes:
    """One run of pages."""
    begin = s.normal(first, "pc.ram", seed + first)
    rest = [s.normal(page, None, seed + page) for page in range(first + 1, first + npages)]
    return begin + b"".join(rest)


def packet(first: int, npages: int, seed: int) -> bytes:
    return s.part(records(first, npages, seed) + s.eos())


def arrived(world: World, page: int) -> bytes:
    return world.page(0, page)


def overlapping(backwards: bool) -> list[bytes]:
    """Each packet begins with the last page of the one before; or came before it."""
    packets = [packet(first, 8, 1000 * first) for first in range(4, 60, 7)]
    return packets[::-1] if backwards else packets


def brought(stats: RoundStats) -> int:
    """Pages of QEMU; what it never sent is filled with holes behind its last ones."""
    return stats.pages - stats.hole_pages


@pytest.mark.parametrize("backwards", [False, True])
def test_a_page_in_two_packets_costs_no_round_of_its_own(backwards: bool) -> None:
    packets = overlapping(backwards)
    world = World([*packets, END, DEVICES], channel=CHANNEL)
    final = world.engine.run()
    twice = len(packets) - 1
    assert [brought(stats) for stats in final.rounds] == [7 * len(packets) + 1 + 1, twice]
    for first in range(11, 60, 7):
        seed = 1000 * (first - 7 if backwards else first)  # the packet that came last
        assert arrived(world, first) == s.page_of(seed + first)
    assert world.link.sender.digest() == world.link.receiver.digest()


def test_a_packet_whose_neighbours_came_first() -> None:
    """On another channel."""
    pieces = [packet(4, 8, 1), packet(18, 8, 2), packet(11, 8, 3), END, DEVICES]
    world = World(pieces, channel=CHANNEL)
    final = world.engine.run()
    assert [brought(stats) for stats in final.rounds] == [8 + 8 + 6 + 1, 2]
    assert arrived(world, 11) == s.page_of(3 + 11) and arrived(world, 18) == s.page_of(3 + 18)
    assert arrived(world, 12) == s.page_of(3 + 12)


def test_so_it_was_a_round_each_where_pages_come_by_one_stream() -> None:
    """There QEMU sends no page twice but in another pass."""
    packets = overlapping(False)
    final = World([*packets, END, DEVICES]).engine.run()
    assert len(final.rounds) == len(packets)


def test_a_single_page_and_zeros_are_kept_as_well() -> None:
    again = s.part(s.zero(5, "pc.ram") + s.normal(9, "pc.ram", 99) + s.eos())
    world = World([packet(4, 8, 1), again, END, DEVICES], channel=CHANNEL)
    final = world.engine.run()
    assert [brought(stats) for stats in final.rounds] == [9, 2]
    assert arrived(world, 5) == bytes(s.PAGE)
    assert arrived(world, 9) == s.page_of(99)


def test_they_go_first_in_the_next_round() -> None:
    """Which may bring a newer one: that is the one that stays."""

    def before(piece: int) -> None:
        if piece == 3:
            world.helm.passes = 2

    newer = packet(9, 4, 3)
    pieces = [packet(4, 8, 1), packet(11, 8, 2), newer, END, DEVICES]
    world = World(pieces, before=before, channel=CHANNEL)
    final = world.engine.run()
    # The one that was kept makes no round of its own, nothing being known of it.
    assert [brought(stats) for stats in final.rounds] == [15, 1 + 5]
    assert len(world.policy.views) == 1
    assert arrived(world, 11) == s.page_of(3 + 11)
    assert arrived(world, 18) == s.page_of(2 + 18)


def test_pages_of_the_next_pass_are_not_kept_one_by_one() -> None:
    """Where QEMU has begun anew, the round ends at once."""

    def before(piece: int) -> None:
        if piece == 2:
            world.helm.passes = 2

    world = World([packet(4, 8, 1), packet(11, 8, 2), END, DEVICES], before=before, channel=CHANNEL)
    final = world.engine.run()
    assert [brought(stats) for stats in final.rounds] == [8, 9]
    assert arrived(world, 11) == s.page_of(2 + 11)


def test_a_pass_that_qemu_did_not_tell_of_is_a_round() -> None:
    world = World([packet(4, 8, 1), packet(4, 8, 2), END, DEVICES], channel=CHANNEL)
    final = world.engine.run()
    assert [brought(stats) for stats in final.rounds] == [8, 9]
    assert arrived(world, 4) == s.page_of(2 + 4)


def test_only_so_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then they land, and the round goes on: QEMU's pass does, and nothing is known of a next one
    that the policy could be asked about."""
    monkeypatch.setattr(stream_pass, "MOST_AGAIN_PAGES", 3)
    waited: list[int] = []
    ahead: list[int] = []
    landed: list[bytes] = []

    def before(piece: int) -> None:
        waited.append(len(world.engine._again))
        ahead.append(world.engine._lent.ahead_bytes)
        landed.append(arrived(world, 11))

    packets = overlapping(False)
    world = World([*packets, END, DEVICES], before=before, channel=CHANNEL)
    world.helm.remaining_bytes = 50 * s.PAGE
    final = world.engine.run()
    assert waited == [0, 0, 0, 1, 2, 3, 0, 1, 2, 3, 3]
    # Three of the seven wait for the fourth, which goes with them, and three for the end.
    assert ahead[6] == (3 + 8) * s.PAGE
    assert [brought(stats) for stats in final.rounds] == [57 + 1 + 4, 3]
    assert [stats.dirty_pages for stats in final.rounds] == [0, 0]  # the guest has stopped
    assert world.policy.views == []
    assert [landed[5], landed[7]] == [s.page_of(4000 + 11), s.page_of(11000 + 11)]
    assert world.link.sender.digest() == world.link.receiver.digest()
    for first in range(11, 60, 7):
        assert arrived(world, first) == s.page_of(1000 * first + first)


def test_no_link_is_called_slow_within_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever waits in the midst of it: ``cancel`` gives up where rounds bring no progress."""
    monkeypatch.setattr(stream_pass, "MOST_AGAIN_PAGES", 1)
    tuning = Tuning(0, LIMIT_NS, 0, OnStall.CANCEL)
    world = World([*overlapping(False), END, DEVICES], tuning=tuning, channel=CHANNEL)
    world.engine.tools = replace(world.tools, policy=StandardPolicy())
    world.helm.remaining_bytes = 1 << 40
    assert len(world.engine.run().rounds) == 2


def test_nor_where_one_that_waited_comes_again_with_the_next_pass() -> None:
    def before(piece: int) -> None:
        if piece == 4:
            world.helm.passes = 2

    packets = [packet(4, 8, 1), packet(11, 8, 2), packet(4, 20, 3), packet(40, 4, 4)]
    tuning = Tuning(0, LIMIT_NS, 0, OnStall.CANCEL)
    pieces = [*packets, packet(50, 4, 5), END, DEVICES]
    world = World(pieces, tuning=tuning, before=before, channel=CHANNEL)
    world.engine.tools = replace(world.tools, policy=StandardPolicy())
    world.helm.remaining_bytes = 1 << 40
    world.engine.run()
    assert arrived(world, 11) == s.page_of(3 + 11)


def test_fewer_wait_where_qemu_may_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts them as sent: what waits then is downtime that nobody foresees."""
    monkeypatch.setattr(stream_pass, "MOST_AGAIN_AT_END_PAGES", 1)
    waited: list[int] = []

    def before(piece: int) -> None:
        waited.append(len(world.engine._again))
        if piece == 5:
            world.helm.passes = 2

    packets = [packet(first, 8, first) for first in range(4, 53, 7)]
    world = World(
        [*packets, END, DEVICES],
        before=before,
        channel=CHANNEL,
        policy=ScriptedPolicy(Decision(Action.SWITCH_OVER, "fits", NOTHING)),
    )
    world.engine.run()
    assert world.helm.allowed == [LIMIT_NS]
    assert max(waited[:6]) == 3 and max(waited[6:]) == 1
    assert world.link.sender.digest() == world.link.receiver.digest()


def test_what_waits_is_in_the_forecast() -> None:
    def before(piece: int) -> None:
        if piece == 4:
            world.helm.passes = 2
            world.helm.remaining_bytes = 10 * s.PAGE

    packets = [packet(4, 8, 1), packet(11, 8, 2), packet(18, 8, 3), packet(40, 4, 4)]
    world = World([*packets, packet(50, 4, 5), END, DEVICES], before=before, channel=CHANNEL)
    final = world.engine.run()
    assert world.policy.views[0].dirty_pages == 10 + 2
    assert final.rounds[0].dirty_pages == 10  # dirtied while it ran


def test_what_waits_at_the_end_lands_while_the_state_is_read() -> None:
    """The guest is stopped: each round trip behind the state's last byte is downtime."""
    cut = len(DEVICES) // 2
    landed: list[bytes] = []

    def before(piece: int) -> None:
        landed.append(arrived(world, 11))

    pieces = [packet(4, 8, 1), packet(11, 8, 2), END, DEVICES[:cut], None, DEVICES[cut:]]
    world = World(pieces, before=before, channel=CHANNEL)
    barriers = counted_barriers(world)
    final = world.engine.run()
    assert landed[5] == landed[6] == s.page_of(2 + 11)
    # For the last pages with zeros where nothing was ever sent, and for what had waited.
    assert barriers == [0, 1]
    assert [(brought(stats), stats.paused) for stats in final.rounds] == [(16, False), (1, True)]
    started = [event.dirty_pages for event in world.events if isinstance(event, RoundStarted)]
    assert started[1] == 1


@pytest.mark.parametrize("late", range(8))
def test_they_land_however_late_the_barriers_are(late: int) -> None:
    """Also where the state has ended before the last pages have landed."""
    cut = len(DEVICES) // 2
    pieces = [packet(4, 8, 1), packet(11, 8, 2), END, DEVICES[:cut], None, DEVICES[cut:]]
    world = World(pieces, channel=CHANNEL)
    world.link.late_barriers = late
    world.helm.remaining_bytes = 50 * s.PAGE
    final = world.engine.run()
    assert arrived(world, 11) == s.page_of(2 + 11)
    assert [(brought(stats), stats.paused) for stats in final.rounds] == [(16, False), (1, True)]
    started = [event.dirty_pages for event in world.events if isinstance(event, RoundStarted)]
    assert started[1] == 1
    assert world.engine.state.copy() == DEVICES
    assert world.link.sender.digest() == world.link.receiver.digest()


def counted_barriers(world: World) -> list[int]:
    """The number of each that was acknowledged."""
    numbers: list[int] = []
    barrier = world.link.sender.barrier

    def counted(round_: int, timeout_ns: int = 0) -> bool:
        done = barrier(round_, timeout_ns)
        if done:
            numbers.append(round_)
        return done

    world.link.sender.barrier = counted  # type: ignore[method-assign]
    return numbers


def test_bytes_and_pages_count_once() -> None:
    """However many parts a packet was queued in: reading ahead is bounded by what is not read, and
    the end of a pass is near when it is."""

    def before(piece: int) -> None:
        if piece == 3:
            engine = world.engine
            assert engine._lent.ahead_bytes == 19 * s.PAGE
            assert engine._left_bytes() == (67 - 8 - 19 + 1) * s.PAGE
            checked.append(True)

    checked: list[bool] = []
    three = s.part(records(40, 8, 2) + records(33, 8, 3) + records(48, 4, 4) + s.eos())
    world = World([packet(4, 8, 1), three, END, DEVICES], before=before, channel=CHANNEL)
    world.engine.run()
    assert checked


RUNS = st.lists(st.tuples(st.integers(0, 56), st.integers(1, 8)), min_size=1, max_size=4)
PACKETS = st.lists(RUNS, max_size=20)


@settings(max_examples=60, deadline=None)
@given(PACKETS, st.integers(1, 5))
@example([[(4, 8)], [(11, 8)], [(10, 3)], [(11, 1)]], 3)
@example([[(4, 8), (20, 8)], [(11, 8), (27, 3), (40, 1)], [(29, 8), (18, 1)]], 1)
def test_what_came_last_is_what_is_there(packets: list[list[tuple[int, int]]], most: int) -> None:
    """In whatever way they overlap, and whatever runs one event brings."""
    newest: dict[int, bytes] = {}
    pieces = []
    for number, runs in enumerate(packets):
        body = b""
        for at, (first, npages) in enumerate(runs):
            seed = 1000 * number + 100 * at
            body += records(first, npages, seed)
            newest |= {page: s.page_of(seed + page) for page in range(first, first + npages)}
        pieces.append(s.part(body + s.eos()))
    newest[LAST] = s.page_of(777)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_pass, "MOST_AGAIN_PAGES", most)
        world = World([*pieces, END, DEVICES], channel=CHANNEL)
        world.engine.run()
    assert {page: arrived(world, page) for page in newest} == newest
    assert world.link.sender.digest() == world.link.receiver.digest()
