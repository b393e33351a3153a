# SPDX-License-Identifier: Apache-2.0
"""The bytes of an image file: header, records, their checksums and bounds. No I/O.

    header | META | HEAD ... | PAGES ... | STATE ... | INDEX ... | END         to the last byte
    record = 40 bytes: magic, kind, codec, sequence, lengths, checksum | payload

Little-endian. Every byte of a file is under the checksum of its header or of its record, records
are numbered, and END ends the file: a changed byte, a cut, a missing, doubled or moved record is
found. All numbers are checked here, before anything is allocated for them (docs/images.md).
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from vmth import kernels
from vmth.errors import StreamError, UsageError

__all__ = [
    "END_BYTES",
    "FRAME_HEAD",
    "HEADER_BYTES",
    "INDEX_FRAME",
    "INDEX_HEAD",
    "MAX_BLOCKS",
    "MAX_CONTENT_BYTES",
    "MAX_FRAMES",
    "MAX_FRAME_RUNS",
    "MAX_HEAD_BYTES",
    "MAX_META_BYTES",
    "MAX_PAGES",
    "MAX_PAYLOAD_BYTES",
    "MAX_STATE_BYTES",
    "RECORD_BYTES",
    "RUN16",
    "VERSION",
    "Codec",
    "End",
    "Kind",
    "RecordHead",
    "Seal",
    "damaged",
    "header_bytes",
    "is_image",
    "read_header",
]

FILE_MAGIC = b"VMTHIMG\n"
#: The version that is written; it and the one before it are read.
VERSION = 1
VERSIONS_READ = (1,)
_HEADER = struct.Struct("<8sHHI8xQ")
HEADER_BYTES = _HEADER.size

RECORD_MAGIC = 0x5243_4556  # "VECR"
_RECORD = struct.Struct("<IHHQII16s")
RECORD_BYTES = _RECORD.size
CHECKSUM_AT = RECORD_BYTES - 16

#: Unpacked bytes of a record; a page frame's runs come on top.
MAX_CONTENT_BYTES = 1 << 20
MAX_FRAME_RUNS = 4096
MAX_PAYLOAD_BYTES = (2 << 20) - RECORD_BYTES
MAX_META_BYTES = 1 << 20
#: The stream up to its first pages.
MAX_HEAD_BYTES = 16 << 20
#: The stream behind its last pages.
MAX_STATE_BYTES = 1 << 30
#: Kept by a reader for the whole file.
MAX_FRAMES = (1 << 32) - 2
MAX_BLOCKS = 4096
#: Of all blocks together: 64 TiB at 4 KiB.
MAX_PAGES = 1 << 34

#: A frame's payload: runs, data pages, then RUN16 entries and the data.
FRAME_HEAD = struct.Struct("<II")
#: {page, npages, block, kind}: ``kind`` is a PageKind, ZERO or PAGE.
RUN16 = np.dtype([("page", "<u8"), ("npages", "<u4"), ("block", "<u2"), ("kind", "<u2")])
#: An INDEX record's content: frames, runs, then INDEX_FRAME and RUN16 entries.
INDEX_HEAD = struct.Struct("<II")
INDEX_FRAME = np.dtype([("offset", "<u8"), ("nruns", "<u4"), ("data_pages", "<u4")])

_END = struct.Struct("<QQQQQQQQQQ16sQ32s")
_END_MARK = b"\nGMIHTMV"
END_BYTES = RECORD_BYTES + _END.size + len(_END_MARK)

_PAD_BYTES = 4096


class Kind(enum.IntEnum):
    """What a record holds, in the order of the file; 0 is none."""

    META = 1  #: JSON
    HEAD = 2  #: the stream up to the first pages
    PAGES = 3
    STATE = 4  #: the stream behind the last pages
    INDEX = 5
    END = 6


class Codec(enum.IntEnum):
    """How a record's content is stored."""

    RAW = 1
    ZSTD = 2  #: one zstd frame


