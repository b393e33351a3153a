# SPDX-License-Identifier: Apache-2.0
"""When a dirty set is looked at while a round goes on, and what is made of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmth.dirty.fake import FakeDirtySource
from vmth.dirty.growth import COST_PARTS, FIRST_NS, DirtyGrowth
from vmth.errors import GuestError
from vmth.guest import CanPeek, DirtySource, Guest
from vmth.types import Bitmaps, Gpa, Mapping, RamBlock

MS = 1_000_000
LOOK_EVERY_NS = 100 * MS
BLOCKS = [RamBlock("a", 200 * 4096, Gpa(0), Mapping(address=4096))]


class SlowSource(FakeDirtySource):
    """A look takes ``look_ns``, of the world's clock."""

    world: World
    look_ns = 0

    def peek(self, bitmaps: Bitmaps) -> bool:
        self.world.now += self.look_ns
        return super().peek(bitmaps)


class World:
    """A guest that dirties one page a millisecond, and the round that is looked at."""

    def __init__(self, sources: Sequence[DirtySource], blocks: Sequence[RamBlock] = BLOCKS) -> None:
        self.now = 0
        self.sources = sources
        for source in sources:
            source.start()
        guest = SimpleNamespace(dirty=sources, blocks=blocks)
        self.growth = DirtyGrowth(cast(Guest, guest), lambda: self.now)

    def round(self, queued_ms: int, lasts_ms: int) -> tuple[tuple[int, int], ...]:
        """As the round loop does: pages are queued until then, and under way until that."""
        started, written = self.now, 0
        self.now += queued_ms * MS
        self.growth.begin(started)
        while self.now < started + lasts_ms * MS:
            wait_ns = self.growth.wait_ns(LOOK_EVERY_NS)
            assert 0 < wait_ns <= LOOK_EVERY_NS
            self.now += wait_ns
            for page in range(written, min(lasts_ms, (self.now - started) // MS)):
                cast(Any, self.sources[page % len(self.sources)]).write(0, page)
                written = page + 1
            if self.now < started + lasts_ms * MS:
                self.growth.look()
        return self.growth.end()


def test_looks_come_a_quarter_later_each_time() -> None:
    world = World([FakeDirtySource(BLOCKS)])
    seen = world.round(0, 150)
    times = [ns for ns, _ in seen]
    assert times[0] // 1000 == FIRST_NS // 1000 and times[-1] > 110 * MS
    for before, after in itertools.pairwise(times):
        assert after == before + before // 4
    assert all(pages == ns // MS for ns, pages in seen)


def test_nothing_is_looked_at_before_all_pages_are_queued() -> None:
    seen = World([FakeDirtySource(BLOCKS)]).round(60, 150)
    assert [ns // MS for ns, _ in seen] == [60, 75, 93, 117, 146]


def test_short_rounds_and_other_phases_are_not_looked_at() -> None:
    world = World([FakeDirtySource(BLOCKS)])
    assert world.round(0, 9) == ()
    assert world.growth.wait_ns(LOOK_EVERY_NS) == LOOK_EVERY_NS
    world.now += 1000 * MS
    world.growth.look()
    assert world.growth.end() == ()
    assert len(world.round(0, 100)) > 5, "one round's end is the end of all looking"
    assert world.round(0, 9) == ()


def test_looks_that_take_long_are_few() -> None:
    source = SlowSource(BLOCKS)
    world = World([source])
    source.world, source.look_ns = world, 1 * MS
    times = [ns // MS for ns, _ in world.round(0, 180)]
    assert times == [10, 10 + COST_PARTS, 10 + 2 * COST_PARTS, 10 + 3 * COST_PARTS]


def test_a_look_at_much_memory_comes_later() -> None:
    blocks = [RamBlock("a", 64 << 30, Gpa(0), Mapping(address=4096))]
    seen = World([FakeDirtySource(blocks)], blocks).round(0, 150)
    assert seen[0][0] == FIRST_NS + 64 * MS


def test_pages_that_two_sources_see_count_once() -> None:
    sources = [FakeDirtySource(BLOCKS), FakeDirtySource(BLOCKS, fetch_clears=True)]
    world = World(sources)
    for source in sources:
        source.write(0, 199)
    seen = world.round(0, 100)
    assert seen and all(pages == ns // MS + 1 for ns, pages in seen)


class Blind(FakeDirtySource):
    def peek(self, bitmaps: Bitmaps) -> bool:
        self.calls.append(("peek",))
        return False


def test_a_source_that_cannot_be_looked_at_is_asked_once() -> None:
    blind = Blind(BLOCKS)
    world = World([FakeDirtySource(BLOCKS), blind])
    assert isinstance(blind, CanPeek)
    assert world.round(0, 150) == () == world.round(0, 150)
    assert blind.calls.count(("peek",)) == 1


@pytest.mark.parametrize("error", [GuestError("gone"), OSError("no"), TypeError("what")])
def test_a_look_that_fails_ends_the_looking_and_nothing_else(error: Exception) -> None:
    source = FakeDirtySource(BLOCKS)
    world = World([source])
    source.fail_next("peek", error)
    assert world.round(0, 150) == () == world.round(0, 150)
    assert source.calls.count(("peek",)) == 1
