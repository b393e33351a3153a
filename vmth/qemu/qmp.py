# SPDX-License-Identifier: Apache-2.0
"""A QEMU's monitor, for code without an event loop: ``Qmp`` runs the asyncio client of qemu.qmp in
a thread of its own ("vmth-qmp"). The only file that imports qemu.qmp.

QMP serves one client at a time: a second one is not refused by QEMU but never greeted, which is
said here as such.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import errno
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from vmth.errors import ChannelError, MigrationError, RefusedError, UsageError
from vmth.qemu.monitor_socket import MonitorSocket, connect_when_there

if TYPE_CHECKING:
    from qemu.qmp import Message, QMPClient

__all__ = ["MAX_EVENTS", "Qmp", "QmpError", "QmpEvent", "Question", "UnreadError"]

log = logging.getLogger(__name__)

#: Events kept for ``wait_event``; the oldest goes first.
MAX_EVENTS = 1024
THREAD = "vmth-qmp"
#: A command and its arguments.
Question: TypeAlias = tuple[str, Mapping[str, Any] | None]
#: Commands in flight at once. asyncio complains on stderr of the fifth write to a QEMU that ended.
PIPELINED = 4
_PEER = struct.Struct("iII")


class QmpError(MigrationError):
    """QEMU answered a command with an error. Nothing is known of the guest by that alone."""

    def __init__(self, command: str, kind: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}")
        self.command = command
        self.kind = kind  #: QMP's error class: "GenericError", "CommandNotFound", ...
        self.description = description  #: QEMU's own words


class UnreadError(ChannelError):
    """QEMU is gone and has not carried out the command: it was not sent any more, or it was the
    last one and QEMU had not read all of it. A unix socket tells: closed with unread bytes in it,
    it resets its peer; closed already, it takes nothing; and nothing is sent behind the brace that
    ends a command.
    """


@dataclass(frozen=True, slots=True)
class QmpEvent:
    """One event. ``time_ns`` is QEMU's CLOCK_REALTIME when it happened, to the microsecond."""

    name: str
    data: Mapping[str, Any]
    time_ns: int


