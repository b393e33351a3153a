# SPDX-License-Identifier: Apache-2.0
"""A mover killed in every phase of a QEMU's migration: the guest runs again, or stays paused with
the command that settles it; the settings are back, and the next migration works."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_qmp import FakeError, FakeQmp
from qmp_qemu import QmpQemu
from waiting import wait_until
from watchdog_mover import SESSION

from vmth.errors import GuestError
from vmth.journal import Side, StateDirectory, note_path
from vmth.qemu import watchdog as module
from vmth.qemu.qmp import Qmp
from vmth.qemu.settings import capabilities_of, migration_status, parameters_of
from vmth.qemu.watchdog import Watchdog

PATIENCE_S = 60.0
HERE = Path(__file__).parent


class Mover:
    """The process at its phase; its watchdog's words are in ``said``."""

    def __init__(self, qemu: QmpQemu, phase: str, folder: Path, *more: str) -> None:
        self._stderr = folder / "stderr"
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, str(HERE / "watchdog_mover.py")),
                    *(str(qemu.path), phase, str(folder), *more),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.said
        self.watchdog_pid = int(line)

    @property
    def said(self) -> str:
        return self._stderr.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def await_watchdog(self) -> None:
        wait_until(lambda: not alive(self.watchdog_pid))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@contextmanager
def mover(qemu: QmpQemu, phase: str, folder: Path, *more: str) -> Iterator[Mover]:
    process = Mover(qemu, phase, folder, *more)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.kill()
        process.await_watchdog()


