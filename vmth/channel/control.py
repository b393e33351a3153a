# SPDX-License-Identifier: Apache-2.0
"""A control connection: messages over a connected socket, with liveness.

One reader thread decodes what arrives, answers pings, sends its own, and queues the rest;
``receive`` takes from the queue, ``send`` may be called from any thread. A peer that says nothing
for ``peer_timeout_s`` has gone silent, which is a failure even where TCP still acknowledges (a
stopped process keeps its connections).
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from vmth.errors import ChannelError, StreamError, VmthError
from vmth.wire.framing import FrameDecoder, FrameEncoder
from vmth.wire.messages import Message, Ping, Pong

__all__ = ["ControlConnection"]

_READ_BYTES = 1 << 16
_INBOX_MESSAGES = 64
_PINGS_PER_TIMEOUT = 4


class ControlConnection:
    """Owns ``sock``. ``on_failure`` is called once, from the reader thread, when the connection
    ends or breaks, so that an owner blocked elsewhere can be woken; not called after ``close()``.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        peer_timeout_s: float = 10.0,
        on_failure: Callable[[VmthError], None] | None = None,
        on_message: Callable[[Message], None] | None = None,
        name: str = "vmth-control",
    ) -> None:
        self._sock = sock
        self._sock.settimeout(peer_timeout_s)
        self.peer_timeout_s = peer_timeout_s
        self._on_failure = on_failure
        self._on_message = on_message
        self._encoder = FrameEncoder()
        self._decoder = FrameDecoder()
        self._send_lock = threading.Lock()
        # Guarded by _changed: what arrived, what wakes the owner first, and how it ended.
        self._changed = threading.Condition()
        self._inbox: deque[Message] = deque()
        self._interruptions: deque[VmthError] = deque()
        self._failure: VmthError | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_loop, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def failure(self) -> VmthError | None:
        """Why the connection ended, once it has."""
        return self._failure

    @property
    def thread_id(self) -> int | None:
        """The reader's, as the kernel numbers it; None unless it runs."""
        return self._thread.native_id if self._thread.is_alive() else None

    @property
    def waits(self) -> bool:
        """``receive`` would return or raise at once. Any thread."""
        return bool(self._interruptions or self._inbox or self._failure)

    def wait(self, timeout_s: float) -> bool:
        """Until ``receive`` would return or raise at once; False after that time."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: self.waits, timeout_s))

    def send(self, message: Message) -> None:
        """Raises ChannelError when the connection is gone or the peer does not read for the peer
        timeout; the connection is unusable then."""
        if self._failure is not None:
            raise ChannelError(str(self._failure))
        try:
            with self._send_lock:
                self._sock.sendall(self._encoder.encode(message))
        except OSError as error:
            raise ChannelError(f"control connection: sending failed: {error}") from error

    def receive(self, timeout_s: float | None = None) -> Message:
        """The next message. An interruption comes before any message, the end of the connection
        after all of them, and again at every later call. Raises ChannelError at the timeout."""
        with self._changed:
            ready = self._changed.wait_for(
                lambda: self._interruptions or self._inbox or self._failure, timeout_s
            )
            if not ready:
                raise ChannelError(f"no answer from the peer within {timeout_s:g} s")
            if self._interruptions:
                raise self._interruptions.popleft()
            if self._inbox:
                message = self._inbox.popleft()
                self._changed.notify_all()
                return message
            assert self._failure is not None
            raise self._failure

    def interrupt(self, error: VmthError) -> None:
        """Make ``receive()``, a blocked one too, raise ``error`` once. Any thread; never blocks."""
        with self._changed:
            self._interruptions.append(error)
            self._changed.notify_all()

    def close(self) -> None:
        """Close the socket and join the reader. Idempotent, not from the reader thread."""
        self._closed.set()
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # already gone: that is what close wants
        with self._changed:
            self._changed.notify_all()  # the reader may wait for room in the inbox
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        self._sock.close()

    def _read_loop(self) -> None:
        try:
            self._read_until_end()
        except VmthError as error:
            self._fail(error)
        except OSError as error:
            self._fail(ChannelError(f"control connection lost: {error}"))

    def _read_until_end(self) -> None:
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        interval_s = self.peer_timeout_s / _PINGS_PER_TIMEOUT
        heard = time.monotonic()
        next_ping = heard + interval_s
        number = 0
        while not self._closed.is_set():
            now = time.monotonic()
            if now - heard > self.peer_timeout_s:
                raise ChannelError(f"the peer went silent: nothing heard for {now - heard:.1f} s")
            if now >= next_ping:
                number += 1
                next_ping = now + interval_s
                self.send(Ping(number))
            if not poller.poll(max(0.0, next_ping - now) * 1000 + 1):
                continue
            data = self._sock.recv(_READ_BYTES)
            if not data:
                self._decoder.feed_eof()
                self._decoder.next_message()  # raises when it ended inside a frame
                raise ChannelError("the peer closed the control connection")
            heard = time.monotonic()
            self._decoder.feed(data)
            while (message := self._decoder.next_message()) is not None:
                self._take(message)
            heard = time.monotonic()  # a full inbox is our slowness, not the peer's silence

    def _take(self, message: Message) -> None:
        if isinstance(message, Ping):
            self.send(Pong(message.number))
            return
        if isinstance(message, Pong):
            return
        if self._on_message is not None:
            self._on_message(message)
        with self._changed:
            # A full inbox: stop reading until the owner takes what is there.
            self._changed.wait_for(
                lambda: len(self._inbox) < _INBOX_MESSAGES or self._closed.is_set()
            )
            self._inbox.append(message)
            self._changed.notify_all()

    def _fail(self, error: VmthError) -> None:
        if isinstance(error, StreamError):
            error = StreamError(f"control connection: {error}")
        with self._changed:
            self._failure = error
            self._changed.notify_all()
        if self._closed.is_set():
            return
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was faster
        if self._on_failure is not None:
            self._on_failure(error)
