# SPDX-License-Identifier: Apache-2.0
"""Bytes to messages and back: the preamble of a connection, and the frames of a control connection.

    encoder: message -> 16-byte header + msgpack body        decoder: feed(bytes), next_message()

No I/O: callers bring bytes and take messages. What a peer sent wrong is a StreamError, after which
the decoder stays failed; what our own code does wrong is a UsageError. The incoming bytes are
hostile: the length is compared with its bound before the body is awaited, the checksum before the
body is read, and at most one frame and one feed are buffered. Layouts: docs/protocol.md.
"""

from __future__ import annotations

import enum
import re
import struct
import zlib
from dataclasses import dataclass

import msgspec

from vmth.errors import StreamError, UsageError
from vmth.wire.checks import ID_BYTES, MAX_CHANNELS, problem
from vmth.wire.messages import (
    MESSAGE_TYPES,
    PROTOCOL_VERSION,
    PROTOCOL_VERSION_MIN,
    Message,
    Role,
)

__all__ = [
    "HEADER_BYTES",
    "MAX_BODY_BYTES",
    "MAX_FEED_BYTES",
    "PREAMBLE_BYTES",
    "PREAMBLE_REPLY_BYTES",
    "FrameDecoder",
    "FrameEncoder",
    "Preamble",
    "PreambleError",
    "PreambleReply",
    "PreambleStatus",
    "choose_version",
]

PREAMBLE_MAGIC = b"VMTH\r\n\x1a\n"
FRAME_MAGIC = b"VMc1"
PREAMBLE_BYTES = 64
PREAMBLE_REPLY_BYTES = 32
HEADER_BYTES = 16
MAX_BODY_BYTES = (1 << 20) + (64 << 10)
#: The largest piece that feed() takes; sockets are read in far smaller ones.
MAX_FEED_BYTES = 1 << 20
MAY_BE_IGNORED = 0x8000
NO_TOKEN = bytes(ID_BYTES)

_PREAMBLE = struct.Struct("<8sHHBBH16s16s12sI")
_REPLY = struct.Struct("<8sHHHH12sI")
_HEADER = struct.Struct("<4sHHII")
_CRC = struct.Struct("<I")


class PreambleStatus(enum.IntEnum):
    """What the destination says to a preamble."""

    OK = 1
    VERSION = 2
    UNKNOWN_SESSION = 3
    BAD_TOKEN = 4
    BUSY = 5
    ROLE = 6
    MALFORMED = 7


class PreambleError(StreamError):
    """A preamble that is refused; ``status`` is what to answer before closing."""

    def __init__(self, message: str, status: PreambleStatus = PreambleStatus.MALFORMED) -> None:
        super().__init__(message)
        self.status = status


def choose_version(
    peer_min: int,
    peer_max: int,
    own_min: int = PROTOCOL_VERSION_MIN,
    own_max: int = PROTOCOL_VERSION,
) -> int:
    """The highest version in both ranges, or 0 when they do not meet."""
    highest = min(peer_max, own_max)
    return highest if highest >= max(peer_min, own_min) else 0


def _check_length(what: str, data: bytes, expected: int) -> None:
    if len(data) != expected:
        raise PreambleError(f"{what}: received {len(data)} bytes, allowed {expected}")


def _check_fixed(what: str, received: bytes, expected: bytes) -> None:
    if received != expected:
        raise PreambleError(f"{what}: received {received.hex()}, allowed {expected.hex()}")


def _check_crc(what: str, data: bytes, received: int) -> None:
    computed = zlib.crc32(data)
    if received != computed:
        raise PreambleError(f"{what} checksum: received {received:#x}, computed {computed:#x}")


def _check_id(what: str, value: bytes) -> None:
    if len(value) != ID_BYTES:
        raise UsageError(f"{what}: {len(value)} bytes given, {ID_BYTES} needed")


