# SPDX-License-Identifier: Apache-2.0
"""The relay: what connects here is connected on, in order, and carried until both ends close.

    accept -> [peer listen: read the hello] -> opener: dial, [peer connect: exchange hellos] -> Link

One opener for all, one connection after the other: QEMU up to 7.2 takes the first connection that
it gets for the main one, so the order of arrival is kept, over two relays too: the listening one
answers a hello only once its own connection stands.
"""

from __future__ import annotations

import contextlib
import enum
import os
import queue
import secrets
import select
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from vmth.channel.sockets import LinkOptions, ListeningSocket, dial
from vmth.errors import StreamError, UsageError, let_frames_go
from vmth.options import check_plaintext
from vmth.qemu.relay.ends import Breaker, End, FramedEnd, PlainEnd
from vmth.qemu.relay.frames import DamageError, Hello, can_compress
from vmth.qemu.relay.link import Link, LinkState
from vmth.qemu.relay.migration import MigrationNotes
from vmth.qemu.relay.observe import ConnectionWatch, Observer
from vmth.qemu.relay.peer import connecting_end, listening_end, read_hello, refuse
from vmth.qemu.relay.report import ConnectionReport, RelayReport, migration_lines
from vmth.uri import Endpoint, Scheme, parse_endpoint

__all__ = ["MAX_CONNECTIONS", "Peer", "Relay", "RelayOptions"]

#: Carried at once; further ones wait to be accepted.
MAX_CONNECTIONS = 1024
ACCEPT_PAUSE_MS = 100
#: For parsing what was carried when everything is over.
OBSERVE_REST_S = 30.0
#: For threads to end; one that is still dialing is left to the end of the process.
JOIN_S = 2.0
RESET_LINGER = struct.pack("ii", 1, 0)


class Peer(enum.Enum):
    """On which side the other end is a relay too, so that frames travel there."""

    CONNECT = "connect"
    LISTEN = "listen"


def _relay_link() -> LinkOptions:
    # A destination that stops reading for a while is no lost one: QEMU sets no such limit either.
    return LinkOptions(user_timeout_ms=0)


@dataclass(frozen=True, slots=True)
class RelayOptions:
    """``compress``: what this relay sends to its peer. ``once``: end when connections that carried
    something have closed and none is open."""

    listen: str
    connect: str
    peer: Peer | None = None
    compress: bool = False
    once: bool = False
    insecure: bool = False
    link: LinkOptions = field(default_factory=_relay_link)

    def __post_init__(self) -> None:
        if self.compress and self.peer is None:
            raise UsageError("--compress needs a relay at the other end too: --peer connect|listen")
        if self.compress and not can_compress():
            raise UsageError("--compress: zstandard is not installed (pip install vmth[qemu])")

    def endpoints(self) -> tuple[Endpoint, Endpoint]:
        """Where to listen and where to connect. Raises UsageError."""
        listen, connect = parse_endpoint(self.listen, listening=True), parse_endpoint(self.connect)
        for endpoint in (listen, connect):
            if endpoint.scheme is Scheme.FD:
                raise UsageError(f"{endpoint.display}: a relay's URI may be tcp: or unix:")
        return listen, connect


@dataclass(slots=True, eq=False)
class _Carried:
    """A connection from its acceptance on."""

    number: int
    peer: str
    sock: socket.socket
    watch: ConnectionWatch
    group: int = 0
    hello: Hello | None = None
    link: Link | None = None


