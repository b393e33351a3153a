# SPDX-License-Identifier: Apache-2.0
"""A running job at a unix socket: other processes look at it and steer it.

    connect -> one line of JSON, a ``JobRequest`` -> one line of JSON, a ``JobReply`` -> closed

The socket is its owner's alone (mode 0600) and is there from before the guest is touched until the
job has ended. What a request changes is what ``MigrationJob`` lets any thread change; a request
that is not understood, or whose sender has gone, changes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Annotated, Protocol, Self

import msgspec

from vmth.channel.sockets import is_stale
from vmth.errors import UsageError, VmthError
from vmth.job import MOST
from vmth.stats import JobStats

__all__ = ["JobReply", "JobRequest", "JobSocket", "SteeredJob", "ask_job"]

log = logging.getLogger(__name__)

THREAD = "vmth-job-socket"
MAX_REQUEST_BYTES = 4096
MAX_REPLY_BYTES = 1 << 20
#: For a request to arrive, and for its reply to leave: others wait meanwhile.
PATIENCE_S = 2.0
BACKLOG = 128
_AGAIN_S = 0.01

_Count = Annotated[int, msgspec.Meta(ge=0, le=MOST)]


class JobRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What to change; nothing by default. The first three are those of ``MigrationJob.set``."""

    bandwidth_bps: _Count | None = None
    downtime_limit_ns: _Count | None = None
    timeout_ns: _Count | None = None
    switchover: bool = False
    cancel: bool = False


class JobReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """The job after the change; with an ``error`` nothing was changed, and there is no more."""

    error: str = ""
    session_id: str = ""
    stats: JobStats | None = None


class SteeredJob(Protocol):
    """The part of ``MigrationJob`` that is used here, from the thread THREAD."""

    @property
    def session_id(self) -> str: ...
    @property
    def done(self) -> bool: ...
    def set(
        self,
        *,
        bandwidth_bps: int | None = None,
        downtime_limit_ns: int | None = None,
        timeout_ns: int | None = None,
    ) -> None: ...
    def switchover(self) -> None: ...
    def cancel(self) -> None: ...
    def stats(self) -> JobStats: ...


class JobSocket:
    """Answers at ``path`` from the constructor on; until ``serve()`` was called, that no job has
    begun. A context manager; leaving it takes the socket away.

    Raises UsageError where it cannot listen: something else stands there, another job's socket for
    instance. One that a dead process has left is replaced.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)
        self._listener, self._identity = _listen(self.path)
        self._job: SteeredJob | None = None
        self._client: socket.socket | None = None  #: which is served now
        self._woken, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._serve, name=THREAD, daemon=True)
        self._thread.start()

    def serve(self, job: SteeredJob) -> None:
        """Requests are this job's from now on."""
        self._job = job

    def close(self) -> None:
        """Idempotent. Whoever has not said yet what it wants is let go."""
        if self._wake < 0:
            return
        os.close(self._wake)
        self._wake = -1
        client = self._client
        if client is not None:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RD)
        self._thread.join()
        self._listener.close()
        os.close(self._woken)
        with contextlib.suppress(OSError), _parent(self.path) as (folder, name):
            if _identity(folder, name) == self._identity:  # and not somebody else's by now
                os.unlink(name, dir_fd=folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        poll.register(self._listener, select.POLLIN)
        while not any(fd == self._woken for fd, _ in poll.poll()):
            try:
                connection, _ = self._listener.accept()
            except OSError as error:  # it went away again, or there is no descriptor left
                log.info("%s: %s", self.path, error)
                time.sleep(_AGAIN_S)
                continue
            with connection:
                self._client = connection
                try:
                    self._talk(connection)
                except OSError as error:
                    log.info("%s: %s", self.path, error)
                except Exception:  # of the job's; the next one is to be served all the same
                    log.exception("%s: a request was not answered", self.path)
                self._client = None

    def _talk(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE_S)
        line = _read_line(connection, MAX_REQUEST_BYTES)
        if _is_gone(connection):  # and has told its user that nobody answered
            return
        reply = _answer(self._job, line)
        connection.sendall(msgspec.json.encode(reply) + b"\n")


def _is_gone(connection: socket.socket) -> bool:
    """Closed at the other end; one that only has no more to say waits for the reply."""
    poll = select.poll()
    poll.register(connection, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def _answer(job: SteeredJob | None, line: bytes) -> JobReply:
    try:
        if len(line) > MAX_REQUEST_BYTES:
            raise ValueError(f"more than {MAX_REQUEST_BYTES} bytes")
        request = msgspec.json.decode(line, type=JobRequest)
    except (ValueError, RecursionError) as error:  # msgspec's are ValueErrors
        fields = ", ".join(JobRequest.__struct_fields__)
        return JobReply(error=f"received {line[:80]!r} ({error}), allowed one object of {fields}")
    if job is None:
        return JobReply(error="the job has not begun")
    if job.done:
        return JobReply(error="the job has ended")
    try:
        job.set(
            bandwidth_bps=request.bandwidth_bps,
            downtime_limit_ns=request.downtime_limit_ns,
            timeout_ns=request.timeout_ns,
        )
    except VmthError as error:
        return JobReply(error=str(error))
    if request.switchover:
        job.switchover()
    if request.cancel:
        job.cancel()
    return JobReply(session_id=job.session_id, stats=job.stats())


def ask_job(path: str | os.PathLike[str], request: JobRequest, timeout_s: float = 10.0) -> JobReply:
    """What the job at that socket answers. Raises UsageError where none listens, or what listens
    gives no such answer in time."""
    allowed = "allowed: the --job-socket of a migration that goes on"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_s)
        try:
            _connect(connection, os.fspath(path), timeout_s)
            connection.sendall(msgspec.json.encode(request) + b"\n")
            data = _read_line(connection, MAX_REPLY_BYTES)
        except TimeoutError:
            raise UsageError(f"{path}: no answer within {timeout_s:g}s; {allowed}") from None
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror or error}; {allowed}") from None
    try:
        return msgspec.json.decode(data, type=JobReply)
    except ValueError as error:
        raise UsageError(f"{path}: received {data[:80]!r} ({error}); {allowed}") from None


