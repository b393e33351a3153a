# SPDX-License-Identifier: Apache-2.0
"""The two ends of a carried connection: QEMU's socket as it is, or checked frames to a peer relay.

An ``End`` is read by one thread and written by another. Every wait ends when the connection's
``Breaker`` fires, so a blocked reader or slow writer never outlives the connection. Bytes held: one
buffer of 256 KiB a direction, with frames one more for what is compressed or not yet checked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import termios
import threading
import time
from typing import Protocol

from vmth.errors import ChannelError
from vmth.qemu.relay.frames import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    DamageError,
    Frame,
    FrameKind,
    FrameReader,
    FrameWriter,
    Totals,
)

__all__ = ["Breaker", "BrokenError", "End", "FramedEnd", "PlainEnd", "SourceLostError"]

BUFFER_BYTES = MAX_FRAME_BYTES
#: How long what was written before a reset may take to leave this machine.
FLUSH_S = 1.0
FLUSH_POLL_S = 0.002
#: Unsent bytes that TCP may hold beyond what the link has in flight.
NOTSENT_LOWAT_BYTES = 512 << 10
TCP_NOTSENT_LOWAT = 25  # Python's socket does not name it


class BrokenError(Exception):
    """The connection was broken elsewhere: leave."""


class SourceLostError(ConnectionResetError):
    """Who sent what waits to be written was reset: its bytes in flight go with it."""


class Breaker:
    """Ends every wait of a connection's two threads. Thread-safe; closed by its owner at last."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.fired = False

    def fire(self) -> None:
        self.fired = True
        os.eventfd_write(self._fd, 1)

    def watch(self, sock: socket.socket, event: int) -> select.poll:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(sock, event)
        return poll

    def wait(self, poll: select.poll) -> list[tuple[int, int]]:
        """Until something is ready; what it is. BrokenError when it fires."""
        ready = poll.poll()
        if self.fired:
            raise BrokenError
        return ready

    def close(self) -> None:
        os.close(self._fd)


class End(Protocol):
    """One side of a carried connection. ``name`` says in messages which one it is."""

    name: str

    def receive(self) -> memoryview | bytes:
        """More bytes, valid until the next call; none at the half-close. Raises OSError or
        StreamError when this side is broken, BrokenError when the connection is."""

    def send(self, data: memoryview | bytes) -> None:
        """All of it. Raises as ``receive()``."""

    def finish(self) -> None:
        """Carry a half-close to this side: nothing more is sent."""

    def delivered(self) -> None:
        """What this side sent before its half-close has been handed on. Then what it has to say
        about that is awaited. Raises as ``receive()``."""

    def heed(self, source: End) -> None:
        """``send()`` carries what ``source`` says: while it waits it looks whether that one was
        reset, and raises SourceLostError then."""

    def stop_reading(self) -> None:
        """Nobody takes what this side sends any more: let it know where that can be told."""

    def abort(self, reason: str) -> None:
        """Reset this side. Never raises; called once no thread uses it."""

    def close(self) -> None:
        """After both half-closes."""


class _Socket:
    """What both kinds of ends do with their socket."""

    def __init__(self, sock: socket.socket, name: str, breaker: Breaker) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, NOTSENT_LOWAT_BYTES)
        self.name = name
        self._sock = sock
        self._breaker = breaker
        self._readable = breaker.watch(sock, select.POLLIN)
        self._writable = breaker.watch(sock, select.POLLOUT)

    def heed(self, source: End) -> None:
        if isinstance(source, _Socket):
            self._writable.register(source._sock, 0)  # errors are always told

    def close(self) -> None:
        self._sock.close()

    def _fill(self, view: memoryview) -> int:
        """Fewer bytes only at the end of the stream."""
        at = 0
        while at < len(view):
            try:
                nbytes = self._sock.recv_into(view[at:])
            except BlockingIOError:
                self._breaker.wait(self._readable)
                continue
            if nbytes == 0:
                break
            at += nbytes
        return at

    def _send_all(self, *pieces: memoryview | bytes) -> None:
        """Every byte, in as few calls as the socket takes."""
        left = [memoryview(piece) for piece in pieces if len(piece)]
        while left:
            try:
                sent = self._sock.sendmsg(left)
            except BlockingIOError:
                self._wait_writable()
                continue
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if left:
                left[0] = left[0][sent:]
                if self._breaker.fired:
                    raise BrokenError

    def _wait_writable(self) -> None:
        for fd, events in self._breaker.wait(self._writable):
            if fd == self._sock.fileno():
                continue
            if events & select.POLLERR:
                raise SourceLostError(errno.ECONNRESET, "reset while bytes waited to be taken")
            self._writable.unregister(fd)  # it has closed; what it sent is still to be read

    def _reset(self) -> None:
        """RST on TCP, once what was written has left; a unix socket knows only its close."""
        with contextlib.suppress(OSError):
            if self._sock.family != socket.AF_UNIX:
                self._flush()
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    def _flush(self) -> None:
        deadline = time.monotonic() + FLUSH_S
        queued = bytearray(4)
        while time.monotonic() < deadline:
            fcntl.ioctl(self._sock, termios.TIOCOUTQ, queued)
            if not any(queued) or self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                return
            time.sleep(FLUSH_POLL_S)


