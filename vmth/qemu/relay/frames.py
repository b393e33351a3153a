# SPDX-License-Identifier: Apache-2.0
"""What two relays say to each other on a carried connection: a hello each, then checked frames.

    connecting relay   hello | DATA DATA ... END | DONE
    listening relay    hello | DATA ... END DONE |

    frame = header, 40 bytes, its fields and its own checksum | payload, at most 256 KiB

A frame is bound to its connection, its direction and its place: the checksums are seeded with the
connection's token, the sequence counts from 0. docs/relay.md has the field tables. No I/O here.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vmth import kernels
from vmth.errors import StreamError, UsageError

zstandard: Any
try:
    import zstandard
except ImportError:
    zstandard = None

__all__ = [
    "FEATURE_ZSTD",
    "HEADER_BYTES",
    "HELLO_BYTES",
    "MAX_FRAME_BYTES",
    "MAX_REASON_BYTES",
    "DamageError",
    "Frame",
    "FrameKind",
    "FrameReader",
    "FrameWriter",
    "Hello",
    "HelloRole",
    "HelloStatus",
    "Totals",
    "can_compress",
    "check_hello",
    "decode_hello",
    "encode_hello",
    "frame_seed",
]

VERSION_MIN = VERSION = 1
MAGIC = b"vmthrely"
HELLO_BYTES = 64
HELLO = struct.Struct("<8sBBHHH16sQQQ")  # and le64 checksum
FEATURE_ZSTD = 1  #: this relay can read compressed frames

MARK = int.from_bytes(b"VMRF", "little")
HEADER_BYTES = 40
HEADER = struct.Struct("<IBBHQIIQ")  # and le64 checksum
FLAG_ZSTD = 1
U64 = struct.Struct("<Q")
TOTALS = struct.Struct("<QQ")
MAX_FRAME_BYTES = 256 << 10
MAX_REASON_BYTES = 512
PAGE = 4096
#: Shorter payloads are not worth an attempt: page requests must not wait for it.
LEAST_COMPRESSED_BYTES = 1024
ZSTD_LEVEL = 1
MAX_U64 = 2**64 - 1


class DamageError(StreamError):
    """What came from the other relay is not what it sent. The connection must break."""


class HelloRole(enum.IntEnum):
    CONNECTING = 1
    LISTENING = 2


class HelloStatus(enum.IntEnum):
    GO_ON = 1
    REFUSED = 2  #: a RESET frame with the reason follows


class FrameKind(enum.IntEnum):
    DATA = 1  #: bytes of the carried connection
    END = 2  #: half-close: no DATA follows in this direction; payload: totals of what was sent
    DONE = 3  #: all up to the other direction's END was delivered; payload: totals of that
    RESET = 4  #: the carried connection is broken; payload: why, UTF-8; nothing follows


@dataclass(frozen=True, slots=True)
class Hello:
    """The first 64 bytes each way. ``group``: connections of one migration share it; 0 is not
    known. A listening relay gives ``token``, ``connection`` and ``group`` back."""

    role: HelloRole
    status: HelloStatus
    version_min: int
    version_max: int
    features: int
    relay_id: bytes
    token: int
    connection: int
    group: int


@dataclass(frozen=True, slots=True)
class Totals:
    """DATA of one direction: ``data_bytes`` before compression, ``data_frames``."""

    data_bytes: int
    data_frames: int


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame that was checked. ``payload`` is valid until the next one is read."""

    kind: FrameKind
    payload: memoryview | bytes

    def totals(self) -> Totals:
        if len(self.payload) != TOTALS.size:
            raise DamageError(
                f"{self.kind.name}: received {len(self.payload)} bytes, allowed {TOTALS.size}"
            )
        return Totals(*TOTALS.unpack(self.payload))

    def reason(self) -> str:
        return bytes(self.payload[:MAX_REASON_BYTES]).decode("utf-8", "replace")


def can_compress() -> bool:
    """Is the package ``zstandard`` there (``pip install vmth[qemu]``)?"""
    return zstandard is not None


def check_of(data: bytes | memoryview, seed: int) -> int:
    return kernels.checksum64(np.frombuffer(data, dtype=np.uint8), seed)


