# SPDX-License-Identifier: Apache-2.0
"""A listener, guests on both ends, and a source that says byte by byte what a test wants."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from memory_guest import PAGE, MemoryGuest

import vmth
from vmth.errors import MigrationError
from vmth.handshake import Incoming, make_offer, read_exactly
from vmth.listener import Listener
from vmth.options import MigrateOptions, ReceiveOptions
from vmth.stats import MigrationResult
from vmth.types import Gpa, Mapping, RamBlock
from vmth.wire.framing import (
    PREAMBLE_REPLY_BYTES,
    FrameDecoder,
    FrameEncoder,
    Preamble,
    PreambleReply,
    PreambleStatus,
)
from vmth.wire.messages import Accept, Message, Offer, Ping, Role


class World:
    """Guests and listeners that end with it; threads and descriptors are counted then."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.resources = contextlib.ExitStack()
        self.made: list[MemoryGuest] = []
        self.prepare: Callable[[MemoryGuest], None] = lambda guest: None

    def guest(self, **options: Any) -> MemoryGuest:
        options.setdefault("npages", 64)
        guest = MemoryGuest(working_set=16, **options)
        self.resources.callback(guest.close)
        return guest

    def make_guest(self, incoming: Incoming) -> MemoryGuest:
        guest = self.guest(npages=incoming.blocks[0].npages, filled=False)
        self.made.append(guest)
        self.prepare(guest)
        return guest

    def listen(self, uri: str = "tcp:127.0.0.1:0", **options: Any) -> Listener:
        options.setdefault("state_dir", self.tmp_path / "destination")
        listener = Listener(uri, self.make_guest, ReceiveOptions(**options))
        self.resources.callback(listener.close)
        return listener

    def options(self, **options: Any) -> MigrateOptions:
        return MigrateOptions(
            state_dir=self.tmp_path / "source", query_timeout_s=0.6, zerocopy=False, **options
        )

    def moves(self, listener: Listener, **options: Any) -> MigrationResult:
        """Every trouble ends with a migration that works."""
        source = self.guest()
        source.resume()
        result = vmth.migrate(source, listener.endpoint.display, self.options(**options))
        while isinstance(listener.outcomes.get(timeout=5), MigrationError):
            pass  # those before it
        assert result.verified
        assert source.released
        assert self.made[-1].running
        assert self.made[-1].pause()
        assert self.made[-1].counted() == self.made[-1].total
        return result


@contextlib.contextmanager
def one_world(tmp_path: Path) -> Iterator[World]:
    gc.collect()  # what tests before this one left to the collector
    before = (threading.active_count(), open_files())
    world = World(tmp_path)
    with world.resources:
        yield world
    assert (threading.active_count(), open_files()) == before


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class Stranger:
    """A connection to a listener. Context manager."""

    def __init__(self, listener: Listener) -> None:
        self.sock = socket.create_connection(("127.0.0.1", listener.endpoint.port), timeout=10)
        self._encoder = FrameEncoder()
        self._decoder = FrameDecoder()

    def preamble(self, role: Role, session_id: bytes, index: int = 0, token: bytes = b"") -> None:
        self.sock.sendall(Preamble(role, session_id, index, token or bytes(16)).pack())

    def reply(self) -> PreambleReply:
        return PreambleReply.unpack(read_exactly(self.sock, PREAMBLE_REPLY_BYTES))

    def status(self, *preamble: Any) -> PreambleStatus:
        self.preamble(*preamble)
        return self.reply().status

    def say(self, message: Message) -> None:
        self.sock.sendall(self._encoder.encode(message))

    def hear(self) -> Message:
        """The next message that is not a ping."""
        while True:
            message = self._decoder.next_message()
            if message is None:
                data = self.sock.recv(65536)
                if not data:
                    raise EOFError("the listener closed the connection")
                self._decoder.feed(data)
            elif not isinstance(message, Ping):
                return message

    def ends(self) -> bool:
        """Wait for the listener to end the connection, whatever it still says."""
        with contextlib.suppress(ConnectionResetError):
            while self.sock.recv(65536):
                pass
        return True

    def begin(self, session_id: bytes, channels: int = 1, *, digest: bool = True) -> Accept:
        assert self.status(Role.CONTROL, session_id) is PreambleStatus.OK
        self.say(offer(session_id, channels, digest))
        accept = self.hear()
        assert isinstance(accept, Accept)
        return accept

    def reset(self) -> None:
        """End with an RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


def offer(session_id: bytes, channels: int, digest: bool) -> Offer:
    """Of a guest of one page."""
    blocks = [RamBlock("ram", PAGE, Gpa(0), Mapping(fd=0))]
    return make_offer(session_id, 7, blocks, MigrateOptions(channels=channels, digest=digest), {})
