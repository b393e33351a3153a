# SPDX-License-Identifier: Apache-2.0
"""What every DirtySource must do, whatever it tracks: the conformance suite.

A test module derives a class from ``DirtySourceConformance`` and gives it a fixture ``harness``::

    class TestMySource(DirtySourceConformance):
        @pytest.fixture
        def harness(self) -> Iterator[DirtyHarness]:
            with my_memory() as harness:
                yield harness

The suite speaks of three moments of a page: it is *fetched* (its bit was reported), *re-armed*, and
*read* (always after it was re-armed). The promise that a migration lives on: if the page's content
changes after it was read, a later fetch reports it. Sources whose fetch re-arms by itself, and
sources that report more than was written, conform.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pytest

from vmth.guest import CanPeek, DirtySource
from vmth.types import Bitmap, RamBlock, new_bitmaps

__all__ = ["DirtyHarness", "DirtySourceConformance", "Page"]

#: (block, page)
Page = tuple[int, int]

#: Re-arm granularities differ (KVM: 64 pages), and the first fetch may report everything.
ROUNDS_UNTIL_QUIET = 3


class DirtyHarness(Protocol):
    """Memory with a writer, and the source under test over it, not started."""

    @property
    def blocks(self) -> Sequence[RamBlock]:
        """At least two, together at least 200 pages; one whose pages are no multiple of 64."""

    @property
    def source(self) -> DirtySource: ...

    def write(self, block: int, page: int) -> None:
        """Change the page's content. The write may happen later, in any order with other pages'.
        Called from any one thread at a time, also while the source is being called."""

    def settle(self) -> None:
        """Return when every write that was asked for has happened, and nothing else writes."""

    def read(self, block: int, page: int) -> bytes:
        """The page's content as it is now; it may be torn while a write is under way."""


def all_pages(blocks: Sequence[RamBlock]) -> list[Page]:
    return [(index, page) for index, block in enumerate(blocks) for page in range(block.npages)]


def pages_of(bitmaps: Sequence[Bitmap]) -> set[Page]:
    return {
        (index, int(page))
        for index, bitmap in enumerate(bitmaps)
        for page in np.flatnonzero(np.unpackbits(bitmap.view(np.uint8), bitorder="little"))
    }


class Mover:
    """What a migration does with a source: fetches, re-arms, reads, and remembers what it read."""

    def __init__(self, harness: DirtyHarness) -> None:
        self.harness = harness
        self.pending: set[Page] = set()  #: reported and not read since
        self.sent: dict[Page, bytes] = {}  #: what was read last

    def fetch(self) -> set[Page]:
        bitmaps = new_bitmaps(self.harness.blocks)
        self.harness.source.fetch(bitmaps)
        reported = pages_of(bitmaps)
        self.pending |= reported
        return reported

    def peek(self) -> set[Page] | None:
        """None: this source cannot."""
        source = self.harness.source
        bitmaps = new_bitmaps(self.harness.blocks)
        known = isinstance(source, CanPeek) and source.peek(bitmaps)
        return pages_of(bitmaps) if known else None

    def rearm(self, block: int, page: int, npages: int = 1) -> None:
        self.harness.source.rearm(block, page, npages)

    def send(self, pages: set[Page]) -> None:
        """Re-arm, then read. Neighbours are re-armed in one call, as a real mover does."""
        for block, page, npages in _runs(pages):
            self.rearm(block, page, npages)
            for sent in range(page, page + npages):
                self.sent[block, sent] = self.harness.read(block, sent)
        self.pending -= pages

    def send_everything(self) -> None:
        self.send(set(all_pages(self.harness.blocks)))

    def stale(self) -> set[Page]:
        """Pages whose content is not what was read last."""
        return {page for page, content in self.sent.items() if content != self.harness.read(*page)}


