# SPDX-License-Identifier: Apache-2.0
"""IncomingStream: a stream into a QEMU that waits for one, against a loader that the test plays."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_qmp import FakeError
from incoming_world import IncomingWorld

from vmth.channel import sockets
from vmth.errors import MigrationError, RefusedError, UsageError
from vmth.qemu import incoming
from vmth.qemu import stream as q
from vmth.qemu.incoming import IncomingStream

MACHINE = "pc-q35-7.2"
PING = 0x766D0001


def test_events_are_written_and_the_load_is_awaited(tmp_path: Path) -> None:
    with IncomingWorld(tmp_path) as world:
        stream = world.started()
        stream.send(q.FileHeader(3))
        stream.send(q.Configuration(MACHINE))
        stream.send(q.RamFlush())  # no bytes
        stream.send_raw(b"opaque")
        world.say(q.Pong(1), q.Pong(PING))
        stream.await_taken(5)
        name = len(MACHINE).to_bytes(4, "big") + MACHINE.encode()
        ping = b"\x08" + (2).to_bytes(2, "big") + (4).to_bytes(2, "big") + PING.to_bytes(4, "big")
        assert world.taken() == b"QEVM\0\0\0\3\x07" + name + b"opaque" + ping
        world.completes("paused")
        assert stream.await_loaded(5) == "paused"
        assert stream.trouble() is None


@pytest.mark.parametrize("late", [False, True])
def test_a_held_guest_needs_no_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """QEMU says it by an event, which may be heard after the return path."""
    monkeypatch.setattr(incoming, "_EVENT_S", 10.0)
    with IncomingWorld(tmp_path) as world:
        stream = world.started()
        asked = world.fake.commands().count("query-status")
        world.fake.emit("MIGRATION", status="active")
        if not late:
            world.fake.emit("MIGRATION", status="completed")
        world.completes("paused")
        timer = threading.Timer(0.01, lambda: world.fake.emit("MIGRATION", status="completed"))
        with timer_of(timer, late):
            stream.await_held(5)
        assert world.fake.commands().count("query-status") == asked
        assert stream.trouble() is None
        stream.close()
        assert world.switched_on() == set()  # put back, as for one that was asked


def test_a_qemu_without_events_is_asked(tmp_path: Path) -> None:
    with IncomingWorld(tmp_path) as world:
        stream = world.started()
        asked = world.fake.commands().count("query-status")
        world.completes("paused")
        stream.await_held(5)
        assert world.fake.commands().count("query-status") == asked + 1


@pytest.mark.parametrize("events", [False, True])
def test_a_guest_that_runs_is_not_held(tmp_path: Path, events: bool) -> None:
    with IncomingWorld(tmp_path) as world:
        stream = world.started()
        if events:
            world.fake.emit("RESUME")
            world.fake.emit("MIGRATION", status="completed")
        world.completes("running")
        with pytest.raises(MigrationError, match="although it was told to stay paused"):
            stream.await_held(5)


@contextlib.contextmanager
def timer_of(timer: threading.Timer, wanted: bool) -> Iterator[None]:
    if wanted:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if wanted:
            timer.join()


def test_qemu_is_told_to_stay_paused_and_settings_come_back(tmp_path: Path) -> None:
    with IncomingWorld(tmp_path) as world:
        site = dict.fromkeys(
            ("multifd", "zero-copy-send", "postcopy-ram", "postcopy-preempt"), True
        )
        world.fake.capabilities |= {**site, "events": True}
        world.fake.parameters["tls-creds"] = "tls0"
        before = dict(world.fake.capabilities), dict(world.fake.parameters)
        stream = world.started()
        commands = world.fake.commands()
        assert commands.index("stop") < commands.index("migrate-incoming")
        assert world.switched_on() == {"late-block-activate", "events"}
        assert world.fake.parameters["tls-creds"] == ""
        world.completes("prelaunch")
        stream.await_loaded(5)
        assert world.switched_on() == {"late-block-activate", "events"}
        stream.close()  # when the guest runs already, for those who wait for it
        assert world.switched_on() == {*site, "events"}
        assert (world.fake.capabilities, world.fake.parameters) == before
        assert stream.notes == []


def test_the_socket_is_private_and_leaves_nothing(tmp_path: Path) -> None:
    with IncomingWorld(tmp_path) as world:
        world.started()
        assert world.modes == [0o700]
        assert world.folder is not None and not world.folder.exists()


def open_places() -> list[str]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            found.append(os.readlink(link))
    return found


def test_a_qemu_that_does_not_stop_is_left_as_it_is(tmp_path: Path) -> None:
    with IncomingWorld(tmp_path) as world:
        world.fake.answers["stop"] = FakeError("GenericError", "not now")
        before = dict(world.fake.capabilities), dict(world.fake.parameters)
        with pytest.raises(RefusedError, match="not now"):
            world.started()
        assert (world.fake.capabilities, world.fake.parameters) == before
        told = set(world.fake.commands()) - {"stop"}
        assert all(name.startswith("query-") for name in told), told


def test_the_place_where_qemu_listened_is_let_go_here(tmp_path: Path) -> None:
    """A directory that was removed goes to its disk with the last descriptor: not with QEMU's."""
    with IncomingWorld(tmp_path) as world:
        stream = world.started()
        assert world.folder is not None
        place = f"{world.folder}/stream (deleted)"
        held = open_places()
        assert held.count(place) == 1
        stream.close()
        held = open_places()
        assert place not in held