class PlainEnd(_Socket):
    """QEMU's own socket."""

    def __init__(self, sock: socket.socket, name: str, breaker: Breaker) -> None:
        super().__init__(sock, name, breaker)
        self._buffer = memoryview(bytearray(BUFFER_BYTES))

    def receive(self) -> memoryview:
        while True:
            try:
                return self._buffer[: self._sock.recv_into(self._buffer)]
            except BlockingIOError:
                self._breaker.wait(self._readable)

    def send(self, data: memoryview | bytes) -> None:
        self._send_all(data)

    def finish(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            # It has closed already: a half-close cannot reach it, nor does it need one.
            if error.errno != errno.ENOTCONN:
                raise

    def delivered(self) -> None:
        """A socket has nothing to say about that."""

    def stop_reading(self) -> None:
        if self._sock.family == socket.AF_UNIX:  # TCP has no way to say it
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RD)

    def abort(self, reason: str) -> None:
        self._reset()


class FramedEnd(_Socket):
    """The connection to the other relay, after both hellos."""

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        breaker: Breaker,
        *,
        send_seed: int,
        receive_seed: int,
        compress: bool = False,
    ) -> None:
        super().__init__(sock, name, breaker)
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._writer = FrameWriter(send_seed, compress=compress)
        self._reader = FrameReader(receive_seed, self._take)
        self._lock = threading.Lock()  # of the writer and the order of its frames
        self._ended = self._peer_ended = self._confirmed = False
        self._cut = False  # a frame was left unfinished

    @property
    def wire_sent_bytes(self) -> int:
        return self._writer.wire_bytes

    @property
    def wire_received_bytes(self) -> int:
        return self._reader.wire_bytes

    def receive(self) -> memoryview | bytes:
        while True:
            frame = self._reader.next_frame()
            if frame.kind is FrameKind.DATA:
                if self._peer_ended:
                    raise DamageError("DATA behind END")
                return frame.payload
            if frame.kind is FrameKind.END:
                if self._peer_ended:
                    raise DamageError("a second END")
                self._compare(frame, self._reader.totals, "received here")
                self._peer_ended = True
                return b""
            self._control(frame)

    def send(self, data: memoryview | bytes) -> None:
        with self._lock:
            self._send(self._writer.data(data))

    def finish(self) -> None:
        with self._lock:
            self._ended = True
            self._send(self._writer.end())

    def delivered(self) -> None:
        with self._lock:
            self._send(self._writer.done(self._reader.totals))
        while not self._confirmed:
            frame = self._reader.next_frame()
            if frame.kind in (FrameKind.DATA, FrameKind.END):
                raise DamageError(f"{frame.kind.name} behind END")
            self._control(frame)

    def stop_reading(self) -> None:
        """The reset that follows says it."""

    def abort(self, reason: str) -> None:
        # One who left within a frame leaves the other relay to find that out itself.
        if not self._cut:
            with contextlib.suppress(OSError):
                self._sock.settimeout(FLUSH_S)
                self._sock.sendall(b"".join(self._writer.reset(reason)))
        self._reset()

    def _send(self, frame: tuple[bytes, memoryview | bytes]) -> None:
        self._cut = True
        self._send_all(*frame)
        self._cut = False

    def _take(self, nbytes: int) -> memoryview:
        view = self._buffer[:nbytes]
        got = self._fill(view)
        if got < nbytes:
            raise ChannelError(
                "the other relay closed the connection without an end"
                if got == 0 and nbytes == HEADER_BYTES
                else f"the connection to the other relay ended within a frame: received {got} "
                f"bytes, needs {nbytes}"
            )
        return view

    def _control(self, frame: Frame) -> None:
        if frame.kind is FrameKind.RESET:
            raise ConnectionResetError(errno.ECONNRESET, f"the other relay says: {frame.reason()}")
        if not self._ended or self._confirmed:
            raise DamageError("DONE without an END")
        self._compare(frame, self._writer.totals, "sent here")
        self._confirmed = True

    @staticmethod
    def _compare(frame: Frame, ours: Totals, verb: str) -> None:
        theirs = frame.totals()
        if theirs != ours:
            raise DamageError(
                f"{frame.kind.name}: the other relay counts {theirs.data_bytes} bytes in "
                f"{theirs.data_frames} frames, {verb} were {ours.data_bytes} in {ours.data_frames}"
            )
