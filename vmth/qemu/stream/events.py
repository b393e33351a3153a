# SPDX-License-Identifier: Apache-2.0
"""What a migration stream says, as plain frozen data, in the order in which it is said.

    FileHeader, Configuration, ConfigurationField*, Command*,
    SectionStarted(START) RamSize BlockListed* RamEnd SectionFinished,
    SectionStarted(PART) (RamPages | RamFlush)* RamEnd SectionFinished, ...
    SectionStarted(FULL) DeviceState SectionFinished, ..., EndOfState, Description, StreamFinished

Where the reader meets what it does not know, PassThrough says why and RawBytes carry the rest.
Buffers in ``RamPages`` and ``RawBytes`` may refer to what was fed, without a copy: bytes that were
fed must stay as they are until their events have been used.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from vmth.qemu.ram import BlockTable, PageKind, Runs

__all__ = [
    "BlockListed",
    "Command",
    "CommandCode",
    "Configuration",
    "ConfigurationField",
    "Description",
    "DeviceState",
    "EndOfState",
    "Event",
    "FileHeader",
    "MappedPages",
    "PackageFinished",
    "PackageStarted",
    "PagePayload",
    "PassThrough",
    "RamEnd",
    "RamFlush",
    "RamPages",
    "RamSize",
    "RawBytes",
    "SectionFinished",
    "SectionKind",
    "SectionStarted",
    "StreamFinished",
]


class SectionKind(enum.IntEnum):
    """The byte that a section begins with."""

    START = 1
    PART = 2
    END = 3
    FULL = 4


class CommandCode(enum.IntEnum):
    """Commands of the source to the destination, in the main stream."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11


@dataclass(frozen=True, slots=True)
class FileHeader:
    """Magic and version of the file; absent on a connection that resumes a postcopy."""

    version: int


@dataclass(frozen=True, slots=True)
class Configuration:
    """The machine type; the destination compares it for equality."""

    machine: str


@dataclass(frozen=True, slots=True)
class ConfigurationField:
    """A subsection of the configuration. ``name`` without its ``configuration/``."""

    name: str
    version: int
    body: bytes


@dataclass(frozen=True, slots=True)
class SectionStarted:
    """A section's header. PART and END name only the id; the rest is that of its START."""

    kind: SectionKind
    section_id: int
    idstr: str
    instance_id: int
    version_id: int


@dataclass(frozen=True, slots=True)
class SectionFinished:
    """The section's footer was there."""

    section_id: int


@dataclass(frozen=True, slots=True)
class RamSize:
    """The sum of all blocks' lengths; as many ``BlockListed`` follow as make it up."""

    total_bytes: int


@dataclass(frozen=True, slots=True)
class MappedPages:
    """Where a mapped-ram file holds a block: offsets in the file; both 0 for an ignored block."""

    page_bytes: int
    bitmap_offset: int
    pages_offset: int


@dataclass(frozen=True, slots=True)
class BlockListed:
    """One ramblock of the source. Lengths in bytes; None is what the stream does not say."""

    idstr: str
    used_length: int
    page_size: int | None = None  #: backing page, postcopy of hugetlb blocks only
    gpa: int | None = None  #: with x-ignore-shared
    mapped: MappedPages | None = None


@dataclass(frozen=True, slots=True)
class PagePayload:
    """One page of a ``RamPages``; ``data`` is empty for a zero page."""

    idstr: str
    page: int
    kind: PageKind
    data: memoryview


@dataclass(frozen=True, slots=True, eq=False)
class RamPages:
    """Runs of pages in the order of the stream; ``at`` of a run counts from ``data``'s first byte.

    How pages are gathered into runs and events follows from how the bytes were fed.
    """

    table: BlockTable
    runs: Runs
    data: memoryview = field(repr=False)
    channel: int | None = None  #: of multifd; None: the main connection

    def pages(self) -> Iterator[PagePayload]:
        """Page by page: for tests and tools, too slow for a guest."""
        for page, npages, at, stride, nbytes, block, kind in self.runs.tolist():
            for i in range(npages):
                start = at + i * stride
                yield PagePayload(
                    self.table.names[block],
                    page + i,
                    PageKind(kind),
                    self.data[start : start + nbytes],
                )


@dataclass(frozen=True, slots=True)
class RamFlush:
    """Every multifd channel must have reached its synchronisation here (QEMU 8.1 and later)."""


@dataclass(frozen=True, slots=True)
class RamEnd:
    """The end of the ram section's payload."""


@dataclass(frozen=True, slots=True)
class DeviceState:
    """The payload of a FULL section, not interpreted."""

    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Command:
    """``code`` is a ``CommandCode`` where it is known, any number where it is not."""

    code: int
    data: bytes


@dataclass(frozen=True, slots=True)
class PackageStarted:
    """PACKAGED: the next ``nbytes`` bytes are a section stream that the destination takes whole."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class PackageFinished:
    """The package's last byte was read."""


@dataclass(frozen=True, slots=True)
class EndOfState:
    """All state was sent."""


@dataclass(frozen=True, slots=True)
class Description:
    """The vmdescription: what device sections hold, as JSON."""

    json: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class PassThrough:
    """From byte ``position`` of the stream on nothing is understood; RawBytes carry all of it."""

    reason: str
    position: int


@dataclass(frozen=True, slots=True)
class RawBytes:
    """Bytes that were not interpreted."""

    data: memoryview = field(repr=False)


@dataclass(frozen=True, slots=True)
class StreamFinished:
    """The stream ended where it may."""


Event: TypeAlias = (
    FileHeader
    | Configuration
    | ConfigurationField
    | SectionStarted
    | SectionFinished
    | RamSize
    | BlockListed
    | RamPages
    | RamFlush
    | RamEnd
    | DeviceState
    | Command
    | PackageStarted
    | PackageFinished
    | EndOfState
    | Description
    | PassThrough
    | RawBytes
    | StreamFinished
)
