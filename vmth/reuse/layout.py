# SPDX-License-Identifier: Apache-2.0
"""The bytes of an index file: its header, its bounds and checksums. No I/O.

    header, 4096 bytes | hashes, 16 bytes a row, ascending | places, 8 bytes a row

Little-endian. Row i says that page ``places[i]`` of the file had the content with ``hashes[i]``.
All numbers are checked here before anything is allocated or mapped for them (docs/reuse.md).
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vmth import kernels
from vmth.channel.reuse import KEY_BYTES

__all__ = [
    "ENTRY_BYTES",
    "HEADER_BYTES",
    "VERSION",
    "Built",
    "FileKind",
    "Header",
    "Identity",
    "UnusableError",
    "body_checksum",
    "check_rows",
]

MAGIC = b"VMTHIDX\n"
VERSION = 1
#: The arrays begin at a page: they are mapped.
HEADER_BYTES = 4096
#: Of one content: its hash and its place. This is what the memory of an index is counted by.
ENTRY_BYTES = 24
#: 24 GiB, of 4 TiB of different pages.
MAX_ENTRIES = 1 << 30

_HEADER = struct.Struct("<8sHHII4xQQqQQQQQQQ32s")
_ZEROS = bytes(HEADER_BYTES - _HEADER.size - 8)
_ROWS_A_LOOK = 1 << 20

U64 = npt.NDArray[np.uint64]


class UnusableError(Exception):
    """Why an index cannot be used as it is: it is built again."""


class FileKind(enum.IntEnum):
    """What is indexed; 0 is none."""

    RAW = 1  #: pages one after the other
    IMAGE = 2  #: a saved VM (docs/images.md); its data pages in the order of the file


@dataclass(frozen=True, slots=True)
class Identity:
    """What a file was when it was indexed. ``mtime_ns`` is 0 for a block device, whose ``inode`` is
    its number: there only the samples tell."""

    size_bytes: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class Built:
    """What building found. Pages: ``pages`` looked at, of which ``zero_pages`` and those of holes
    are not indexed, ``repeated_pages`` have a content that an earlier one has, and ``left_pages``
    were left out to stay within ``limit`` entries."""

    pages: int
    hole_pages: int
    zero_pages: int
    repeated_pages: int
    left_pages: int
    limit: int


@dataclass(frozen=True, slots=True)
class Header:
    """All that an index says beside its rows."""

    kind: FileKind
    page_bytes: int
    entries: int
    identity: Identity
    built: Built
    body_checksum: int
    key: bytes = field(repr=False)

    def pack(self) -> bytes:
        built, identity = self.built, self.identity
        head = _HEADER.pack(
            MAGIC,
            VERSION,
            self.kind,
            HEADER_BYTES,
            self.page_bytes,
            self.entries,
            identity.size_bytes,
            identity.mtime_ns,
            identity.inode,
            built.pages,
            built.hole_pages,
            built.zero_pages,
            built.repeated_pages,
            built.left_pages,
            built.limit,
            self.key,
        )
        head += self.body_checksum.to_bytes(8, "little") + _ZEROS[8:]
        return head + _checksum(head).to_bytes(8, "little")

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Raises UnusableError."""
        if len(data) != HEADER_BYTES:
            raise UnusableError(f"its header has {len(data)} bytes, allowed {HEADER_BYTES}")
        magic, version, kind, header_bytes, page_bytes, entries, *numbers, key = (
            _HEADER.unpack_from(data)
        )
        if magic != MAGIC:
            raise UnusableError("it is no index of pages")
        if _checksum(data[:-8]) != int.from_bytes(data[-8:], "little"):
            raise UnusableError("its header is damaged")
        if version != VERSION:
            raise UnusableError(f"its version is {version}, allowed {VERSION}")
        if kind not in tuple(FileKind) or header_bytes != HEADER_BYTES:
            raise UnusableError(f"kind {kind} or header of {header_bytes} bytes are not known")
        if not 4096 <= page_bytes <= 2 << 20 or page_bytes & (page_bytes - 1):
            raise UnusableError(f"its pages have {page_bytes} bytes, allowed 4096 to {2 << 20}")
        if entries > MAX_ENTRIES:
            raise UnusableError(f"it has {entries} entries, allowed {MAX_ENTRIES}")
        return cls(
            FileKind(kind),
            page_bytes,
            entries,
            Identity(*numbers[:3]),
            Built(*numbers[3:]),
            int.from_bytes(data[_HEADER.size : _HEADER.size + 8], "little"),
            key,
        )

    @property
    def file_bytes(self) -> int:
        """Of the whole index."""
        return HEADER_BYTES + ENTRY_BYTES * self.entries

    @property
    def complete(self) -> bool:
        return self.built.left_pages == 0


def body_checksum(hashes: U64, places: U64) -> int:
    """XXH64 of both arrays, one after the other's checksum."""
    first = kernels.checksum64(hashes.reshape(-1).view(np.uint8), 0)
    return kernels.checksum64(places.view(np.uint8), first)


def check_rows(hashes: U64, places: U64, npages: int) -> None:
    """Hashes rise strictly, and places are pages of the file. Raises UnusableError.

    A piece at a time: an index may be larger than what memory is free.
    """
    for first in range(0, len(places), _ROWS_A_LOOK):
        rows = slice(first, first + _ROWS_A_LOOK)
        if int(places[rows].max()) >= npages:
            raise UnusableError(f"place {int(places[rows].max())} is outside of {npages} pages")
        high, low = hashes[first : first + _ROWS_A_LOOK + 1].T
        rises = (high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] > low[:-1]))
        if not rises.all():
            raise UnusableError("its hashes do not rise")


def _checksum(data: bytes) -> int:
    return kernels.checksum64(np.frombuffer(data, dtype=np.uint8), 0)


assert KEY_BYTES == 32, "the header's layout"
