# SPDX-License-Identifier: Apache-2.0
"""A destination QEMU that vmth starts itself from a command line, and that lives on when vmth ends.

    PARENT/qemu-1a2b3c4d/qmp         its monitor, for vmth and then for the operator
                        /log         what it printed
                        /receiving   locked by vmth until the guest is loaded

A folder whose "receiving" nobody locks belongs to a vmth that was killed in between: its QEMU holds
no whole guest and never ran one. The next start quits it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from vmth.errors import RefusedError, UsageError, VmthError
from vmth.qemu.qmp import Qmp

__all__ = ["QemuProcess", "check_command", "process_identity", "sweep", "wait_for_exit"]

log = logging.getLogger(__name__)

#: It may allocate all of its memory before it answers; a source waits for 60 s.
START_S = 45.0
_LOOK_S = 0.02
_ENDING_S = 1.0
_WORDS_BYTES = 600
_SOCKET_PATH_BYTES = 107
_PREFIX = "qemu-"

#: Processes that live on: kept so that they are reaped, and no warning is due for them.
_living_on: list[subprocess.Popen[bytes]] = []


def check_command(command: Sequence[str]) -> None:
    """Raises UsageError for a command line that vmth cannot start."""
    if not command:
        raise UsageError("the command line of QEMU: received nothing, allowed: a QEMU binary first")
    if shutil.which(command[0]) is None:
        raise UsageError(f"{command[0]}: not found or not executable, allowed: a QEMU binary")
    for argument in command[1:]:
        if argument.lstrip("-") in ("incoming", "daemonize") and argument.startswith("-"):
            raise UsageError(
                f"{argument} in the command line of QEMU: allowed without; vmth adds -S, -incoming "
                "defer and a monitor, and lets it live on by itself"
            )


class QemuProcess:
    """A QEMU that waits for a migration, started in a folder of its own below ``parent``. Raises
    UsageError for a bad command line, RefusedError with QEMU's words when it does not start."""

    def __init__(self, command: Sequence[str], parent: Path) -> None:
        check_command(command)
        for done in [process for process in _living_on if process.poll() is not None]:
            _living_on.remove(done)
        self.folder = parent / f"{_PREFIX}{secrets.token_hex(4)}"
        self.qmp_path = self.folder / "qmp"
        if len(os.fsencode(self.qmp_path)) > _SOCKET_PATH_BYTES:
            raise UsageError(
                f"{self.qmp_path}: {len(os.fsencode(self.qmp_path))} bytes, allowed for a socket "
                f"{_SOCKET_PATH_BYTES}: choose a shorter state directory"
            )
        self.folder.mkdir(mode=0o700, parents=True)
        self._lock_fd = -1
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._lock_fd = _lock(self.folder)
            self._process = self._start(command)
        except BaseException:
            self.end(0)
            raise

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        added = ["-S", "-incoming", "defer", "-qmp", f"unix:{self.qmp_path},server=on,wait=off"]
        with (self.folder / "log").open("wb") as file:
            try:
                return subprocess.Popen(
                    [*command, *added],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            except OSError as error:
                raise UsageError(f"{command[0]} cannot be started: {error}") from error

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def connect(self) -> Qmp:
        """Its monitor, once it answers. Raises RefusedError; the process is not ended by that."""
        assert self._process is not None
        deadline = time.monotonic() + START_S
        while True:
            if self._process.poll() is not None:
                raise RefusedError(f"QEMU does not start: {self.last_words() or 'it says nothing'}")
            if _accepts(self.qmp_path):
                try:
                    return Qmp(self.qmp_path, timeout_s=START_S)
                except VmthError:
                    # A QEMU that refuses its command line listens first, and then closes and ends:
                    # its own words are the reason.
                    if not wait_for_exit(self.pid, _ENDING_S):
                        raise
                    self._process.wait()
                    continue
            if time.monotonic() >= deadline:
                raise RefusedError(f"QEMU has no monitor {START_S:g} s after its start")
            time.sleep(_LOOK_S)

    def last_words(self) -> str:
        """The end of what it printed, as one line."""
        try:
            with (self.folder / "log").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _WORDS_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        return "; ".join(line.strip() for line in text.splitlines() if line.strip())

    def keep(self) -> None:
        """It holds a whole guest: from now on nobody quits it but ``end()``. Idempotent."""
        if self._lock_fd >= 0:
            (self.folder / "receiving").unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = -1
            assert self._process is not None
            _living_on.append(self._process)

    def end(self, timeout_s: float) -> None:
        """Wait for it to end, kill it when the time is up, remove its folder. Idempotent."""
        if self._process is not None:
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
        shutil.rmtree(self.folder, ignore_errors=True)


def sweep(parent: Path) -> list[str]:
    """Clean up after those that were killed and those that have ended: quit what waits for a guest
    that nobody brings, remove the folders of what is gone. Returns a sentence for each QEMU that
    was quit."""
    done = []
    for folder in sorted(parent.glob(f"{_PREFIX}*")):
        try:
            fd = os.open(folder / "receiving", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            fd = -1  # it holds a guest, or held one
        except OSError:
            continue
        try:
            if fd >= 0:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _quit_waiting(folder / "qmp"):
                    done.append(f"quit a QEMU that an earlier vmth had left waiting ({folder})")
            if not _accepts(folder / "qmp"):
                shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # its vmth lives
        finally:
            if fd >= 0:
                os.close(fd)
    return done


def wait_for_exit(pid: int, timeout_s: float) -> bool:
    """Of a process that need not be our child. False when the time is up."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(int(timeout_s * 1000)))
    finally:
        os.close(fd)


def process_identity(pid: int) -> str:
    """Its number and when it began, for a journal: another QEMU may listen at the same path later.
    Empty where that cannot be seen."""
    try:
        return f"{pid} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""


def _lock(folder: Path) -> int:
    fd = os.open(folder / "receiving", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        try:
            sock.connect(str(path))
        except BlockingIOError:
            return True  # its queue is full
        except OSError:
            return False
        return True


def _quit_waiting(path: Path) -> bool:
    """Quit a QEMU that has loaded nothing; any other is left alone."""
    if not _accepts(path):
        return False
    try:
        with Qmp(path) as qmp:
            if qmp.status() != "inmigrate":
                return False
            pid = qmp.pid
            with contextlib.suppress(VmthError):
                qmp.execute("quit")
        return wait_for_exit(pid, START_S)
    except VmthError as error:
        log.warning("a QEMU that an earlier vmth has left: %s", error)
        return False