class Relay:
    """Listens from its construction on; ``start()`` carries. Thread-safe; its owner calls
    ``finish()`` at last. Raises UsageError or ChannelError if it cannot listen.

    ``say`` is told each broken connection and each migration that ended, from the threads here.
    """

    def __init__(self, options: RelayOptions, say: Callable[[str], None] = lambda line: None):
        listen, self._connect = options.endpoints()
        options.link.check_for(self._connect)
        plaintext = [check_plaintext(end, options.insecure) for end in (listen, self._connect)]
        self._options = options
        self._say = say
        self._relay_id = secrets.token_bytes(16)
        self._socket = ListeningSocket(listen, options.link)
        self.endpoint = self._socket.endpoint
        self._report = RelayReport(
            self.endpoint.display,
            self._connect.display,
            options.peer.value if options.peer else None,
            options.compress,
            [text for text in plaintext if text is not None],
        )
        self._observer = Observer(self._migration_ended)
        self._lock = threading.Lock()
        self._open: dict[int, _Carried] = {}
        self._carried_any = self._stopping = self._finished = False
        self._break_reason = ""
        self._over = threading.Event()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._to_open: queue.SimpleQueue[_Carried | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._accept_loop, name="vmth-accept", daemon=True),
            threading.Thread(target=self._open_loop, name="vmth-open", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until the relay is over: ``once`` is fulfilled, or it was stopped and nothing is open."""
        return self._over.wait(timeout_s)

    def stop(self) -> int:
        """Accept no more; what is open is carried to its end. How many connections that are."""
        with self._lock:
            self._stopping = True
            self._wake_up()
            count = len(self._open)
        self._check_over()
        return count

    def break_all(self, reason: str, *, interrupted: bool = False) -> None:
        """Stop, and reset every open connection at both ends."""
        with self._lock:
            self._stopping, self._break_reason = True, reason
            self._report.interrupted |= interrupted and bool(self._open)
            self._wake_up()
            links = [carried.link for carried in self._open.values()]
        for link in links:
            if link is not None:
                link.fail(reason)
        self._check_over()

    def finish(self) -> RelayReport:
        """Stop listening, and report once what was carried has been looked at. What is still open
        is left to the end of the process, and counted. Idempotent."""
        if self._finished:
            return self._report
        self.stop()
        self._to_open.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(JOIN_S)
        self._socket.close()
        with self._lock:
            self._finished = True
            os.close(self._wake)
        if not self._observer.close(OBSERVE_REST_S):
            self._report.fallbacks.append("the observer did not keep up: the sums are incomplete")
        self._report.open_connections = len(self._open)
        return self._report

    def _wake_up(self) -> None:
        if not self._finished:
            os.eventfd_write(self._wake, 1)

    # ---- accepting -----------------------------------------------------------------------------

    def _accept_loop(self) -> None:
        poll = select.poll()
        poll.register(self._socket.sock, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        self._socket.sock.setblocking(False)
        troubled = False  # said once until it works again
        with self._socket:  # at the end nobody can connect any more
            while not self._stopping:
                poll.poll()
                if len(self._open) >= MAX_CONNECTIONS:
                    self._pause()
                    continue
                try:
                    sock, peer = self._socket.accept()
                except BlockingIOError:
                    continue
                except OSError as error:  # out of descriptors, or gone before it was accepted
                    if not troubled:
                        self._say(f"connections cannot be accepted: {error}")
                    troubled = True
                    self._pause()
                    continue
                troubled = False
                self._accepted(sock, peer)

    def _pause(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.poll(ACCEPT_PAUSE_MS)

    def _accepted(self, sock: socket.socket, peer: str) -> None:
        sock.setblocking(True)
        pid = _peer_pid(sock)
        key = ("pid", pid) if pid else None
        with self._lock:
            self._report.connections += 1
            number = self._report.connections
            carried = _Carried(number, peer, sock, self._observer.watch(number, key), pid)
            self._open[number] = carried
        if self._options.peer is Peer.LISTEN:
            threading.Thread(
                target=self._greeted, args=(carried,), name=f"vmth-hello-{number}", daemon=True
            ).start()
        else:
            self._to_open.put(carried)

    def _greeted(self, carried: _Carried) -> None:
        try:
            carried.hello = hello = read_hello(carried.sock)
        except (OSError, StreamError) as error:
            self._failed(carried, f"from {carried.peer}: {error}", error)
            return
        carried.watch.key = ("peer", hello.relay_id, hello.group)
        self._to_open.put(carried)

    # ---- opening -------------------------------------------------------------------------------

    def _open_loop(self) -> None:
        while (carried := self._to_open.get()) is not None:
            try:
                self._open_one(carried)
            except (OSError, StreamError, UsageError) as error:
                reason = f"to {self._connect.display}: {error}"
                if carried.hello is not None:
                    with contextlib.suppress(OSError):
                        refuse(carried.sock, carried.hello, reason, relay_id=self._relay_id)
                self._failed(carried, reason, error)

    def _open_one(self, carried: _Carried) -> None:
        with contextlib.ExitStack() as undo:
            far_sock = dial(self._connect, self._options.link)
            undo.callback(far_sock.close)
            breaker = Breaker()
            undo.callback(breaker.close)
            near, far = self._ends(carried, far_sock, breaker)
            undo.pop_all()
        link = Link(
            f"vmth-c{carried.number}",
            near,
            far,
            breaker,
            watcher=carried.watch,
            on_closed=lambda link: self._closed(carried, link),
        )
        with self._lock:
            carried.link = link
            reason = self._break_reason
        if reason:
            link.fail(reason)
        link.start()

    def _ends(
        self, carried: _Carried, far_sock: socket.socket, breaker: Breaker
    ) -> tuple[End, End]:
        near_name, far_name = f"from {carried.peer}", f"to {self._connect.display}"
        peer, compress = self._options.peer, self._options.compress
        far: End
        if peer is Peer.CONNECT:
            far = connecting_end(
                far_sock,
                far_name,
                breaker,
                relay_id=self._relay_id,
                connection=carried.number,
                group=carried.group,
                compress=compress,
            )
            return PlainEnd(carried.sock, near_name, breaker), far
        far = PlainEnd(far_sock, far_name, breaker)
        if carried.hello is None:
            return PlainEnd(carried.sock, near_name, breaker), far
        near = listening_end(
            carried.sock,
            near_name,
            breaker,
            carried.hello,
            relay_id=self._relay_id,
            compress=compress,
        )
        return near, far

    # ---- closing -------------------------------------------------------------------------------

    def _failed(self, carried: _Carried, reason: str, error: BaseException) -> None:
        """It never was carried: reset who connected."""
        let_frames_go(error)
        with contextlib.suppress(OSError):
            if carried.sock.family != socket.AF_UNIX and carried.hello is None:
                carried.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_LINGER)
        carried.sock.close()
        report = ConnectionReport(carried.number, carried.peer, state=LinkState.BROKEN.value)
        report.reason, report.damaged = reason, isinstance(error, DamageError)
        self._gone(carried, report, counts=True)

    def _closed(self, carried: _Carried, link: Link) -> None:
        report = ConnectionReport(carried.number, carried.peer, state=link.state.value)
        report.reason, report.damaged = link.reason, link.damaged
        report.forward_bytes = link.counters.forward_bytes
        report.backward_bytes = link.counters.backward_bytes
        for end in (link.near, link.far):
            if isinstance(end, FramedEnd):
                report.wire_sent_bytes = end.wire_sent_bytes
                report.wire_received_bytes = end.wire_received_bytes
        carried_bytes = report.forward_bytes + report.backward_bytes
        self._gone(carried, report, counts=carried_bytes > 0)

    def _gone(self, carried: _Carried, report: ConnectionReport, *, counts: bool) -> None:
        carried.watch.flush()
        self._observer.put(lambda: self._note(carried.watch, report))
        with self._lock:
            self._carried_any |= counts
            del self._open[carried.number]
        self._check_over()

    def _check_over(self) -> None:
        with self._lock:
            over = self._stopping or (self._options.once and self._carried_any)
            if over and not self._open:
                self._over.set()

    # ---- the observer's thread -----------------------------------------------------------------

    def _note(self, watch: ConnectionWatch, report: ConnectionReport) -> None:
        report.role = watch.role
        report.channel = watch.parser.channel if watch.parser is not None else None
        self._report.add_connection(report)
        if report.reason:
            self._say(f"connection {report.number} broken: {report.reason}")
        self._observer.left(watch)

    def _migration_ended(self, notes: MigrationNotes) -> None:
        self._report.add_migration(notes)
        for line in migration_lines(notes):
            self._say(line)


def _peer_pid(sock: socket.socket) -> int:
    """The process that connected over a unix socket; 0 if that is not known."""
    if sock.family != socket.AF_UNIX:
        return 0
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", raw)[0]
    return max(pid, 0)
