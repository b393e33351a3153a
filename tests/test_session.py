# SPDX-License-Identifier: Apache-2.0
"""Whole migrations between two sessions in this process: outcomes, failures, and again
afterwards."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_guest import PAGE, MemoryGuest

import vmth
from vmth.channel.control import ControlConnection
from vmth.errors import (
    CancelledError,
    ExitCode,
    GuestError,
    InDoubtError,
    MigrationError,
    NotResumedError,
    RefusedError,
    UsageError,
    VerificationError,
)
from vmth.events import Connected, RoundFinished
from vmth.guest import USUAL_STATE_BYTES
from vmth.handshake import Incoming
from vmth.journal import FileOps, Journal, JournalError
from vmth.listener import Listener
from vmth.options import MigrateOptions, ReceiveOptions
from vmth.policy.interface import Decision, Forecast, RoundView
from vmth.policy.standard import StandardPolicy
from vmth.uri import parse_endpoint
from vmth.wire.messages import Abort, Message, Mode


class World:
    """A source guest, a listener whose guests are kept, and what to compare afterwards."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.guests: list[MemoryGuest] = []
        self.made: list[MemoryGuest] = []
        self.listeners: list[Listener] = []
        self.prepare: Callable[[MemoryGuest], None] = lambda guest: None

    def guest(self, **options: Any) -> MemoryGuest:
        guest = MemoryGuest(**options)
        self.guests.append(guest)
        return guest

    def make_guest(self, incoming: Incoming) -> MemoryGuest:
        guest = self.guest(
            npages=incoming.blocks[0].npages,
            filled=False,
            idstrs=[block.idstr for block in incoming.blocks],
        )
        self.made.append(guest)
        self.prepare(guest)
        return guest

    def listen(self, uri: str = "tcp:127.0.0.1:0", **options: Any) -> Listener:
        chosen = ReceiveOptions(state_dir=self.tmp_path / "destination", **options)
        listener = Listener(parse_endpoint(uri, listening=True), self.make_guest, chosen)
        self.listeners.append(listener)
        return listener

    def options(self, **options: Any) -> MigrateOptions:
        options.setdefault("query_timeout_s", 0.6)
        return MigrateOptions(state_dir=self.tmp_path / "source", **options)

    def migrate(self, guest: MemoryGuest, listener: Listener, **options: Any) -> Any:
        return vmth.migrate(guest, listener.endpoint.display, self.options(**options))

    def check_moved(self, source: MemoryGuest, listener: Listener, *, runs: bool = True) -> None:
        received = listener.wait_for_guest(5)
        there = self.made[-1]
        assert received.guest is there
        assert source.released
        assert not source.running
        assert there.running is runs
        there.pause()
        assert there.counted() == there.total

    def check_stayed(self, source: MemoryGuest, *, runs: bool = True) -> None:
        assert source.running is runs
        assert not source.released
        assert all(not guest.running for guest in self.made)
        source.pause()
        assert source.counted() == source.total
        if runs:
            source.resume()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    gc.collect()  # what tests before this one left to the collector
    before = (threading.active_count(), len(os.listdir("/proc/self/fd")))
    world = World(tmp_path)
    yield world
    for listener in world.listeners:
        listener.close()
    for guest in world.guests:
        guest.close()
    for journal in tmp_path.glob("source/*.source"):
        raise AssertionError(f"the source's journal {journal} was left behind")
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


@pytest.mark.parametrize("mode", [Mode.LIVE, Mode.COLD])
@pytest.mark.parametrize("channels", [1, 4])
def test_a_running_guest_moves_with_proof(world: World, mode: Mode, channels: int) -> None:
    source, listener = world.guest(), world.listen()
    source.resume()
    result = world.migrate(source, listener, mode=mode, channels=channels, audit=True)
    world.check_moved(source, listener)
    assert result.verified
    assert result.verified_scope == "memory"
    assert result.digest_source == result.digest_destination != ""
    assert result.audited
    assert result.rounds[-1].paused
    assert result.transfer.hole_pages > 0
    assert result.transfer.zero_pages > 0
    assert result.downtime_ns == result.downtime_parts.total_ns > 0
    assert 0 < result.wire_bytes < source.blocks[0].used_length