def _read_line(connection: socket.socket, most_bytes: int) -> bytes:
    """Without its end; what has come until the other end closed, or one byte more than the most.
    TimeoutError when the line takes longer than the socket's timeout."""
    timeout_s = connection.gettimeout() or 0.0
    give_up_s = time.monotonic() + timeout_s
    data = b""
    while b"\n" not in data and len(data) <= most_bytes:
        left_s = give_up_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        connection.settimeout(left_s)
        piece = connection.recv(1 << 16)
        if not piece:
            break
        data += piece
    connection.settimeout(timeout_s)
    return data.partition(b"\n")[0][: most_bytes + 1]


def _connect(connection: socket.socket, path: str, timeout_s: float) -> None:
    """To a path of any length, however many wait there already."""
    give_up_s = time.monotonic() + timeout_s
    with _parent(path) as (folder, name):
        while True:
            try:
                connection.connect(f"/proc/self/fd/{folder}/{name}")
                return
            except BlockingIOError:  # its queue is full
                if time.monotonic() > give_up_s:
                    raise TimeoutError from None
            time.sleep(_AGAIN_S)


def _listen(path: str) -> tuple[socket.socket, tuple[int, int] | None]:
    """The listener, and what is at the path now. Nobody connects before it listens, and those who
    want to listen at the same path come one after another."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        with _parent(path) as (folder, name):
            with contextlib.suppress(OSError):  # a filesystem without locks
                fcntl.flock(folder, fcntl.LOCK_EX)
            short = f"/proc/self/fd/{folder}/{name}"
            try:
                listener.bind(short)
            except OSError as error:
                stale = not os.path.islink(short) and is_stale(short)
                if error.errno != errno.EADDRINUSE or not stale:
                    raise
                os.unlink(name, dir_fd=folder)
                listener.bind(short)
            os.chmod(name, stat.S_IRUSR | stat.S_IWUSR, dir_fd=folder)
            listener.listen(BACKLOG)
            return listener, _identity(folder, name)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"{path}: {error.strerror or error}; allowed: a path for a new unix socket"
        ) from None


@contextlib.contextmanager
def _parent(path: str) -> Iterator[tuple[int, str]]:
    """The directory, open, and the name in it: a socket's own path has 107 bytes at most."""
    where, name = os.path.split(os.path.abspath(path))
    folder = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield folder, name
    finally:
        os.close(folder)


def _identity(folder: int, name: str) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        return found.st_dev, found.st_ino
    return None
