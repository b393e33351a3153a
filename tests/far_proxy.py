# SPDX-License-Identifier: Apache-2.0
"""A tunnel to a far listener: page connections are late by so much each way, others are not, and
TCP's own round trip ends at the tunnel's near end."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque

from vmth.wire.framing import PREAMBLE_BYTES, Preamble
from vmth.wire.messages import Role

__all__ = ["FarProxy"]


class FarProxy:
    """Context manager; listens at ``port`` until it ends. ``late_s`` may change at any time."""

    def __init__(self, port: int, late_s: float) -> None:
        self._far = port
        self.late_s = late_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> FarProxy:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        for sock in self._sockets:
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._far))
            self._sockets += [near, far]
            head = near.recv(PREAMBLE_BYTES, socket.MSG_PEEK | socket.MSG_WAITALL)
            late = len(head) == PREAMBLE_BYTES and Preamble.unpack(head).role is Role.PAGE
            for source, target in ((near, far), (far, near)):
                self._carry(source, target, late)

    def _carry(self, source: socket.socket, target: socket.socket, late: bool) -> None:
        """One thread reads, another writes what is due."""
        waiting: deque[tuple[float, bytes]] = deque()
        changed = threading.Condition()

        def read() -> None:
            data = b"x"
            while data:
                try:
                    data = source.recv(1 << 18)
                except OSError:
                    data = b""
                with changed:
                    waiting.append((time.monotonic() + self.late_s * late, data))
                    changed.notify()

        def write() -> None:
            while True:
                with changed:
                    changed.wait_for(lambda: len(waiting) > 0)
                    due, data = waiting.popleft()
                self._ended.wait(max(0.0, due - time.monotonic()))
                with contextlib.suppress(OSError):  # that end is gone
                    if data:
                        target.sendall(data)
                    else:
                        target.shutdown(socket.SHUT_WR)
                if not data:
                    return

        for run in (read, write):
            thread = threading.Thread(target=run)
            self._threads.append(thread)
            thread.start()