def migrates_again(qmp: Qmp, folder: Path) -> None:
    """As far as any byte; then it is cancelled."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "again"))
        listener.listen(1)
        qmp.execute("migrate", {"uri": f"unix:{folder / 'again'}"})
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(4, socket.MSG_WAITALL) == b"QEVM"
            qmp.execute("migrate_cancel")
    wait_until(lambda: migration_status(qmp) in ("cancelled", "failed", "completed"))


@pytest.mark.slow
@pytest.mark.parametrize("side", ["SRC", "DST"])
@pytest.mark.parametrize("phase", ["active", "pre-switchover", "device", "completed"])
def test_a_killed_mover_leaves_a_known_guest(tmp_path: Path, phase: str, side: str) -> None:
    with QmpQemu(tmp_path, side, paused=False, memory="64M") as qemu:
        with Qmp(qemu.path) as qmp:
            before = capabilities_of(qmp), parameters_of(qmp)
        with mover(qemu, phase, tmp_path) as killed:
            killed.kill()
            killed.await_watchdog()
        note = note_path(tmp_path, SESSION)
        with Qmp(qemu.path) as qmp:
            assert (capabilities_of(qmp), parameters_of(qmp)) == before
            if phase == "completed":
                assert qmp.status() == "postmigrate"
                command = f"next: vmth recover --session {SESSION.hex()} --state-dir {tmp_path}\n"
                assert "may run at the destination" in killed.said
                assert killed.said.endswith(command)
                assert note.read_text() == killed.said
                qmp.execute("cont")
            else:
                assert qmp.status() == "running", killed.said
                assert migration_status(qmp) in ("failed", "cancelled")
                assert "the guest runs here" in killed.said and "next:" not in killed.said
                assert not note.exists()
            assert len(killed.said.splitlines()) == 1
            migrates_again(qmp, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["SRC", "DST"])
@pytest.mark.parametrize("phase", ["active", "pre-switchover", "device"])
def test_a_guest_that_was_paused_stays_paused(tmp_path: Path, phase: str, side: str) -> None:
    with QmpQemu(tmp_path, side, paused=False, memory="64M") as qemu:
        with Qmp(qemu.path) as qmp:
            qmp.execute("stop")
        with mover(qemu, phase, tmp_path) as killed:
            killed.kill()
            killed.await_watchdog()
        with Qmp(qemu.path) as qmp:
            if qmp.status() == "postmigrate":  # 7.2, which then migrates only what has run
                assert qmp.version < (9, 0, 0)
                qmp.execute("cont")
                qmp.execute("stop")
            assert qmp.status() == "paused"
            migrates_again(qmp, tmp_path)
        assert "the migration is " in killed.said and "next:" not in killed.said


@pytest.mark.slow
def test_a_mover_that_settles_everything_hears_nothing(tmp_path: Path) -> None:
    with QmpQemu(tmp_path, "SRC", paused=False, memory="64M") as qemu:
        with mover(qemu, "device", tmp_path, "finish") as finished:
            finished.await_watchdog()
        with Qmp(qemu.path) as qmp:
            wait_until(lambda: qmp.status() == "running")
        assert finished.said == ""


@pytest.mark.slow
def test_a_qemu_that_went_too_is_told_as_gone(tmp_path: Path) -> None:
    with QmpQemu(tmp_path, "SRC", paused=False) as qemu:
        with mover(qemu, "device", tmp_path) as killed:
            qemu.kill()
            killed.kill()
            killed.await_watchdog()
    assert "its QEMU is gone too" in killed.said and "next: vmth recover" in killed.said


# ---- on the fake, in this process ----------------------------------------------------------------


def order(fake: FakeQmp, folder: Path, *, was_running: bool = True) -> module._Order:
    saved = {"capabilities": {"events": False}, "parameters": {}}
    return module._Order(
        str(fake.path), saved, "5e", str(folder / "note"), "vmth recover", was_running
    )


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NOTICES_S", 0.0)
    monkeypatch.setattr(module, "LOOK_S", 0.001)


def act(fake: FakeQmp, folder: Path, **given: bool) -> tuple[str, str]:
    return module._act(order(fake, folder, **given), deadline_s=time.monotonic() + 0.2)


def test_a_stuck_guest_is_resumed_by_command(tmp_path: Path, hasty: None) -> None:
    with FakeQmp(tmp_path / "qmp") as fake:
        states = iter(["finish-migrate", "finish-migrate", "finish-migrate", "running"])
        fake.answers["query-status"] = lambda _: {"status": next(states)}
        fake.answers["query-migrate"] = {"status": "failed"}
        fake.answers["cont"] = {}
        said, todo = act(fake, tmp_path)
    assert said.startswith("the guest runs here") and todo == ""
    assert "cont" in fake.commands()


def test_a_guest_that_was_not_running_is_never_resumed(tmp_path: Path, hasty: None) -> None:
    with FakeQmp(tmp_path / "qmp") as fake:
        fake.answers["query-status"] = {"status": "finish-migrate"}
        fake.answers["query-migrate"] = {"status": "failed"}
        said, todo = act(fake, tmp_path, was_running=False)
        assert said.startswith("the guest is finish-migrate here") and todo == ""
        assert "cont" not in fake.commands()


@pytest.mark.parametrize("told", [[True], [True, False], [False, True]])
def test_a_guest_that_somebody_else_has_stopped_stays_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], told: list[bool]
) -> None:
    """What the mover knew last counts. The real process, whose mover ends without a word."""
    with FakeQmp(tmp_path / "qmp") as fake:
        states = iter(["finish-migrate"] * 3)
        fake.answers["query-status"] = lambda _: {"status": next(states, "running")}
        fake.answers["query-migrate"] = {"status": "failed"}
        dog = Watchdog(fake.path, {}, SESSION, state_dir=tmp_path)
        for elsewhere in told:
            dog.stopped_elsewhere(elsewhere)
        dog._let_go()
    said = capfd.readouterr().err
    assert ("the guest is finish-migrate here" in said) is told[-1]
    assert ("the guest runs here" in said) is not told[-1]


def test_a_completed_migration_is_never_resumed(tmp_path: Path, hasty: None) -> None:
    with FakeQmp(tmp_path / "qmp") as fake:
        fake.capabilities["events"] = True
        fake.answers["query-status"] = {"status": "postmigrate"}
        fake.answers["query-migrate"] = {"status": "completed"}
        said, todo = act(fake, tmp_path)
        assert "may run at the destination" in said and todo == "vmth recover"
        assert not {"cont", "migrate_cancel"} & set(fake.commands())
        assert not fake.capabilities["events"], "the settings were not put back"


def test_a_guest_that_cannot_be_resumed_is_told_with_the_reason(
    tmp_path: Path, hasty: None
) -> None:
    with FakeQmp(tmp_path / "qmp") as fake:
        fake.answers["query-status"] = {"status": "finish-migrate"}
        fake.answers["query-migrate"] = {"status": "failed"}
        fake.answers["cont"] = FakeError("GenericError", 'Failed to get "write" lock')
        with pytest.raises(module._OutOfTimeError, match=r"finish-migrate here.*write"):
            act(fake, tmp_path)


def test_a_migration_that_does_not_end_is_cancelled_and_told(tmp_path: Path, hasty: None) -> None:
    with FakeQmp(tmp_path / "qmp") as fake:
        fake.answers["query-migrate"] = {"status": "active"}
        fake.answers["migrate_cancel"] = {}
        with pytest.raises(module._OutOfTimeError, match="still active, the guest running"):
            act(fake, tmp_path)
        assert "migrate_cancel" in fake.commands()


def test_a_note_that_cannot_be_written_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with FakeQmp(tmp_path / "qmp") as fake:
        asked = module._Order(str(fake.path), {}, "5e", str(tmp_path / "no" / "n"), "x", True)
    module._report(asked, "the guest is paused", "vmth recover")
    assert "could not be kept in" in capfd.readouterr().err


def test_a_process_that_cannot_begin_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(GuestError, match="watchdog"):
        Watchdog(tmp_path / "qmp", {}, SESSION, state_dir=tmp_path)


@pytest.mark.slow
def test_a_process_that_has_ended_since_is_no_trouble(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path / "qmp", {}, SESSION, state_dir=tmp_path)
    os.kill(watchdog.pid, signal.SIGKILL)
    wait_until(lambda: not alive(watchdog.pid))
    watchdog.done()
    watchdog.done()


def test_the_note_goes_with_the_journal(tmp_path: Path) -> None:
    with StateDirectory(tmp_path) as directory:
        journal = directory.create_journal(SESSION, Side.SOURCE)
        note_path(tmp_path, SESSION).write_text("told\n")
        assert directory.sessions() == [(SESSION, Side.SOURCE)]
        journal.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["receiver_id"]
