# SPDX-License-Identifier: Apache-2.0
"""What a listener remembers of sessions that ended: as long as a source may ask, and no longer."""

from __future__ import annotations

import contextlib
import random
import secrets
import socket
import threading
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from listener_world import Stranger, World, one_world, open_files
from waiting import wait_until

import vmth
from vmth.destination_record import DestinationRecord
from vmth.errors import MigrationError
from vmth.guest import Guest
from vmth.job import JobSession
from vmth.journal import Side, StateDirectory
from vmth.listener import Listener
from vmth.options import ReceiveOptions
from vmth.received import ReceiveResult
from vmth.source_session import SourceSession
from vmth.wire.framing import PreambleStatus
from vmth.wire.handover import Action, Record
from vmth.wire.messages import (
    Abort,
    AbortCode,
    Answer,
    AnswerState,
    Grant,
    Message,
    Paused,
    Query,
    Released,
    ReleasedSeen,
    Role,
    Running,
    Seal,
    Sealed,
    State,
)

SESSION = b"s" * 16
LARGE = random.Random(0).randbytes(700_000)  # what a MemoryGuest that never wrote sends


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with one_world(tmp_path) as world:
        yield world


def _seal(stranger: Stranger) -> None:
    """A guest of one page that is a hole, without pages sent and without a digest."""
    stranger.say(Paused(0, False))
    stranger.say(State("counter", 1, 0, bytes(8), True))
    for name, version, data in (("empty", 3, b""), ("large", 2, LARGE)):
        stranger.say(State(name, version, 0, data, True))
    everything = bytes(8) + LARGE
    stranger.say(Seal(0, 0, 0, 3, len(everything), zlib.crc32(everything)))
    assert isinstance(stranger.hear(), Sealed)


def test_fenced_offers_leave_nothing_behind(world: World) -> None:
    listener = world.listen()
    before = open_files()
    for _ in range(20):
        session_id = secrets.token_bytes(16)
        with Stranger(listener) as source, Stranger(listener) as asker:
            accept = source.begin(session_id)
            assert asker.status(Role.QUERY, session_id) is PreambleStatus.OK
            asker.say(Query(session_id, accept.receiver_id))
            answer = asker.hear()
            assert isinstance(answer, Answer)
            assert answer.state == AnswerState.ABORTED
            assert isinstance(listener.outcomes.get(timeout=5), MigrationError)
        while world.made:
            guest = world.made.pop()
            assert guest.released
            assert guest.calls.count("release") == 1
            guest.close()
    wait_until(lambda: open_files() == before)
    assert listener.states() == {}
    assert list((world.tmp_path / "destination").glob("*.destination")) == []
    world.moves(listener)


def test_aborted_sessions_hold_no_descriptor_and_are_bounded(world: World) -> None:
    listener = world.listen(max_records=5)
    before = open_files()
    for number in range(5):
        with Stranger(listener) as source:
            source.begin(bytes([number + 1]) * 16, digest=False)
            _seal(source)
        assert isinstance(listener.outcomes.get(timeout=5), MigrationError)
        world.made.pop().close()
    assert list(listener.states().values()) == ["aborted"] * 5
    wait_until(lambda: open_files() == before)
    with Stranger(listener) as source:
        assert source.status(Role.CONTROL, SESSION) is PreambleStatus.BUSY
    # The source of one of them gives it back: there is room again.
    with Stranger(listener) as source:
        assert source.status(Role.QUERY, b"\x03" * 16) is PreambleStatus.OK
        source.say(Abort(AbortCode.FAILED, "it runs here"))
        assert source.ends()
    assert len(listener.states()) == 4
    world.moves(listener)


