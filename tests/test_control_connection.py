# SPDX-License-Identifier: Apache-2.0
"""The control connection over a socket pair: order, liveness, hostile bytes, and its ends."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator

import pytest

from vmth.channel.control import ControlConnection
from vmth.errors import CancelledError, ChannelError, StreamError, VmthError
from vmth.wire.framing import FrameDecoder, FrameEncoder
from vmth.wire.messages import Abort, AbortCode, Message, Ping, Pong, RoundDone


@pytest.fixture
def pair() -> Iterator[tuple[ControlConnection, socket.socket, queue.Queue[VmthError]]]:
    ours, theirs = socket.socketpair()
    failures: queue.Queue[VmthError] = queue.Queue()
    control = ControlConnection(ours, peer_timeout_s=5, on_failure=failures.put)
    control.start()
    theirs.settimeout(5)
    yield control, theirs, failures
    control.close()
    theirs.close()


Pair = tuple[ControlConnection, socket.socket, "queue.Queue[VmthError]"]


def read_message(sock: socket.socket) -> Message:
    decoder = FrameDecoder()
    while (message := decoder.next_message()) is None:
        decoder.feed(sock.recv(1))
    return message


def test_messages_arrive_in_order_and_pings_are_answered(pair: Pair) -> None:
    control, theirs, _ = pair
    encoder = FrameEncoder()
    messages = [RoundDone(number, 2, 3, 4) for number in range(200)]
    theirs.sendall(b"".join(encoder.encode(message) for message in [*messages[:100], Ping(7)]))
    assert [control.receive(5) for _ in range(100)] == messages[:100]
    assert read_message(theirs) == Pong(7)
    theirs.sendall(b"".join(encoder.encode(message) for message in messages[100:]))
    assert [control.receive(5) for _ in range(100)] == messages[100:]


def test_a_full_inbox_slows_the_peer_down_and_loses_nothing(pair: Pair) -> None:
    control, theirs, _ = pair
    messages = [RoundDone(number, 2, 3, 4) for number in range(5000)]
    data = b"".join(FrameEncoder().encode(message) for message in messages)
    sender = threading.Thread(target=theirs.sendall, args=(data,))
    sender.start()
    assert [control.receive(5) for _ in messages] == messages
    sender.join()


def test_messages_before_the_end_are_delivered_and_the_end_stays(pair: Pair) -> None:
    control, theirs, failures = pair
    abort = Abort(AbortCode.FAILED, "enough")
    theirs.sendall(FrameEncoder().encode(abort))
    theirs.close()
    assert control.receive(5) == abort
    for _ in range(3):
        with pytest.raises(ChannelError, match="closed the control connection"):
            control.receive(5)
    assert "closed" in str(failures.get(timeout=5))
    with pytest.raises(ChannelError):
        control.send(abort)


@pytest.mark.parametrize("cut", [1, 15, 16, 17])
def test_an_end_inside_a_frame_is_a_stream_error(pair: Pair, cut: int) -> None:
    control, theirs, _ = pair
    theirs.sendall(FrameEncoder().encode(Abort(AbortCode.FAILED, "enough"))[:cut])
    theirs.close()
    with pytest.raises(StreamError, match="ended inside a frame"):
        control.receive(5)


def test_damage_at_any_byte_is_a_stream_error() -> None:
    frame = FrameEncoder().encode(Abort(AbortCode.FAILED, "enough"))
    for position in range(len(frame)):
        damaged = bytearray(frame)
        damaged[position] ^= 0x10
        ours, theirs = socket.socketpair()
        control = ControlConnection(ours, peer_timeout_s=5)
        control.start()
        theirs.sendall(damaged)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(StreamError, match="control connection"):
            control.receive(5)
        control.close()
        theirs.close()


def test_a_silent_peer_is_found_although_tcp_is_content() -> None:
    ours, theirs = socket.socketpair()
    failures: queue.Queue[VmthError] = queue.Queue()
    control = ControlConnection(ours, peer_timeout_s=0.2, on_failure=failures.put)
    control.start()
    with pytest.raises(ChannelError, match="went silent"):
        control.receive(5)
    assert isinstance(failures.get(timeout=5), ChannelError)
    assert read_message(theirs) == Ping(1)
    control.close()
    theirs.close()


def test_two_idle_ends_keep_each_other_alive() -> None:
    ours, theirs = socket.socketpair()
    ends = [ControlConnection(sock, peer_timeout_s=0.2) for sock in (ours, theirs)]
    for end in ends:
        end.start()
    with pytest.raises(ChannelError, match="no answer"):
        ends[0].receive(0.6)  # three peer timeouts of silence between the owners
    ends[0].send(Pong(0))
    ends[0].send(RoundDone(1, 2, 3, 4))
    assert ends[1].receive(5) == RoundDone(1, 2, 3, 4)
    for end in ends:
        end.close()


def test_an_interrupt_wakes_a_receiver_once(pair: Pair) -> None:
    control, theirs, _ = pair
    woken: queue.Queue[object] = queue.Queue()

    def receive() -> None:
        try:
            woken.put(control.receive())
        except VmthError as error:
            woken.put(error)

    thread = threading.Thread(target=receive)
    thread.start()
    control.interrupt(CancelledError("enough"))
    assert isinstance(woken.get(timeout=5), CancelledError)
    thread.join()
    theirs.sendall(FrameEncoder().encode(RoundDone(1, 2, 3, 4)))
    assert control.receive(5) == RoundDone(1, 2, 3, 4)


def test_close_ends_the_reader_even_with_a_full_inbox(pair: Pair) -> None:
    control, theirs, failures = pair
    theirs.sendall(b"".join(FrameEncoder().encode(RoundDone(n, 2, 3, 4)) for n in range(500)))
    control.close()
    assert failures.empty()
    assert not any(thread.name == "vmth-control" for thread in threading.enumerate())