def test_memory_arrives_byte_for_byte(world: World) -> None:
    source, listener = world.guest(writing=False, idstrs=("low", "high")), world.listen()
    source.resume()
    expected = [view.copy() for view in source.views]
    world.prepare = lambda guest: setattr(guest, "writing", False)
    world.migrate(source, listener)
    for ours, theirs in zip(expected, world.made[-1].views, strict=True):
        assert np.array_equal(ours, theirs)


def test_a_paused_guest_arrives_paused(world: World) -> None:
    source, listener = world.guest(), world.listen()
    world.migrate(source, listener)
    world.check_moved(source, listener, runs=False)


def test_digest_off_is_never_called_verified(world: World) -> None:
    source, listener = world.guest(), world.listen()
    source.resume()
    result = world.migrate(source, listener, digest=False)
    world.check_moved(source, listener)
    assert not result.verified
    assert result.verified_scope == "none"
    assert result.digest_source == result.digest_destination == ""
    assert any("digest" in fallback for fallback in result.fallbacks)


@pytest.mark.parametrize("scheme", ["tcp6", "unix", "fd"])
def test_every_scheme_carries_a_migration(world: World, scheme: str, tmp_path: Path) -> None:
    source = world.guest()
    source.resume()
    if scheme == "fd":
        pairs = [socket.socketpair() for _ in range(3)]
        ours = "fd:" + ",".join(str(a.fileno()) for a, _ in pairs)
        listener = world.listen("fd:" + ",".join(str(b.fileno()) for _, b in pairs))
        vmth.migrate(source, ours, world.options(channels=2))
        for a, b in pairs:
            a.close()
            b.close()
    else:
        uri = "tcp:[::1]:0" if scheme == "tcp6" else f"unix:{tmp_path}/sock"
        listener = world.listen(uri)
        world.migrate(source, listener)
    world.check_moved(source, listener)


def test_several_sessions_at_once(world: World) -> None:
    listener = world.listen()
    sources = [world.guest(seed=seed) for seed in range(3)]
    for source in sources:
        source.resume()
    jobs = [
        vmth.start_migration(source, listener.endpoint.display, world.options())
        for source in sources
    ]
    results = [job.wait(20) for job in jobs]
    for _ in sources:
        assert listener.wait_for_guest(5).verified
    assert len({result.session_id for result in results}) == 3
    assert sum(guest.running for guest in world.made) == 3
    for guest in world.made:
        guest.pause()
        assert guest.counted() == guest.total


