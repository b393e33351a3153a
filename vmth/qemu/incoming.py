# SPDX-License-Identifier: Apache-2.0
"""A stream into a QEMU that waits for one: what vmth writes, QEMU loads, and stays paused.

    we (StreamWriter) ---- private unix socket ----> QEMU -incoming defer
                      <--- return path ------------       PONG: taken so far; SHUT 0: all loaded

QEMU is told to stay paused after the load, with or without ``-S``. Whatever goes wrong raises a
MigrationError with QEMU's own reason where it can still be asked.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from vmth.channel.sockets import queue_ahead
from vmth.errors import MigrationError, RefusedError, StreamError, UsageError, VmthError
from vmth.qemu.qmp import Qmp, QmpError, QmpEvent
from vmth.qemu.settings import SETTINGS_QUESTIONS, MigrationSettings
from vmth.qemu.stream.events import Command, CommandCode, Event
from vmth.qemu.stream.fields import BE32
from vmth.qemu.stream.returnpath import Pong, ReturnMessage, ReturnPathReader, Shut
from vmth.qemu.stream.writer import StreamWriter

__all__ = ["CAPABILITIES", "IncomingStream"]

#: Set for the load and put back behind it. What would make QEMU expect another stream, more
#: connections or a running guest is off; image locks are taken when the guest is resumed.
CAPABILITIES = {
    "events": True,
    "late-block-activate": True,
    "mapped-ram": False,
    "multifd": False,
    "postcopy-preempt": False,
    "postcopy-ram": False,
    "x-colo": False,
    "x-ignore-shared": False,
    "zero-copy-send": False,
}
#: As for a migration of its own QEMU would take TLS on our socket too.
PARAMETERS = {"tls-creds": ""}
#: Written and not read by QEMU yet, at most, as the kernel counts. With the usual 208 KiB QEMU
#: and who writes wait for each other; this much QEMU loads in a millisecond.
_AHEAD_BYTES = 2 << 20
_PING_BASE = 0x766D0000
_READ_BYTES = 4096
#: Between two looks at QEMU's state after it has said that everything is loaded: downtime.
_LOOK_S = 0.001
#: QEMU sends its event before it says that everything is loaded, on another connection.
_EVENT_S = 0.05


class IncomingStream:
    """One load. Not thread-safe but for ``trouble()``. A context manager: leaving it closes.

    ``timeout_s``: how long QEMU may take nothing of what is written. ``log``: the end of what QEMU
    printed, for whoever has that: QEMU says there what was wrong with a stream. ``lock_late``:
    image locks are taken when the guest is resumed, not when it is loaded. ``close()`` before
    everything was loaded makes the load fail: that QEMU is of no further use and should be quit.
    Every method may raise ChannelError when QEMU's monitor is gone.
    """

    def __init__(
        self,
        qmp: Qmp,
        *,
        timeout_s: float = 60.0,
        log: Callable[[], str] | None = None,
        lock_late: bool = True,
    ) -> None:
        self.notes: list[str] = []  #: what is weaker with this QEMU than with others
        self._qmp = qmp
        self._timeout_s = timeout_s
        self._log = log
        self._lock_late = lock_late
        self._settings = MigrationSettings(qmp)
        self._writer = StreamWriter()
        self._returned = ReturnPathReader()
        self._sock: socket.socket | None = None
        self._place: int | None = None  #: where QEMU listened
        self._pings = 0
        self._ending = False
        self._loaded = False

    def start(self) -> None:
        """Prepare QEMU and connect to it. Raises RefusedError for a QEMU that does not wait for a
        migration (nothing was changed), MigrationError when it does not listen."""
        self._qmp.ask_ahead(("query-status", None), ("query-migrate", None))
        self._check_waits()
        self._qmp.ask_ahead(("stop", None), *SETTINGS_QUESTIONS)
        self._execute("stop", {})  # it shall not run by itself once loaded, even without -S
        try:
            late = {"late-block-activate": self._lock_late}
            unknown = self._settings.apply({**CAPABILITIES, **late}, PARAMETERS)
            if "late-block-activate" in unknown and self._lock_late:
                self.notes.append(
                    "this QEMU has no late-block-activate: it takes the locks of its disk images "
                    "as soon as it has loaded"
                )
            self._sock = self._connect()
        except BaseException:
            self._settings.restore(0)
            raise

    @property
    def fd(self) -> int:
        """The connected socket, blocking; whoever writes to it duplicates it and writes whole
        sections."""
        return self._connection.fileno()

    def send(self, event: Event) -> None:
        """Write an event's bytes. Raises as ``send_raw``, and UsageError for what the format cannot
        say."""
        data = self._writer.send(event)
        if data:
            self.send_raw(data)

    def send_raw(self, data: bytes | memoryview) -> None:
        """Write bytes as they are. Raises MigrationError when QEMU has closed, or has taken nothing
        for ``timeout_s``; the stream is of no use then."""
        sock, rest = self._connection, memoryview(data).cast("B")
        while rest:
            try:
                rest = rest[sock.send(rest, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                if not _ready(sock, select.POLLOUT, self._timeout_s):
                    raise MigrationError(
                        f"{self._who} has taken nothing of its stream for {self._timeout_s:g} s, "
                        f"{len(rest)} bytes are left"
                    ) from None
            except OSError as error:
                raise self._failure(str(error)) from error

    def await_taken(self, timeout_s: float) -> None:
        """Return when QEMU has accepted all that was written; only between sections, behind an
        OPEN_RETURN_PATH. Raises MigrationError."""
        self._pings += 1
        self.send(Command(CommandCode.PING, BE32.pack(_PING_BASE + self._pings)))
        wanted = Pong(_PING_BASE + self._pings)
        deadline = time.monotonic() + timeout_s
        while (message := self._next_message(deadline, timeout_s)) != wanted:
            if isinstance(message, Shut):
                raise self._failure(f"it shut the stream with status {message.status}")

    def await_loaded(self, timeout_s: float) -> str:
        """Everything was written. Return when QEMU has loaded it and holds the guest, paused: its
        run state. Raises MigrationError with QEMU's reason; QEMU then runs nothing."""
        deadline = time.monotonic() + timeout_s
        self._await_shut(deadline, timeout_s)
        status = self._await_state(deadline, timeout_s)
        self._loaded = True
        return status

    def await_held(self, timeout_s: float) -> None:
        """As ``await_loaded``, but QEMU is not asked for its run state where its events say that
        the guest is held: the answer would be downtime."""
        deadline = time.monotonic() + timeout_s
        self._await_shut(deadline, timeout_s)
        if self._qmp.wait_event(_is_completed, _EVENT_S) is None:
            self._await_state(deadline, timeout_s)
        elif self._qmp.wait_event(_is_resume, 0) is not None:
            raise self._runs()
        self._loaded = True

    def _await_shut(self, deadline: float, timeout_s: float) -> None:
        self._ending = True  # QEMU may close from now on
        with contextlib.suppress(OSError):  # it has closed: what it said is read below
            self._connection.shutdown(socket.SHUT_WR)  # it shall not wait for what is missing
        while not isinstance(message := self._next_message(deadline, timeout_s), Shut):
            pass
        if message.status != 0:
            raise self._failure(f"it shut the stream with status {message.status}")

    def _await_state(self, deadline: float, timeout_s: float) -> str:
        while (status := self._status()) == "inmigrate":
            if time.monotonic() >= deadline:
                raise self._failure(f"it was not ready within {timeout_s:g} s")
            time.sleep(_LOOK_S)
        if status == "running":
            raise self._runs()
        return status

    def _runs(self) -> MigrationError:
        return MigrationError(f"{self._who} runs its guest although it was told to stay paused")

    def lock_images(self, *, late: bool) -> None:
        """Change ``lock_late`` before the last byte is written. Raises RefusedError."""
        if late != self._lock_late:
            self._settings.apply({"late-block-activate": late}, {})
            self._lock_late = late

    def trouble(self) -> MigrationError | None:
        """Why QEMU takes nothing any more; None while it does, and once ``await_loaded`` began,
        which says so itself. Any thread."""
        what = self._seen_closed()
        return None if what is None or self._ending else self._failure(what)

    def _seen_closed(self) -> str | None:
        sock = self._sock
        if sock is None:
            return None
        try:
            answer = sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            return str(error)
        return None if answer else "it closed its stream"

    def close(self) -> None:
        """Give the connection up; put QEMU's settings back if it has loaded all. That takes some
        milliseconds, which need not be the guest's downtime. Idempotent."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
            if self._loaded:
                self.notes += self._settings.restore()
        if self._place is not None:
            os.close(self._place)
            self._place = None

    def __enter__(self) -> IncomingStream:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- QEMU --------------------------------------------------------------------------------------

    @property
    def _who(self) -> str:
        return f"the QEMU at {self._qmp.path}"

    def _check_waits(self) -> None:
        status = self._status()
        if status != "inmigrate":
            raise RefusedError(
                f"{self._who} is {status!r}, allowed 'inmigrate': start it with -incoming defer"
            )
        migration = self._execute("query-migrate", {}).get("status", "none")
        if migration != "none":
            raise RefusedError(
                f"{self._who} has begun to take in a migration already ({migration}): quit it and "
                "start it again with -incoming defer"
            )

    def _connect(self) -> socket.socket:
        """QEMU listens in a directory that only it and we may enter; it is gone once connected.
        Whoever lets go last of a directory that was removed may wait for the disk. QEMU would, when
        it closes, with its guest paused: so it is held here until ``close()``."""
        folder = Path(tempfile.mkdtemp(prefix="vmth-"))
        try:
            if os.geteuid() == 0:
                with contextlib.suppress(OSError):  # it runs as another user, or is not ours to see
                    os.chown(folder, os.stat(f"/proc/{self._qmp.pid}").st_uid, -1)
            path = str(folder / "stream")
            self._migrate_incoming(f"unix:{path}")
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            queue_ahead(sock, _AHEAD_BYTES)
            try:
                sock.connect(path)
            except OSError as error:
                sock.close()
                raise MigrationError(f"{self._who} does not listen at {path}: {error}") from error
            with contextlib.suppress(OSError):
                self._place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            return sock
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _migrate_incoming(self, uri: str) -> None:
        try:  # QEMU 9.1 and later stay, so that they can be asked what was wrong
            self._qmp.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
        except QmpError as error:
            if "exit-on-error" not in str(error):
                raise RefusedError(f"{self._who} takes no migration in: {error}") from error
            self._execute("migrate-incoming", {"uri": uri})

    def _execute(self, command: str, arguments: dict[str, object]) -> dict[str, object]:
        try:
            answer = self._qmp.execute(command, arguments)
        except QmpError as error:
            raise RefusedError(f"{self._who}: {command}: {error}") from error
        return answer if isinstance(answer, dict) else {}

    def _status(self) -> str:
        return self._qmp.status()

    def _failure(self, what: str) -> MigrationError:
        """With the reason that QEMU itself gives, if it still answers."""
        try:
            reason = self._qmp.execute("query-migrate").get("error-desc") or what
            text = f"{self._who} could not load the guest: {reason}"
        except VmthError:
            text = f"{self._who} ended while it loaded the guest ({what})"
        said = self._log() if self._log is not None else ""
        return MigrationError(f"{text}: {said}" if said else f"{text}; its log says more")

    # -- the return path ---------------------------------------------------------------------------

    @property
    def _connection(self) -> socket.socket:
        if self._sock is None:
            raise UsageError("the stream into QEMU is not open")
        return self._sock

    def _next_message(self, deadline: float, timeout_s: float) -> ReturnMessage:
        sock = self._connection
        while True:
            try:
                message = self._returned.next_message()
                if message is not None:
                    return message
                if not _ready(sock, select.POLLIN, deadline - time.monotonic()):
                    raise self._failure(f"it gave no answer within {timeout_s:g} s")
                data = sock.recv(_READ_BYTES)
            except StreamError as error:
                raise self._failure(f"its return path: {error}") from error
            except OSError as error:
                raise self._failure(str(error)) from error
            if not data:
                raise self._failure("it closed its stream")
            self._returned.feed(data)


def _is_completed(event: QmpEvent) -> bool:
    """QEMU sends it when nothing of the load is left to do."""
    return event.name == "MIGRATION" and event.data.get("status") == "completed"


def _is_resume(event: QmpEvent) -> bool:
    return event.name == "RESUME"


def _ready(sock: socket.socket, what: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(sock, what)
    return bool(poll.poll(max(0, int(timeout_s * 1000))))
