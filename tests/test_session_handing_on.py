# SPDX-License-Identifier: Apache-2.0
"""Sessions whose destination hands pages on to another program: scope, refusals, its troubles."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from listener_world import open_files
from memory_guest import PAGE, MemoryGuest
from warm_file import stored

from vmth import source_session
from vmth.channel.interface import StreamSink
from vmth.channel.reuse import ReuseSource
from vmth.errors import MigrationError, RefusedError, StreamError
from vmth.guest import DirtySource, StateStream
from vmth.handshake import HANDED_ON, SCOPE_STREAM, Incoming, hear_handed_on, make_offer
from vmth.job import MigrationJob
from vmth.listener import Listener
from vmth.options import MigrateOptions, ReceiveOptions
from vmth.qemu import stream as q
from vmth.source_session import SourceSession
from vmth.stats import MigrationResult
from vmth.types import Mapping, RamBlock
from vmth.wire.messages import Accept, HandedOn, Message, Mode, Offer, Ping

NAMES = ("ram", "rom")
NPAGES = 96
SECTION = 7


class HandingGuest:
    """``ram`` lands in a memfd where ``in_place``, everything else in a socket whose other end a
    thread reads."""

    dirty: Sequence[DirtySource] = ()

    def __init__(self, incoming: Incoming, *, in_place: bool, reads: bool = True) -> None:
        self.verified_scope = "memory" if in_place else "stream"
        self.calls: list[str] = []
        self.released = threading.Event()
        self.why: Exception | None = None
        self.announcing: Callable[[], None] = lambda: None
        self.handed = bytearray()
        self._fd = os.memfd_create("ram") if in_place else -1
        if in_place:
            os.ftruncate(self._fd, NPAGES * PAGE)
        self.blocks: Sequence[RamBlock] = [
            replace(block, mapping=Mapping(fd=self._fd))
            if in_place and block.idstr == "ram"
            else block
            for block in incoming.blocks
        ]
        self.theirs, self._ours = socket.socketpair()
        self._thread = threading.Thread(target=self._read)
        if reads:
            self._thread.start()

    def _read(self) -> None:
        while data := self.theirs.recv(1 << 20):
            self.handed += data

    def in_place(self) -> bytes:
        return os.pread(self._fd, NPAGES * PAGE, 0)

    def handed_pages(self) -> dict[str, bytes]:
        """What the reading program would hold; every page must have come."""
        writer = q.StreamWriter()
        head: list[q.Event] = [
            q.FileHeader(3),
            q.Configuration("pc"),
            q.SectionStarted(q.SectionKind.START, SECTION, "ram", 0, 4),
            q.RamSize(len(NAMES) * NPAGES * PAGE),
            *(q.BlockListed(name, NPAGES * PAGE) for name in NAMES),
            q.RamEnd(),
            q.SectionFinished(SECTION),
        ]
        reader = q.StreamReader()
        reader.feed(b"".join(bytes(writer.send(event)) for event in head) + bytes(self.handed))
        pages: dict[tuple[str, int], bytes] = {}
        while (event := reader.next_event()) is not None:
            if isinstance(event, q.RamPages):
                for page in event.pages():
                    pages[page.idstr, page.page] = bytes(page.data) or bytes(PAGE)
        names = {name for name, _ in pages}
        return {name: b"".join(pages[name, i] for i in range(NPAGES)) for name in names}

    # -- the Guest protocol, and what this guest may do besides ------------------------------------

    def pause(self) -> bool:
        return False

    def resume(self) -> None:
        self.calls.append("resume")

    def save_state(self, write: Callable[[StateStream], None]) -> None:
        raise AssertionError("a destination")

    def load_state(self, streams: Iterable[StateStream]) -> None:
        self.calls.append("load_state")

    def release(self) -> None:
        self.calls.append("release")
        self.released.set()

    def page_sink(self) -> StreamSink:
        return StreamSink(self._ours.fileno(), SECTION, tuple(block.idstr for block in self.blocks))

    def trouble(self) -> Exception | None:
        return self.why

    def announce(self) -> None:
        self.calls.append("announce")
        self.announcing()

    def notes(self) -> Sequence[str]:
        return ["one note"]

    def close(self) -> None:
        self._ours.close()
        if self._thread.ident is not None:
            self._thread.join()
        self.theirs.close()
        if self._fd >= 0:
            os.close(self._fd)


class World:
    def __init__(self, tmp_path: Path) -> None:
        self.made: list[HandingGuest] = []
        self.options: dict[str, Any] = {"in_place": True}
        self.prepare: Callable[[HandingGuest], None] = lambda guest: None
        self.source = MemoryGuest(NPAGES, idstrs=NAMES)
        self.source.resume()
        self._tmp_path = tmp_path
        self.listener = self.listen()

    def listen(self, reuse: Sequence[ReuseSource] = ()) -> Listener:
        receive = ReceiveOptions(
            state_dir=self._tmp_path / "destination", peer_timeout_s=0.4, reuse=reuse
        )
        return Listener("tcp:127.0.0.1:0", self.make_guest, receive)

    def make_guest(self, incoming: Incoming) -> HandingGuest:
        self.made.append(HandingGuest(incoming, **self.options))
        self.prepare(self.made[-1])
        return self.made[-1]

    def move(self, features: Sequence[str] = (SCOPE_STREAM,), **options: Any) -> MigrationResult:
        chosen = MigrateOptions(
            state_dir=self._tmp_path / "source", mode=Mode.COLD, zerocopy=False, **options
        )
        session = SourceSession(self.source, self.listener.endpoint, chosen, features=features)
        return MigrationJob(session).wait(20)

    def close(self) -> None:
        self.listener.close()
        self.source.close()
        for guest in self.made:
            guest.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    before = (threading.active_count(), open_files())
    world = World(tmp_path)
    yield world
    world.close()
    assert (threading.active_count(), open_files()) == before


def test_blocks_without_memory_are_handed_on(world: World) -> None:
    assert world.move().verified_scope == "memory"
    received = world.listener.wait_for_guest(5)
    guest = world.made[0]
    assert received.verified and received.verified_scope == "memory"
    assert guest.in_place() == bytes(world.source.views[0])
    assert guest.handed_pages() == {"rom": bytes(world.source.views[1])}
    assert guest.calls == ["load_state", "resume", "announce"]
    assert "one note" in received.fallbacks


def test_a_proof_that_ends_at_the_stream_says_so_at_both_ends(world: World) -> None:
    world.options["in_place"] = False
    assert world.move().verified_scope == "stream"
    assert world.listener.wait_for_guest(5).verified_scope == "stream"
    ram, rom = (bytes(view) for view in world.source.views)
    assert world.made[0].handed_pages() == {"ram": ram, "rom": rom}


@pytest.mark.parametrize(
    ("in_place", "forms"),
    [
        (True, ("dedup", "delta", "same", "zero", "zstd")),
        (False, ("same", "zero", "zstd")),  # nothing is held there
    ],
)
def test_forms_that_build_on_pages_need_some_that_are_held(
    world: World, in_place: bool, forms: tuple[str, ...]
) -> None:
    world.options["in_place"] = in_place
    (decision,) = world.move(fixed_forms=True).form_decisions
    assert decision.forms == forms


def test_no_page_is_built_on_one_that_was_handed_on(world: World) -> None:
    """Both blocks hold the same contents many times: ``rom``, sent first or last, may be copied
    from ``ram`` but never the other way round, and arrives in every byte."""
    world.source.pause()
    ram, rom = world.source.views
    page = np.frombuffer(np.random.default_rng(7).bytes(PAGE), dtype=np.uint8)
    for index in range(NPAGES):
        for view in (ram, rom):
            view[index * PAGE : (index + 1) * PAGE] = page
            view[index * PAGE] = index % 3
    result = world.move(fixed_forms=True)
    assert result.verified
    assert world.made[0].in_place() == bytes(ram)
    assert world.made[0].handed_pages() == {"rom": bytes(rom)}
    world.source.resume()
    world.move()  # and again


def test_an_older_source_builds_on_nothing_where_pages_are_handed_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not offer to be told, so it must not be trusted to keep away."""
    monkeypatch.setattr(source_session, "make_offer", _offer_without(HANDED_ON))
    (decision,) = world.move(fixed_forms=True).form_decisions
    assert decision.forms == ("same", "zero", "zstd")


