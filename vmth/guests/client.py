# SPDX-License-Identifier: Apache-2.0
"""The mover's side of a holder: ``HolderGuest``, a ``Guest`` by requests to another process.

Memory is not copied over the socket: the holder hands out its memfds and its dirty bitmaps, so that
a fetch is one request and one pass over the bitmaps here. Every request has a timeout; a holder
that does not answer, or is gone, gives ``GuestError`` with its name, and so does every request
after it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from vmth.dirty.populated import populated_bits
from vmth.errors import GuestError, RefusedError, StreamError, UsageError, VmthError
from vmth.guest import DirtySource, StateStream
from vmth.guests import requests as rq
from vmth.guests.machine import BeatReport
from vmth.guests.schedule import Workload
from vmth.types import Bitmap, Bitmaps, Mapping, RamBlock, bitmap_words

__all__ = [
    "STATE_STREAM",
    "HolderConnection",
    "HolderDirtySource",
    "HolderGoneError",
    "HolderGuest",
    "reap_left_alone",
    "status_of",
]

#: 1.5 KiB, and the pace table.
STATE_BYTES_A_VCPU = 2048

#: The name of a shipped guest's one state stream ("vcpu-kvm", "vcpu-process").
STATE_STREAM = "vcpu-"

REQUEST_S = 10.0
#: Filling memory runs at 0.5 to 1 GB/s.
PREPARE_S_PER_GIB = 20.0

_FAILURES: dict[str, type[VmthError]] = {
    "usage": UsageError,
    "refused": RefusedError,
    "stream": StreamError,
}

_R = TypeVar("_R", bound=rq.Reply)


class HolderGoneError(GuestError):
    """The holder does not answer, or there is none: what its guest does is not known from here."""


class HolderConnection:
    """One connection to a holder; requests from any thread, one at a time."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self._socket = connection
        self._lock = threading.Lock()
        self._broken = ""
        self.name = name

    @classmethod
    def open(cls, path: str) -> HolderConnection:
        """To the socket that a holder listens on. HolderGoneError when nobody does."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.settimeout(REQUEST_S)
            connection.connect(path)
        except OSError as error:
            connection.close()
            raise HolderGoneError(f"no holder answers at {path}: {error}") from None
        return cls(connection, f"holder at {path}")

    def ask(
        self, request: rq.Request, expect: type[_R], timeout_s: float = REQUEST_S, nfds: int = 0
    ) -> tuple[_R, list[int]]:
        """The reply and its ``nfds`` descriptors (now the caller's). UsageError, RefusedError or
        GuestError as the holder says; HolderGoneError when it does not answer, and for ever
        after."""
        data = rq.encode(request)
        with self._lock:
            if self._broken:
                raise HolderGoneError(self._broken)
            try:
                self._socket.settimeout(timeout_s)
                self._socket.sendall(data)
                answer, fds, _, _ = socket.recv_fds(
                    self._socket, rq.REQUEST_MAX_BYTES + 1, rq.FDS_MAX
                )
            except TimeoutError:
                self._break(f"{self.name} did not answer {_verb(request)} within {timeout_s:g} s")
            except OSError as error:
                self._break(f"{self.name} is gone ({_verb(request)}: {error})")
            except BaseException:  # a signal's: the answer still comes, and nobody waits for it
                self._broken = f"{self.name}: {_verb(request)} was interrupted"
                self._socket.close()
                raise
            if not answer:
                self._break(f"{self.name} is gone (while asked for {_verb(request)})")
        try:
            return self._check(request, answer, fds, expect, nfds), fds
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def _break(self, reason: str) -> NoReturn:
        # A late answer must never be taken for the next request's.
        self._broken = reason
        self._socket.close()
        raise HolderGoneError(reason) from None

    def _check(
        self, request: rq.Request, answer: bytes, fds: list[int], expect: type[_R], nfds: int
    ) -> _R:
        reply = rq.decode_reply(answer)
        if isinstance(reply, rq.Failed):
            raise _FAILURES.get(reply.kind, GuestError)(reply.text)
        if not isinstance(reply, expect):
            raise GuestError(f"{self.name} answered {_verb(request)} with {type(reply).__name__}")
        if len(fds) != nfds:
            raise GuestError(f"{self.name} handed out {len(fds)} descriptors: expected {nfds}")
        return reply

    def close(self) -> None:
        """Idempotent; a holder takes it for a mover that vanished."""
        with self._lock:
            self._broken = self._broken or f"the connection to {self.name} is closed"
            self._socket.close()


def _verb(request: rq.Request) -> str:
    return type(request).__name__


def status_of(path: str, timeout_s: float = REQUEST_S) -> rq.StatusReport:
    """Ask a holder whether its guest runs, without being its mover. GuestError when it cannot be
    asked: the guest's state is then not known."""
    connection = HolderConnection.open(path)
    with contextlib.closing(connection):
        return connection.ask(rq.Status(), rq.StatusReport, timeout_s)[0]


class HolderDirtySource:
    """``DirtySource`` in the holder, by its name there ("kvm-log", "uffd-wp", ...). What it cannot
    see is what that source cannot see."""

    def __init__(self, connection: HolderConnection, name: str, blocks: Sequence[RamBlock]) -> None:
        self.name = name
        self._connection = connection
        self._blocks = blocks
        self._shared: list[Bitmap] = []
        self._rearm = True
        self._notes: list[str] = []
        self._started = False

    def start(self) -> None:
        started, fds = self._connection.ask(
            rq.DirtyStart(), rq.DirtyStarted, nfds=len(self._blocks)
        )
        self._rearm = started.rearm
        self._started = True
        try:
            self._shared = [
                np.frombuffer(mmap.mmap(fd, bitmap_words(block.npages) * 8), dtype=np.uint64)
                for fd, block in zip(fds, self._blocks, strict=True)
            ]
        finally:
            for fd in fds:
                os.close(fd)

    def fetch(self, bitmaps: Bitmaps) -> None:
        self._notes = self._connection.ask(rq.DirtyFetch(), rq.DirtyFetched)[0].notes
        self._take_shared(bitmaps)

    def peek(self, bitmaps: Bitmaps) -> bool:
        """See ``CanPeek``."""
        known = self._connection.ask(rq.DirtyPeek(), rq.DirtyPeeked)[0].known
        self._take_shared(bitmaps)
        return known

    def _take_shared(self, bitmaps: Bitmaps) -> None:
        for out, shared in zip(bitmaps, self._shared, strict=True):
            np.bitwise_or(out, shared, out=out)
            shared[:] = 0

    def rearm(self, block: int, page: int, npages: int) -> None:
        if self._rearm:
            self._connection.ask(rq.DirtyRearm(block, page, npages), rq.Ack)

    def notes(self) -> Sequence[str]:
        """As of the last fetch."""
        return self._notes

    def stop(self) -> None:
        """Idempotent. The shared bitmaps are let go whatever the holder answers; with a holder that
        is gone, so is its tracking."""
        self._shared = []
        if self._started:
            self._started = False
            with contextlib.suppress(HolderGoneError):
                self._connection.ask(rq.DirtyStop(), rq.Ack)


class HolderGuest:
    """``Guest``, ``CanHold``, ``CanThrottleVcpus``, ``CanEstimateState`` and
    ``CanReportPopulated`` for a guest in a holder.

    ``blocks[i].mapping.fd`` is a memfd that this object owns until ``release()`` or ``close()``; a
    view from ``views()`` keeps its memory alive on its own. Made by spawn.py. ``close()`` without
    ``release()`` leaves the guest as a vanished mover would; ``shutdown()`` ends it.
    """

    def __init__(
        self,
        connection: HolderConnection,
        attached: rq.Attached,
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        """Takes over ``connection`` and ``process``, also when it raises."""
        self.kind = attached.kind
        self.vcpus = attached.vcpus
        self.socket_path = attached.socket_path
        self._connection = connection
        self._process = process
        self._fds: list[int] = []
        self._views: list[npt.NDArray[np.uint8]] = []
        try:
            _, self._fds = connection.ask(rq.Memory(), rq.Ack, nfds=len(attached.blocks))
            self._blocks = tuple(
                RamBlock(row.idstr, row.length_bytes, row.gpa, Mapping(fd=fd))
                for row, fd in zip(attached.blocks, self._fds, strict=True)
            )
        except BaseException:
            self.close()
            raise
        self._dirty = (HolderDirtySource(connection, attached.dirty_source, self._blocks),)

    # ---- Guest ---------------------------------------------------------------------------------

    @property
    def blocks(self) -> Sequence[RamBlock]:
        return self._blocks

    @property
    def dirty(self) -> Sequence[DirtySource]:
        return self._dirty

    def pause(self) -> bool:
        return self._connection.ask(rq.Pause(), rq.Was)[0].value

    def resume(self) -> None:
        self._connection.ask(rq.Resume(), rq.Ack)

    def save_state(self, write: Callable[[StateStream], None]) -> None:
        saved, _ = self._connection.ask(rq.SaveState(), rq.Saved)
        write(StateStream(STATE_STREAM + self.kind, saved.version, saved.data))

    def switchover_threads(self) -> Sequence[int]:
        """The holder's only one; none where it is not known who that is, or it has ended."""
        process = self._process
        return (process.pid,) if process is not None and process.poll() is None else ()

    def estimate_state_bytes(self) -> int:
        return self.vcpus * STATE_BYTES_A_VCPU

    def load_state(self, streams: Iterable[StateStream]) -> None:
        """GuestError unless there is exactly the one stream that this kind of guest has."""
        expected = STATE_STREAM + self.kind
        loaded = False
        for stream in streams:
            if stream.name != expected or loaded:
                raise GuestError(f"state stream {stream.name!r}: this guest takes one {expected!r}")
            self._connection.ask(rq.LoadState(stream.version, stream.data), rq.Ack)
            loaded = True
        if not loaded:
            raise GuestError(f"no state stream {expected!r} has arrived")

    def release(self) -> None:
        """Free the guest and its memory and wait for the holder's exit. Idempotent."""
        self._end(rq.Release())

    # ---- what it can beyond that ---------------------------------------------------------------

    def hold(self) -> None:
        self._connection.ask(rq.Hold(), rq.Ack)

    def throttle(self, percent: int) -> None:
        if not 0 <= percent <= 99:
            raise UsageError(f"throttle of {percent} %: must be 0 to 99")
        self._connection.ask(rq.Throttle([percent]), rq.Ack)

    def throttle_vcpus(self, percents: Sequence[int]) -> None:
        if len(percents) != self.vcpus or not all(0 <= percent <= 99 for percent in percents):
            raise UsageError(
                f"throttle of {list(percents)} %: must be {self.vcpus} numbers of 0 to 99"
            )
        self._connection.ask(rq.Throttle(list(percents)), rq.Ack)

    def vcpu_dirty_pages(self) -> Sequence[int]:
        return self._connection.ask(rq.VcpuDirty(), rq.VcpuPages)[0].pages

    def populated(self, block: int, page: int, npages: int, out: Bitmap) -> None:
        """By SEEK_DATA on the memfd: what was never written, through any mapping or descriptor, is
        a hole, and asking does not populate it."""
        populated_bits(self._blocks[block], page, npages, out)

    def is_running(self) -> bool:
        """Does it run in its holder, now? GuestError when the holder cannot be asked, and for a
        guest that arrived here, ran, and does not run now: it may not be taken for one that never
        did."""
        status = self.status()
        if status.arrived and status.ever_ran and not status.running:
            raise GuestError(
                f"the guest in {self._connection.name} ran here and is"
                f" {status.problem or status.phase} now"
            )
        return status.running

    def describe(self) -> dict[str, str]:
        """What ``spawn.find`` needs."""
        return {"kind": self.kind, "socket": self.socket_path}

    # ---- for the demo and the tests ------------------------------------------------------------

    def prepare(self, content: str, workload: Workload) -> rq.Prepared:
        """Fill an empty guest and put the workload's program into it."""
        gib = sum(block.used_length for block in self._blocks) / (1 << 30)
        request = rq.Prepare(
            content=content,
            workload=workload.kind,
            rate_bps=workload.rate_bps,
            working_set_bytes=workload.working_set_bytes,
            seed=workload.seed,
            jump=workload.jump,
        )
        return self._connection.ask(request, rq.Prepared, 60.0 + PREPARE_S_PER_GIB * gib)[0]

    def start(self) -> None:
        """Run the prepared guest."""
        self._connection.ask(rq.Start(), rq.Ack)

    def pause_at_beat(self, timeout_ns: int = 5_000_000_000) -> bool:
        """Pause at a heartbeat, where the control block in memory is exact. False at the timeout
        (it runs on) or when it is paused between two beats (resume it first)."""
        reply, _ = self._connection.ask(
            rq.PauseAtBeat(timeout_ns), rq.Was, REQUEST_S + timeout_ns / 1e9
        )
        return reply.value

    def beat_report(self) -> BeatReport:
        report, _ = self._connection.ask(rq.Report(), rq.Reported)
        return BeatReport(
            beats=report.beats,
            first_beat_at_ns=report.first_beat_at_ns,
            last_beat_at_ns=report.last_beat_at_ns,
            max_gap_ns=report.max_gap_ns,
            running_ns=report.running_ns,
            out_of_order=report.out_of_order,
            other_beats=tuple(report.other_beats),
        )

    def status(self) -> rq.StatusReport:
        return self._connection.ask(rq.Status(), rq.StatusReport)[0]

    def views(self) -> list[npt.NDArray[np.uint8]]:
        """Guest memory, one array a block, shared with the guest. Reading a hole through it
        populates that page; whoever keeps an array keeps the memory."""
        if not self._views:
            self._views = [
                np.frombuffer(mmap.mmap(fd, block.used_length), dtype=np.uint8)
                for fd, block in zip(self._fds, self._blocks, strict=True)
            ]
        return list(self._views)

    # ---- ends ----------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """End the guest, whatever it does. Idempotent."""
        self._end(rq.Shutdown())

    def close(self) -> None:
        """Let go of the holder: it sees its mover vanish. Idempotent."""
        self._connection.close()
        if self._process is not None:
            _LEFT_ALONE.append(self._process)
            self._process = None
        self._views = []
        while self._fds:
            os.close(self._fds.pop())

    def _end(self, request: rq.Request) -> None:
        process, self._process = self._process, None
        try:
            self._connection.ask(request, rq.Ack)
        except HolderGoneError:
            if process is not None:
                process.terminate()  # it may live all the same, and then nobody can ask it to end
        self.close()
        if process is not None:
            _reap(process)


#: Holders whose guest close() left to itself: kept, so that they are waited for once they end.
_LEFT_ALONE: list[subprocess.Popen[bytes]] = []


def reap_left_alone() -> None:
    """Wait for those that have ended since."""
    _LEFT_ALONE[:] = [process for process in _LEFT_ALONE if process.poll() is None]


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Wait for a holder that was told to end; kill it after the request timeout."""
    try:
        process.wait(REQUEST_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
