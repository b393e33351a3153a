# SPDX-License-Identifier: Apache-2.0
"""One carried connection, between socketpairs: every byte, every ending, bounded in flight."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from relay_world import (
    TIMEOUT_S,
    TOKEN,
    carried,
    fill_up,
    framed,
    frames_of,
    read_to_break,
    read_to_end,
    send_for_ever,
    send_in_pieces,
    tcp_pair,
)

from vmth.qemu.relay import frames as f
from vmth.qemu.relay.ends import BUFFER_BYTES, Breaker, End, PlainEnd
from vmth.qemu.relay.link import Direction, Link, LinkState

PEERS = pytest.mark.parametrize("peers", [False, True], ids=["plain", "peers"])
TCP = pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])


def pieces_of(seed: int, count: int, most: int) -> list[bytes]:
    chance = random.Random(seed)
    return [chance.randbytes(chance.randrange(1, most)) for _ in range(count)]


@given(
    st.lists(st.integers(1, 70_000), max_size=8),
    st.lists(st.integers(1, 3_000), max_size=8),
    st.sampled_from(["plain", "peers", "compressed"]),
    st.integers(0, 2**32),
)
@settings(max_examples=12, deadline=None)
def test_every_byte_arrives_however_it_is_cut(
    forth: list[int], back: list[int], mode: str, seed: int
) -> None:
    chance = random.Random(seed)
    there = [chance.choice((chance.randbytes(n), b"a" * n)) for n in forth]
    here = [chance.randbytes(n) for n in back]
    with carried(peers=mode != "plain", compress=mode == "compressed") as world:
        senders = [
            send_in_pieces(world.source, there),
            send_in_pieces(world.destination, here),
        ]
        assert read_to_end(world.destination) == b"".join(there)
        assert read_to_end(world.source) == b"".join(here)
        for sender in senders:
            sender.join(TIMEOUT_S)
        for link in world.joined():
            assert (link.state, link.reason) == (LinkState.CLOSED, "")
            assert link.counters.forward_bytes == sum(forth)
            assert link.counters.backward_bytes == sum(back)


@PEERS
@TCP
def test_half_close_is_carried_and_the_other_way_stays_open(peers: bool, tcp: bool) -> None:
    with carried(peers=peers, tcp=tcp) as world:
        world.source.sendall(b"state")
        world.source.shutdown(socket.SHUT_WR)
        assert read_to_end(world.destination) == b"state"
        world.destination.sendall(b"SHUT")
        assert world.source.recv(100) == b"SHUT"
        assert [link.state for link in world.links] == [LinkState.OPEN] * len(world.links)
        world.destination.close()
        assert world.source.recv(100) == b""
        assert {link.state for link in world.joined()} == {LinkState.CLOSED}


@PEERS
def test_a_request_is_forwarded_without_waiting_for_more(peers: bool) -> None:
    """Both ways in turn: a relay that gathered bytes would stop the exchange."""
    with carried(peers=peers, tcp=True) as world:
        for i in range(200):
            world.destination.sendall(b"request%d" % i)
            assert world.source.recv(100) == b"request%d" % i
            world.source.sendall(b"page%d" % i)
            assert world.destination.recv(100) == b"page%d" % i


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


@PEERS
@pytest.mark.parametrize("side", ["source", "destination"])
def test_reset_is_carried(peers: bool, side: str) -> None:
    with carried(peers=peers, tcp=True) as world:
        sides = {"source": world.source, "destination": world.destination}
        other = sides["destination" if side == "source" else "source"]
        sides[side].sendall(b"last words")
        assert other.recv(100) == b"last words"
        reset(sides[side])
        with pytest.raises(ConnectionResetError):
            other.recv(100)
        links = world.joined()
        assert {link.state for link in links} == {LinkState.BROKEN}
        assert not any(link.damaged for link in links)
        assert any(link.reason.startswith(f"{side}: ") for link in links)


@PEERS
def test_last_words_of_a_destination_that_fails_arrive(peers: bool) -> None:
    """It says why, then closes with bytes unread: the source reads that before its writes fail."""
    with carried(peers=peers) as world:
        world.destination.sendall(b"SHUT 1")
        world.destination.close()
        assert read_to_end(world.source) == b"SHUT 1"
        with pytest.raises(OSError) as caught:
            send_for_ever(world.source)
        assert caught.value.errno in (errno.EPIPE, errno.ECONNRESET)
        assert {link.state for link in world.joined()} == {LinkState.BROKEN}


class HeldEnd:
    """An end whose reader has stopped: ``send`` waits until it is let go."""

    name = "held"

    def __init__(self) -> None:
        self.entered, self.let_go = threading.Event(), threading.Event()
        self.received = bytearray()
        self._over = threading.Event()

    def receive(self) -> bytes:
        assert self._over.wait(TIMEOUT_S)
        return b""

    def send(self, data: memoryview | bytes) -> None:
        self.entered.set()
        assert self.let_go.wait(TIMEOUT_S)
        self.received += data

    def finish(self) -> None:
        self._over.set()

    def delivered(self) -> None:
        pass

    def heed(self, source: End) -> None:
        pass

    def stop_reading(self) -> None:
        pass

    def abort(self, reason: str) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_slow_reader_holds_the_source_back() -> None:
    source, near = socket.socketpair()
    breaker, held = Breaker(), HeldEnd()
    link = Link("slow", PlainEnd(near, "source", breaker), held, breaker)
    capacity = near.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    link.start()
    source.sendall(b"first")
    assert held.entered.wait(TIMEOUT_S)
    taken = 5 + fill_up(source, bytes(1 << 20))
    # What the relay itself holds is one buffer; the rest is the socket's own.
    assert taken <= BUFFER_BYTES + capacity
    held.let_go.set()
    source.shutdown(socket.SHUT_WR)
    assert link.join(TIMEOUT_S)
    assert len(held.received) == taken == link.counters.forward_bytes
    source.close()


def test_breaking_wakes_a_blocked_writer_and_an_idle_reader() -> None:
    with carried(peers=True) as world:
        fill_up(world.source, bytes(1 << 20))  # nobody reads
        world.links[0].fail("asked for")
        links = world.joined()
        assert links[0].reason == "asked for"
        assert links[1].state is LinkState.BROKEN


@pytest.mark.slow
@PEERS
def test_reset_is_carried_past_a_reader_that_has_stopped(peers: bool) -> None:
    with carried(peers=peers, tcp=True) as world:
        fill_up(world.source, bytes(1 << 20))
        reset(world.source)
        assert {link.state for link in world.joined()} == {LinkState.BROKEN}
        with pytest.raises(ConnectionResetError):
            read_to_end(world.destination)


class Broken:
    """A watcher with a fault."""

    def carried(self, direction: Direction, data: memoryview | bytes) -> None:
        raise KeyError("a fault of the watcher")

    def finished(self, direction: Direction) -> None:
        raise AssertionError("told again")


def test_a_fault_of_the_watcher_breaks_nothing() -> None:
    with carried(peers=False, watcher=Broken()) as world:
        sender = send_in_pieces(world.source, pieces_of(3, 20, 5000))
        assert read_to_end(world.destination) == b"".join(pieces_of(3, 20, 5000))
        sender.join(TIMEOUT_S)
        world.destination.close()
        (link,) = world.joined()
        assert link.state is LinkState.CLOSED
        assert "a fault of the watcher" in link.watch_fault


# ---- damage between two relays -----------------------------------------------------------------


def flip(at: int) -> Callable[[list[bytes]], list[bytes]]:
    def change(frames: list[bytes]) -> list[bytes]:
        frame = bytearray(frames[1])
        frame[at] ^= 0x10
        return [frames[0], bytes(frame), *frames[2:]]

    return change


DAMAGE: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "payload": (flip(f.HEADER_BYTES + 2), "frame 1: the payload of 9 bytes is damaged"),
    "header": (flip(9), "frame 1: its header is damaged"),
    "checksum": (flip(39), "frame 1: its header is damaged"),
    "missing": (lambda frames: [frames[0], *frames[2:]], "frame 1 is missing"),
    "repeated": (lambda frames: [frames[0], *frames], "frame 0 is repeated"),
    "swapped": (lambda frames: [frames[1], frames[0], *frames[2:]], "frame 0 is missing"),
    "cut": (lambda frames: [frames[0], frames[1][:45]], "ended within a frame: received 5 bytes"),
    "ended": (lambda frames: frames[:2], "closed the connection without an end"),
    "nothing": (lambda frames: [], "closed the connection without an end"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_breaks_the_connection_at_both_ends_by_name(kind: str) -> None:
    """Frames of a sending relay are recorded, changed, and given to a receiving one."""
    change, message = DAMAGE[kind]
    writer = f.FrameWriter(f.frame_seed(TOKEN, f.HelloRole.CONNECTING))
    frames = [writer.data(piece) for piece in (b"first", b"second---"[:9], b"third")]
    whole = [b"".join(map(bytes, frame)) for frame in (*frames, writer.end())]
    link_side, wire = tcp_pair()
    far, destination = socket.socketpair()
    destination.settimeout(TIMEOUT_S)
    wire.settimeout(TIMEOUT_S)
    breaker = Breaker()
    near = framed(link_side, breaker, f.HelloRole.LISTENING)
    link = Link("damaged", near, PlainEnd(far, "destination", breaker), breaker)
    link.start()
    wire.sendall(b"".join(change(whole)))
    with contextlib.suppress(OSError):  # it may be broken by now
        wire.shutdown(socket.SHUT_WR)
    # Nothing that is not what was sent reaches QEMU; then its connection ends.
    assert b"firstsecond---third".startswith(read_to_end(destination))
    assert link.join(TIMEOUT_S)
    assert link.state is LinkState.BROKEN and message in link.reason
    assert link.damaged == (kind not in ("cut", "ended", "nothing"))
    # The sending relay is told the reason.
    (told,) = frames_of(read_to_break(wire))
    reader = f.FrameReader(
        f.frame_seed(TOKEN, f.HelloRole.LISTENING), lambda n: memoryview(told)[n != 40 and 40 :][:n]
    )
    assert message in reader.next_frame().reason()
    for sock in (wire, destination):
        sock.close()


def test_a_reset_between_relays_tells_the_reason_to_both() -> None:
    with carried(peers=True) as world:
        world.links[1].fail("the disk of this host is on fire")
        first, second = world.joined()
        assert second.reason == "the disk of this host is on fire"
        assert first.reason.endswith("the other relay says: the disk of this host is on fire")
        assert not first.damaged


@pytest.mark.parametrize(
    ("totals", "message"),
    [
        (f.Totals(4, 1), "END: the other relay counts 4 bytes in 1 frames, received here were 5"),
        (f.Totals(5, 2), "END: the other relay counts 5 bytes in 2 frames, received here were 5"),
    ],
)
def test_totals_are_compared(totals: f.Totals, message: str) -> None:
    writer = f.FrameWriter(f.frame_seed(TOKEN, f.HelloRole.CONNECTING))
    out = b"".join(map(bytes, writer.data(b"first")))
    writer.totals = totals
    link_side, wire = tcp_pair()
    breaker = Breaker()
    far, destination = socket.socketpair()
    near = framed(link_side, breaker, f.HelloRole.LISTENING)
    link = Link("totals", near, PlainEnd(far, "destination", breaker), breaker)
    link.start()
    wire.sendall(out + b"".join(writer.end()))
    assert link.join(TIMEOUT_S)
    assert link.damaged and message in link.reason
    for sock in (wire, destination):
        sock.close()


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (lambda w: [w.end(), w.data(b"late")], "DATA behind END"),
        (lambda w: [w.end(), w.end()], "END behind END"),
        (lambda w: [w.done(f.Totals(0, 0))], "DONE without an END"),
    ],
)
def test_frames_out_of_turn(
    frames: Callable[[f.FrameWriter], list[tuple[bytes, bytes]]], message: str
) -> None:
    writer = f.FrameWriter(f.frame_seed(TOKEN, f.HelloRole.CONNECTING))
    link_side, wire = tcp_pair()
    breaker = Breaker()
    far, destination = socket.socketpair()
    near = framed(link_side, breaker, f.HelloRole.LISTENING)
    link = Link("turn", near, PlainEnd(far, "destination", breaker), breaker)
    link.start()
    wire.sendall(b"".join(b"".join(frame) for frame in frames(writer)))
    assert link.join(TIMEOUT_S)
    assert link.damaged and message in link.reason
    for sock in (wire, destination):
        sock.close()


def test_delivery_is_confirmed_or_the_connection_counts_as_broken() -> None:
    """A relay that vanishes after all was sent but before it said DONE."""
    source, near = socket.socketpair()
    link_side, wire = tcp_pair()
    breaker = Breaker()
    far = framed(link_side, breaker, f.HelloRole.CONNECTING)
    link = Link("unconfirmed", PlainEnd(near, "source", breaker), far, breaker)
    link.start()
    source.shutdown(socket.SHUT_WR)
    back = f.FrameWriter(f.frame_seed(TOKEN, f.HelloRole.LISTENING))
    wire.sendall(b"".join(back.end()))
    wire.shutdown(socket.SHUT_WR)
    assert link.join(TIMEOUT_S)
    assert link.state is LinkState.BROKEN and "without an end" in link.reason
    for sock in (wire, source):
        sock.close()