class WatchingPolicy(StandardPolicy):
    """Keeps what it was shown and what it made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[RoundView, Forecast]] = []

    def decide(self, view: RoundView) -> Decision:
        decision = super().decide(view)
        self.seen.append((view, decision.forecast))
        return decision


def test_a_slow_disk_and_much_state_are_in_the_forecast(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_fsync(_ops: FileOps, fd: int) -> None:
        time.sleep(0.03)
        os.fsync(fd)

    monkeypatch.setattr(FileOps, "fsync", slow_fsync)
    source, listener, policy = world.guest(), world.listen(), WatchingPolicy()
    setattr(source, "estimate_state_bytes", lambda: 100 << 20)  # noqa: B010
    source.resume()
    # That much state fits into the default limit only over a link that is fast today.
    world.migrate(source, listener, policy=policy, downtime_limit_ns=60_000_000_000)
    world.check_moved(source, listener)
    view, forecast = policy.seen[0]
    assert view.state_bytes == 100 << 20
    assert view.journal_ns >= 30_000_000
    assert forecast.overhead_ns >= 3 * view.journal_ns
    other, plain = world.guest(), WatchingPolicy()
    other.resume()
    world.migrate(other, listener, policy=plain, delta_cache_bytes=5 << 20)
    assert plain.seen[0][0].state_bytes == USUAL_STATE_BYTES
    assert plain.seen[0][0].delta_cache_pages == 1280


@pytest.mark.parametrize("estimate", [-1, None, 1.5])
def test_an_estimate_of_the_state_that_is_none_is_refused(world: World, estimate: object) -> None:
    source, listener = world.guest(), world.listen()
    setattr(source, "estimate_state_bytes", lambda: estimate)  # noqa: B010
    source.resume()
    with pytest.raises(MigrationError, match=f"received {estimate}, allowed 0 or more bytes"):
        world.migrate(source, listener)
    world.check_stayed(source)
    setattr(source, "estimate_state_bytes", lambda: 0)  # noqa: B010
    _again(world, source)


def _again(world: World, source: MemoryGuest, failed: int = 1) -> None:
    """Every failure ends with a migration that works."""
    listener = world.listeners[-1]
    for _ in range(failed):
        assert isinstance(listener.outcomes.get(timeout=5), MigrationError)
    world.prepare = lambda guest: None
    world.migrate(source, listener)
    world.check_moved(source, listener)


@pytest.mark.parametrize("error", [ValueError, GuestError])
@pytest.mark.parametrize("callback", ["save_state", "pause", "hold", "is_running"])
def test_a_source_callback_that_raises(world: World, callback: str, error: type[Exception]) -> None:
    source, listener = world.guest(), world.listen()
    source.resume()
    source.fail[callback] = error("the device is on fire")
    with pytest.raises(MigrationError, match="on fire"):
        world.migrate(source, listener)
    world.check_stayed(source)
    _again(world, source)


def test_a_release_that_raises_does_not_undo_the_move(world: World) -> None:
    source, listener = world.guest(), world.listen()
    source.resume()
    source.fail["release"] = GuestError("the holder does not answer")
    assert world.migrate(source, listener).verified
    listener.wait_for_guest(5)
    assert world.made[-1].running
    assert not source.running


def test_load_state_that_raises_keeps_the_source(world: World) -> None:
    source, listener = world.guest(), world.listen()
    source.resume()
    world.prepare = lambda guest: guest.fail.update(load_state=ValueError("no such device"))
    with pytest.raises(MigrationError, match="no such device"):
        world.migrate(source, listener)
    world.check_stayed(source)
    assert world.made[-1].released
    _again(world, source)


def test_resume_that_raises_at_the_destination_gives_the_guest_back(world: World) -> None:
    source, listener = world.guest(), world.listen()
    source.resume()
    world.prepare = lambda guest: guest.fail.update(resume=OSError("no vCPU"))
    with pytest.raises(MigrationError, match="runs here"):
        world.migrate(source, listener)
    world.check_stayed(source)
    _again(world, source)


def test_a_destination_that_cannot_tell_leaves_both_paused(world: World, tmp_path: Path) -> None:
    source, listener = world.guest(), world.listen()
    source.resume()

    def sick(guest: MemoryGuest) -> None:
        guest.fail.update(resume=OSError("no vCPU"), is_running=OSError("the holder is gone"))

    world.prepare = sick
    with pytest.raises(InDoubtError, match="vmth recover"):
        world.migrate(source, listener)
    there = world.made[-1]
    assert (source.running, source.released, there.running) == (False, False, False)
    # The operator brings the destination's guest back to life; the source then hears of it.
    listener.close()
    options = ReceiveOptions(state_dir=tmp_path / "destination")
    again = Listener(listener.endpoint, world.make_guest, options, lambda *_: there)
    world.listeners[-1] = again
    assert there.running
    recovered = vmth.recover(lambda detail: source, state_dir=tmp_path / "source")
    assert [one.state for one in recovered] == ["done"]
    assert source.released
    there.pause()
    assert there.counted() == there.total


def test_a_slow_start_that_the_source_gave_up_on_keeps_the_only_copy(world: World) -> None:
    """The source loses patience after the grant and hears RUNNING from a query: it releases its
    guest and says so on that connection, while the destination's session still goes on."""
    source, listener = world.guest(), world.listen()
    source.resume()

    def wait_a_second() -> None:
        threading.Event().wait(1.0)

    def slow(guest: MemoryGuest) -> None:
        guest.on_call["resume"] = wait_a_second

    world.prepare = slow
    result = world.migrate(source, listener, peer_timeout_s=0.3, query_timeout_s=5)
    assert result.verified
    assert source.released
    there = world.made[-1]
    assert listener.wait_for_guest(5).guest is there
    assert there.running
    assert not there.released


