# SPDX-License-Identifier: Apache-2.0
"""The fake source and the OR of several conform, and fail as they should."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from dirty_conformance import DirtyHarness, DirtySourceConformance, Page, pages_of

from vmth.dirty.combine import CombinedDirtySource
from vmth.dirty.fake import FakeDirtySource
from vmth.errors import UsageError
from vmth.guest import DirtySource
from vmth.types import Bitmaps, Mapping, RamBlock, new_bitmaps


def fake_blocks() -> list[RamBlock]:
    return [
        RamBlock(f"ram{index}", npages * 4096, index << 32, Mapping(address=0))
        for index, npages in enumerate((130, 64, 7))
    ]


class FakeHarness:
    """Content is a count of writes; the writes go to the fakes in turn."""

    def __init__(self, fakes: Sequence[FakeDirtySource], source: DirtySource) -> None:
        self.blocks = fake_blocks()
        self.source = source
        self._fakes = fakes
        self._counts: dict[Page, int] = {}

    def write(self, block: int, page: int) -> None:
        count = self._counts.get((block, page), 0) + 1
        self._counts[block, page] = count
        self._fakes[count % len(self._fakes)].write(block, page)

    def settle(self) -> None:
        pass

    def read(self, block: int, page: int) -> bytes:
        return self._counts.get((block, page), 0).to_bytes(8, "little")


class TestFake(DirtySourceConformance):
    @pytest.fixture(params=[False, True], ids=["rearm-clears", "fetch-clears"])
    def harness(self, request: pytest.FixtureRequest) -> DirtyHarness:
        fake = FakeDirtySource(fake_blocks(), fetch_clears=request.param)
        return FakeHarness([fake], fake)


class TestCombined(DirtySourceConformance):
    @pytest.fixture
    def harness(self) -> DirtyHarness:
        fakes = [FakeDirtySource(fake_blocks(), fetch_clears=clears) for clears in (False, True)]
        return FakeHarness(fakes, CombinedDirtySource(fakes))


def test_a_script_is_played_one_entry_a_fetch() -> None:
    fake = FakeDirtySource(fake_blocks(), fetch_clears=True, script=[[(0, 3, 2)], [], [(1, 0, 1)]])
    fake.start()
    played = []
    for _ in range(4):
        bitmaps = new_bitmaps(fake_blocks())
        fake.fetch(bitmaps)
        played.append(pages_of(bitmaps))
    assert played == [{(0, 3), (0, 4)}, set(), {(1, 0)}, set()]
    assert fake.calls == [("start",), *[("fetch",)] * 4]


def test_sources_of_which_one_cannot_be_looked_at_are_not_looked_at() -> None:
    class Unseen:
        """A source without ``peek``."""

        def start(self) -> None: ...
        def fetch(self, bitmaps: Bitmaps) -> None: ...
        def rearm(self, block: int, page: int, npages: int) -> None: ...
        def stop(self) -> None: ...

    combined = CombinedDirtySource([FakeDirtySource(fake_blocks()), Unseen()])
    combined.start()
    assert not combined.peek(new_bitmaps(fake_blocks()))


def test_a_failure_is_raised_once() -> None:
    fake = FakeDirtySource(fake_blocks())
    fake.fail_next("start", OSError("no"))
    with pytest.raises(OSError, match="no"):
        fake.start()
    fake.start()
    assert fake.started


def test_a_fake_refuses_what_the_contract_forbids() -> None:
    fake = FakeDirtySource(fake_blocks())
    with pytest.raises(UsageError, match="not started"):
        fake.fetch(new_bitmaps(fake_blocks()))
    with pytest.raises(UsageError, match=r"\[129, 131\) of block 0, which has 130"):
        fake.write(0, 129, 2)


def test_combining_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one"):
        CombinedDirtySource([])


def test_a_failed_start_stops_the_sources_that_had_started() -> None:
    fakes = [FakeDirtySource(fake_blocks()) for _ in range(3)]
    fakes[2].fail_next("start", OSError("third"))
    fakes[0].fail_next("stop", OSError("first"))
    with pytest.raises(OSError, match="third") as caught:
        CombinedDirtySource(fakes).start()
    assert [fake.calls for fake in fakes] == [
        [("start",), ("stop",)],
        [("start",), ("stop",)],
        [("start",)],
    ]
    assert "first" in caught.value.__notes__[0]


def test_stop_reaches_every_source_even_if_one_raises() -> None:
    fakes = [FakeDirtySource(fake_blocks()) for _ in range(3)]
    combined = CombinedDirtySource(fakes)
    combined.start()
    fakes[0].fail_next("stop", OSError("first"))
    fakes[1].fail_next("stop", OSError("second"))
    with pytest.raises(OSError, match="first") as caught:
        combined.stop()
    assert "second" in caught.value.__notes__[0]
    assert not fakes[2].started