@dataclass(frozen=True, slots=True)
class Preamble:
    """The first 64 bytes of a connection, source to destination."""

    role: Role
    session_id: bytes
    channel: int = 0
    token: bytes = NO_TOKEN
    version_min: int = PROTOCOL_VERSION_MIN
    version_max: int = PROTOCOL_VERSION

    def pack(self) -> bytes:
        """Raises UsageError for ids of a wrong length and a channel out of range."""
        _check_id("preamble session id", self.session_id)
        _check_id("preamble token", self.token)
        last = MAX_CHANNELS - 1 if self.role == Role.PAGE else 0
        if not 0 <= self.channel <= last:
            raise UsageError(f"preamble channel: {self.channel} given, 0 to {last} allowed")
        body = _PREAMBLE.pack(
            PREAMBLE_MAGIC,
            self.version_min,
            self.version_max,
            self.role,
            0,
            self.channel,
            self.session_id,
            self.token,
            bytes(12),
            0,
        )[:-4]
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def unpack(cls, data: bytes) -> Preamble:
        """Exactly PREAMBLE_BYTES. Raises PreambleError with the status to answer."""
        _check_length("preamble", data, PREAMBLE_BYTES)
        (magic, low, high, role, reserved1, channel, session_id, token, reserved2, crc) = (
            _PREAMBLE.unpack(data)
        )
        _check_fixed("preamble magic", magic, PREAMBLE_MAGIC)
        _check_crc("preamble", data[:-4], crc)
        # A later version may lay out the rest anew: whether we speak it comes before what it says.
        if not 1 <= low <= high:
            raise PreambleError(f"preamble versions: received {low} to {high}, allowed 1 and up")
        if not choose_version(low, high):
            raise PreambleError(
                f"protocol version: received {low} to {high}, "
                f"allowed {PROTOCOL_VERSION_MIN} to {PROTOCOL_VERSION}",
                PreambleStatus.VERSION,
            )
        if role not in {member.value for member in Role}:
            raise PreambleError(
                f"preamble role: received {role}, allowed {[member.value for member in Role]}",
                PreambleStatus.ROLE,
            )
        _check_fixed("preamble reserved bytes", bytes([reserved1]) + reserved2, bytes(13))
        last = MAX_CHANNELS - 1 if role == Role.PAGE else 0
        if channel > last:
            raise PreambleError(f"preamble channel: received {channel}, allowed 0 to {last}")
        if role != Role.PAGE:
            _check_fixed("preamble token", token, NO_TOKEN)
        return cls(Role(role), session_id, channel, token, low, high)


@dataclass(frozen=True, slots=True)
class PreambleReply:
    """The destination's 32 bytes. ``version`` is 0 unless ``status`` is OK."""

    status: PreambleStatus
    version: int = 0
    version_min: int = PROTOCOL_VERSION_MIN
    version_max: int = PROTOCOL_VERSION

    def pack(self) -> bytes:
        body = _REPLY.pack(
            PREAMBLE_MAGIC,
            self.version,
            self.status,
            self.version_min,
            self.version_max,
            bytes(12),
            0,
        )[:-4]
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def unpack(cls, data: bytes) -> PreambleReply:
        """Exactly PREAMBLE_REPLY_BYTES. Raises PreambleError."""
        _check_length("preamble reply", data, PREAMBLE_REPLY_BYTES)
        magic, version, status, low, high, reserved, crc = _REPLY.unpack(data)
        _check_fixed("preamble reply magic", magic, PREAMBLE_MAGIC)
        _check_crc("preamble reply", data[:-4], crc)
        allowed = [member.value for member in PreambleStatus]
        if status not in allowed:
            raise PreambleError(f"preamble reply status: received {status}, allowed {allowed}")
        _check_fixed("preamble reply reserved bytes", reserved, bytes(12))
        ours = (
            range(PROTOCOL_VERSION_MIN, PROTOCOL_VERSION + 1)
            if status == PreambleStatus.OK
            else range(1)
        )
        if version not in ours:
            raise PreambleError(
                f"preamble reply version: received {version}, allowed {ours[0]} to {ours[-1]}"
            )
        return cls(PreambleStatus(status), version, low, high)


_TYPE_NUMBERS = {kind: number for number, kind in MESSAGE_TYPES.items()}
_DECODERS = {number: msgspec.msgpack.Decoder(kind) for number, kind in MESSAGE_TYPES.items()}
_PATH = re.compile(r"\$\[(\d+)\]")


class FrameEncoder:
    """Messages to frames. Stateless but for the reused msgpack encoder; one a thread."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()

    def encode(self, message: Message) -> bytes:
        """One whole frame. Raises UsageError for a message that the peer's decoder would refuse."""
        wrong = problem(message)
        if wrong is not None:
            raise UsageError(wrong)
        body = self._encoder.encode(message)
        if len(body) > MAX_BODY_BYTES:
            raise UsageError(
                f"{type(message).__name__}: body of {len(body)} bytes, allowed {MAX_BODY_BYTES}"
            )
        header = _HEADER.pack(FRAME_MAGIC, _TYPE_NUMBERS[type(message)], 0, len(body), 0)[:-4]
        return header + _CRC.pack(zlib.crc32(body, zlib.crc32(header))) + body


