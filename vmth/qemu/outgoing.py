# SPDX-License-Identifier: Apache-2.0
"""A source QEMU's migration taken in: its connections as one order of events, its return path.

    source QEMU --main, multifd--> unix sockets --> fixed buffers --> reader --> next_event()
               <-- SHUT, PONG ------------------------------------ shut()

The main connection is one end of a socket pair that QEMU is given, and may be written far ahead;
multifd wants to connect by itself, and so does a QEMU that takes no descriptor.

QEMU's bytes are read into a fixed pool of buffers and parsed where they lie, so what is read ahead
is bounded and QEMU's own measure of its bandwidth stays honest. QEMU waits for SHUT with its guest
stopped when all state was sent: whoever has this object decides when it is told. Until then losing
the connections makes QEMU resume its guest by itself, but in pre-switchover.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, Self

import msgspec

from vmth.channel.pump import FIRST_BYTES, CanPump, PagePump, Pumped, PumpLimits
from vmth.errors import ChannelError, MigrationError, StreamError, UsageError, VmthError
from vmth.qemu.qmp import QmpError
from vmth.qemu.state_store import StateStore
from vmth.qemu.stream import (
    Command,
    CommandCode,
    Event,
    MultifdMerger,
    PassThrough,
    Pong,
    RamPages,
    RawBytes,
    Shut,
    StreamFinished,
    StreamReader,
    encode_return_message,
)
from vmth.qemu.stream.fields import MAX_DESCRIPTION_BYTES
from vmth.qemu.stream_connection import LEAST_READ_BYTES, Connection

__all__ = ["Commands", "OutgoingStream"]

#: Of the main connection: read ahead at most BUFFERS * BUFFER_BYTES.
BUFFER_BYTES = 4 << 20
BUFFERS = 3
#: QEMU's name for its end of the pair.
PAIR_NAME = "vmth-stream"
#: Of one read, until a limit is set.
FIRST_READ_BYTES = 2 << 20
#: Of a multifd channel, whose packets have up to 512 KiB of pages.
CHANNEL_BUFFER_BYTES = 2 << 20
CHANNEL_BUFFERS = 2
MAX_CHANNELS = 255
#: State without a vmdescription that ends as state may is complete after so long a silence.
QUIET_S = 0.3
#: As long as a vmdescription may be, with what stands before it.
TAIL_BYTES = MAX_DESCRIPTION_BYTES + 64
#: A section's footer and the end mark of all state.
FOOTER_AND_END = 6
LOOK_S = 0.05
#: Longer than QEMU sleeps between two writes when its bandwidth is limited; not beyond QUIET_S.
SILENCE_S = 0.25
REASON_TIMEOUT_S = 1.0


class Commands(Protocol):
    """What is needed of ``vmth.qemu.qmp.Qmp``."""

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any: ...

    def give_descriptor(self, fd: int, name: str) -> bool: ...


class OutgoingStream:
    """``start()`` once, then ``next_event()`` until StreamFinished; a context manager. One thread,
    except that ``close()`` may be called from any.

    The capabilities (return-path, multifd with ``multifd_channels`` channels) are the caller's to
    set before. Device state comes as PassThrough and RawBytes, not interpreted.

    Bytes that an event refers to stay as they are until the next call of ``next_event()``, and
    longer after ``in_use()``.
    """

    def __init__(
        self, qmp: Commands, *, multifd_channels: int = 0, connect_timeout_s: float = 10.0
    ) -> None:
        if not 0 <= multifd_channels <= MAX_CHANNELS:
            raise UsageError(
                f"multifd channels: received {multifd_channels}, allowed 0 to {MAX_CHANNELS}"
            )
        self._qmp = qmp
        self._nchannels = multifd_channels
        self._connect_timeout_s = connect_timeout_s
        self._reader = StreamReader(opaque_devices=True)
        self._merger = MultifdMerger(self._reader, multifd_channels) if multifd_channels else None
        self._main: Connection | None = None
        self._main_poll = select.poll()
        self._channels: list[Connection] = []
        self._pump: PagePump | None = None
        self._tail = StateStore(2 * TAIL_BYTES)
        self._passing = False
        self._checked_bytes = 0  #: of the state, at the last look for its end
        self._last_read_s = 0.0
        self._silent_since_s: float | None = None
        self._paging = False  #: pages have come
        self._closed = False
        self.finished = False  #: all state was given out; QEMU waits for ``shut()``
        #: Of all connections, when no event was left to give out; what a multifd channel has sent
        #: behind its SYNC is among them, and waits in the merger.
        self.given_out_bytes = 0

    # -- the beginning -----------------------------------------------------------------------------

    def start(self, peer_uid: int | None = None) -> None:
        """Tell QEMU to migrate to us, take its connections.

        ``peer_uid``: the user as whom QEMU runs; where it has to find us in a directory, that is
        private, and given to this user where we may give it away. Raises MigrationError with QEMU's
        reason if it does not come; its guest runs on then, and nothing is left behind, unless QEMU
        did not answer: it may then keep a descriptor until it is given another.
        """
        deadline = time.monotonic() + self._connect_timeout_s
        try:
            with contextlib.ExitStack() as stack:
                pair = None if self._nchannels else self._begin_on_a_pair(stack)
                if pair is not None:
                    self._take([pair[0]], deadline, pair[1])
                else:
                    self._take(self._begin_by_name(stack, peer_uid, deadline), deadline)
                stack.pop_all()
        except BaseException:
            self.close()
            raise
        self._read_at_most(FIRST_READ_BYTES)
        self._last_read_s = time.monotonic()

    def _begin_on_a_pair(
        self, stack: contextlib.ExitStack
    ) -> tuple[socket.socket, socket.socket] | None:
        """Our end and QEMU's, whose queue can be bounded as long as it is held; None where QEMU
        takes no descriptor."""
        ours, its = (stack.enter_context(sock) for sock in socket.socketpair())
        if not self._qmp.give_descriptor(its.fileno(), PAIR_NAME):
            stack.close()
            return None
        try:
            self._qmp.execute("migrate", {"uri": f"fd:{PAIR_NAME}"})
        except QmpError:  # one that does not answer would be waited for twice
            with contextlib.suppress(VmthError):  # it may have been taken out already
                self._qmp.execute("closefd", {"fdname": PAIR_NAME})
            raise
        return ours, its

    def _begin_by_name(
        self, stack: contextlib.ExitStack, peer_uid: int | None, deadline: float
    ) -> list[socket.socket]:
        """QEMU connects as often as it wants to, in a directory of our own."""
        socks: list[socket.socket] = []
        folder = Path(tempfile.mkdtemp(prefix="vmth-qemu-"))
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                path = folder / "stream"
                listener.bind(str(path))
                listener.listen(1 + self._nchannels)
                if peer_uid not in (None, os.geteuid()) and os.geteuid() == 0:
                    os.chown(path, peer_uid or 0, -1)
                    os.chown(folder, peer_uid or 0, -1)
                self._qmp.execute("migrate", {"uri": f"unix:{path}"})
                while len(socks) < 1 + self._nchannels:
                    listener.settimeout(LOOK_S)
                    with contextlib.suppress(TimeoutError):
                        socks.append(stack.enter_context(listener.accept()[0]))
                        continue
                    self._check_coming(deadline, f"{len(socks)} of {1 + self._nchannels}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return socks

    def _take(
        self, socks: list[socket.socket], deadline: float, far_end: socket.socket | None = None
    ) -> None:
        """``far_end``: QEMU's of the only one."""
        mains = [sock for sock in socks if self._first_bytes(sock, deadline) == b"QEVM"]
        if len(mains) != 1:
            raise StreamError(
                f"the source QEMU's connections: received {len(mains)} with a file header, "
                "allowed one"
            )
        for sock in socks:
            sock.setblocking(False)
        main, merger, reader = mains[0], self._merger, self._reader
        if merger is None:
            give_back = partial(reader.give_back, FIRST_BYTES)
            self._main = Connection(main, reader.feed, BUFFERS, BUFFER_BYTES, give_back, far_end)
            self._main_poll.register(main, select.POLLIN)
            return
        self._main = Connection(main, merger.feed_main, BUFFERS, BUFFER_BYTES)
        for index, sock in enumerate(sock for sock in socks if sock is not main):
            feed = partial(merger.feed_channel, index)
            give_back = partial(merger.give_back, index)
            self._channels.append(
                Connection(sock, feed, CHANNEL_BUFFERS, CHANNEL_BUFFER_BYTES, give_back)
            )

    def _first_bytes(self, sock: socket.socket, deadline: float) -> bytes:
        """Which connection it is: the main one need not be the first that connects."""
        while True:
            sock.settimeout(LOOK_S)
            with contextlib.suppress(TimeoutError):
                first = sock.recv(4, socket.MSG_PEEK)
                if len(first) == 4 or not first:
                    return first
                threading.Event().wait(LOOK_S)
            self._check_coming(deadline, "no bytes")

    def _check_coming(self, deadline: float, have: str) -> None:
        reason = self._reason()
        if reason:
            raise MigrationError(f"the source QEMU did not begin to migrate: {reason}")
        if time.monotonic() > deadline:
            raise ChannelError(
                f"the source QEMU did not begin within {self._connect_timeout_s:g} s: {have}"
            )

    def _reason(self) -> str:
        """Why QEMU has ended its migration; empty where it has not."""
        answer = self._qmp.execute("query-migrate")
        if answer.get("status") not in ("failed", "cancelled", "cancelling"):
            return ""
        return str(answer.get("error-desc") or f"status {answer['status']}")

    # -- events ------------------------------------------------------------------------------------

    def next_event(self, timeout_s: float) -> Event | None:
        """The next event; None when none came in time. StreamFinished is the last one.

        Raises StreamError for bytes that QEMU does not send, MigrationError with its reason when it
        ended its migration, ChannelError when it is gone.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            event = self._parse()
            if event is not None:
                return self._seen(event)
            self.given_out_bytes = sum(of.received_bytes for of in self._connections())
            if self._complete():
                self.finished = True
                if self._main is not None:
                    self._main.let_go()  # nothing is read any more that would tell QEMU's end
                return StreamFinished()
            if not self._read(deadline):
                return None

    def pump_pages(self, sender: CanPump, round_: int, limits: PumpLimits) -> Pumped | None:
        """Have native code read and send pages as long as nothing else comes. What is left is given
        out by ``next_event()``, behind what was sent. None: the stream is not in the midst of
        pages, or comes by multifd. Always the same sender."""
        main = self._main
        midst = self._reader.in_pages(FIRST_BYTES) if self._merger is None else None
        if midst is None or main is None or self._closed:
            return None
        table, block = midst
        self._paging, pump = True, self._pump
        if pump is None:
            fd = main.sock.fileno()
            pump = sender.page_pump(fd, table.lengths, table.wire_names, table.page_bytes)
            self._pump = pump
        first = bytes(main.take_back())
        pumped = pump.run(first, block, round_, limits)
        self._reader.went_on(pumped.used_bytes, pumped.block)
        main.put(pumped.left, pumped.read_bytes)
        self.given_out_bytes = main.received_bytes - len(pumped.left)
        if pumped.read_bytes:
            self._last_read_s, self._silent_since_s = time.monotonic(), None
        return pumped

    def in_use(self, until: Callable[[], object]) -> None:
        """The bytes of the event that was given out last are read until ``until()`` returns, which
        implies the same of all events before. It is called before they are overwritten."""
        for connection in self._connections():
            connection.in_use(until)

    @property
    def unread_bytes(self) -> int:
        """Bytes that QEMU has sent and whose events were not all given out."""
        return (
            sum(
                connection.received_bytes + connection.unread_bytes()
                for connection in self._connections()
            )
            - self.given_out_bytes
        )

    def limit_read(self, nbytes: int) -> None:
        """Take at most so many bytes (at least 64 KiB) at once of all connections that bring pages:
        what waits to become whole is not on its way yet. QEMU may write as many ahead, where that
        can be told."""
        self._read_at_most(nbytes)
        for connection in self._connections():
            connection.limit_ahead(nbytes)

    def _read_at_most(self, nbytes: int) -> None:
        bringing = self._channels or self._connections()
        for connection in bringing:
            connection.read_bytes = max(LEAST_READ_BYTES, nbytes // len(bringing))

    def wait_for_more(self, patience_s: float) -> None:
        """So long the next bytes are waited for before those that are there are given out: larger
        pieces cost less, and come later. Of the main connection; multifd's stay as they are."""
        for connection in self._connections()[:1]:
            connection.patience_s = patience_s

    def _connections(self) -> list[Connection]:
        return [*([self._main] if self._main is not None else []), *self._channels]

    def _parse(self) -> Event | None:
        try:
            source = self._reader if self._merger is None else self._merger
            return source.next_event()
        except StreamError as error:
            if any(connection.ended for connection in self._connections()):
                raise self._ended_early() from error
            raise

    def _seen(self, event: Event) -> Event:
        if isinstance(event, RamPages):
            self._paging = True
        elif isinstance(event, RawBytes):
            self._tail.add(event.data)
        elif isinstance(event, PassThrough):
            self._passing = True
        elif isinstance(event, Command) and event.code == CommandCode.PING:
            with contextlib.suppress(ChannelError):  # a lost connection shows when it is read
                self._send(encode_return_message(Pong(int.from_bytes(event.data, "big"))))
        elif isinstance(event, StreamFinished):
            # Nothing waits for SHUT any more: QEMU has closed before it was told.
            raise self._ended_early()
        return event

    def _complete(self) -> bool:
        """Was all state given out? The vmdescription is whole; a machine that sends none is known
        by the state's end mark with silence behind it."""
        if not self._passing or self.finished:
            return self.finished
        if self._main is None or self._main.unread_bytes():
            return False
        # Each look takes time for the size of the tail, and the guest stands still.
        if self._tail.ends_with(b"}") and self._tail.total_bytes != self._checked_bytes:
            self._checked_bytes = self._tail.total_bytes
            said = self._tail.description()
            if said is not None:
                with said:
                    if _is_description(said):
                        return True
        quiet_s = time.monotonic() - self._last_read_s
        tail = self._tail.last(FOOTER_AND_END)
        return quiet_s > QUIET_S and len(tail) == FOOTER_AND_END and (tail[0], tail[5]) == (0x7E, 0)

    def _read(self, deadline: float) -> bool:
        """More bytes of any connection that may be read. False: none came in time."""
        if self._closed or self._main is None:
            raise ChannelError("the source QEMU's stream is closed")
        began_s = time.monotonic()
        ready = self._wait(deadline)
        for connection in ready:
            connection.read()
            if connection.ended:
                self._at_end(connection)
        if ready:
            self._last_read_s, self._silent_since_s = time.monotonic(), None
        else:
            self._in_silence(began_s)
        return bool(ready) or time.monotonic() < deadline

    def _in_silence(self, began_s: float) -> None:
        """An end that is held here too does not close with QEMU, so it is let go of. Before pages
        come, which is before it is known how long its queue should be, QEMU is asked first: it may
        be long at its preparations. Later it may be about to write while it cannot answer."""
        assert self._main is not None
        if self._silent_since_s is None:
            self._silent_since_s = began_s
        silent_s = time.monotonic() - self._silent_since_s
        if not self._main.holds_far_end or silent_s < SILENCE_S:
            return
        if not self._paging:
            self._silent_since_s = None
            with contextlib.suppress(VmthError):
                if not self._reason():
                    return
        self._main.limit_ahead(0)  # nobody can shorten it from now on
        self._main.let_go()

    def _wait(self, deadline: float) -> list[Connection]:
        merger, main = self._merger, self._main
        assert main is not None
        left_ms = 1000 * min(max(0.0, deadline - time.monotonic()), QUIET_S)
        if merger is None and not main.ended:  # the same one again and again
            return [main] if self._main_poll.poll(left_ms) else []
        asked = [main] if merger is None or merger.main_may_read() else []
        asked += (
            channel
            for index, channel in enumerate(self._channels)
            if merger is not None and merger.channel_may_read(index)
        )
        poll = select.poll()
        by_fd = {}
        for connection in asked:
            if not connection.ended:
                by_fd[connection.sock.fileno()] = connection
                poll.register(connection.sock, select.POLLIN)
        if not by_fd:
            raise self._ended_early()
        return [by_fd[fd] for fd, _ in poll.poll(left_ms)]

    def _at_end(self, connection: Connection) -> None:
        if connection is not self._main:
            assert self._merger is not None
            self._merger.feed_channel_eof(self._channels.index(connection))
        elif self._merger is None:
            self._reader.feed_eof()
        else:
            self._merger.feed_main_eof()

    def _ended_early(self) -> VmthError:
        """QEMU closed its stream before it was told that all has arrived."""
        deadline = time.monotonic() + REASON_TIMEOUT_S
        reason, wait = "", threading.Event()
        try:
            while not (reason := self._reason()) and time.monotonic() < deadline:
                wait.wait(LOOK_S)  # it closes first and tells then
        except VmthError as error:
            return ChannelError(f"the source QEMU is gone: {error}")
        return MigrationError(f"the source QEMU ended its migration: {reason or 'no reason given'}")

    # -- the return path, the end ------------------------------------------------------------------

    def shut(self, status: int) -> None:
        """Tell QEMU how the destination took all of it; 0: it has loaded everything. QEMU then
        reports ``completed`` and stays paused. Raises ChannelError when it cannot be told."""
        self._send(encode_return_message(Shut(status)))

    def _send(self, data: bytes) -> None:
        if self._main is None:
            raise ChannelError("the source QEMU's stream is not connected")
        try:
            self._main.sock.sendall(data)
        except OSError as error:
            raise ChannelError(f"the source QEMU's return path: {error}") from error

    def sockets_to_read(self) -> list[socket.socket]:
        """Of all connections, for somebody else who reads them to their ends; this object's own."""
        for connection in self._connections():
            connection.let_go()
        return [connection.sock for connection in self._connections()]

    def close(self) -> None:
        """Let go of the connections; a QEMU that was not told SHUT then resumes its guest.
        Idempotent."""
        self._closed = True
        self._pump = None
        for connection in self._connections():
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Description(msgspec.Struct):
    """Of a vmdescription what tells it: all of it is looked at, but nothing is made of it, which
    would take milliseconds of downtime."""

    devices: list[msgspec.Raw]


_DESCRIPTION: Final = msgspec.json.Decoder(_Description)


def _is_description(said: memoryview) -> bool:
    try:
        _DESCRIPTION.decode(said)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False
    return True