def _offer_without(feature: str) -> Callable[..., Offer]:
    def make(*args: Any, **kwargs: Any) -> Offer:
        offer = make_offer(*args, **kwargs)
        kept = [name for name in offer.features if name != feature]
        return msgspec.structs.replace(offer, features=kept)

    return make


@pytest.mark.parametrize(
    ("told", "error"),
    [
        (HandedOn([0, 2]), r"HandedOn.blocks: received 2, allowed 0 to 1"),
        (Ping(1), r"received Ping, allowed HandedOn"),
    ],
)
def test_what_a_destination_says_of_blocks_is_checked(told: Message, error: str) -> None:
    accept = Accept(bytes(16), bytes(16), [HANDED_ON], "x")
    with pytest.raises(StreamError, match=error):
        hear_handed_on(lambda: told, accept, 2)
    assert hear_handed_on(lambda: HandedOn([1]), accept, 2) == [1]


@pytest.mark.parametrize("in_place", [True, False])
def test_pages_of_files_are_handed_on_too(world: World, tmp_path: Path, in_place: bool) -> None:
    """Their content comes from a file and is hashed, so it needs nothing that landed."""
    world.options["in_place"] = in_place
    world.source.pause()  # it writes
    ram, rom = (bytes(view) for view in world.source.views)
    warm = stored(tmp_path / "warm.raw", np.frombuffer(ram + rom, dtype=np.uint8))
    try:
        world.listener.close()
        world.listener = world.listen([warm])
        result = world.move(fixed_forms=True)
        received = world.listener.wait_for_guest(5)
        assert result.transfer.forms["reuse"].pages >= NPAGES - 2
        assert received.reused[0].pages == result.transfer.forms["reuse"].pages
        handed = world.made[0].handed_pages()
        assert handed["rom"] == rom and handed.get("ram", ram) == ram and received.verified
    finally:
        world.listener.close()
        os.close(warm.fd)


