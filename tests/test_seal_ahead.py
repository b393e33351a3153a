# SPDX-License-Identifier: Apache-2.0
"""The seal that goes out behind the last pages: never judged before they have landed, and taken
back when some of them have not. Whole sessions over a far link, then the engine on fakes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qemu_streams as s
from far_proxy import FarProxy
from listener_world import World, one_world
from memory_guest import MemoryGuest
from stream_pass_world import DEVICES, END, every_page
from stream_pass_world import World as StreamWorld
from test_realtime import TakenBackOnce

import vmth
from vmth import destination_session, handshake, precopy, source_session
from vmth.channel.control import ControlConnection
from vmth.channel.pages import NativeReceiver, NativeSender
from vmth.errors import MigrationError, NotConvergedError
from vmth.memory_pass import MemoryPass
from vmth.policy.fixed import FixedRoundsPolicy
from vmth.precopy import PreCopy
from vmth.qemu import stream_pass
from vmth.qemu.stream_pass import StreamPass
from vmth.types import Bitmap
from vmth.wire.messages import LastBarrier, Message, Mode, PackedState, Paused, Pong, Seal, State

LATE_S = 0.1


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with one_world(tmp_path) as made:
        yield made


class Said:
    """What the source says on its control connection, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.messages: list[Message] = []
        send = ControlConnection.send

        def note(connection: Any, message: Message) -> None:
            if not isinstance(message, Pong):
                self.messages.append(message)
            send(connection, message)

        monkeypatch.setattr(ControlConnection, "send", note)

    def kinds(self, *kinds: type[Message]) -> list[str]:
        return [type(message).__name__ for message in self.messages if isinstance(message, kinds)]

    def turns(self, *kinds: type[Message]) -> list[str]:
        """The same, those that follow one of their kind left out."""
        return [kind for kind, _ in itertools.groupby(self.kinds(*kinds))]


def equal_when_loaded(source: MemoryGuest) -> Callable[[MemoryGuest], None]:
    """The destination loads its state when all memory is there, and not before."""

    def prepare(there: MemoryGuest) -> None:
        def check() -> None:
            for ours, theirs in zip(source.views, there.views, strict=True):
                assert np.array_equal(ours, theirs)

        there.on_call["load_state"] = check

    return prepare


@pytest.mark.parametrize("mode", [Mode.LIVE, Mode.COLD])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_seal_waits_for_the_last_pages(
    world: World, monkeypatch: pytest.MonkeyPatch, mode: Mode, channels: int
) -> None:
    said = Said(monkeypatch)
    source, listener = world.guest(), world.listen()
    world.prepare = equal_when_loaded(source)
    source.resume()
    options = world.options(mode=mode, channels=channels, policy=FixedRoundsPolicy(2))
    with FarProxy(listener.endpoint.port, LATE_S) as tunnel:
        result = vmth.migrate(source, f"tcp:127.0.0.1:{tunnel.port}", options)
        assert result.verified
        assert listener.wait_for_guest(5).guest is world.made[-1]
    # One seal, and it needed no repair: it was on its way before the pages, and answered after.
    told = said.turns(Paused, LastBarrier, State, Seal)
    assert told == ["Paused", "LastBarrier", "State", "Seal"]
    assert said.kinds(LastBarrier, Seal) == ["LastBarrier", "Seal"]
    assert result.transfer.missed_pages == 0
    parts = result.downtime_parts
    assert parts.last_pages_ns + parts.state_ns > 2 * LATE_S * 1e9
    assert parts.total_ns == result.downtime_ns
    # The way there and back through the tunnel, which TCP does not see.
    assert result.transfer.base_rtt_ns > 2 * LATE_S * 1e9
    world.prepare = lambda guest: None
    world.moves(listener)