class Qmp:
    """The monitor at the unix socket ``path``, connected and negotiated when the constructor
    returns; a context manager. ``timeout_s`` bounds the connecting and every command that brings
    no bound of its own; a socket that is not there yet, because QEMU is starting, is waited for
    up to ``appears_within_s``.

    Thread-safe: any thread may call anything at any time, except that callbacks of ``on_event``
    must not execute commands or close. Raises UsageError for a path that is no QMP socket or when
    qemu.qmp is not installed, RefusedError when another client holds the monitor, and ChannelError,
    from then on at every call, once the connection is gone.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        timeout_s: float = 10.0,
        *,
        appears_within_s: float = 0.0,
    ) -> None:
        self.path = os.path.abspath(path)
        self.timeout_s = timeout_s
        self._client = _make_client()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._events: collections.deque[QmpEvent] = collections.deque(maxlen=MAX_EVENTS)
        self._callbacks: list[Callable[[QmpEvent], None]] = []
        self._calls = 0
        self._sent = 0  # commands, on the thread
        # Calls without an answer: what ended the connection is known only when all let it go.
        self._interrupted: set[asyncio.Task[Any]] = set()
        self._cause: BaseException | None = None
        self._lost: str | None = None
        self._commands: frozenset[str] | None = None
        #: Sent by ``ask_ahead`` and not taken: command, arguments, the answer.
        self._asked: collections.deque[
            tuple[str, dict[str, Any], concurrent.futures.Future[Any]]
        ] = collections.deque()
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._no_calls: asyncio.Event
        self._over: asyncio.Event
        connection = connect_when_there(self.path, timeout_s, appears_within_s)
        self._socket = connection
        try:
            self.pid = _PEER.unpack(
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
            )[0]  #: who listens at the socket: QEMU, unless a manager opened it on QEMU's behalf
            ready: concurrent.futures.Future[None] = concurrent.futures.Future()
            self._thread = threading.Thread(
                target=lambda: self._run(connection, ready), name=THREAD, daemon=True
            )
            self._thread.start()
        except BaseException:
            connection.close()
            raise
        try:
            ready.result()
        except BaseException:
            self._thread.join(timeout_s)
            raise

    # ---- what callers use ------------------------------------------------------------------------

    @property
    def thread_id(self) -> int | None:
        """Of the thread that talks to QEMU, as the kernel numbers it; None once it has ended."""
        return self._thread.native_id if self._thread.is_alive() else None

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        out_of_band: bool = False,
    ) -> Any:
        """What QEMU returns for the command; names are QEMU's own, dashes and all. Raises QmpError
        with QEMU's words, ChannelError when QEMU is gone or gave no answer in time (whether the
        command was carried out is then not known), UnreadError when it certainly was not."""
        self._check_thread(command)
        asked = self._take_asked(command, arguments)
        if asked is not None:
            return asked.result()
        bound_s = self.timeout_s if timeout_s is None else timeout_s
        return self._submit(command, arguments, bound_s, out_of_band).result()

    def ask_ahead(self, *commands: Question) -> None:
        """Send at once what ``execute`` is called for next, in this order, at most PIPELINED; each
        of those calls takes the answer to its own. Whatever else is sent drops the answers that
        are left, so that none is older than the last change that was made here; what QEMU does by
        itself meanwhile they do not tell. For whoever has the monitor to itself."""
        with self._lock:  # all or none, and no order of another thread between them
            asked = [
                (name, dict(given or {}), self._submit(name, given, self.timeout_s, False))
                for name, given in commands[:PIPELINED]
            ]
            self._asked.extend(asked)

    def _take_asked(
        self, command: str, arguments: Mapping[str, Any] | None
    ) -> concurrent.futures.Future[Any] | None:
        with self._lock:
            if self._asked and self._asked[0][:2] == (command, dict(arguments or {})):
                return self._asked.popleft()[2]
        return None

    def execute_many(self, commands: Iterable[Question]) -> list[Any | QmpError]:
        """The answers in the same order, errors of QEMU among them; asked without waiting for one
        before the next, which for hundreds of questions is several times faster."""
        flying: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
        answers: list[Any | QmpError] = []

        def land(until: int) -> None:
            while len(flying) > until:
                try:
                    answers.append(flying.popleft().result())
                except QmpError as error:
                    answers.append(error)

        for command, arguments in commands:
            flying.append(self._submit(command, arguments, self.timeout_s, False))
            land(PIPELINED - 1)
        land(0)
        return answers

    def give_descriptor(self, fd: int, name: str) -> bool:
        """Give QEMU a duplicate of the descriptor, which its commands then know by ``name``; the
        caller's stays its own. False: it has not taken it (it was refused one, or none came
        through to it). Not together with another ``give_descriptor``: QEMU takes the last one that
        came."""
        self._check_thread("getfd")
        try:
            self._submit("getfd", {"fdname": name}, self.timeout_s, False, fd).result()
        except QmpError as error:
            log.info("no descriptor goes to this QEMU: %s", error)
            return False
        return True

    def on_event(self, callback: Callable[[QmpEvent], None]) -> Callable[[], None]:
        """Call it with every later event, on the thread of this monitor: it must return at once.
        What it raises is logged and dropped. Returns what takes it back."""
        with self._lock:
            self._callbacks.append(callback)

        def forget() -> None:
            with self._lock, contextlib.suppress(ValueError):
                self._callbacks.remove(callback)

        return forget

    def wait_event(
        self, wanted: Callable[[QmpEvent], bool], timeout_s: float | None
    ) -> QmpEvent | None:
        """The oldest event since the connecting that is ``wanted``, taken out of the queue; the
        others stay. None when none came in time (None: no bound). Raises ChannelError when the
        connection is gone and nothing in the queue is wanted."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while True:
                for index, event in enumerate(self._events):
                    if wanted(event):
                        del self._events[index]
                        return event
                if self._lost is not None:
                    raise ChannelError(self._lost)
                left_s = None if deadline_s is None else deadline_s - time.monotonic()
                if left_s is not None and left_s <= 0:
                    return None
                self._changed.wait(left_s)

    def forget_events(self) -> None:
        """Drop what is queued, so that ``wait_event`` sees later events only."""
        with self._lock:
            self._events.clear()

    def status(self) -> str:
        """The run state by ``query-status``: "running", "paused", "inmigrate", "postmigrate"..."""
        return str(self.execute("query-status")["status"])

    def has_command(self, command: str) -> bool:
        """Does this QEMU know the command? Asked once."""
        if self._commands is None:
            rows = self.execute("query-commands")
            self._commands = frozenset(str(row["name"]) for row in rows)
        return command in self._commands

    @property
    def version(self) -> tuple[int, int, int]:
        """Major, minor, micro, from the greeting."""
        greeting = self._client.greeting
        assert greeting is not None
        numbers: Any = greeting.QMP.version["qemu"]
        return int(numbers["major"]), int(numbers["minor"]), int(numbers["micro"])

    @property
    def lost(self) -> str | None:
        """Why the connection is gone; None while it stands."""
        return self._lost

    def close(self) -> None:
        """Let go of the monitor; the guest and QEMU go on as they are. Idempotent."""
        with self._lock:
            if self._lost is None:
                self._loop.call_soon_threadsafe(self._stop.set)
        if threading.current_thread() is not self._thread:
            self._thread.join(self.timeout_s)

    def __enter__(self) -> Qmp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_thread(self, command: str) -> None:
        if threading.current_thread() is self._thread:
            raise UsageError(f"{command} from a callback of on_event: allowed from other threads")

    def _submit(
        self,
        command: str,
        arguments: Mapping[str, Any] | None,
        bound_s: float,
        out_of_band: bool,
        fd: int | None = None,
    ) -> concurrent.futures.Future[Any]:
        self._check_thread(command)
        with self._lock:
            if self._lost is not None:
                raise UnreadError(self._lost)
            self._calls += 1
            self._asked.clear()
            return asyncio.run_coroutine_threadsafe(
                self._call(command, arguments, bound_s, out_of_band, fd), self._loop
            )

    # ---- on the thread ---------------------------------------------------------------------------

    def _run(self, connection: MonitorSocket, ready: concurrent.futures.Future[None]) -> None:
        """Whatever loop this process prefers: one that takes only the descriptor sends by it."""
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(self._serve(connection, ready))

    async def _serve(
        self, connection: MonitorSocket, ready: concurrent.futures.Future[None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop, self._no_calls, self._over = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._client.events.event_filter = self._take
        try:
            await self._greet(connection)
        except BaseException as error:
            connection.close()
            ready.set_exception(error)
            return
        ready.set_result(None)
        why = await self._until_over()
        with self._changed:
            self._lost = why
            idle = self._calls == 0
            self._changed.notify_all()
        if not idle:
            await self._no_calls.wait()
        try:
            await self._client.disconnect()
        except Exception as error:  # QMP errors and the socket's; it is over
            self._cause = error
        self._over.set()
        if self._interrupted:
            await asyncio.wait(self._interrupted)

    async def _greet(self, connection: MonitorSocket) -> None:
        from qemu.qmp import ConnectError

        try:
            async with asyncio.timeout(self.timeout_s):
                await self._client.connect(connection)
        except TimeoutError:
            raise RefusedError(
                f"{self.path} accepts but does not greet within {self.timeout_s:g}s: QMP serves "
                "one client at a time; close the other one (a manager's, a qmp-shell), or give "
                "QEMU a second monitor: -qmp unix:PATH,server=on,wait=off"
            ) from None
        except ConnectError as error:
            if isinstance(error.exc, (EOFError, OSError)):
                reason = str(error.exc) or "it closed the connection"
                raise ChannelError(f"{self.path} does not greet: {reason}") from None
            reason = " ".join(str(error.exc).split())
            raise UsageError(
                f"{self.path} is no QMP socket ({reason}); allowed: that of -qmp unix:PATH,... or "
                "of a -mon with mode=control"
            ) from None

    async def _until_over(self) -> str:
        """Until ``close()`` or the end of the connection; why calls fail from then on."""
        from qemu.qmp import Runstate

        stopped = asyncio.ensure_future(self._stop.wait())
        while not stopped.done() and self._client.runstate == Runstate.RUNNING:
            changed = asyncio.ensure_future(self._client.runstate_changed())
            await asyncio.wait((stopped, changed), return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
        closed = stopped.done()
        stopped.cancel()
        if closed:
            # Answers in flight are not waited for: whoever closes has no use for them.
            with contextlib.suppress(Exception):
                await self._client.disconnect()
            return f"{self.path}: this end closed the monitor"
        return f"{self.path}: QEMU closed the monitor: did it end?"

    async def _call(
        self,
        command: str,
        arguments: Mapping[str, Any] | None,
        bound_s: float,
        out_of_band: bool,
        fd: int | None,
    ) -> Any:
        """``fd`` goes ahead of the command, with a blank."""
        from qemu.qmp import ExecInterruptedError, ExecuteError, QMPError, StateError

        self._sent += 1
        number, sent_bytes = self._sent, self._socket.sent_bytes
        task = asyncio.current_task()
        assert task is not None
        try:
            async with asyncio.timeout(bound_s):
                if fd is not None:
                    self._client.send_fd_scm(fd)
                    sent_bytes = self._socket.sent_bytes
                return await self._client.execute(command, arguments, out_of_band)
        except ExecuteError as error:
            raise QmpError(command, error.error_class, str(error)) from None
        except TimeoutError:
            raise ChannelError(f"{self.path}: no answer to {command} within {bound_s:g}s") from None
        except ExecInterruptedError as error:
            self._interrupted.add(task)
            interruption = error
        except StateError:
            raise UnreadError(f"{self.path}: {command}: QEMU has closed the monitor") from None
        except (QMPError, OSError) as error:
            raise ChannelError(f"{self.path}: {command}: {error}") from error
        finally:
            with self._lock:
                self._calls -= 1
                if self._lost is not None and self._calls == 0:
                    self._no_calls.set()
        try:
            await self._over.wait()
            text = f"{self.path}: {command}: QEMU closed the monitor ({interruption})"
            if 0 < self._socket.sent_bytes == sent_bytes:  # 0: nothing is counted
                raise UnreadError(f"{text}, and this was not sent")
            if number == self._sent and _is_reset(self._cause):
                raise UnreadError(f"{text}, and had not read this")
            raise ChannelError(text) from interruption
        finally:
            self._interrupted.discard(task)

    def _take(self, message: Message) -> bool:
        """Keep an event; False, so that the client does not keep it too, without bound."""
        stamp = message.get("timestamp")
        data = message.get("data")
        event = QmpEvent(
            str(message["event"]),
            MappingProxyType(data if isinstance(data, dict) else {}),
            _time_ns(stamp if isinstance(stamp, dict) else {}),
        )
        with self._changed:
            self._events.append(event)
            callbacks = list(self._callbacks)
            self._changed.notify_all()
        for callback in callbacks:
            try:
                callback(event)
            except Exception:
                log.exception("a callback for QMP events failed at %s", event.name)
        return False


def _is_reset(cause: BaseException | None) -> bool:
    """By the kernel: asyncio raises ConnectionResetError of its own, without a number."""
    return isinstance(cause, OSError) and cause.errno in (errno.ECONNRESET, errno.EPIPE)


def _time_ns(stamp: Mapping[str, Any]) -> int:
    seconds, microseconds = stamp.get("seconds", 0), stamp.get("microseconds", 0)
    if not isinstance(seconds, int) or not isinstance(microseconds, int) or seconds < 0:
        return time.time_ns()  # QEMU says -1 when it has no clock
    return seconds * 1_000_000_000 + microseconds * 1000


def _make_client() -> QMPClient:
    try:
        from qemu.qmp import QMPClient
    except ImportError as error:
        raise UsageError(
            f"QMP needs the package qemu.qmp ({error}): pip install 'vmth[qemu]'"
        ) from None
    return QMPClient("vmth")