def test_records_are_remembered_over_a_restart_and_can_then_be_given_back(world: World) -> None:
    listener = world.listen()
    with Stranger(listener) as source:
        source.begin(SESSION, digest=False)
        _seal(source)
    listener.outcomes.get(timeout=5)
    listener.close()
    again = world.listen()
    assert again.states() == {SESSION.hex(): "aborted"}
    with Stranger(again) as source:
        assert source.status(Role.QUERY, SESSION) is PreambleStatus.OK
        source.say(Abort(AbortCode.FAILED, "it runs here"))
        assert source.ends()
    assert again.states() == {}
    world.moves(again)


@pytest.mark.parametrize(
    ("records", "calls"),
    [
        ([Record.RECEIVING], ["release"]),
        ([Record.RECEIVING, Record.ABORTED], ["release"]),
        ([Record.RECEIVING, Record.STARTING], ["is_running", "resume"]),
        ([Record.RECEIVING, Record.STARTING, Record.RUNNING], []),
    ],
)
def test_a_restart_finds_the_guest_again(
    world: World, records: list[Record], calls: list[str]
) -> None:
    """One that never ran here is freed, one that was being started is asked, and resumed."""
    with StateDirectory(world.tmp_path / "destination") as directory:
        with directory.create_journal(SESSION, Side.DESTINATION) as journal:
            for record in records:
                journal.append(record, directory.receiver_id, {"guest.key": "its key"})
    guest = world.guest(writing=False)
    found: list[dict[str, str]] = []

    def find_guest(session_id: str, detail: Mapping[str, str]) -> Guest:
        assert session_id == SESSION.hex()
        found.append(dict(detail))
        return guest

    with Listener(
        "tcp:127.0.0.1:0",
        world.make_guest,
        ReceiveOptions(state_dir=world.tmp_path / "destination"),
        find_guest,
    ):
        assert found == [{"guest.key": "its key"}]
        assert guest.calls == calls


def test_an_abort_by_query_ends_a_session_that_goes_on(world: World) -> None:
    listener = world.listen()
    with Stranger(listener) as source, Stranger(listener) as other:
        source.begin(SESSION)
        assert other.status(Role.QUERY, SESSION) is PreambleStatus.OK
        other.say(Abort(AbortCode.CANCELLED, "enough"))
        assert other.ends()
        assert source.ends()
        assert isinstance(listener.outcomes.get(timeout=5), MigrationError)
    assert world.made[-1].calls == ["release"]
    assert listener.states() == {}
    world.moves(listener)


def test_aborted_is_answered_on_the_control_connection(world: World) -> None:
    """resume() raised: the source says Abort to Aborted, and the destination hears it."""
    listener = world.listen()
    world.prepare = lambda guest: guest.fail.update(resume=OSError("no vCPU"))
    source = world.guest()
    source.resume()
    with pytest.raises(MigrationError):
        vmth.migrate(source, listener.endpoint.display, world.options())
    listener.outcomes.get(timeout=5)
    assert source.running
    assert listener.states() == {}
    world.prepare = lambda guest: None
    world.moves(listener)


def test_a_connection_lost_after_the_seal_is_given_back_on_another(world: World) -> None:
    listener = world.listen()
    source = world.guest()
    source.resume()
    lost: list[str] = []

    def lose(session: JobSession) -> None:
        assert isinstance(session, SourceSession) and session._control is not None
        session._control._sock.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: "aborted" in listener.states().values())
        lost.append("the control connection")

    job = vmth.start_migration(source, listener.endpoint.display, world.options())
    source.on_call["hold"] = lambda: lose(job._session)
    source.fail["hold"] = OSError("the control connection is gone")
    with pytest.raises(MigrationError):
        job.wait(20)
    assert lost
    assert source.running
    assert isinstance(listener.outcomes.get(timeout=5), MigrationError)
    wait_until(lambda: listener.states() == {})
    world.moves(listener)