def payload_check(payload: bytes | memoryview, seed: int) -> int:
    """XXH64 of the whole pages' XXH3-128 and of the bytes behind them: three times the speed of
    XXH64 over everything."""
    view = np.frombuffer(payload, dtype=np.uint8)
    npages = len(view) // PAGE
    if npages == 0:
        return kernels.checksum64(view, seed)
    hashes = np.empty((npages, 2), dtype=np.uint64)
    kernels.page_hash(view[: npages * PAGE], PAGE, seed, hashes)
    rest = view[npages * PAGE :]
    joined = np.concatenate((hashes.astype("<u8").view(np.uint8).reshape(-1), rest))
    return kernels.checksum64(joined, seed)


def frame_seed(token: int, role: HelloRole) -> int:
    """Of the frames that the relay in ``role`` sends."""
    return token if role is HelloRole.CONNECTING else token ^ MAX_U64


# ---- hello -------------------------------------------------------------------------------------


def encode_hello(hello: Hello) -> bytes:
    head = HELLO.pack(
        MAGIC,
        hello.role,
        hello.status,
        hello.version_min,
        hello.version_max,
        hello.features,
        hello.relay_id,
        hello.token,
        hello.connection,
        hello.group,
    )
    return head + U64.pack(check_of(head, 0))


def decode_hello(data: bytes | memoryview, role: HelloRole) -> Hello:
    """The other relay's hello. Raises StreamError for anything else, DamageError for one that
    arrived damaged."""
    head = bytes(data[: HELLO.size])
    magic, said, status, least, most, features, relay_id, token, connection, group = HELLO.unpack(
        head
    )
    if magic != MAGIC:
        raise StreamError(
            f"relay hello: received {magic!r}, allowed {MAGIC!r} (is the other end a vmth relay "
            "with --peer?)"
        )
    if U64.unpack(data[HELLO.size :])[0] != check_of(head, 0):
        raise DamageError("relay hello: its checksum differs")
    if said != role:
        ours = "connect" if role is HelloRole.CONNECTING else "listen"
        raise StreamError(f"relay hello: received role {said}, allowed {role} (--peer {ours})")
    if status not in list(HelloStatus):
        raise StreamError(f"relay hello: received status {status}, allowed 1, 2")
    if token == 0:
        raise StreamError("relay hello: received token 0, allowed 1 and more")
    return Hello(
        role, HelloStatus(status), least, most, features, relay_id, token, connection, group
    )


def check_hello(hello: Hello) -> None:
    """Raises StreamError if there is no version that both speak."""
    if hello.version_min > VERSION or hello.version_max < VERSION_MIN:
        raise StreamError(
            f"relay framing: received versions {hello.version_min} to {hello.version_max}, "
            f"allowed {VERSION_MIN} to {VERSION}"
        )


# ---- frames ------------------------------------------------------------------------------------


class FrameWriter:
    """Frames of one direction. Not thread-safe: the order of calls is the order of frames."""

    def __init__(self, seed: int, *, compress: bool = False) -> None:
        self._seed = seed
        self._sequence = 0
        self.totals = Totals(0, 0)
        self.wire_bytes = 0
        self._zstd: Any = None
        if compress:
            if not can_compress():
                raise UsageError("compressed frames: zstandard is not installed (vmth[qemu])")
            self._zstd = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=False)

    def data(self, payload: memoryview | bytes) -> tuple[bytes, memoryview | bytes]:
        """(header, payload) of 1 to 256 KiB of carried bytes; compressed where that is smaller."""
        self.totals = Totals(self.totals.data_bytes + len(payload), self.totals.data_frames + 1)
        if self._zstd is not None and len(payload) >= LEAST_COMPRESSED_BYTES:
            packed = self._zstd.compress(payload)
            if len(packed) < len(payload):
                return self._frame(FrameKind.DATA, FLAG_ZSTD, packed, payload), packed
        return self._frame(FrameKind.DATA, 0, payload, payload), payload

    def end(self) -> tuple[bytes, bytes]:
        payload = TOTALS.pack(self.totals.data_bytes, self.totals.data_frames)
        return self._frame(FrameKind.END, 0, payload, payload), payload

    def done(self, delivered: Totals) -> tuple[bytes, bytes]:
        payload = TOTALS.pack(delivered.data_bytes, delivered.data_frames)
        return self._frame(FrameKind.DONE, 0, payload, payload), payload

    def reset(self, reason: str) -> tuple[bytes, bytes]:
        payload = reason.encode()[:MAX_REASON_BYTES]
        return self._frame(FrameKind.RESET, 0, payload, payload), payload

    def _frame(
        self, kind: FrameKind, flags: int, wire: bytes | memoryview, raw: bytes | memoryview
    ) -> bytes:
        head = HEADER.pack(
            MARK,
            kind,
            flags,
            0,
            self._sequence,
            len(wire),
            len(raw),
            payload_check(raw, self._seed),
        )
        self._sequence += 1
        self.wire_bytes += HEADER_BYTES + len(wire)
        return head + U64.pack(check_of(head, self._seed))


