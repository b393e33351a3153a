# SPDX-License-Identifier: Apache-2.0
"""Pages that multifd brings twice in a round (QEMU before 8.0) cost one round, not one each."""

from __future__ import annotations

import pytest
import qemu_streams as s
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stream_pass_world import DEVICES, END, World

from vmth.qemu import stream_pass

CHANNEL = 0
#: END's own page.
LAST = 3


def packet(first: int, npages: int, seed: int) -> bytes:
    """One run of pages."""
    begin = s.normal(first, "pc.ram", seed + first)
    rest = [s.normal(page, None, seed + page) for page in range(first + 1, first + npages)]
    return s.part(begin + b"".join(rest) + s.eos())


def arrived(world: World, page: int) -> bytes:
    return world.page(0, page)


def overlapping(backwards: bool) -> list[bytes]:
    """Each packet begins with the last page of the one before; or came before it."""
    packets = [packet(first, 8, 1000 * first) for first in range(4, 60, 7)]
    return packets[::-1] if backwards else packets


@pytest.mark.parametrize("backwards", [False, True])
def test_a_page_in_two_packets_costs_no_round_of_its_own(backwards: bool) -> None:
    packets = overlapping(backwards)
    world = World([*packets, END, DEVICES], channel=CHANNEL)
    final = world.engine.run()
    twice = len(packets) - 1
    assert [stats.pages for stats in final.rounds] == [7 * len(packets) + 1 + 1, twice]
    for first in range(11, 60, 7):
        seed = 1000 * (first - 7 if backwards else first)  # the packet that came last
        assert arrived(world, first) == s.page_of(seed + first)
    assert world.link.sender.digest() == world.link.receiver.digest()


def test_a_packet_whose_neighbours_came_first() -> None:
    """On another channel."""
    pieces = [packet(4, 8, 1), packet(18, 8, 2), packet(11, 8, 3), END, DEVICES]
    world = World(pieces, channel=CHANNEL)
    final = world.engine.run()
    assert [stats.pages for stats in final.rounds] == [8 + 8 + 6 + 1, 2]
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
    assert [stats.pages for stats in final.rounds] == [9, 2]
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
    assert [stats.pages for stats in final.rounds] == [15, 1, 5]
    assert arrived(world, 11) == s.page_of(3 + 11)
    assert arrived(world, 18) == s.page_of(2 + 18)


def test_pages_of_the_next_pass_are_not_kept_one_by_one() -> None:
    """Where QEMU has begun anew, the round ends at once."""

    def before(piece: int) -> None:
        if piece == 2:
            world.helm.passes = 2

    world = World([packet(4, 8, 1), packet(11, 8, 2), END, DEVICES], before=before, channel=CHANNEL)
    final = world.engine.run()
    assert [stats.pages for stats in final.rounds] == [8, 9]
    assert arrived(world, 11) == s.page_of(2 + 11)


def test_a_pass_that_qemu_did_not_tell_of_is_a_round() -> None:
    world = World([packet(4, 8, 1), packet(4, 8, 2), END, DEVICES], channel=CHANNEL)
    final = world.engine.run()
    assert [stats.pages for stats in final.rounds] == [8, 9]
    assert arrived(world, 4) == s.page_of(2 + 4)


def test_only_so_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_pass, "MOST_AGAIN_PAGES", 3)
    packets = overlapping(False)
    world = World([*packets, END, DEVICES], channel=CHANNEL)
    final = world.engine.run()
    # Three wait, the fourth ends the round; the three go with it.
    assert len(final.rounds) == 3
    assert world.link.sender.digest() == world.link.receiver.digest()
    for first in range(11, 60, 7):
        assert arrived(world, first) == s.page_of(1000 * first + first)


PACKETS = st.lists(st.tuples(st.integers(0, 56), st.integers(1, 8)), max_size=30)


@settings(max_examples=40)
@given(PACKETS, st.integers(1, 5))
@example([(4, 8), (11, 8), (10, 3), (11, 1)], 3)
def test_what_came_last_is_what_is_there(packets: list[tuple[int, int]], most: int) -> None:
    """In whatever way they overlap."""
    newest = {LAST: s.page_of(777)}
    pieces = []
    for number, (first, npages) in enumerate(packets):
        pieces.append(packet(first, npages, 100 * number))
        newest |= {page: s.page_of(100 * number + page) for page in range(first, first + npages)}
    newest[LAST] = s.page_of(777)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_pass, "MOST_AGAIN_PAGES", most)
        world = World([*pieces, END, DEVICES], channel=CHANNEL)
        world.engine.run()
    assert {page: arrived(world, page) for page in newest} == newest
    assert world.link.sender.digest() == world.link.receiver.digest()
