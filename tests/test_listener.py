# SPDX-License-Identifier: Apache-2.0
"""A listener among strangers: floods, silence, resets and rule breakers cost it nothing for good,
and each case ends with a migration that works."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from listener_world import Stranger, World, one_world, open_files
from waiting import wait_until

import vmth
from vmth import listener as listener_module
from vmth.channel.sockets import LinkOptions
from vmth.destination_record import DestinationRecord
from vmth.destination_session import ReceiveResult
from vmth.errors import ChannelError, MigrationError, UsageError
from vmth.journal import JournalError, Side, StateDirectory
from vmth.options import ReceiveOptions
from vmth.source_session import SourceSession
from vmth.wire.framing import Preamble, PreambleStatus
from vmth.wire.handover import Record
from vmth.wire.messages import (
    PROTOCOL_VERSION,
    Abort,
    AbortCode,
    Answer,
    AnswerState,
    Grant,
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


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "STRANGER_TIMEOUT_S", 0.3)


# -- who is let in ---------------------------------------------------------------------------------


def test_resets_after_the_control_preamble_leave_every_slot_free(world: World) -> None:
    listener = world.listen(max_sessions=2)
    for _ in range(400):
        with Stranger(listener) as stranger:
            stranger.preamble(Role.CONTROL, secrets.token_bytes(16))
            stranger.reset()
    world.moves(listener)
    assert listener.states() == {}


def test_a_control_connection_that_resets_is_an_outcome(world: World) -> None:
    listener = world.listen()
    with Stranger(listener) as stranger:
        assert stranger.status(Role.CONTROL, SESSION) is PreambleStatus.OK
        stranger.reset()
    assert isinstance(listener.outcomes.get(timeout=5), MigrationError)
    world.moves(listener)


def test_a_session_that_fails_unforeseen_is_an_outcome(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = world.listen(max_sessions=1)
    with monkeypatch.context() as broken:
        broken.setattr(
            "vmth.destination_session.ControlConnection.start",
            lambda _: (_ for _ in ()).throw(RuntimeError("can't start new thread")),
        )
        with Stranger(listener) as stranger:
            assert stranger.status(Role.CONTROL, SESSION) is PreambleStatus.OK
            assert stranger.ends()
        outcome = listener.outcomes.get(timeout=5)
    assert isinstance(outcome, MigrationError)
    assert "can't start new thread" in str(outcome)
    world.moves(listener)


def test_silent_preambles_end_by_their_deadline(world: World, impatient: None) -> None:
    listener = world.listen()
    before = threading.active_count()
    with contextlib.ExitStack() as strangers:
        crowd = [strangers.enter_context(Stranger(listener)) for _ in range(100)]
        for stranger in crowd:
            with contextlib.suppress(ConnectionError):  # those beyond the bound are refused
                stranger.sock.sendall(b"VMTH")
        assert threading.active_count() <= before + listener_module.MAX_UNKNOWN
        assert all(stranger.ends() for stranger in crowd)
    wait_until(lambda: threading.active_count() == before)
    world.moves(listener)


class Dribble:
    """Sends a byte on every connection again and again until each has ended."""

    def __init__(self, crowd: list[Stranger], data: bytes) -> None:
        self.most_threads = 0
        pending = list(crowd)
        while pending:
            self.most_threads = max(self.most_threads, threading.active_count())
            for stranger in list(pending):
                stranger.sock.settimeout(0.0005)
                try:
                    stranger.sock.sendall(data[:1])
                    if not stranger.sock.recv(1 << 16):
                        pending.remove(stranger)
                except TimeoutError:
                    continue
                except OSError:
                    pending.remove(stranger)


def test_dribbling_preambles_end_by_their_deadline(world: World, impatient: None) -> None:
    listener = world.listen()
    with contextlib.ExitStack() as strangers:
        crowd = [strangers.enter_context(Stranger(listener)) for _ in range(20)]
        Dribble(crowd, Preamble(Role.CONTROL, SESSION).pack())
    world.moves(listener)


def test_dribbling_queries_are_bounded_and_end(world: World, impatient: None) -> None:
    listener = world.listen()
    before = threading.active_count()
    with contextlib.ExitStack() as strangers:
        crowd = [strangers.enter_context(Stranger(listener)) for _ in range(100)]
        for stranger in crowd:
            with contextlib.suppress(ConnectionError):
                stranger.preamble(Role.QUERY, SESSION)
        assert Dribble(crowd, b"V").most_threads <= before + listener_module.MAX_UNKNOWN
    wait_until(lambda: threading.active_count() == before)
    world.moves(listener)


def test_close_does_not_wait_for_strangers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "STRANGER_TIMEOUT_S", 3600.0)
    listener = world.listen()
    with contextlib.ExitStack() as strangers:
        for count in range(20):
            stranger = strangers.enter_context(Stranger(listener))
            if count % 2:
                assert stranger.status(Role.QUERY, SESSION) is PreambleStatus.OK
        listener.close()
    world.moves(world.listen())


def test_a_flooding_query_is_cut_off(world: World) -> None:
    listener = world.listen()
    with Stranger(listener) as stranger:
        assert stranger.status(Role.QUERY, SESSION) is PreambleStatus.OK
        header = b"VMc1\x11\0\0\0\0\0\x10\0\0\0\0\0"  # a Query of 1 MiB
        with contextlib.suppress(ConnectionError):
            stranger.sock.sendall(header + bytes(1 << 20))
        assert stranger.ends()
    world.moves(listener)


def test_a_thread_that_does_not_start_costs_one_connection(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "MAX_UNKNOWN", 1)
    listener = world.listen()
    start = threading.Thread.start
    failed: list[threading.Thread] = []

    def fail_once(thread: threading.Thread) -> None:
        if thread.name == "vmth-listen" and not failed:
            failed.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", fail_once)
        with Stranger(listener) as stranger:
            assert stranger.ends()
    assert failed
    world.moves(listener)


def test_a_link_option_that_the_kernel_refuses_costs_one_connection(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = world.listen()
    calls: list[int] = []

    def refuse(*_: object) -> None:
        calls.append(1)
        raise ChannelError("link options: no")

    with monkeypatch.context() as broken:
        broken.setattr("vmth.channel.sockets.set_link_options", refuse)
        with Stranger(listener) as stranger:
            assert stranger.ends()
    assert calls
    world.moves(listener)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"keepalive_s": -1}, "keepalive_s: received -1, allowed 0 to 32767"),
        ({"keepalive_s": 32768}, "keepalive_s: received 32768, allowed 0 to 32767"),
        ({"user_timeout_ms": -1}, "user_timeout_ms: received -1, allowed 0 to"),
        ({"send_buffer_bytes": 1 << 31}, "send_buffer_bytes: received 2147483648, allowed 0 to"),
        ({"receive_buffer_bytes": -5}, "receive_buffer_bytes: received -5, allowed 0 to"),
        ({"connect_timeout_s": 0}, "connect_timeout_s: received 0, allowed over 0"),
        ({"dscp": 64}, "dscp: received 64, allowed 0 to 63"),
    ],
)
def test_link_options_are_checked_where_they_are_made(
    options: dict[str, Any], allowed: str
) -> None:
    with pytest.raises(UsageError, match=allowed):
        LinkOptions(**options)


@pytest.mark.parametrize(
    ("preamble", "status"),
    [
        ((Role.PAGE, SESSION, 0, b"t" * 16), PreambleStatus.UNKNOWN_SESSION),
        ((Role.FAULT, SESSION), PreambleStatus.ROLE),
    ],
)
def test_what_is_refused_says_why(
    world: World, preamble: tuple[Any, ...], status: PreambleStatus
) -> None:
    listener = world.listen()
    with Stranger(listener) as stranger:
        assert stranger.status(*preamble) is status
        assert stranger.ends()
    world.moves(listener)


def test_another_version_is_told_ours(world: World) -> None:
    listener = world.listen()
    with Stranger(listener) as stranger:
        stranger.sock.sendall(Preamble(Role.CONTROL, SESSION, 0, bytes(16), 900, 901).pack())
        reply = stranger.reply()
        assert reply.status is PreambleStatus.VERSION
        assert reply.version_min <= reply.version_max == PROTOCOL_VERSION
        assert stranger.ends()
    world.moves(listener)


def test_a_session_beyond_the_bound_is_busy(world: World) -> None:
    listener = world.listen(max_sessions=1)
    with Stranger(listener) as first, Stranger(listener) as second:
        first.begin(SESSION)
        assert second.status(Role.CONTROL, b"t" * 16) is PreambleStatus.BUSY
    assert isinstance(listener.outcomes.get(timeout=5), MigrationError)
    world.moves(listener)


# -- what is remembered ----------------------------------------------------------------------------


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

    def lose(session: SourceSession) -> None:
        assert session._control is not None
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


# -- where it listens ------------------------------------------------------------------------------


def test_a_busy_port_leaves_nothing_behind(world: World) -> None:
    first = world.listen()
    world.moves(first)
    with socket.create_server(("127.0.0.1", 0)) as other:
        uri = f"tcp:127.0.0.1:{other.getsockname()[1]}"
        first.close()
        _leave_record(world)
        before = open_files()
        with pytest.raises(ChannelError, match="cannot listen"):
            world.listen(uri)
        assert open_files() == before
    again = world.listen(uri)
    assert list(again.states().values()) == ["aborted"]
    world.moves(again)


def _leave_record(world: World) -> None:
    """As a crash before the grant leaves one."""
    with StateDirectory(world.tmp_path / "destination") as directory:
        with directory.create_journal(SESSION, Side.DESTINATION) as journal:
            journal.append(Record.RECEIVING, directory.receiver_id)


def test_two_listeners_do_not_share_a_state_directory(world: World) -> None:
    first = world.listen()
    before = open_files()
    with pytest.raises(JournalError, match="in use"):
        world.listen()
    assert open_files() == before
    world.moves(first)


def test_a_listener_without_threads_leaves_nothing_behind(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files()
    with monkeypatch.context() as broken:
        broken.setattr(
            threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError("no thread"))
        )
        with pytest.raises(RuntimeError, match="no thread"):
            world.listen()
    assert open_files() == before
    world.moves(world.listen())


def _pairs(world: World, count: int) -> tuple[list[socket.socket], list[socket.socket], str, str]:
    pairs = [socket.socketpair() for _ in range(count)]
    for one in (end for pair in pairs for end in pair):
        world.resources.callback(one.close)
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    near, far = ("fd:" + ",".join(str(one.fileno()) for one in ends) for ends in (ours, theirs))
    return ours, theirs, near, far


def test_descriptors_wait_for_a_source_that_starts_late(world: World, impatient: None) -> None:
    _, _, ours, theirs = _pairs(world, 3)
    listener = world.listen(theirs)
    # A TCP connection made after the descriptors is given up before the source begins.
    other = world.listen(state_dir=world.tmp_path / "other")
    with Stranger(other) as stranger:
        assert stranger.ends()
    source = world.guest()
    source.resume()
    assert vmth.migrate(source, ours, world.options(channels=2)).verified
    assert listener.wait_for_guest(5).verified


def test_unused_descriptors_do_not_hold_close_up(world: World) -> None:
    _, _, _, theirs = _pairs(world, 3)
    world.listen(theirs).close()
    world.moves(world.listen())


def test_a_bad_descriptor_leaves_the_good_ones_alone(world: World) -> None:
    ours, theirs, _, uri = _pairs(world, 1)
    before = open_files()
    read_end, write_end = os.pipe()
    with pytest.raises(UsageError, match="not a socket"):
        world.listen(f"{uri},{read_end}")
    os.close(read_end)
    os.close(write_end)
    assert open_files() == before
    ours[0].sendall(b"still there")
    assert theirs[0].recv(11) == b"still there"