def _decode_body(number: int, body: bytes) -> Message:
    kind = MESSAGE_TYPES[number]
    try:
        message = _DECODERS[number].decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # msgspec names a field by its place in the array; people know it by its name.
        fields = kind.__struct_fields__
        text = _PATH.sub(
            lambda place: fields[int(place[1])] if int(place[1]) < len(fields) else place[0],
            str(error),
            count=1,
        )
        raise StreamError(f"{kind.__name__}: {text}") from None
    wrong = problem(message)
    if wrong is not None:
        raise StreamError(wrong)
    return message


class FrameDecoder:
    """Frames to messages, from bytes in pieces of any size.

    ``feed()`` and ``feed_eof()`` bring what was received, ``next_message()`` is then called until
    it returns None. The first StreamError is final: every later call raises it again.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._eof = False
        self._error: StreamError | None = None
        #: Frames of unknown types that may be ignored, so far.
        self.ignored = 0

    @property
    def at_eof(self) -> bool:
        """The peer has ended the connection and every frame of it was taken."""
        return self._eof and not self._buffer

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take received bytes. Raises UsageError for a piece over MAX_FEED_BYTES, for bytes after
        feed_eof(), and while a whole frame and more is still waiting to be taken."""
        if self._eof:
            raise UsageError("feed() after feed_eof()")
        if len(data) > MAX_FEED_BYTES:
            raise UsageError(f"feed: {len(data)} bytes given, {MAX_FEED_BYTES} allowed")
        if len(self._buffer) > HEADER_BYTES + MAX_BODY_BYTES:
            raise UsageError(
                f"feed: {len(self._buffer)} bytes are buffered, take the messages first"
            )
        if self._error is None:
            self._buffer += data

    def feed_eof(self) -> None:
        """The peer has ended the connection. Idempotent."""
        self._eof = True

    def next_message(self) -> Message | None:
        """The next message, or None when more bytes are needed (or none are left at the end).
        Raises StreamError, also for a connection that ended inside a frame."""
        if self._error is not None:
            raise self._error
        try:
            return self._next_message()
        except StreamError as error:
            self._error = error
            self._buffer.clear()
            raise

    def _next_message(self) -> Message | None:
        while True:
            frame = self._take_frame()
            if frame is None:
                return None
            number, body = frame
            if number in MESSAGE_TYPES:
                return _decode_body(number, body)
            if not number & MAY_BE_IGNORED:
                raise StreamError(
                    f"message type: received {number:#06x}, "
                    f"allowed 0x0001 to {max(_plain_types()):#06x}, or with bit 15 set"
                )
            self.ignored += 1

    def _take_frame(self) -> tuple[int, bytes] | None:
        needed = HEADER_BYTES
        if len(self._buffer) >= HEADER_BYTES:
            magic, number, reserved, length, crc = _HEADER.unpack_from(self._buffer)
            if magic != FRAME_MAGIC:
                raise StreamError(
                    f"frame magic: received {magic.hex()}, allowed {FRAME_MAGIC.hex()}"
                )
            if length > MAX_BODY_BYTES:
                raise StreamError(
                    f"frame length: received {length} bytes, allowed {MAX_BODY_BYTES}"
                )
            needed += length
            if len(self._buffer) >= needed:
                with memoryview(self._buffer) as whole:
                    body = bytes(whole[HEADER_BYTES:needed])
                    computed = zlib.crc32(body, zlib.crc32(whole[: HEADER_BYTES - 4]))
                if crc != computed:
                    raise StreamError(
                        f"frame checksum: received {crc:#010x}, computed {computed:#010x}"
                    )
                if reserved:
                    raise StreamError(f"frame reserved bytes: received {reserved:#06x}, allowed 0")
                del self._buffer[:needed]
                return number, body
        if self._eof and self._buffer:
            raise StreamError(
                f"connection ended inside a frame: received {len(self._buffer)} of {needed} bytes"
            )
        return None


def _plain_types() -> list[int]:
    return [number for number in MESSAGE_TYPES if not number & MAY_BE_IGNORED]
