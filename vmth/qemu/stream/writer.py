# SPDX-License-Identifier: Apache-2.0
"""Events to the bytes of a main connection that QEMU loads. No I/O: ``send(event)`` returns bytes.

Whatever the reader gives can be sent: what was not interpreted comes out byte for byte; ram records
are written anew, with a block's name left out while the block stays. mapped-ram files are read,
not written: their pages come before the block list is complete.
"""

from __future__ import annotations

import numpy as np

from vmth.errors import UsageError
from vmth.qemu.ram import BlockTable, RamEncoder, Runs
from vmth.qemu.stream.events import (
    BlockListed,
    Command,
    CommandCode,
    Configuration,
    ConfigurationField,
    Description,
    DeviceState,
    EndOfState,
    Event,
    FileHeader,
    PackageStarted,
    RamEnd,
    RamFlush,
    RamPages,
    RamSize,
    RawBytes,
    SectionFinished,
    SectionKind,
    SectionStarted,
)
from vmth.qemu.stream.fields import (
    BE16,
    BE32,
    BE64,
    FILE_MAGIC,
    MAX_COMMAND_BYTES,
    SECTION_FOOTER,
    wire_string,
)

__all__ = ["StreamWriter"]

EOS = BE64.pack(0x10)
FLUSH = BE64.pack(0x200)
MEM_SIZE = 0x4


class StreamWriter:
    """One main connection. Sections are not checked against each other: that is the reader's work.

    ``flush_records``: write RamFlush, which QEMU before 8.1 does not know and which a stream
    without multifd channels does not need.
    """

    def __init__(self, *, page_bytes: int = 4096, flush_records: bool = False) -> None:
        self._page_bytes = page_bytes
        self._flush_records = flush_records
        self._encoder = RamEncoder()
        self._listed: list[tuple[str, int]] = []
        self._to_list_bytes = 0
        self._table: BlockTable | None = None

    def send(self, event: Event) -> bytes | memoryview:
        """The event's bytes; empty for those that have none.

        Raises UsageError for what the format cannot say; nothing is written then.
        """
        match event:
            case RamPages():
                return self._pages(event)
            case RamEnd():
                return EOS
            case RamFlush():
                return FLUSH if self._flush_records else b""
            case RamSize():
                return self._ram_size(event)
            case BlockListed():
                return self._block(event)
            case SectionStarted():
                return _section_start(event)
            case SectionFinished():
                return bytes([SECTION_FOOTER]) + BE32.pack(event.section_id)
            case RawBytes():
                return event.data
            case DeviceState():
                return event.body
            case _:
                return self._rare(event)

    def _rare(self, event: Event) -> bytes:
        match event:
            case FileHeader():
                return FILE_MAGIC + BE32.pack(event.version)
            case Configuration():
                name = event.machine.encode("utf-8", "surrogateescape")
                return b"\x07" + BE32.pack(len(name)) + name
            case ConfigurationField():
                return self._configuration_field(event)
            case Command():
                return _command(event.code, event.data)
            case PackageStarted():
                return _command(CommandCode.PACKAGED, BE32.pack(event.nbytes))
            case EndOfState():
                return b"\x00"
            case Description():
                return b"\x06" + BE32.pack(len(event.json)) + event.json
            case _:
                return b""

    def _configuration_field(self, event: ConfigurationField) -> bytes:
        if event.name == "target-page-bits":
            self._page_bytes = 1 << int.from_bytes(event.body, "big")
        head = b"\x05" + wire_string("configuration/" + event.name)
        return head + BE32.pack(event.version) + event.body

    def _ram_size(self, event: RamSize) -> bytes:
        self._listed, self._table = [], None
        self._to_list_bytes = event.total_bytes
        self._end_list()
        return BE64.pack(event.total_bytes | MEM_SIZE)

    def _block(self, event: BlockListed) -> bytes:
        if event.used_length > self._to_list_bytes:
            raise UsageError(
                f"block {event.idstr!r}: {event.used_length} bytes, {self._to_list_bytes} left"
            )
        if event.mapped is not None:
            raise UsageError("mapped-ram cannot be written")
        self._listed.append((event.idstr, event.used_length))
        self._to_list_bytes -= event.used_length
        self._end_list()
        record = wire_string(event.idstr) + BE64.pack(event.used_length)
        for value in (event.page_size, event.gpa):
            if value is not None:
                record += BE64.pack(value)
        return record

    def _end_list(self) -> None:
        if self._to_list_bytes == 0:
            self._table = BlockTable(self._listed, self._page_bytes)

    def _pages(self, event: RamPages) -> bytes | memoryview:
        if self._table is None:
            raise UsageError("pages before all blocks were listed")
        runs = event.runs
        if event.table.names != self._table.names:
            runs = _renumbered(runs, event.table, self._table)
        return self._encoder.encode(self._table, runs, event.data)


def _renumbered(runs: Runs, have: BlockTable, want: BlockTable) -> Runs:
    """The same runs with the other table's block numbers."""
    try:
        numbers = np.array([want.index[have.names[i]] for i in np.unique(runs["block"])])
    except KeyError as error:
        raise UsageError(f"block {error} is not listed") from None
    _, positions = np.unique(runs["block"], return_inverse=True)
    renumbered = runs.copy()
    renumbered["block"] = numbers[positions]
    return renumbered


def _section_start(event: SectionStarted) -> bytes:
    head = bytes([event.kind]) + BE32.pack(event.section_id)
    if event.kind in (SectionKind.PART, SectionKind.END):
        return head
    return (
        head + wire_string(event.idstr) + BE32.pack(event.instance_id) + BE32.pack(event.version_id)
    )


def _command(code: int, data: bytes) -> bytes:
    if len(data) > MAX_COMMAND_BYTES:
        raise UsageError(f"command {code}: {len(data)} bytes, allowed {MAX_COMMAND_BYTES}")
    return b"\x08" + BE16.pack(code) + BE16.pack(len(data)) + data
