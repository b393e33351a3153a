# SPDX-License-Identifier: Apache-2.0
"""A source QEMU for tests without one: answers ``migrate`` by connecting and sending a stream."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vmth.qemu import stream as q
from vmth.qemu.outgoing import OutgoingStream


class FakeSource:
    """``Commands`` whose ``migrate`` makes ``1 + len(channels)`` connections, each in a thread of
    its own that sends its bytes; one that ``takes_descriptors`` sends to what it was given. The
    connections stay open until ``close()``."""

    def __init__(
        self,
        main: bytes,
        channels: Sequence[bytes] = (),
        *,
        main_first: bool = True,
        takes_descriptors: bool = True,
    ) -> None:
        self.takes_descriptors = takes_descriptors
        self.given: dict[str, socket.socket] = {}  #: descriptors, by name
        self.status: dict[str, Any] = {"status": "active"}
        self.commands: list[str] = []
        self.returned = bytearray()  #: what came on the return path
        self.answered = threading.Event()  #: SHUT was read
        self.closes_after_sending = False
        self.dies_after_sending = False  #: as one that is killed: nothing is shut down before
        self._pieces = [main, *channels] if main_first else [*channels, main]
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        self.commands.append(command)
        if command == "query-migrate":
            return self.status
        assert arguments is not None
        if command == "closefd":
            self.given.pop(str(arguments["fdname"])).close()
            return {}
        assert command == "migrate"
        kind, _, where = str(arguments["uri"]).partition(":")
        for piece in self._pieces:
            sock = self.given.pop(where) if kind == "fd" else _connected(where)
            self._sockets.append(sock)
            thread = threading.Thread(target=self._send, args=(sock, piece), daemon=True)
            thread.start()
            self._threads.append(thread)
        return {}

    def give_descriptor(self, fd: int, name: str) -> bool:
        if self.takes_descriptors:
            self.given[name] = socket.socket(fileno=os.dup(fd))
        return self.takes_descriptors

    def queue_bytes(self) -> int:
        """That may be written to the main connection and not be read."""
        return self._sockets[0].getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)

    def _send(self, sock: socket.socket, piece: bytes) -> None:
        with contextlib.suppress(OSError):
            sock.sendall(piece)
            if self.closes_after_sending:
                sock.shutdown(socket.SHUT_RDWR)
                return
            if self.dies_after_sending:
                sock.close()
                return
            while data := sock.recv(4096):
                self.returned += data
                if b"\x00\x01\x00\x04" in self.returned:
                    self.answered.set()
                    return

    def send_more(self, data: bytes) -> None:
        """Of the main stream, behind what was sent."""
        self._sockets[0].sendall(data)

    def wait_over(self) -> None:
        """Until SHUT was read or the stream was lost."""
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        for sock in (*self._sockets, *self.given.values()):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join()


def _connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


def drain(next_event: Callable[[float], q.Event | None], timeout_s: float = 10.0) -> list[q.Event]:
    """All events up to StreamFinished; buffers are copied, as they live until the next call."""
    events: list[q.Event] = []
    while True:
        event = next_event(timeout_s)
        assert event is not None, f"nothing came after {len(events)} events"
        if isinstance(event, q.RamPages):
            event = q.RamPages(event.table, event.runs, memoryview(bytes(event.data)))
        elif isinstance(event, q.RawBytes):
            event = q.RawBytes(memoryview(bytes(event.data)))
        events.append(event)
        if isinstance(event, q.StreamFinished):
            return events


@contextlib.contextmanager
def started(source: FakeSource, channels: int = 0) -> Iterator[OutgoingStream]:
    with OutgoingStream(source, multifd_channels=channels) as stream:
        try:
            stream.start()
            yield stream
        finally:
            stream.close()
            source.close()


class LentPages:
    """Pages that were given out, looked at when their buffer is about to be filled again."""

    def __init__(self) -> None:
        self.checked = 0
        self._lent: list[tuple[q.PagePayload, bytes]] = []

    def lend(self, page: q.PagePayload, content: bytes) -> None:
        self._lent.append((page, content))

    def check(self) -> None:
        for page, content in self._lent:
            assert bytes(page.data) == content
        self.checked += len(self._lent)
        self._lent.clear()