def test_the_destination_knows_of_the_pause_while_the_last_pages_are_sent(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that cannot send them says so before; the pause before, that was taken back, it does
    not say."""
    said = Said(monkeypatch)
    at_pass: list[tuple[int, bool, list[str]]] = []
    send = MemoryPass.send

    def note(one: MemoryPass, bitmaps: Sequence[Bitmap], number: int) -> None:
        at_pass.append((number, not source.running, said.kinds(Paused)))
        send(one, bitmaps, number)

    monkeypatch.setattr(MemoryPass, "send", note)
    source, listener = world.guest(), world.listen()
    source.resume()
    vmth.migrate(source, listener.endpoint.display, world.options(policy=TakenBackOnce()))
    assert listener.wait_for_guest(5).guest is world.made[-1]
    assert [number for number, _, _ in at_pass] == [0, 1, 2]
    assert [told for _, _, told in at_pass] == [[], [], ["Paused"]]
    assert [paused for _, paused, _ in at_pass] == [False, False, True]
    assert said.kinds(Paused) == ["Paused"]


def test_what_an_end_does_not_know_is_not_used(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a source nor a destination of before has either feature."""
    listener = world.listen()
    make_offer, common_features = handshake.make_offer, handshake.common_features
    new = {handshake.SEAL_AHEAD, handshake.PACKED_STATE}

    def old_offer(*given: Any) -> Any:
        offer = make_offer(*given)
        offer.features[:] = [name for name in offer.features if name not in new]
        return offer

    def old_answer(offer: Any) -> list[str]:
        return [name for name in common_features(offer) if name not in new]

    said = Said(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(source_session, "make_offer", old_offer)
        world.moves(listener)
    with monkeypatch.context() as patch:
        patch.setattr(destination_session, "common_features", old_answer)
        world.moves(listener)
    assert said.kinds(LastBarrier, PackedState, Seal) == ["Seal", "Seal"]
    world.moves(listener)
    assert said.kinds(LastBarrier, Seal)[2:] == ["LastBarrier", "Seal"]


@pytest.mark.parametrize(("digest", "audit"), [(False, False), (True, True)])
def test_without_a_digest_or_with_an_audit_everything_lands_first(
    world: World, monkeypatch: pytest.MonkeyPatch, digest: bool, audit: bool
) -> None:
    """What is missed would go unseen; an audit compares before the seal."""
    said = Said(monkeypatch)
    source, listener = world.guest(), world.listen()
    source.resume()
    vmth.migrate(source, listener.endpoint.display, world.options(digest=digest, audit=audit))
    assert listener.wait_for_guest(5).guest is world.made[-1]
    assert said.kinds(LastBarrier, Seal) == ["Seal"]


def test_the_result_tells_of_what_a_repair_sent(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though most of it is put together while the destination compares."""
    wrong = True  # the destination's table, for one page, until it comes again
    digest, hashes_of = NativeReceiver.digest, NativeReceiver.hashes
    subdigests, resend = NativeReceiver.subdigests, PreCopy.resend

    def wrong_digest(receiver: NativeReceiver) -> tuple[int, int, int]:
        low, high, pages = digest(receiver)
        return low ^ wrong, high, pages

    def wrong_hashes(receiver: NativeReceiver, block: int, page: int, npages: int) -> Any:
        hashes = hashes_of(receiver, block, page, npages)
        if wrong and page <= 5 < page + npages:
            hashes[5 - page] ^= np.uint64(1)
        return hashes

    def wrong_sums(receiver: NativeReceiver, block: int, page: int, npages: int, step: int) -> Any:
        sums = subdigests(receiver, block, page, npages, step)
        if wrong and page <= 5 < page + npages:
            sums[(5 - page) // step] ^= np.uint64(1)
        return sums

    def repair(engine: PreCopy, block: int, pages: Sequence[int]) -> None:
        nonlocal wrong
        wrong = False
        resend(engine, block, pages)

    monkeypatch.setattr(NativeReceiver, "digest", wrong_digest)
    monkeypatch.setattr(NativeReceiver, "hashes", wrong_hashes)
    monkeypatch.setattr(NativeReceiver, "subdigests", wrong_sums)
    monkeypatch.setattr(PreCopy, "resend", repair)
    source, listener = world.guest(), world.listen()
    source.resume()
    result = vmth.migrate(source, listener.endpoint.display, world.options())
    assert listener.wait_for_guest(5).guest is world.made[-1]
    assert result.verified and result.digest_source == result.digest_destination != ""
    repaired = result.rounds[-1]
    assert not wrong and repaired.paused and repaired.pages == 1
    for what in ("normal_pages", "zero_pages"):
        sent = sum(getattr(stats, what) for stats in result.rounds)
        assert getattr(result.transfer, what) == sent, what


def test_a_state_that_cannot_be_saved_while_pages_are_under_way(world: World) -> None:
    source, listener = world.guest(), world.listen()
    source.fail["save_state"] = RuntimeError("no state today")
    source.resume()
    with FarProxy(listener.endpoint.port, LATE_S) as tunnel:
        with pytest.raises(MigrationError, match="no state today"):
            vmth.migrate(
                source, f"tcp:127.0.0.1:{tunnel.port}", world.options(policy=FixedRoundsPolicy(1))
            )
        assert source.running and not source.released
        assert isinstance(listener.outcomes.get(timeout=5), MigrationError)
        assert not world.made[-1].running
    world.moves(listener)


def test_last_pages_that_do_not_come_are_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seal waits at the destination; the source waits no longer than without it."""
    monkeypatch.setattr(precopy, "LATE_FACTOR", 1)
    monkeypatch.setattr(precopy, "LOOK_EVERY_NS", 10_000_000)
    said = Said(monkeypatch)
    source, listener = world.guest(), world.listen()
    source.resume()
    with FarProxy(listener.endpoint.port, 0.0) as tunnel:

        def lose() -> None:
            tunnel.late_s = 60.0

        source.on_call["pause"] = lose
        with pytest.raises(NotConvergedError, match="the last pages have not landed"):
            vmth.migrate(
                source, f"tcp:127.0.0.1:{tunnel.port}", world.options(policy=FixedRoundsPolicy(1))
            )
        assert said.kinds(LastBarrier, Seal) == ["LastBarrier", "Seal"]
        assert source.running and not source.released
        assert isinstance(listener.outcomes.get(timeout=5), MigrationError)
        assert not world.made[-1].running
    world.moves(listener)


def test_a_destination_that_calls_missed_pages_sealed_gets_no_grant(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NativeSender, "take_missed", lambda self, bitmaps: _miss_first(bitmaps))
    source, listener = world.guest(), world.listen()
    source.resume()
    with pytest.raises(MigrationError, match="received Sealed for pages that were missed"):
        vmth.migrate(source, listener.endpoint.display, world.options(mode=Mode.COLD))
    assert source.running and not source.released
    assert not world.made[-1].running
    assert isinstance(listener.outcomes.get(timeout=5), MigrationError)
    monkeypatch.undo()
    world.moves(listener)


def _miss_first(bitmaps: Sequence[Bitmap]) -> int:
    bitmaps[0][0] |= np.uint64(1)
    return 1


# -- the engine over a QEMU's stream, on fakes -----------------------------------------------------


class Ahead:
    """Notes what had happened when the seal went out."""

    def __init__(self, world: StreamWorld) -> None:
        self.world = world
        self.told: list[tuple[str, int, bool]] = []  # what, barriers, guest paused
        self.digest = (0, 0, 0)

    def stays_paused(self) -> None:
        raise AssertionError("a QEMU's guest is paused long before its last pages are here")

    def last_pages_sent(self) -> int:
        sender, receiver = self.world.link.sender, self.world.link.receiver
        self.digest = sender.digest()
        self.told.append(("sent", sender.barriers(), self.world.guest.paused))
        assert not receiver.wait_barriers(sender.barriers(), 1), "judged before the last pages"
        return 0

    def pages_missed(self) -> None:
        self.told.append(("missed", -1, self.world.guest.paused))


def stream_world(pieces: Sequence[bytes], **options: Any) -> tuple[StreamWorld, Ahead]:
    """The barrier behind the last pages comes late: not while the state is read."""

    def before(piece: int) -> None:
        if piece == len(pieces):
            made.link.late_barriers = 5

    made = StreamWorld(pieces, before=before, **options)
    ahead = Ahead(made)
    tools = replace(made.tools, seal_ahead=ahead)
    made.engine = StreamPass(made.guest, tools, made.stream, made.helm)
    return made, ahead


def test_a_qemus_seal_goes_behind_its_last_pages_and_holes() -> None:
    first = s.part(s.normal(10, "pc.ram") + s.eos())
    world, ahead = stream_world([first, END, DEVICES])
    world.engine.run()
    assert [(what, paused) for what, _, paused in ahead.told] == [("sent", True)]
    assert ahead.digest == world.link.receiver.digest()
    assert ahead.digest[2] == sum(block.npages for block in world.guest.blocks)


def test_a_qemus_seal_is_of_the_last_barrier_of_several_in_its_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kept pages that landed in the midst of the round have had one of the same name."""
    monkeypatch.setattr(stream_pass, "MOST_AGAIN_PAGES", 1)
    monkeypatch.setattr(stream_pass, "MOST_AGAIN_AT_END_PAGES", 1)
    twice = [s.part(s.normal(page, "pc.ram", 900 + page) + s.eos()) for page in (5, 6)]
    end = s.end(s.normal(60, "pc.ram", 777) + s.eos())
    first = s.part(b"".join(s.normal(page, "pc.ram") for page in range(60)) + s.eos())
    world, ahead = stream_world([first, *twice, end, DEVICES], channel=0)
    world.engine.run()
    assert [stats.round for stats in world.engine.rounds] == [0]
    assert [(what, count) for what, count, _ in ahead.told] == [("sent", 2)]
    assert world.page(0, 5) == s.page_of(905) and world.page(0, 6) == s.page_of(906)
    assert world.page(0, 60) == s.page_of(777)


def test_a_qemus_seal_is_not_ahead_of_pages_that_were_kept() -> None:
    """Of a page that came twice the older copy is on its way: a digest of it would be equal."""
    world, ahead = stream_world([every_page(), END, DEVICES], channel=0)
    world.engine.run()
    assert world.page(0, 3) == s.page_of(777)
    assert ahead.told == []


def test_a_qemus_seal_is_taken_back_where_pages_were_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, ahead = stream_world([every_page(), END, DEVICES])
    sender, barrier = world.link.sender, world.link.sender.barrier
    missed: list[tuple[int, int, bytes]] = []

    def land(*given: Any) -> bool:
        landed = barrier(*given)
        if landed and [what for what, _, _ in ahead.told] == ["sent"]:
            missed.append((0, 3, s.page_of(777)))
        return landed

    def take() -> list[tuple[int, int, bytes]]:
        taken = missed.copy()
        missed.clear()
        return taken

    monkeypatch.setattr(sender, "barrier", land)
    monkeypatch.setattr(sender, "take_missed", lambda bitmaps: len(missed))
    monkeypatch.setattr(sender, "take_missed_pages", take)
    final = world.engine.run()
    assert [what for what, _, _ in ahead.told] == ["sent", "missed"]
    assert final.rounds[-1].pages == 1
    assert world.page(0, 3) == s.page_of(777)
