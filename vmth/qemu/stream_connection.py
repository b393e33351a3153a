# SPDX-License-Identifier: Apache-2.0
"""What a source QEMU writes, read into a fixed pool of buffers.

    QEMU --> its end of a socket, with what may wait there --> ours --> buffer after buffer --> feed

A larger queue in the socket lets QEMU and its reader work side by side where they would wait for
each other, and each wait costs a wake-up of the other. What is in it when the guest stops is
downtime, so it is bounded by what the link carries: by whoever holds QEMU's end of the socket.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import socket
import sys
import termios
from collections import deque
from collections.abc import Callable
from typing import Final

from vmth.channel.sockets import queue_ahead, take_arrived
from vmth.errors import ChannelError

__all__ = ["LEAST_READ_BYTES", "NEAR_PATIENCE_S", "PATIENCE_S", "Connection"]

#: So long the next bytes are waited for before those that are there are parsed, until it is set.
PATIENCE_S: Final = 0.0005
#: The same near the end of a pass: what waits for others may be downtime.
NEAR_PATIENCE_S: Final = 0.0001
#: A buffer with less room is full.
LEAST_READ_BYTES: Final = 64 << 10
#: Written and not read, as the kernel counts: Linux' own default, and what QEMU writes in a
#: millisecond or two where nothing holds it up.
LEAST_AHEAD_BYTES: Final = 208 << 10
MOST_AHEAD_BYTES: Final = 2 << 20


class _Buffer:
    """A piece of the pool. ``wait`` returns when nobody reads what it was filled with."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.wait: Callable[[], object] | None = None


def _pool(nbuffers: int, nbytes: int) -> deque[_Buffer]:
    """In one piece of huge pages, where the kernel has them: a stream has something to look at on
    each 4 KiB, and each look at another small page costs a walk of the page tables."""
    memory = mmap.mmap(-1, nbuffers * nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = memoryview(memory)
    return deque(_Buffer(whole[i * nbytes : (i + 1) * nbytes]) for i in range(nbuffers))


class Connection:
    """One stream socket of QEMU's and its buffers, filled in turn."""

    def __init__(
        self,
        sock: socket.socket,
        feed: Callable[[memoryview], None],
        nbuffers: int,
        nbytes: int,
        give_back: Callable[[], int] = lambda: 0,
        far_end: socket.socket | None = None,
    ) -> None:
        """``give_back()``: how many of the bytes that were fed last are to be fed again.
        ``far_end``: what QEMU writes to, where that is known here; this object's from now on."""
        self.sock = sock
        self._far_end = far_end
        self.ended = False
        self.read_bytes = nbytes  #: of one read, at most
        self.patience_s = PATIENCE_S
        self.received_bytes = 0
        self._feed = feed
        self._give_back = give_back
        self._buffers = _pool(nbuffers, nbytes)
        self._filled = 0
        self._unfed = 0  #: of the filled bytes: a packet's or a record's that is not whole yet

    def in_use(self, until: Callable[[], object]) -> None:
        self._buffers[0].wait = until

    def read(self) -> None:
        """What has arrived, up to a buffer's end: in pieces as large as can be had without waiting
        longer than patience_s for the next bytes, since each costs as much as many pages."""
        self._unfed += self._give_back()
        if len(self._buffers[0].view) - self._filled < LEAST_READ_BYTES:
            self._next_buffer()
        self._take(min(len(self._buffers[0].view), self._filled + self.read_bytes))
        if self._unfed:
            self._feed(self._buffers[0].view[self._filled - self._unfed : self._filled])
            self._unfed = 0

    def _take(self, end: int) -> None:
        try:
            n, self.ended = take_arrived(
                self.sock, self._buffers[0].view[self._filled : end], self.patience_s
            )
        except ConnectionResetError:  # what QEMU had not read of the return path went with it
            n, self.ended = 0, True
        except OSError as error:
            raise ChannelError(f"the source QEMU's stream: {error}") from error
        self.received_bytes += n
        self._filled += n
        self._unfed += n

    def take_back(self) -> memoryview:
        """The last bytes that were fed, now not fed; empty where all, or too few, are used."""
        self._unfed += self._give_back()
        return self._buffers[0].view[self._filled - self._unfed : self._filled]

    def put(self, data: bytes, received_bytes: int) -> None:
        """In place of what was taken back: what is left of it, and of so many bytes that somebody
        else has read from the socket."""
        self.received_bytes += received_bytes
        self._filled -= self._unfed
        self._unfed = 0
        if len(self._buffers[0].view) - self._filled < max(len(data), LEAST_READ_BYTES):
            self._next_buffer()
        begin, self._filled = self._filled, self._filled + len(data)
        self._buffers[0].view[begin : self._filled] = data
        self._feed(self._buffers[0].view[begin : self._filled])

    def limit_ahead(self, nbytes: int) -> None:
        """QEMU may write about so many bytes before they are read, if that can be told: at least
        what any socket takes, and MOST_AHEAD_BYTES at most."""
        far_end = self._far_end
        if far_end is not None:
            with contextlib.suppress(OSError):  # another thread has let go of it
                queue_ahead(far_end, max(LEAST_AHEAD_BYTES, min(nbytes, MOST_AHEAD_BYTES)))

    @property
    def holds_far_end(self) -> bool:
        """An end that is held here does not close with QEMU."""
        return self._far_end is not None

    def let_go(self) -> None:
        """Of QEMU's end. Idempotent; any thread."""
        far_end, self._far_end = self._far_end, None
        if far_end is not None:
            far_end.close()

    def close(self) -> None:
        self.let_go()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def unread_bytes(self) -> int:
        return int.from_bytes(fcntl.ioctl(self.sock, termios.FIONREAD, bytes(4)), sys.byteorder)

    def _next_buffer(self) -> None:
        """What was not fed goes with us."""
        unfed = self._buffers[0].view[self._filled - self._unfed : self._filled]
        self._buffers.rotate(-1)
        buffer, self._filled = self._buffers[0], self._unfed
        if buffer.wait is not None:
            buffer.wait()
            buffer.wait = None
        buffer.view[: self._unfed] = unfed
