# SPDX-License-Identifier: Apache-2.0
"""A listener among strangers: floods, silence, resets and rule breakers cost it nothing for good,
and each case ends with a migration that works."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from listener_world import Stranger, World, one_world, open_files
from waiting import wait_until

import vmth
from vmth import listener as listener_module
from vmth.channel.sockets import LinkOptions
from vmth.channel.watch import IdleRule
from vmth.errors import ChannelError, MigrationError, RefusedError, UsageError
from vmth.journal import JournalError, Side, StateDirectory
from vmth.wire.framing import Preamble, PreambleStatus
from vmth.wire.handover import Record
from vmth.wire.messages import (
    PROTOCOL_VERSION,
    Abort,
    AbortCode,
    Ping,
    Role,
)

SESSION = b"s" * 16


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with one_world(tmp_path) as world:
        yield world


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "STRANGER_TIMEOUT_S", 0.3)


def _moves(world: World, listener: vmth.Listener) -> bool:
    """False where every slot is taken."""
    try:
        world.moves(listener)
    except RefusedError:
        return False
    return True


# -- who is let in ---------------------------------------------------------------------------------


def test_resets_after_the_control_preamble_leave_every_slot_free(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "STRANGER_TIMEOUT_S", 1e6)  # which would free a lost one
    listener = world.listen(max_sessions=2)
    for _ in range(400):
        with Stranger(listener) as stranger:
            stranger.preamble(Role.CONTROL, secrets.token_bytes(16))
            stranger.reset()
    wait_until(lambda: _moves(world, listener))  # the last ones may still be on their way out
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


def test_a_page_connection_without_the_token_is_refused(world: World) -> None:
    listener = world.listen()
    with Stranger(listener) as source, Stranger(listener) as stranger:
        source.begin(SESSION)
        assert stranger.status(Role.PAGE, SESSION, 0, b"x" * 16) is PreambleStatus.BAD_TOKEN
        assert stranger.ends()
        assert listener.states() == {SESSION.hex(): "receiving"}  # not its fault
    world.moves(listener)


@pytest.mark.parametrize(
    ("indices", "named"),
    [((0, 0), "page channel 0: attached before"), ((2,), "page channel 2: allowed 0 to 1")],
)
def test_a_wrong_channel_index_ends_its_session(
    world: World, indices: tuple[int, ...], named: str
) -> None:
    listener = world.listen()
    with Stranger(listener) as source, contextlib.ExitStack() as channels:
        token = source.begin(SESSION, 2).token
        for index in indices[:-1]:
            channel = channels.enter_context(Stranger(listener))
            assert channel.status(Role.PAGE, SESSION, index, token) is PreambleStatus.OK
        last = channels.enter_context(Stranger(listener))
        assert last.status(Role.PAGE, SESSION, indices[-1], token) is PreambleStatus.MALFORMED
        abort = source.hear()
        assert isinstance(abort, Abort)
        assert abort.code == AbortCode.PROTOCOL
        assert named in abort.reason
        assert source.ends()
    outcome = listener.outcomes.get(timeout=5)
    assert isinstance(outcome, MigrationError)
    assert named in str(outcome)
    assert world.made[-1].released
    assert listener.states() == {}
    world.moves(listener)


def _ping_until_ended(stranger: Stranger) -> str:
    """Nothing but pings, until the listener has had enough; its reason."""
    stranger.sock.settimeout(0.02)
    with contextlib.suppress(ConnectionError):
        while True:
            stranger.say(Ping(1))
            with contextlib.suppress(TimeoutError):
                message = stranger.hear()
                if isinstance(message, Abort):
                    return message.reason
    return "nothing was said"


def test_a_source_whose_page_channels_do_not_come_is_ended(world: World) -> None:
    listener = world.listen(max_sessions=1, peer_timeout_s=0.4)
    with Stranger(listener) as source:
        source.begin(SESSION, 2)
        assert "0 of 2 page channels came within 0.4 s" in _ping_until_ended(source)
    world.moves(listener)


def test_a_source_that_only_pings_is_ended(world: World) -> None:
    listener = world.listen(max_sessions=1, idle_timeout_s=0.4)
    with Stranger(listener) as source, Stranger(listener) as channel:
        token = source.begin(SESSION).token
        assert channel.status(Role.PAGE, SESSION, 0, token) is PreambleStatus.OK
        assert "nothing has happened for 0.4 s" in _ping_until_ended(source)
    world.moves(listener)


def test_the_idle_rule_counts_from_the_last_thing_that_happened() -> None:
    rule = IdleRule(channels=2, attach_s=10, idle_s=100, now_s=1000)
    assert rule.judge(1010, 0, 0) is None
    assert "0 of 2" in str(rule.judge(1011, 0, 0))
    assert "1 of 2" in str(rule.judge(1011, 1, 0))
    for now_s, wire_bytes in ((1090, 64), (1189, 65), (1288, 66), (1388, 66)):
        assert rule.judge(now_s, 2, wire_bytes) is None
    assert "nothing has happened for 100 s" in str(rule.judge(1389, 2, 66))


def test_channels_are_not_missed_while_the_source_is_told_what_is_here() -> None:
    """A filter may take longer on a slow link than channels take to come; but not for ever."""
    rule = IdleRule(channels=2, attach_s=10, idle_s=100, now_s=1000)
    for now_s in range(1000, 1100, 5):
        rule.not_before(now_s)
        assert rule.judge(now_s, 0, 0) is None
    assert rule.judge(1100, 0, 0) is None
    rule.not_before(1101)
    assert "nothing has happened for 100 s" in str(rule.judge(1101, 0, 0))


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