def damaged(where: str, what: str, received: object, allowed: object) -> NoReturn:
    """Raise the StreamError of a wrong file: where it is, what, and both values."""
    raise StreamError(f"{where}: {what}: received {received}, allowed {allowed}")


def header_bytes() -> bytes:
    head = _HEADER.pack(FILE_MAGIC, VERSION, 0, RECORD_BYTES, 0)[:-8]
    return head + kernels.checksum64(_u8(head), 0).to_bytes(8, "little")


def is_image(begin: bytes) -> bool:
    """Do a file's first bytes say that it is an image?"""
    return begin[: len(FILE_MAGIC)] == FILE_MAGIC


def read_header(data: bytes) -> int:
    """The format's version. Raises StreamError."""
    if len(data) < HEADER_BYTES:
        damaged("image header", "bytes", len(data), HEADER_BYTES)
    magic, version, flags, record_bytes, checksum = _HEADER.unpack_from(data)
    if magic != FILE_MAGIC:
        damaged("image header", "magic", magic, FILE_MAGIC)
    computed = kernels.checksum64(_u8(data[: HEADER_BYTES - 8]), 0)
    if checksum != computed:
        damaged("image header", "checksum", f"{checksum:#018x}", f"{computed:#018x}")
    if version not in VERSIONS_READ:
        damaged("image header", "version", version, VERSIONS_READ)
    if flags or any(data[16:24]):
        damaged("image header", "flags", f"{flags:#x} {data[16:24].hex()}", "none")
    if record_bytes != RECORD_BYTES:
        damaged("image header", "bytes of a record's head", record_bytes, RECORD_BYTES)
    return int(version)


@dataclass(frozen=True, slots=True)
class RecordHead:
    """A record without its payload. ``content_bytes``: of the payload's packed part, unpacked."""

    kind: Kind
    codec: Codec
    sequence: int
    payload_bytes: int
    content_bytes: int
    checksum: bytes = bytes(16)

    @property
    def size_bytes(self) -> int:
        return RECORD_BYTES + self.payload_bytes

    def pack(self) -> bytes:
        return _RECORD.pack(
            RECORD_MAGIC,
            self.kind,
            self.codec,
            self.sequence,
            self.payload_bytes,
            self.content_bytes,
            self.checksum,
        )

    @classmethod
    def unpack(cls, data: bytes | memoryview, where: str) -> RecordHead:
        """Raises StreamError for anything outside its bound; the checksum is not looked at."""
        if len(data) < RECORD_BYTES:
            damaged(where, "bytes of a record's head", len(data), RECORD_BYTES)
        magic, kind, codec, sequence, payload, content, checksum = _RECORD.unpack_from(data)
        if magic != RECORD_MAGIC:
            damaged(where, "record magic", f"{magic:#010x}", f"{RECORD_MAGIC:#010x}")
        if kind not in _KINDS:
            damaged(where, "record kind", kind, sorted(_KINDS))
        if codec not in _CODECS:
            damaged(where, "codec", codec, sorted(_CODECS))
        if payload > MAX_PAYLOAD_BYTES:
            damaged(where, "payload bytes", payload, f"at most {MAX_PAYLOAD_BYTES}")
        if content > MAX_CONTENT_BYTES:
            damaged(where, "content bytes", content, f"at most {MAX_CONTENT_BYTES}")
        return cls(Kind(kind), Codec(codec), sequence, payload, content, checksum)


_KINDS = frozenset(Kind)
_CODECS = frozenset(Codec)