def test_a_source_that_wants_more_proof_is_refused(world: World) -> None:
    world.options["in_place"] = False
    with pytest.raises(RefusedError, match=r"features: received .*, allowed with 'scope-stream'"):
        world.move(features=())
    assert world.made[0].calls == ["release"]
    assert world.source.running


def test_an_audit_is_refused(world: World) -> None:
    with pytest.raises(RefusedError, match="audit: received on, allowed off"):
        world.move(audit=True)
    assert world.made[0].calls == ["release"]


def test_the_program_knows_why_it_takes_no_more(world: World) -> None:
    """Its closed socket is a broken pipe to the receiver; the reason that it gives is told."""
    world.options |= {"in_place": False, "reads": False}

    def breaks(guest: HandingGuest) -> None:
        guest.why = RuntimeError("no such block")
        guest.theirs.close()

    world.prepare = breaks
    with pytest.raises(MigrationError, match="no such block"):
        world.move()
    assert world.made[0].calls == ["release"]
    assert world.source.running


def test_a_program_that_ends_is_found_though_no_page_goes_to_it(world: World) -> None:
    """All pages land in place; nobody writes to the dead program, but somebody looks."""

    def ends(guest: HandingGuest) -> None:
        guest.why = MigrationError("QEMU ended")

    def waits() -> None:
        world.made[0].released.wait(10)

    world.prepare = ends
    world.source.on_call["save_state"] = waits
    with pytest.raises(MigrationError, match="QEMU ended"):
        world.move()
    assert world.made[0].calls == ["release"]


def test_a_failed_announcement_is_a_note(world: World) -> None:
    def fails() -> None:
        raise OSError("no such command")

    world.prepare = lambda guest: setattr(guest, "announcing", fails)
    world.move()
    received = world.listener.wait_for_guest(5)
    assert [note for note in received.fallbacks if "no such command" in note]


def test_a_guest_that_arrives_paused_announces_nothing(world: World) -> None:
    world.source.pause()
    world.move()
    assert not world.listener.wait_for_guest(5).was_running
    assert world.made[0].calls == ["load_state"]