def test_records_that_cannot_be_removed_change_no_outcome(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, listener = world.guest(), world.listen()
    source.resume()
    stuck: list[Path] = []

    def cannot(journal: Journal) -> None:
        stuck.append(journal.path)
        raise JournalError(f"{journal.path}: read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", cannot)
        assert world.migrate(source, listener).verified
        world.check_moved(source, listener)
    assert {path.suffix for path in stuck} == {".source", ".destination"}
    for path in stuck:
        path.unlink()


def test_a_guest_given_back_that_cannot_be_resumed_is_said_to_be_paused(world: World) -> None:
    source, listener = world.guest(), world.listen()
    source.resume()
    world.prepare = lambda guest: guest.fail.update(resume=OSError("no vCPU"))
    source.on_call["hold"] = lambda: source.fail.update(resume=ValueError("stuck"))
    with pytest.raises(NotResumedError, match=r"stuck.*paused"):
        world.migrate(source, listener)
    assert not source.running
    assert not world.made[-1].running
    vmth.recover(lambda detail: source, state_dir=world.tmp_path / "source")
    assert source.running


def test_stopping_the_tracking_comes_before_the_release_and_may_fail(world: World) -> None:
    source, listener = world.guest(), world.listen()
    source.resume()
    tracked = source.dirty[0]
    stop = tracked.stop

    def stop_badly() -> None:
        source.calls.append("stop")
        stop()
        if not source.released:
            raise OSError("no such device")

    tracked.stop = stop_badly  # type: ignore[method-assign]
    assert world.migrate(source, listener).verified
    assert source.calls.index("stop") < source.calls.index("release")
    assert source.calls.count("stop") == 1
    world.check_moved(source, listener)


def test_make_guest_that_refuses(world: World) -> None:
    source, listener = world.guest(), world.listen()
    source.resume()

    def refuse(guest: MemoryGuest) -> None:
        raise RefusedError("memory: 5 GiB needed, 1 GiB available")

    world.prepare = refuse
    with pytest.raises(RefusedError, match="5 GiB needed"):
        world.migrate(source, listener)
    world.check_stayed(source)
    _again(world, source)


def test_a_session_beyond_the_memory_bound_is_refused(world: World) -> None:
    source, listener = world.guest(npages=512), world.listen(max_memory_bytes=256 * PAGE)
    with pytest.raises(RefusedError, match=f"received {512 * PAGE} bytes, allowed {256 * PAGE}"):
        world.migrate(source, listener)
    assert world.made == []


def test_cancel_leaves_the_guest_running(world: World) -> None:
    source, listener = world.guest(), world.listen()
    source.resume()
    job = vmth.start_migration(
        source, listener.endpoint.display, world.options(bandwidth_bps=1 << 20)
    )
    source.on_call["pause"] = lambda: pytest.fail("the bandwidth cap should have kept it busy")
    job.set(downtime_limit_ns=1_000_000)
    assert isinstance(next(job.events()), Connected)
    job.cancel()
    with pytest.raises(CancelledError):
        job.wait(10)
    source.on_call.clear()
    world.check_stayed(source)
    assert job.stats().status == "cancelled"
    _again(world, source)


@pytest.mark.parametrize("late_s", [0.0, 0.3])
def test_the_destination_knows_that_it_was_cancelled(
    world: World, late_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the page channels are closed before the source says so."""
    source, listener = world.guest(), world.listen()
    source.resume()
    send = ControlConnection.send

    def send_late(control: ControlConnection, message: Message) -> None:
        if isinstance(message, Abort):
            time.sleep(late_s)
        send(control, message)

    monkeypatch.setattr(ControlConnection, "send", send_late)
    job = vmth.start_migration(
        source, listener.endpoint.display, world.options(bandwidth_bps=1 << 20)
    )
    assert isinstance(next(job.events()), Connected)
    job.cancel()
    outcome = listener.outcomes.get(timeout=5)
    assert isinstance(outcome, CancelledError), outcome
    assert "the source ended the migration: cancelled by the caller" in str(outcome)
    with pytest.raises(CancelledError):
        job.wait(10)
    world.check_stayed(source)
    _again(world, source, failed=0)


@pytest.mark.parametrize("callback", ["pause", "save_state"])
def test_cancel_while_paused_resumes(world: World, callback: str) -> None:
    source, listener = world.guest(), world.listen()
    source.resume()
    jobs: list[vmth.MigrationJob] = []
    started = threading.Event()

    def cancel() -> None:
        started.wait(5)
        jobs[0].cancel()

    source.on_call[callback] = cancel
    jobs.append(vmth.start_migration(source, listener.endpoint.display, world.options()))
    started.set()
    with pytest.raises(CancelledError):
        jobs[0].wait(10)
    source.on_call.clear()
    world.check_stayed(source)
    _again(world, source)


def test_the_destination_shuts_down_mid_way(world: World) -> None:
    source, listener = world.guest(), world.listen()
    source.resume()
    threads: list[threading.Thread] = []

    def shut_down() -> None:
        threads.append(threading.Thread(target=listener.close))
        threads[0].start()
        threads[0].join(5)

    source.on_call["pause"] = shut_down
    with pytest.raises(MigrationError):
        world.migrate(source, listener)
    source.on_call.clear()
    world.check_stayed(source)
    world.listen()
    _again(world, source, failed=0)


def test_a_write_that_the_tracker_missed_is_found_by_the_audit(world: World) -> None:
    source, listener = world.guest(writing=False), world.listen()
    source.resume()

    def sneak() -> None:
        os.pwrite(source.blocks[0].mapping.fd or 0, b"sneaky", 100 * PAGE)

    source.on_call["save_state"] = sneak  # after the last pages, by a way that nobody tracks
    with pytest.raises(VerificationError, match="page 100 of ramblock 'ram'"):
        world.migrate(source, listener, audit=True)
    source.on_call.clear()
    world.check_stayed(source)
    _again(world, source)


def test_events_tell_every_round(world: World) -> None:
    source, listener = world.guest(), world.listen()
    source.resume()
    job = vmth.start_migration(source, listener.endpoint.display, world.options())
    events = list(job.events())
    result = job.wait(10)
    rounds = [event.stats.round for event in events if isinstance(event, RoundFinished)]
    assert rounds == list(range(len(result.rounds)))
    assert job.stats().status == "completed"
    world.check_moved(source, listener)


def test_bad_requests_are_named(world: World) -> None:
    source = world.guest()
    for uri, allowed in (
        ("rdma:host:1", "tcp:"),
        ("tcp:10.0.0.1:4444", "--insecure"),
        ("fd:0", "allowed"),
    ):
        with pytest.raises((UsageError, MigrationError), match=allowed):
            vmth.migrate(source, uri, world.options())
    with pytest.raises(UsageError, match="received 65, allowed 1 to 64"):
        world.options(channels=65)


def test_nobody_listens(world: World) -> None:
    source = world.guest()
    source.resume()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(MigrationError, match=f"tcp:127.0.0.1:{port}.*refused"):
            vmth.migrate(source, f"tcp:127.0.0.1:{port}", world.options())
    world.check_stayed(source)


def test_a_peer_that_speaks_something_else(world: World) -> None:
    source = world.guest()
    source.resume()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            sock, _ = server.accept()
            with sock:
                sock.recv(64)
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(RefusedError, match="not a vmth destination"):
            vmth.migrate(source, f"tcp:127.0.0.1:{server.getsockname()[1]}", world.options())
        thread.join()
    world.check_stayed(source)


def test_a_resume_that_raises_after_a_failure_is_told(world: World) -> None:
    source, listener = world.guest(), world.listen()
    source.resume()
    source.fail.update(save_state=ValueError("disk"), resume=ValueError("stuck"))
    with pytest.raises(NotResumedError, match=r"disk.*stuck.*paused") as caught:
        world.migrate(source, listener)
    assert not source.running
    assert not caught.value.source_runs
    assert caught.value.exit_code == ExitCode.IN_DOUBT
    recovered = vmth.recover(lambda detail: source, state_dir=world.tmp_path / "source")
    assert [one.state for one in recovered] == ["kept"]
    assert source.running
