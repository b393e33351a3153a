# SPDX-License-Identifier: Apache-2.0
"""The hellos that two relays exchange before frames: who listens answers once its side stands."""

from __future__ import annotations

import secrets
import socket
import time

from vmth.errors import ChannelError, StreamError
from vmth.qemu.relay.ends import Breaker, FramedEnd
from vmth.qemu.relay.frames import (
    FEATURE_ZSTD,
    HELLO_BYTES,
    VERSION,
    VERSION_MIN,
    FrameKind,
    FrameReader,
    FrameWriter,
    Hello,
    HelloRole,
    HelloStatus,
    can_compress,
    check_hello,
    decode_hello,
    encode_hello,
    frame_seed,
)

__all__ = ["HELLO_TIMEOUT_S", "connecting_end", "listening_end", "read_hello", "refuse"]

HELLO_TIMEOUT_S = 10.0
#: The listening relay dials before it answers.
ANSWER_TIMEOUT_S = 30.0


def connecting_end(
    sock: socket.socket,
    name: str,
    breaker: Breaker,
    *,
    relay_id: bytes,
    connection: int,
    group: int,
    compress: bool,
) -> FramedEnd:
    """Greet, and wait until the listening relay has connected on. Raises ChannelError, StreamError
    or OSError; the socket stays the caller's then."""
    hello = Hello(
        HelloRole.CONNECTING,
        HelloStatus.GO_ON,
        VERSION_MIN,
        VERSION,
        FEATURE_ZSTD if can_compress() else 0,
        relay_id,
        secrets.randbits(63) + 1,
        connection,
        group,
    )
    sock.settimeout(HELLO_TIMEOUT_S)
    sock.sendall(encode_hello(hello))
    answer = decode_hello(_take(sock, HELLO_BYTES, ANSWER_TIMEOUT_S), HelloRole.LISTENING)
    if answer.status is HelloStatus.REFUSED:
        raise ChannelError(f"the other relay refuses: {_refusal(sock, hello.token)}")
    check_hello(answer)
    if answer.token != hello.token:
        raise StreamError("relay hello: the answer is another connection's")
    return _framed(sock, name, breaker, hello.token, HelloRole.CONNECTING, compress, answer)


def read_hello(sock: socket.socket) -> Hello:
    """The connecting relay's. Raises StreamError, ChannelError or OSError."""
    hello = decode_hello(_take(sock, HELLO_BYTES, HELLO_TIMEOUT_S), HelloRole.CONNECTING)
    check_hello(hello)
    return hello


def listening_end(
    sock: socket.socket,
    name: str,
    breaker: Breaker,
    hello: Hello,
    *,
    relay_id: bytes,
    compress: bool,
) -> FramedEnd:
    """Tell the connecting relay to go on. Raises as ``connecting_end()``."""
    if compress and not hello.features & FEATURE_ZSTD:
        raise StreamError(_CANNOT_READ)
    sock.settimeout(HELLO_TIMEOUT_S)
    sock.sendall(encode_hello(_answer(hello, HelloStatus.GO_ON, relay_id)))
    return _framed(sock, name, breaker, hello.token, HelloRole.LISTENING, compress, hello)


def refuse(sock: socket.socket, hello: Hello, reason: str, *, relay_id: bytes) -> None:
    """Tell the connecting relay why not. Raises OSError."""
    writer = FrameWriter(frame_seed(hello.token, HelloRole.LISTENING))
    sock.settimeout(HELLO_TIMEOUT_S)
    answer = encode_hello(_answer(hello, HelloStatus.REFUSED, relay_id))
    sock.sendall(answer + b"".join(writer.reset(reason)))


_CANNOT_READ = (
    "compressed frames were asked for, and the other relay cannot read them: zstandard is not "
    "installed there (vmth[qemu])"
)


def _answer(hello: Hello, status: HelloStatus, relay_id: bytes) -> Hello:
    features = FEATURE_ZSTD if can_compress() else 0
    return Hello(
        HelloRole.LISTENING,
        status,
        VERSION,
        VERSION,
        features,
        relay_id,
        hello.token,
        hello.connection,
        hello.group,
    )


def _framed(
    sock: socket.socket,
    name: str,
    breaker: Breaker,
    token: int,
    role: HelloRole,
    compress: bool,
    other: Hello,
) -> FramedEnd:
    if compress and not other.features & FEATURE_ZSTD:
        raise StreamError(_CANNOT_READ)
    return FramedEnd(
        sock,
        name,
        breaker,
        send_seed=frame_seed(token, role),
        receive_seed=frame_seed(token, other.role),
        compress=compress,
    )


def _refusal(sock: socket.socket, token: int) -> str:
    seed = frame_seed(token, HelloRole.LISTENING)
    frame = FrameReader(seed, lambda nbytes: _take(sock, nbytes, HELLO_TIMEOUT_S)).next_frame()
    return frame.reason() if frame.kind is FrameKind.RESET else "without a reason"


def _take(sock: socket.socket, nbytes: int, timeout_s: float) -> memoryview:
    """Exactly so many bytes within the time, however they are dripped."""
    deadline = time.monotonic() + timeout_s
    view = memoryview(bytearray(nbytes))
    at = 0
    while at < nbytes:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            got = sock.recv_into(view[at:])
        except TimeoutError:
            raise ChannelError(
                f"no answer to the relay's hello within {timeout_s:g} s (is the other end a vmth "
                "relay with --peer?)"
            ) from None
        if got == 0:
            raise ChannelError("the other end closed instead of a relay's hello")
        at += got
    return view
