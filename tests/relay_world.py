# SPDX-License-Identifier: Apache-2.0
"""Links between socketpairs, for the relay's tests: two QEMUs' sockets and what is between."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from vmth.qemu.relay.ends import Breaker, FramedEnd, PlainEnd
from vmth.qemu.relay.frames import HEADER_BYTES, HelloRole, frame_seed
from vmth.qemu.relay.link import Link, LinkWatcher

TIMEOUT_S = 30
TOKEN = 0x1122334455667788
#: Changes what one relay sends to the other: (frames as they are, in order) to what arrives.
Meddle = Callable[[list[bytes]], list[bytes]]


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far


@dataclass
class Carried:
    """``source`` and ``destination`` are the QEMUs' sockets, ``links`` what is between them."""

    source: socket.socket
    destination: socket.socket
    links: list[Link]
    tcp: list[socket.socket] = field(default_factory=list)

    def joined(self) -> list[Link]:
        for link in self.links:
            assert link.join(TIMEOUT_S)
        return self.links


@contextmanager
def carried(
    *, peers: bool, compress: bool = False, tcp: bool = False, watcher: LinkWatcher | None = None
) -> Iterator[Carried]:
    """A connection that is carried by one relay's link, or by two with frames between them."""
    pair = tcp_pair if tcp else socket.socketpair
    with ExitStack() as stack:
        source, near = pair()
        far, destination = pair()
        if peers:
            one, two = tcp_pair()
            first, second = Breaker(), Breaker()
            links = [
                Link(
                    "first",
                    PlainEnd(near, "source", first),
                    framed(one, first, HelloRole.CONNECTING, compress=compress),
                    first,
                    watcher=watcher,
                ),
                Link(
                    "second",
                    framed(two, second, HelloRole.LISTENING),
                    PlainEnd(far, "destination", second),
                    second,
                ),
            ]
        else:
            breaker = Breaker()
            links = [
                Link(
                    "only",
                    PlainEnd(near, "source", breaker),
                    PlainEnd(far, "destination", breaker),
                    breaker,
                    watcher=watcher,
                )
            ]
        for sock in (source, destination):
            sock.settimeout(TIMEOUT_S)
            stack.callback(sock.close)
        for link in links:
            stack.callback(_over, link)
            link.start()
        yield Carried(source, destination, links)


def _over(link: Link) -> None:
    link.fail("the test is over")
    assert link.join(TIMEOUT_S)


def framed(
    sock: socket.socket, breaker: Breaker, role: HelloRole, *, compress: bool = False
) -> FramedEnd:
    other = HelloRole.LISTENING if role is HelloRole.CONNECTING else HelloRole.CONNECTING
    return FramedEnd(
        sock,
        "the other relay",
        breaker,
        send_seed=frame_seed(TOKEN, role),
        receive_seed=frame_seed(TOKEN, other),
        compress=compress,
    )


def send_in_pieces(sock: socket.socket, pieces: Sequence[bytes]) -> threading.Thread:
    """In a thread of its own, then half-close."""

    def run() -> None:
        for piece in pieces:
            sock.sendall(piece)
        sock.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def fill_up(sock: socket.socket, data: bytes) -> int:
    """Send without waiting until nothing more is taken. How many bytes were; as it was before."""
    sock.setblocking(False)
    taken = 0
    try:
        while True:
            taken += sock.send(data)
    except BlockingIOError:
        sock.settimeout(TIMEOUT_S)
        return taken


def send_for_ever(sock: socket.socket) -> None:
    while True:
        sock.sendall(bytes(1 << 16))


def read_to_end(sock: socket.socket) -> bytes:
    received = bytearray()
    while data := sock.recv(1 << 16):
        received += data
    return bytes(received)


def read_to_break(sock: socket.socket) -> bytes:
    """What arrives before a reset or an end."""
    received = bytearray()
    try:
        while data := sock.recv(1 << 16):
            received += data
    except ConnectionResetError:
        pass
    return bytes(received)


@contextmanager
def relay_process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``vmth relay --json`` as a process of its own, and the address that it listens on."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vmth", "relay", "--json", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        yield process, process.stderr.readline().split()[-1]
    finally:
        process.kill()
        process.communicate()


def frames_of(data: bytes) -> list[bytes]:
    """Cut at the frames' edges, by their length fields."""
    frames, at = [], 0
    while at < len(data):
        nbytes = HEADER_BYTES + int.from_bytes(data[at + 16 : at + 20], "little")
        frames.append(data[at : at + nbytes])
        at += nbytes
    return frames
