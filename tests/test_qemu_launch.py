# SPDX-License-Identifier: Apache-2.0
"""A QEMU started from a command line: refusals, its folder, what a killed vmth leaves behind."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_qmp import FakeQmp

from vmth.errors import RefusedError, UsageError
from vmth.qemu import launch
from vmth.qemu.launch import QemuProcess, check_command, sweep, wait_for_exit

#: Takes the arguments that vmth adds and serves a monitor as a waiting QEMU does.
QEMU = f"""
import sys, threading
sys.path[:0] = {sys.path!r}
from pathlib import Path
from fake_qmp import FakeQmp
assert sys.argv[1:6] == ["-m", "1G", "-S", "-incoming", "defer"], sys.argv
path = sys.argv[-1].removeprefix("unix:").removesuffix(",server=on,wait=off")
ended = threading.Event()
with FakeQmp(Path(path)) as fake:
    fake.answers["query-status"] = {{"status": "inmigrate", "running": False}}
    fake.answers["quit"] = lambda _: ended.set() or {{}}
    print("ready", flush=True)
    ended.wait(60)
"""


def program(tmp_path: Path, text: str = QEMU) -> list[str]:
    path = tmp_path / "qemu.py"
    path.write_text(text)
    return [sys.executable, str(path), "-m", "1G"]


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ([], "received nothing"),
        (["no-such-qemu"], "no-such-qemu: not found"),
        (["sh", "-incoming", "defer"], "-incoming in the command line"),
        (["sh", "--daemonize"], "--daemonize in the command line"),
    ],
)
def test_a_command_line_that_cannot_be_used(command: list[str], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        check_command(command)


def test_values_are_not_taken_for_options() -> None:
    check_command(["sh", "-name", "incoming", "-append", "daemonize"])


def test_a_folder_whose_socket_path_would_be_too_long(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="allowed for a socket 107"):
        QemuProcess(["sh"], tmp_path / ("x" * 100))
    assert list(tmp_path.iterdir()) == []


def test_a_qemu_that_does_not_start_says_why(tmp_path: Path) -> None:
    process = QemuProcess(["sh", "-c", "echo no such machine >&2; exit 1"], tmp_path)
    with pytest.raises(RefusedError, match="QEMU does not start: no such machine"):
        process.connect()
    process.end(5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("accepts", [0, 1, 2])
def test_a_qemu_that_listens_before_it_refuses_says_why(tmp_path: Path, accepts: int) -> None:
    text = f"""
import socket, sys, time
path = sys.argv[-1].removeprefix("unix:").removesuffix(",server=on,wait=off")
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind(path)
    listening.listen(8)
    for _ in range({accepts}):
        listening.accept()[0].close()
time.sleep(0.2)
sys.exit("no such device")
"""
    process = QemuProcess(program(tmp_path, text), tmp_path / "state")
    with pytest.raises(RefusedError, match="QEMU does not start: no such device"):
        process.connect()
    process.end(5)


def test_it_waits_for_a_guest_and_ends(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    process = QemuProcess(program(tmp_path), folder)
    with process.connect() as qmp:
        assert qmp.status() == "inmigrate" and qmp.pid == process.pid
        assert os.getsid(process.pid) == process.pid  # no signal of our terminal's reaches it
        assert process.last_words() == "ready"
        assert process.folder.stat().st_mode & 0o777 == 0o700
        qmp.execute("quit")
    process.end(10)
    process.end(10)
    assert list(folder.iterdir()) == []


def test_it_lives_on_with_its_guest(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    process = QemuProcess(program(tmp_path), folder)
    process.connect().close()
    process.keep()
    process.keep()
    assert sweep(folder) == []
    assert sorted(path.name for path in process.folder.iterdir()) == ["log", "qmp"]
    process.end(0)  # killed
    assert not process.folder.exists()


def test_what_a_killed_vmth_left_waiting_is_quit(tmp_path: Path) -> None:
    """It is started by another process, which is killed before the guest was loaded."""
    folder = tmp_path / "state"
    mover = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from vmth.qemu.launch import QemuProcess
process = QemuProcess({program(tmp_path)!r}, Path({str(folder)!r}))
process.connect()
print(process.pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", mover], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        pid = int(child.stdout.readline())
        assert sweep(folder) == []  # its vmth lives
        child.kill()
    assert len(sweep(folder)) == 1
    assert wait_for_exit(pid, 10)
    assert list(folder.iterdir()) == []


def test_a_qemu_with_a_guest_is_left_alone(tmp_path: Path) -> None:
    """Also one whose vmth was killed before it could say so."""
    for marked in (False, True):
        folder = tmp_path / f"qemu-{marked:d}"
        folder.mkdir()
        with FakeQmp(folder / "qmp") as fake:
            if marked:
                (folder / "receiving").touch()
            fake.answers["query-status"] = {"status": "paused", "running": False}
            assert sweep(tmp_path) == []
            assert folder.exists() and "quit" not in fake.commands()


def test_folders_of_what_has_ended_are_removed(tmp_path: Path) -> None:
    (tmp_path / "qemu-1").mkdir()
    (tmp_path / "qemu-2").mkdir()
    (tmp_path / "qemu-2" / "receiving").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "qemu-3").mkdir()
    with (tmp_path / "qemu-3" / "receiving").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert sweep(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "qemu-3"]


def test_the_exit_of_any_process_is_waited_for() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        assert not wait_for_exit(process.pid, 0)
        killer = threading.Timer(0, process.kill)
        killer.start()
        assert wait_for_exit(process.pid, 10)
        killer.join()
    assert wait_for_exit(process.pid, 0)


def test_who_lives_on_is_reaped(tmp_path: Path) -> None:
    process = QemuProcess(["true"], tmp_path)
    process.keep()
    wait_for_exit(process.pid, 10)
    other = QemuProcess(["true"], tmp_path)
    assert [left.pid for left in launch._living_on if left.pid == process.pid] == []
    other.end(10)
    process.end(10)
