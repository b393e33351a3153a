# SPDX-License-Identifier: Apache-2.0
"""The return path: what the destination says to the source, on the main connection's other way.

be16 type | be16 length (at most 512) | data      RECV_BITMAP: then be64 n, n bytes, be64 end mark
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TypeAlias

from vmth.errors import StreamError, UsageError
from vmth.qemu.stream.fields import (
    BE16,
    BE32,
    BE64,
    be,
    bound,
    expect,
    string_at,
    wire_string,
)
from vmth.qemu.stream.window import ShortError, Window

__all__ = [
    "PageRequest",
    "Pong",
    "ReceivedBitmap",
    "ResumeAck",
    "ReturnMessage",
    "ReturnPathReader",
    "ReturnType",
    "Shut",
    "SwitchoverAck",
    "encode_return_message",
]

MAX_DATA_BYTES = 512
MAX_BITMAP_BYTES = 1 << 30
BITMAP_END = 0x0123456789ABCDEF
REQUEST_BYTES = 12


class ReturnType(enum.IntEnum):
    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7


@dataclass(frozen=True, slots=True)
class Shut:
    """The last message; ``status`` 0: the destination has loaded everything."""

    status: int


@dataclass(frozen=True, slots=True)
class Pong:
    """The echo of a PING."""

    value: int


@dataclass(frozen=True, slots=True)
class PageRequest:
    """Postcopy: send these bytes first. ``idstr`` None: the block of the request before."""

    start: int
    nbytes: int
    idstr: str | None


@dataclass(frozen=True, slots=True)
class ReceivedBitmap:
    """Which pages of a block have arrived: little-endian words, one bit a page."""

    idstr: str
    bitmap: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ResumeAck:
    value: int


@dataclass(frozen=True, slots=True)
class SwitchoverAck:
    """The destination is ready to be switched to (8.1 and later)."""


ReturnMessage: TypeAlias = Shut | Pong | PageRequest | ReceivedBitmap | ResumeAck | SwitchoverAck


class ReturnPathReader:
    """``feed()`` bytes, take ``next_message()``; None when more are needed.

    Raises StreamError for anything that a destination may not say, then always.
    """

    def __init__(self) -> None:
        self._window = Window()
        self._want = 1
        self._failure: StreamError | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        self._window.feed(data)

    def feed_eof(self) -> None:
        self._window.eof = True

    def next_message(self) -> ReturnMessage | None:
        if self._failure is not None:
            raise self._failure
        try:
            return self._next()
        except StreamError as error:
            self._failure = error
            raise

    def _next(self) -> ReturnMessage | None:
        window = self._window
        while window.available:
            if window.available < self._want:
                break
            window.gather(self._want)
            with window.view() as view:
                try:
                    message, used = _message(view)
                except ShortError as short:
                    self._want = short.need
                    continue
            window.use(used)
            self._want = 1
            return message
        if window.eof and window.available:
            raise StreamError(
                f"return path ends within a message: received {window.available} bytes, "
                f"needs {self._want}"
            )
        return None


def _message(view: memoryview) -> tuple[ReturnMessage, int]:
    kind, nbytes = be(view, 0, 2), be(view, 2, 2)
    bound("return path message", nbytes, MAX_DATA_BYTES)
    end = 4 + nbytes
    if len(view) < end:
        raise ShortError(end)
    if kind == ReturnType.SHUT:
        expect("SHUT length", nbytes, 4)
        return Shut(be(view, 4, 4)), end
    if kind == ReturnType.PONG:
        expect("PONG length", nbytes, 4)
        return Pong(be(view, 4, 4)), end
    if kind == ReturnType.REQ_PAGES:
        expect("REQ_PAGES length", nbytes, REQUEST_BYTES)
        return PageRequest(be(view, 4, 8), be(view, 12, 4), None), end
    if kind == ReturnType.REQ_PAGES_ID:
        return PageRequest(be(view, 4, 8), be(view, 12, 4), _whole(view, 16, end)), end
    if kind == ReturnType.RECV_BITMAP:
        return _bitmap(view, _whole(view, 4, end), end)
    if kind == ReturnType.RESUME_ACK:
        expect("RESUME_ACK length", nbytes, 4)
        return ResumeAck(be(view, 4, 4)), end
    if kind == ReturnType.SWITCHOVER_ACK:
        expect("SWITCHOVER_ACK length", nbytes, 0)
        return SwitchoverAck(), end
    raise StreamError(f"return path message: received type {kind}, allowed 1 to 7")


def _whole(view: memoryview, at: int, end: int) -> str:
    """The string from ``at`` to the message's end."""
    if at >= end:
        raise StreamError(f"return path message: received {end} bytes, needs {at + 1}")
    expect("length of the block's name", at + 1 + view[at], end)
    return string_at(view, at)[0]


def _bitmap(view: memoryview, idstr: str, at: int) -> tuple[ReceivedBitmap, int]:
    nbytes = bound("bitmap", be(view, at, 8), MAX_BITMAP_BYTES)
    if nbytes % 8:
        raise StreamError(f"bitmap: received {nbytes} bytes, allowed a multiple of 8")
    begin = at + 8
    expect("end mark of the bitmap", be(view, begin + nbytes, 8), BITMAP_END)
    return ReceivedBitmap(idstr, bytes(view[begin : begin + nbytes])), begin + nbytes + 8


def encode_return_message(message: ReturnMessage) -> bytes:
    """The message's bytes. Raises UsageError for what does not fit."""
    behind = b""
    match message:
        case Shut():
            kind, data = ReturnType.SHUT, BE32.pack(message.status)
        case Pong():
            kind, data = ReturnType.PONG, BE32.pack(message.value)
        case PageRequest():
            data = BE64.pack(message.start) + BE32.pack(message.nbytes)
            kind = ReturnType.REQ_PAGES
            if message.idstr is not None:
                kind, data = ReturnType.REQ_PAGES_ID, data + wire_string(message.idstr)
        case ReceivedBitmap():
            if len(message.bitmap) % 8:
                raise UsageError(f"bitmap of {len(message.bitmap)} bytes, not a multiple of 8")
            kind, data = ReturnType.RECV_BITMAP, wire_string(message.idstr)
            behind = BE64.pack(len(message.bitmap)) + message.bitmap + BE64.pack(BITMAP_END)
        case ResumeAck():
            kind, data = ReturnType.RESUME_ACK, BE32.pack(message.value)
        case SwitchoverAck():
            kind, data = ReturnType.SWITCHOVER_ACK, b""
    return BE16.pack(kind) + BE16.pack(len(data)) + data + behind