class Seal:
    """Makes and checks whole records in a buffer of its own of 2 MiB; one thread at a time.

    A record's checksum is XXH3-128 of its head and payload, the checksum's own field as zeros, and
    behind them zeros up to the next power of two, at least 4096.
    """

    def __init__(self) -> None:
        self._room = np.zeros(2 << 20, dtype=np.uint8)
        self._hash = np.zeros((1, 2), dtype=np.uint64)
        #: Where a record is read into before ``check``.
        self.room = self._room.data

    def make(self, head: RecordHead, *payload: bytes | memoryview) -> memoryview:
        """The whole record with its checksum; valid until the next call of anything here.

        Raises UsageError if the payload is not as long as the head says, or too long.
        """
        nbytes = sum(len(part) for part in payload)
        if nbytes != head.payload_bytes or nbytes > MAX_PAYLOAD_BYTES:
            raise UsageError(
                f"record payload: received {nbytes} bytes, allowed {head.payload_bytes}, at most "
                f"{MAX_PAYLOAD_BYTES}"
            )
        self.room[:RECORD_BYTES] = head.pack()
        at = RECORD_BYTES
        for part in payload:
            self.room[at : at + len(part)] = part
            at += len(part)
        self.room[CHECKSUM_AT:RECORD_BYTES] = self._checksum(at)
        return self.room[:at]

    def check(self, nbytes: int, where: str) -> tuple[RecordHead, memoryview]:
        """The record of ``nbytes`` bytes that lies in ``room``: its head, and its payload, which is
        valid until the next call. Raises StreamError if its length or its checksum is wrong."""
        head = RecordHead.unpack(self.room[:nbytes], where)
        if head.size_bytes != nbytes:
            damaged(where, "bytes of the record", nbytes, head.size_bytes)
        computed = self._checksum(nbytes)
        if computed != head.checksum:
            damaged(where, "checksum", head.checksum.hex(), computed.hex())
        return head, self.room[RECORD_BYTES:nbytes].toreadonly()

    def _checksum(self, nbytes: int) -> bytes:
        self.room[CHECKSUM_AT:RECORD_BYTES] = bytes(16)
        padded = max(_PAD_BYTES, 1 << (nbytes - 1).bit_length())
        self._room[nbytes:padded] = 0
        kernels.page_hash(self._room[:padded], padded, 0, self._hash)
        return self._hash.tobytes()


@dataclass(frozen=True, slots=True)
class End:
    """What the last record says: where things are, and the digests."""

    records: int  #: of the whole file, this one included
    frames: int
    state_offset: int
    index_offset: int
    normal_pages: int  #: as stored: a page that came twice counts twice
    zero_pages: int
    superseded_pages: int  #: stored pages that a later one takes the place of
    digest_lo: int
    digest_hi: int
    digest_pages: int  #: pages of the memory digest: all that the file holds
    records_digest: bytes  #: SHA-256, first 16 bytes, of all records' checksums before this one
    file_bytes: int
    reserved: bytes = bytes(32)

    def pack(self) -> bytes:
        return (
            _END.pack(
                self.records,
                self.frames,
                self.state_offset,
                self.index_offset,
                self.normal_pages,
                self.zero_pages,
                self.superseded_pages,
                self.digest_lo,
                self.digest_hi,
                self.digest_pages,
                self.records_digest,
                self.file_bytes,
                self.reserved,
            )
            + _END_MARK
        )

    @classmethod
    def unpack(cls, payload: bytes | memoryview, where: str) -> End:
        if len(payload) != _END.size + len(_END_MARK):
            damaged(where, "bytes of END", len(payload), _END.size + len(_END_MARK))
        if bytes(payload[_END.size :]) != _END_MARK:
            damaged(where, "end mark", bytes(payload[_END.size :]).hex(), _END_MARK.hex())
        end = cls(*_END.unpack_from(payload))
        if any(end.reserved):
            damaged(where, "reserved bytes", end.reserved.hex(), "zeros")
        if not HEADER_BYTES <= end.state_offset <= end.index_offset <= end.file_bytes - END_BYTES:
            damaged(
                where,
                "offsets of STATE and INDEX",
                (end.state_offset, end.index_offset),
                f"rising, {HEADER_BYTES} to {end.file_bytes - END_BYTES}",
            )
        return end


def _u8(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, dtype=np.uint8)