def test_a_peer_that_does_not_read_delays_nobody(world: World) -> None:
    """Replies are sent after the record's lock was let go."""
    directory = world.resources.enter_context(StateDirectory(world.tmp_path / "records"))
    journal = directory.create_journal(SESSION, Side.DESTINATION)
    record = DestinationRecord(SESSION, directory.receiver_id, journal)
    stuck, free = threading.Event(), threading.Event()

    def send(_: object) -> None:
        stuck.set()
        assert free.wait(60)

    query = Query(SESSION, directory.receiver_id)
    slow = threading.Thread(target=record.answer, args=(query, send))
    slow.start()
    assert stuck.wait(60)
    answers: list[object] = []
    other = threading.Thread(target=record.answer, args=(query, answers.append))
    other.start()
    wait_until(lambda: len(answers) == 1)
    free.set()
    slow.join()
    other.join()
    journal.remove()


def _receive(world: World, **options: Any) -> tuple[threading.Thread, Any, list[ReceiveResult]]:
    """vmth.receive() in a thread, its place for a Stranger, and what it will have returned."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    arrived: list[ReceiveResult] = []
    chosen = ReceiveOptions(state_dir=world.tmp_path / "destination", **options)
    thread = threading.Thread(
        target=lambda: arrived.append(
            vmth.receive(f"tcp:127.0.0.1:{port}", world.make_guest, chosen)
        )
    )
    thread.start()
    place: Any = SimpleNamespace(endpoint=SimpleNamespace(port=port))

    def listens() -> bool:
        with contextlib.suppress(ConnectionRefusedError), Stranger(place):
            return True
        return False

    wait_until(listens)
    return thread, place, arrived


def _move_and_vanish(place: Any) -> bytes:
    """A source that is gone right after Running. Returns the receiver's id."""
    with Stranger(place) as source:
        return _move(source)


def _move(source: Stranger) -> bytes:
    accept = source.begin(SESSION, digest=False)
    _seal(source)
    source.say(Grant(accept.receiver_id))
    assert isinstance(source.hear(), Running)
    return accept.receiver_id


def test_receive_answers_a_source_that_lost_its_connection(world: World) -> None:
    thread, place, arrived = _receive(world)
    receiver_id = _move_and_vanish(place)
    with Stranger(place) as asker:
        assert asker.status(Role.QUERY, SESSION) is PreambleStatus.OK
        asker.say(Query(SESSION, receiver_id))
        answer = asker.hear()
        assert isinstance(answer, Answer)
        assert answer.state == AnswerState.RUNNING
        assert arrived == []
        asker.say(Released())
        assert isinstance(asker.hear(), ReleasedSeen)
    thread.join(60)
    assert [one.session_id for one in arrived] == [SESSION.hex()]
    world.moves(world.listen())


def test_receive_does_not_end_before_it_has_answered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source's last word comes while the session, whose connection is lost, ends."""
    thread, place, arrived = _receive(world)
    tell = DestinationRecord._tell

    def tell_late(record: DestinationRecord, action: Action, send: Any, message: Message) -> None:
        source.sock.close()
        thread.join(1.0)
        tell(record, action, send, message)

    with Stranger(place) as source, Stranger(place) as asker:
        receiver_id = _move(source)
        assert asker.status(Role.QUERY, SESSION) is PreambleStatus.OK
        asker.say(Query(SESSION, receiver_id))
        assert isinstance(asker.hear(), Answer)
        monkeypatch.setattr(DestinationRecord, "_tell", tell_late)
        asker.say(Released())
        assert isinstance(asker.hear(), ReleasedSeen)
    thread.join(60)
    assert [one.session_id for one in arrived] == [SESSION.hex()]
    monkeypatch.undo()
    world.moves(world.listen())


def test_receive_says_when_the_source_was_not_heard(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    thread, place, arrived = _receive(world, linger_s=0.01)
    _move_and_vanish(place)
    thread.join(60)
    assert len(arrived) == 1
    assert "may stay in doubt" in caplog.text
    again = world.listen()
    assert again.states() == {SESSION.hex(): "running"}
    world.moves(again)