def _runs(pages: set[Page]) -> list[tuple[int, int, int]]:
    runs: list[tuple[int, int, int]] = []
    for block, page in sorted(pages):
        if runs and runs[-1][0] == block and sum(runs[-1][1:]) == page:
            runs[-1] = (block, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((block, page, 1))
    return runs


class DirtySourceConformance:
    """The suite. Each test's name is one sentence of the contract."""

    @pytest.fixture
    def mover(self, harness: DirtyHarness) -> Mover:
        """A started source, everything read once."""
        blocks = harness.blocks
        assert len(blocks) >= 2 and sum(block.npages for block in blocks) >= 200
        assert any(block.npages % 64 for block in blocks)
        harness.settle()
        harness.source.start()
        mover = Mover(harness)
        mover.send_everything()
        return mover

    def write(self, harness: DirtyHarness, *pages: Page) -> None:
        for page in pages:
            harness.write(*page)
        harness.settle()

    def test_a_write_after_start_is_reported(self, harness: DirtyHarness) -> None:
        harness.settle()
        harness.source.start()
        self.write(harness, (0, 7))
        assert (0, 7) in Mover(harness).fetch()

    def test_a_write_before_start_does_not_hide_a_later_one(self, harness: DirtyHarness) -> None:
        self.write(harness, (0, 7))
        harness.source.start()
        mover = Mover(harness)
        mover.send_everything()
        self.write(harness, (0, 7))
        assert (0, 7) in mover.fetch()

    def test_first_and_last_page_of_every_block_are_tracked(self, mover: Mover) -> None:
        blocks = mover.harness.blocks
        edges = {(i, page) for i, block in enumerate(blocks) for page in (0, block.npages - 1)}
        self.write(mover.harness, *edges)
        assert edges <= mover.fetch()

    def test_every_single_page_is_tracked(self, mover: Mover) -> None:
        pages = all_pages(mover.harness.blocks)
        self.write(mover.harness, *pages)
        assert mover.fetch() == set(pages)

    def test_no_bit_past_the_end_of_a_block_is_set(self, mover: Mover) -> None:
        blocks = mover.harness.blocks
        self.write(mover.harness, *((i, block.npages - 1) for i, block in enumerate(blocks)))
        assert all(page < blocks[block].npages for block, page in mover.fetch())

    def test_fetch_adds_to_what_the_bitmaps_hold(self, mover: Mover) -> None:
        bitmaps = new_bitmaps(mover.harness.blocks)
        for bitmap in bitmaps:
            bitmap[0] = 1 << 5
        self.write(mover.harness, (0, 0))
        mover.harness.source.fetch(bitmaps)
        assert {(0, 0), *((i, 5) for i in range(len(bitmaps)))} <= pages_of(bitmaps)

    def test_unread_pages_do_not_hide_later_writes(self, mover: Mover) -> None:
        self.write(mover.harness, (0, 3))
        mover.fetch()
        self.write(mover.harness, (0, 3), (0, 4))
        assert (0, 4) in mover.fetch()
        mover.send(set(mover.pending))
        self.write(mover.harness, (0, 3))
        assert (0, 3) in mover.fetch()

    def test_a_write_after_rearm_is_reported_again(self, mover: Mover) -> None:
        for _ in range(3):
            self.write(mover.harness, (0, 9), (1, 0))
            assert {(0, 9), (1, 0)} <= mover.fetch()
            mover.send(set(mover.pending))

    def test_a_write_between_fetch_and_rearm_is_in_what_is_read(self, mover: Mover) -> None:
        self.write(mover.harness, (0, 9))
        mover.fetch()
        self.write(mover.harness, (0, 9))
        mover.send({(0, 9)})
        mover.fetch()
        assert mover.stale() <= mover.pending

    def test_rearming_a_page_keeps_its_unfetched_neighbours(self, mover: Mover) -> None:
        self.write(mover.harness, (0, 9))
        mover.fetch()
        self.write(mover.harness, (0, 8), (0, 10), (0, 63), (0, 64))
        mover.send({(0, 9)})
        assert {(0, 8), (0, 10), (0, 63), (0, 64)} <= mover.fetch()

    def test_rearming_one_block_keeps_the_others(self, mover: Mover) -> None:
        self.write(mover.harness, (0, 0), (1, 0))
        mover.fetch()
        mover.send({(0, 0)})
        mover.fetch()
        assert (1, 0) in mover.pending

    def test_a_look_takes_nothing_and_shows_what_a_fetch_gives(self, mover: Mover) -> None:
        mover.fetch()
        mover.send(set(mover.pending))
        self.write(mover.harness, (0, 9), (1, 0))
        seen = mover.peek()
        if seen is None:
            return  # not this one
        assert {(0, 9), (1, 0)} <= seen and mover.peek() == seen
        assert seen <= mover.fetch() and {(0, 9), (1, 0)} <= mover.pending
        mover.send(set(mover.pending))
        assert mover.peek() in (set(), None)
        self.write(mover.harness, (0, 9))
        mover.peek()
        mover.rearm(0, 0, mover.harness.blocks[0].npages)  # of what was fetched, which is read
        assert (0, 9) in mover.fetch()

    def test_an_idle_guest_goes_quiet(self, mover: Mover) -> None:
        self.write(mover.harness, (0, 1), (1, 0))
        mover.harness.settle()
        reported = {(0, 0)}
        for _ in range(ROUNDS_UNTIL_QUIET):
            reported = mover.fetch()
            mover.send(set(mover.pending))
        assert reported == set()

    def test_rearming_an_empty_range_changes_nothing(self, mover: Mover) -> None:
        self.write(mover.harness, (0, 1))
        mover.rearm(0, 1, 0)
        assert (0, 1) in mover.fetch()

    def test_stop_is_idempotent_and_allowed_without_start(self, harness: DirtyHarness) -> None:
        harness.source.stop()
        harness.source.start()
        harness.source.stop()
        harness.source.stop()

    def test_a_stopped_source_starts_again(self, mover: Mover) -> None:
        self.write(mover.harness, (0, 2))
        mover.harness.source.stop()
        self.write(mover.harness, (0, 4))
        mover.harness.source.start()
        mover.send_everything()
        self.write(mover.harness, (0, 6))
        assert (0, 6) in mover.fetch()

    @pytest.mark.parametrize("seed", range(4))
    def test_a_random_schedule_loses_no_write(self, mover: Mover, seed: int) -> None:
        dice = random.Random(seed)
        pages = all_pages(mover.harness.blocks)
        for _ in range(12):
            for page in dice.choices(pages, k=dice.choice((0, 1, 5, 70))):
                mover.harness.write(*page)
            if dice.random() < 0.7:
                mover.fetch()
            if dice.random() < 0.3:
                mover.peek()
            pending = sorted(mover.pending)
            mover.send(set(dice.sample(pending, dice.randint(0, len(pending)))))
            if dice.random() < 0.3:
                mover.harness.settle()
                mover.fetch()
                assert mover.stale() <= mover.pending
        mover.harness.settle()
        mover.fetch()
        assert mover.stale() <= mover.pending
        mover.send(set(mover.pending))
        assert mover.stale() == set()

    def test_a_writer_that_never_rests_loses_no_write(self, mover: Mover) -> None:
        pages = all_pages(mover.harness.blocks)
        begun, enough = threading.Event(), threading.Event()

        def keep_writing() -> None:
            dice = random.Random(5)
            while not enough.is_set():
                mover.harness.write(*dice.choice(pages))
                begun.set()

        writer = threading.Thread(target=keep_writing, name="test-writer")
        writer.start()
        try:
            assert begun.wait(60)
            for _ in range(15):
                mover.fetch()
                mover.send(set(mover.pending))
        finally:
            enough.set()
            writer.join()
        mover.harness.settle()
        mover.fetch()
        assert mover.stale() <= mover.pending
