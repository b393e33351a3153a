# SPDX-License-Identifier: Apache-2.0
"""Whole migrations to a destination that has some of the pages in files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from memory_guest import PAGE, MemoryGuest
from warm_file import KEY, Pages, stored

from vmth.channel.reuse import KEY_BYTES, ReuseSource, filter_messages, hear_filter
from vmth.errors import MigrationError, StreamError, UsageError
from vmth.handshake import Incoming
from vmth.listener import Listener
from vmth.options import MigrateOptions, ReceiveOptions
from vmth.received import ReceiveResult, not_found
from vmth.source_session import SourceSession
from vmth.stats import MigrationResult
from vmth.uri import parse_endpoint
from vmth.wire import messages as m

NPAGES = 2048


class World:
    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path
        self.guests: list[MemoryGuest] = []
        self.sources: list[ReuseSource] = []
        self.listener: Listener | None = None

    def guest(self, *, filled: bool = True) -> MemoryGuest:
        self.guests.append(MemoryGuest(NPAGES, filled=filled))
        return self.guests[-1]

    def file(self, name: str, pages: Pages) -> ReuseSource:
        self.sources.append(stored(self.path / name, pages))
        return self.sources[-1]

    def listen(self, reuse: Sequence[ReuseSource]) -> Listener:
        self.listener = Listener(
            parse_endpoint("tcp:127.0.0.1:0", listening=True),
            self._make_guest,
            ReceiveOptions(state_dir=self.path / "destination", reuse=reuse),
        )
        return self.listener

    def _make_guest(self, incoming: Incoming) -> MemoryGuest:
        return self.guest(filled=False)

    def migrate(self, guest: MemoryGuest, *, forms: Sequence[str] = ()) -> MigrationResult:
        assert self.listener is not None
        options = MigrateOptions(
            state_dir=self.path / "source", audit=True, fixed_forms=True, channels=2
        )
        if forms:
            options = replace(options, forms=tuple(forms))
        return SourceSession(guest, self.listener.endpoint, options).run()

    def close(self) -> None:
        if self.listener is not None:
            self.listener.close()
        for guest in self.guests:
            guest.close()
        for source in self.sources:
            os.close(source.fd)

    def failed(self) -> None:
        assert self.listener is not None
        with pytest.raises(MigrationError):
            self.listener.wait_for_guest(5)

    def arrived(self) -> ReceiveResult:
        assert self.listener is not None
        received = self.listener.wait_for_guest(5)
        there = self.guests[-1]
        there.pause()
        assert there.counted() == there.total
        return received


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with contextlib.closing(World(tmp_path)) as world:
        yield world


def test_a_guest_that_comes_back_sends_what_changed(world: World) -> None:
    guest = world.guest()
    earlier = guest.views[0].copy()
    pages = guest.views[0].reshape(-1, PAGE)
    rng = np.random.default_rng(1)
    pages[200:250] = rng.integers(0, 256, (50, PAGE), dtype=np.uint8)
    other = world.file("other.raw", rng.integers(0, 256, 32 * PAGE, dtype=np.uint8))
    world.listen([other, world.file("earlier.raw", earlier)])
    guest.resume()
    result = world.migrate(guest)
    received = world.arrived()
    assert result.verified and result.audited
    reuse = result.transfer.forms["reuse"]
    # Half of memory has content; 50 pages of it are new, and the working set is being written.
    assert NPAGES // 2 - 50 - 64 <= reuse.pages <= NPAGES // 2 - 50 + 64
    assert 16 * reuse.pages <= reuse.wire_bytes <= 20 * reuse.pages
    assert reuse.content_bytes == reuse.pages * PAGE and reuse.cpu_ns > 0
    assert [file.path.rpartition("/")[2] for file in received.reused] == [
        "other.raw",
        "earlier.raw",
    ]
    assert received.reused[0].pages == 0
    assert 0 < received.reused[1].pages <= reuse.pages
    assert not [what for what in received.fallbacks if "not in the files" in what]
    assert result.transfer.missed_pages == 0


def _change(path: Path) -> None:
    with path.open("r+b") as file:
        for page in range(0, 1000, 2):
            file.seek(page * PAGE + 100)
            file.write(b"changed")


def _cut(path: Path) -> None:
    os.truncate(path, 500 * PAGE + 17)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("harm", [_change, _cut, _empty])
def test_a_file_that_is_not_what_was_indexed_costs_bytes_and_nothing_else(
    world: World, harm: Callable[[Path], None]
) -> None:
    guest = world.guest()
    world.listen([world.file("stale.raw", guest.views[0])])
    harm(world.path / "stale.raw")
    guest.resume()
    result = world.migrate(guest)
    received = world.arrived()
    assert result.verified and result.audited
    assert result.transfer.missed_pages >= 400
    proposed = result.transfer.forms["reuse"].pages
    assert received.reused[0].pages <= proposed - 400
    missed = proposed - received.reused[0].pages
    (told,) = (what for what in received.fallbacks if "not in the files" in what)
    assert told.startswith(f"reuse: {missed} of {proposed} pages were not in the files")
    assert not [what for what in received.fallbacks if "source did not agree" in what]


@pytest.mark.parametrize(
    ("asked", "served", "memory_pages", "told"),
    [
        (0, [], 1 << 20, False),
        (1000, [600, 400], 1 << 20, False),
        (1000, [600, 336], 1 << 20, False),  # as many may be there by chance
        (1000, [600, 335], 1 << 20, True),
        (1000, [984], 1 << 10, False),
        (1000, [983], 1 << 10, True),
    ],
)
def test_what_is_there_by_chance_is_no_damage(
    asked: int, served: list[int], memory_pages: int, told: bool
) -> None:
    assert bool(not_found(asked, served, memory_pages)) is told


def test_reuse_is_not_offered_by_a_source_that_may_not_use_it(world: World) -> None:
    guest = world.guest()
    world.listen([world.file("same.raw", guest.views[0])])
    guest.resume()
    result = world.migrate(guest, forms=("zero", "same", "zstd"))
    received = world.arrived()
    assert result.verified
    assert result.transfer.forms["reuse"].pages == 0
    assert received.reused[0].pages == 0
    assert [what for what in received.fallbacks if "source did not agree" in what]


class _Told:
    """What a source hears; raises StreamError for a set that is not one, as the native one does."""

    def __init__(self) -> None:
        self.key = b""
        self.parts: list[tuple[int, int, bytes, bool]] = []

    def begin_reuse(self, key: bytes, entries: int) -> None:
        self.key = key

    def add_reuse(self, base: int, count: int, data: bytes, last: bool) -> None:
        self.parts.append((base, count, data, last))


def test_the_filter_is_told_in_bounded_parts(world: World) -> None:
    source = world.file("some.raw", np.random.default_rng(1).integers(0, 256, 64 * PAGE, np.uint8))
    hashes = np.random.default_rng(2).integers(0, 2**64, (50_000, 2), dtype=np.uint64)
    hashes = hashes[np.lexsort((hashes[:, 1], hashes[:, 0]))]
    many = replace(source, hashes=hashes, places=np.zeros(50_000, dtype=np.uint64))
    told = _Told()
    messages = filter_messages([source, many])
    hear_filter(lambda: next(messages), told)
    assert told.key == KEY
    assert [part[3] for part in told.parts] == [False] * (len(told.parts) - 1) + [True]
    assert 50_000 <= sum(part[1] for part in told.parts) <= 50_064
    assert max(len(part[2]) for part in told.parts) <= 61440
    assert sum(len(part[2]) for part in told.parts) < 2.35 * 50_064
    assert list(messages) == []


@pytest.mark.parametrize(
    "messages",
    [
        [m.ReusePart(0, 1, b"", True)],
        [m.ReuseFilter(KEY, 1), m.ReuseFilter(KEY, 1)],
        [m.ReuseFilter(KEY, 1), m.Running(1)],
    ],
)
def test_anything_else_in_place_of_the_filter_is_refused(messages: list[m.Message]) -> None:
    with pytest.raises(StreamError, match="allowed Reuse"):
        hear_filter(iter(messages).__next__, _Told())


def _lying(sources: Sequence[ReuseSource]) -> Iterator[m.Message]:
    yield m.ReuseFilter(KEY, 2)
    yield m.ReusePart(5, 1, b"", False)
    yield m.ReusePart(5, 1, b"", True)  # does not rise


def test_a_destination_that_tells_nonsense_ends_the_attempt_and_the_next_succeeds(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = world.guest()
    world.listen([world.file("same.raw", guest.views[0])])
    guest.resume()
    with monkeypatch.context() as patched:
        patched.setattr("vmth.destination_session.filter_messages", _lying)
        with pytest.raises(MigrationError, match="fingerprint received 5, allowed 6"):
            world.migrate(guest)
    world.failed()
    assert guest.running
    result = world.migrate(guest)
    world.arrived()
    assert result.verified and result.transfer.forms["reuse"].pages > 0


def test_a_destination_that_dies_while_it_tells_ends_the_attempt(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(sources: Sequence[ReuseSource]) -> Iterator[m.Message]:
        yield m.ReuseFilter(KEY, 2)
        raise OSError("the disk is gone")

    guest = world.guest()
    world.listen([world.file("same.raw", guest.views[0])])
    guest.resume()
    with monkeypatch.context() as patched:
        patched.setattr("vmth.destination_session.filter_messages", dying)
        with pytest.raises(MigrationError):
            world.migrate(guest)
    world.failed()
    assert guest.running
    assert world.migrate(guest).verified
    world.arrived()


def test_sources_must_fit_one_session(world: World) -> None:
    pages = np.random.default_rng(1).integers(0, 256, 64 * PAGE, np.uint8)
    one, two = world.file("a.raw", pages), world.file("b.raw", pages)
    with pytest.raises(UsageError, match="its index has another key than that of"):
        ReceiveOptions(reuse=[one, replace(two, key=bytes(KEY_BYTES))])
    with pytest.raises(UsageError, match="page size: received 8192, allowed 4096"):
        ReceiveOptions(reuse=[replace(one, page_bytes=8192)])
