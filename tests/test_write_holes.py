# SPDX-License-Identifier: Apache-2.0
"""Holes of a file at the destination are filled by writing to it; one that takes none is named."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_guest import PAGE, MemoryGuest

import vmth
import vmth.destination_session
from vmth.channel.pages import NativeReceiver
from vmth.listener import Listener
from vmth.options import MigrateOptions, ReceiveOptions
from vmth.stats import TransferCounters
from vmth.uri import parse_endpoint

_F_SEAL_FUTURE_WRITE = 0x0010
_NPAGES = 512
_REFUSED = "write: the file of block 0 takes no pages (Operation not permitted)"

Prepare = Callable[[MemoryGuest], None]
Arrive = Callable[..., "Arrival"]


def _nothing(guest: MemoryGuest) -> None:
    pass


def _seal(guest: MemoryGuest) -> None:
    fcntl.fcntl(_fd(guest), fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)


def _use_100_pages(guest: MemoryGuest) -> None:
    guest.views[0][: 100 * PAGE] = 7


class Arrival:
    """A migration into a guest on which ``made`` was called before its memory was looked at, and
    ``mapped`` once it was mapped and its holes were known."""

    def __init__(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Prepare, mapped: Prepare
    ) -> None:
        self.source = MemoryGuest(_NPAGES, writing=False)
        self.there = MemoryGuest(_NPAGES, writing=False, filled=False)
        self.counters = TransferCounters()
        made(self.there)
        arrival = self

        class Watched(NativeReceiver):
            def __init__(self, *args: Any, **options: Any) -> None:
                mapped(arrival.there)
                super().__init__(*args, **options)

            def close(self) -> None:
                arrival.counters = self.counters()
                super().close()

        monkeypatch.setattr(vmth.destination_session, "NativeReceiver", Watched)
        listener = Listener(
            parse_endpoint("tcp:127.0.0.1:0", listening=True),
            lambda incoming: self.there,
            ReceiveOptions(state_dir=tmp_path / "destination", realtime=False),
        )
        try:
            sent = [view.copy() for view in self.source.views]
            self.result = vmth.migrate(
                self.source,
                listener.endpoint.display,
                MigrateOptions(state_dir=tmp_path / "source"),
            )
            self.received = listener.wait_for_guest(5)
        finally:
            listener.close()
        self.equal = all(map(np.array_equal, sent, self.there.views))

    def close(self) -> None:
        self.source.close()
        self.there.close()


@pytest.fixture
def arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Arrive]:
    arrivals: list[Arrival] = []

    def make(made: Prepare = _nothing, mapped: Prepare = _nothing) -> Arrival:
        arrivals.append(Arrival(tmp_path, monkeypatch, made, mapped))
        return arrivals[-1]

    yield make
    for arrival in arrivals:
        arrival.close()


def _fd(guest: MemoryGuest) -> int:
    fd = guest.blocks[0].mapping.fd
    assert fd is not None
    return fd


def test_holes_of_a_memfd_are_written(arrive: Arrive) -> None:
    moved = arrive()
    assert moved.result.verified
    assert moved.equal
    assert moved.counters.written_pages == moved.counters.normal_pages == _NPAGES // 2
    assert moved.received.fallbacks == ()


def test_what_is_there_is_overwritten_in_place(arrive: Arrive) -> None:
    moved = arrive(made=_use_100_pages)
    assert moved.result.verified
    assert moved.equal
    assert moved.counters.written_pages == _NPAGES // 2 - 100


def test_a_hole_that_was_filled_meanwhile_is_overwritten(arrive: Arrive) -> None:
    moved = arrive(mapped=_use_100_pages)
    assert moved.result.verified
    assert moved.equal
    assert moved.counters.written_pages == _NPAGES // 2


def test_a_sealed_file_is_named_and_the_guest_arrives(arrive: Arrive) -> None:
    moved = arrive(mapped=_seal)
    assert moved.result.verified
    assert moved.equal
    assert moved.counters.written_pages == 0
    (told,) = moved.received.fallbacks
    assert told.startswith(_REFUSED)