class FrameReader:
    """Checks the frames of one direction in their order.

    ``take`` is called for exactly so many bytes; what it returns is not kept. Every fault is a
    DamageError that names the frame; the reader must not be used afterwards.
    """

    def __init__(self, seed: int, take: Callable[[int], memoryview]) -> None:
        self._seed = seed
        self._take = take
        self._sequence = 0
        self.totals = Totals(0, 0)
        self.wire_bytes = 0
        self._unzstd: Any = None

    def next_frame(self) -> Frame:
        kind, flags, wire_bytes, raw_bytes, check = self._header(bytes(self._take(HEADER_BYTES)))
        number = self._sequence
        payload: memoryview | bytes = self._take(wire_bytes) if wire_bytes else b""
        if flags & FLAG_ZSTD:
            payload = self._unpacked(payload, raw_bytes)
        if payload_check(payload, self._seed) != check:
            raise DamageError(f"frame {number}: the payload of {raw_bytes} bytes is damaged")
        self._sequence += 1
        self.wire_bytes += HEADER_BYTES + wire_bytes
        if kind is FrameKind.DATA:
            self.totals = Totals(self.totals.data_bytes + raw_bytes, self.totals.data_frames + 1)
        return Frame(kind, payload)

    def _header(self, data: bytes) -> tuple[FrameKind, int, int, int, int]:
        number = self._sequence
        head = data[: HEADER.size]
        if U64.unpack_from(data, HEADER.size)[0] != check_of(head, self._seed):
            raise DamageError(f"frame {number}: its header is damaged")
        mark, kind, flags, reserved, sequence, wire_bytes, raw_bytes, check = HEADER.unpack(head)
        if mark != MARK:
            raise DamageError(f"frame {number}: received mark {mark:#x}, allowed {MARK:#x}")
        if sequence > number:
            raise DamageError(f"frame {number} is missing: received frame {sequence}")
        if sequence < number:
            raise DamageError(f"frame {sequence} is repeated: expected frame {number}")
        if kind not in list(FrameKind) or flags & ~FLAG_ZSTD or reserved:
            raise DamageError(f"frame {number}: received kind {kind}, flags {flags:#x}")
        least = 1 if kind == FrameKind.DATA else 0
        if not least <= raw_bytes <= MAX_FRAME_BYTES or not least <= wire_bytes <= raw_bytes:
            raise DamageError(
                f"frame {number}: received {wire_bytes} bytes for {raw_bytes}, allowed {least} to "
                f"{MAX_FRAME_BYTES}"
            )
        if not flags and wire_bytes != raw_bytes:
            raise DamageError(f"frame {number}: received {wire_bytes} bytes for {raw_bytes}")
        return FrameKind(kind), flags, wire_bytes, raw_bytes, check

    def _unpacked(self, payload: memoryview | bytes, raw_bytes: int) -> bytes:
        number = self._sequence
        if not can_compress():
            raise DamageError(f"frame {number} is compressed: zstandard is not installed here")
        if self._unzstd is None:
            self._unzstd = zstandard.ZstdDecompressor()
        try:
            said = zstandard.frame_content_size(payload)
            if said != raw_bytes:
                raise DamageError(f"frame {number}: its zstd frame says {said} bytes")
            unpacked: bytes = self._unzstd.decompress(
                payload, max_output_size=raw_bytes, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise DamageError(f"frame {number}: its zstd frame is damaged ({error})") from None
        if len(unpacked) != raw_bytes:
            raise DamageError(
                f"frame {number}: received {len(unpacked)} bytes, allowed {raw_bytes}"
            )
        return unpacked