@pytest.mark.parametrize("allowed", [True, False])
def test_what_is_written_may_be_ahead_of_qemu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    """Who writes pages and who loads them are not to wait for each other by turns."""
    if not allowed:
        monkeypatch.setattr(sockets, "_SO_SNDBUFFORCE", 0x7FFF)  # no such option
    most = int(Path("/proc/sys/net/core/wmem_max").read_text())
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        usual = one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        with contextlib.suppress(OSError):
            one.setsockopt(socket.SOL_SOCKET, sockets._SO_SNDBUFFORCE, 1 << 20)
            most = 1 << 20
    with (
        IncomingWorld(tmp_path) as world,
        socket.socket(fileno=os.dup(world.started().fd)) as sock,
    ):
        ahead = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    assert ahead == min(2 * most, incoming._AHEAD_BYTES) > usual


def test_an_older_qemu_is_asked_as_it_understands(tmp_path: Path) -> None:
    with IncomingWorld(tmp_path, old=True) as world:
        del world.fake.capabilities["late-block-activate"]
        stream = world.started()
        uris = [given for name, given in world.fake.received if name == "migrate-incoming"]
        assert [sorted(given) for given in uris] == [["exit-on-error", "uri"], ["uri"]]
        assert ["late-block-activate" in note for note in stream.notes] == [True]


def test_a_qemu_that_waits_for_nothing_is_refused_untouched(tmp_path: Path) -> None:
    with IncomingWorld(tmp_path) as world:
        world.status = "running"
        with pytest.raises(RefusedError, match=r"'running', allowed 'inmigrate'.*-incoming defer"):
            IncomingStream(world.qmp).start()
        world.status, world.migration = "inmigrate", {"status": "failed"}
        with pytest.raises(RefusedError, match=r"already \(failed\)"):
            IncomingStream(world.qmp).start()
        assert not {"stop", "migrate-set-capabilities"} & set(world.fake.commands())


def test_a_qemu_that_does_not_listen(tmp_path: Path) -> None:
    with IncomingWorld(tmp_path) as world:
        world.listens = False
        with pytest.raises(MigrationError, match="does not listen"):
            IncomingStream(world.qmp).start()
        assert world.switched_on() == set()  # put back


def test_qemus_own_reason_is_told(tmp_path: Path) -> None:
    with IncomingWorld(tmp_path) as world:
        stream = world.started(log=lambda: "Unknown ramblock 'x'")
        assert stream.trouble() is None
        world.fails("load of migration failed: Invalid argument")
        trouble = stream.trouble()
        assert trouble is not None and "Invalid argument: Unknown ramblock 'x'" in str(trouble)
        with pytest.raises(MigrationError, match="Invalid argument"):
            stream.send_raw(b"x")
        with pytest.raises(MigrationError, match="Invalid argument"):
            stream.await_loaded(5)


def test_a_bad_status_and_a_bad_return_path_are_failures(tmp_path: Path) -> None:
    for number, bad in enumerate((q.encode_return_message(q.Shut(1)), b"\0\x09\0\0")):
        folder = tmp_path / str(number)
        folder.mkdir()
        with IncomingWorld(folder) as world:
            stream = world.started()
            world.loader.sendall(bad)
            with pytest.raises(MigrationError, match=r"status 1|return path message"):
                stream.await_loaded(5)


def test_a_qemu_that_ends_is_told_apart(tmp_path: Path) -> None:
    with IncomingWorld(tmp_path) as world:
        stream = world.started()
        world.loader.close()
        world.fake.hang_up()
        with pytest.raises(MigrationError, match="ended while it loaded the guest"):
            stream.await_loaded(5)


def test_silence_is_bounded(tmp_path: Path) -> None:
    with IncomingWorld(tmp_path) as world:
        stream = world.started(timeout_s=0.01)
        with pytest.raises(MigrationError, match=r"taken nothing of its stream for 0\.01 s"):
            stream.send_raw(bytes(16 << 20))  # more than a socket's buffer holds
        with pytest.raises(MigrationError, match=r"no answer within 0\.01 s"):
            stream.await_loaded(0.01)


def test_qemu_does_not_wait_for_what_is_missing(tmp_path: Path) -> None:
    with IncomingWorld(tmp_path) as world:
        stream = world.started()
        stream.send_raw(b"half a section")
        with pytest.raises(MigrationError, match=r"no answer"):
            stream.await_loaded(0)
        assert world.loader.recv(100) == b"half a section"
        assert world.loader.recv(100) == b""


def test_a_guest_that_runs_by_itself_is_an_error(tmp_path: Path) -> None:
    with IncomingWorld(tmp_path) as world:
        stream = world.started()
        world.completes("running")
        with pytest.raises(MigrationError, match="although it was told to stay paused"):
            stream.await_loaded(5)


def test_a_closed_stream_says_so(tmp_path: Path) -> None:
    with IncomingWorld(tmp_path) as world:
        stream = world.started()
        stream.close()
        stream.close()
        assert stream.trouble() is None
        with pytest.raises(UsageError, match="not open"):
            stream.send_raw(b"x")
