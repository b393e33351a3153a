# SPDX-License-Identifier: Apache-2.0
"""Records of QEMU's ``ram`` sections to runs of pages and back (``csrc/include/vmth/qemu_ram.h``),
and packets of multifd to runs.

Pages are never copied while parsing: a run says where its payload lies in the bytes that were
given. Nothing here does I/O.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vmth._native import _qemu
from vmth.errors import StreamError, UsageError

__all__ = [
    "MAX_BLOCKS",
    "MAX_PAGE_BYTES",
    "MIN_PAGE_BYTES",
    "RUN",
    "BlockTable",
    "PacketParser",
    "PacketStop",
    "PageKind",
    "Parsed",
    "ParsedPackets",
    "RamEncoder",
    "RamParser",
    "Runs",
    "Stop",
]

MAX_BLOCKS = 4096
MIN_PAGE_BYTES = 1024
MAX_PAGE_BYTES = 65536
MAX_IDSTR_BYTES = 255
NAME_BYTES = 256
#: Runs of one call; a call's array is 160 KiB.
RUNS_A_CALL = 4096

#: Structured array: page, npages, at, stride, nbytes, block, kind (``struct vmth_qemu_run``).
Runs: TypeAlias = npt.NDArray[Any]
RUN = _qemu.RUN


class PageKind(enum.IntEnum):
    """How a page travels."""

    ZERO = 1
    PAGE = 2
    XBZRLE = 3  #: a delta against what the page held before
    COMPRESS = 4  #: one zlib stream


class Stop(enum.IntEnum):
    """Why the parser stopped."""

    SHORT = 1  #: the input ends within a record; ``need`` bytes of it would do
    FULL = 2  #: more records follow in the input
    EOS = 3
    FLUSH = 4
    MEM_SIZE = 5  #: the block list follows; ``value`` is its total


@dataclass(frozen=True, slots=True)
class Parsed:
    stop: Stop
    used: int  #: bytes of whole records
    need: int
    value: int
    runs: Runs  #: ``at`` counts from the first byte that was given


class BlockTable:
    """Names and used lengths (bytes) of a stream's blocks, in its order.

    Raises UsageError for a page size or a count outside the bounds, or a name that is empty or
    longer than 255 bytes.
    """

    def __init__(self, blocks: Sequence[tuple[str, int]], page_bytes: int = 4096) -> None:
        if not MIN_PAGE_BYTES <= page_bytes <= MAX_PAGE_BYTES or page_bytes & (page_bytes - 1):
            raise UsageError(
                f"page size: received {page_bytes}, allowed a power of two, "
                f"{MIN_PAGE_BYTES} to {MAX_PAGE_BYTES}"
            )
        if len(blocks) > MAX_BLOCKS:
            raise UsageError(f"blocks: received {len(blocks)}, allowed {MAX_BLOCKS}")
        self.page_bytes = page_bytes
        self.names = tuple(name for name, _ in blocks)
        self.lengths = tuple(length for _, length in blocks)
        self.index = {name: i for i, name in enumerate(self.names)}
        #: NAME_BYTES of each.
        self.wire_names = b"".join(_wire_name(name).ljust(NAME_BYTES, b"\0") for name in self.names)
        self.native = _qemu.Blocks(
            page_bytes, np.array(self.lengths, dtype=np.uint64), self.wire_names
        )

    def __len__(self) -> int:
        return len(self.names)


def _wire_name(name: str) -> bytes:
    raw = name.encode("utf-8", "surrogateescape")
    if not 1 <= len(raw) <= MAX_IDSTR_BYTES:
        raise UsageError(f"idstr: received {len(raw)} bytes, allowed 1 to {MAX_IDSTR_BYTES}")
    return bytes([len(raw)]) + raw


class RamParser:
    """The records of one connection; CONTINUE refers back over calls and sections.

    Not thread-safe. The lock of the interpreter is free while native code parses.
    """

    def __init__(self) -> None:
        self._parser = _qemu.Parser(RUNS_A_CALL)

    @property
    def block(self) -> int:
        """That CONTINUE means in what comes next: an index, or a number beyond all of them."""
        return self._parser.continues()

    def go_on(self, block: int) -> None:
        """Behind records that somebody else has parsed."""
        self._parser.go_on(block)

    def parse(self, blocks: BlockTable, data: bytes | memoryview) -> Parsed:
        """As many records as there are before something stops it.

        Raises StreamError if the first record is bad; records before a bad one are returned first.
        """
        try:
            stop, used, need, value, runs = self._parser.parse(blocks.native, data)
        except _qemu.RecordError as error:
            field, received, allowed = error.args
            raise StreamError(f"{field}: received {received:#x}, allowed {allowed:#x}") from None
        return Parsed(Stop(stop), used, need, value, runs)


class PacketStop(enum.IntEnum):
    """Why the parser of multifd packets stopped."""

    SHORT = _qemu.PACKET_SHORT  #: the input ends within a packet, or with one
    FULL = _qemu.PACKETS_FULL  #: more packets of pages follow
    OTHER = _qemu.PACKET_OTHER  #: a packet follows that is not only plain pages of the blocks


@dataclass(frozen=True, slots=True)
class ParsedPackets:
    stop: PacketStop
    used: int  #: bytes of whole packets
    runs: Runs  #: ``at`` counts from the first byte that was given


class PacketParser:
    """Whole multifd packets of plain pages (``csrc/include/vmth/qemu_multifd.h``). Not thread-safe.
    The lock of the interpreter is free while native code parses."""

    def __init__(self) -> None:
        self._parser = _qemu.PacketParser(RUNS_A_CALL)

    def parse(self, blocks: BlockTable, data: bytes | memoryview) -> ParsedPackets:
        """As many packets as there are before something else comes; raises nothing for what the
        bytes are."""
        stop, used, runs = self._parser.parse(blocks.native, data)
        return ParsedPackets(PacketStop(stop), used, runs)


class RamEncoder:
    """Runs to records, for one connection: a block's name is left out while the block stays."""

    def __init__(self) -> None:
        self._encoder = _qemu.Encoder()

    def encode(
        self, blocks: BlockTable, runs: Runs, data: bytes | memoryview
    ) -> bytes | memoryview:
        """The records of ``runs``, whose payload is in ``data``.

        Raises UsageError, with nothing remembered, if a run leaves its block or ``data``.
        """
        raw = np.ascontiguousarray(runs, dtype=RUN).view(np.uint8)
        try:
            return self._encoder.encode(blocks.native, raw, data)
        except ValueError as error:
            raise UsageError(f"runs to encode: {error}") from None
