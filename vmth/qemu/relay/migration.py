# SPDX-License-Identifier: Apache-2.0
"""What is understood of a migration from the bytes of its connections. No I/O, never in the way.

main      QEVM        StreamReader: machine, blocks, pages, rounds, commands, devices
          way back    ReturnPathReader: page requests, SHUT
multifd   11223344    MultifdReader: packets and pages, payloads skipped
recovery, other       carried unread, and said so
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vmth.errors import StreamError
from vmth.qemu.inspect import Inspector, Report
from vmth.qemu.stream import (
    ChannelHello,
    MultifdReader,
    PageRequest,
    PagesPacket,
    ReturnPathReader,
    Shut,
    StreamReader,
)

__all__ = ["ConnectionParser", "MigrationNotes", "Role", "role_of"]

#: Entries of a list in a report that grows with what is sent.
MAX_NOTES = 64
MAIN_MAGIC, CHANNEL_MAGIC = b"QEVM", b"\x11\x22\x33\x44"
COMMAND_BYTE = 8

#: "main", "multifd", "recovery", "other"; "empty" while nothing was sent.
Role = str


def role_of(head: bytes) -> Role | None:
    """By a connection's first bytes; None when more are needed."""
    if head[:1] == bytes([COMMAND_BYTE]):
        return "recovery"
    if head[:4] in (MAIN_MAGIC, CHANNEL_MAGIC):
        return "main" if head[:4] == MAIN_MAGIC else "multifd"
    if MAIN_MAGIC.startswith(head) or CHANNEL_MAGIC.startswith(head):
        return None if head else "empty"
    return "other"


@dataclass(slots=True, eq=False)
class MigrationNotes:
    """Connections that belong together. ``stream`` is the main stream's report, None until there
    is one; ``shut`` the status that the destination ended its return path with."""

    number: int
    key: object
    stream: Report | None = None
    connections: list[int] = field(default_factory=list)
    open_connections: int = 0
    channels: int = 0
    channel_packets: int = 0
    channel_normal_pages: int = 0
    channel_zero_pages: int = 0
    compressions: set[str] = field(default_factory=set)
    shut: int | None = None
    page_requests: int = 0
    remarks: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def page_bits(self) -> int:
        bits = 12 if self.stream is None else self.stream.configuration.get("target-page-bits", 12)
        return int(bits)

    def remark(self, text: str) -> None:
        if len(self.remarks) < MAX_NOTES:
            self.remarks.append(text)

    def fault(self, text: str) -> None:
        if len(self.faults) < MAX_NOTES:
            self.faults.append(text)


class ConnectionParser:
    """One connection's bytes, both ways, into its migration's notes. Never raises StreamError: what
    cannot be understood is noted, and nothing more of that direction is read."""

    def __init__(self, number: int, role: Role, notes: MigrationNotes) -> None:
        self.channel: int | None = None
        self._name = f"connection {number}"
        self._notes = notes
        self._main: StreamReader | None = None
        self._multifd: MultifdReader | None = None
        self._back: ReturnPathReader | None = None
        if role == "main":
            self._inspector = Inspector(self._name)
            notes.stream = self._inspector.report
            self._main, self._back = StreamReader(), ReturnPathReader()
        elif role == "multifd":
            notes.channels += 1
            self._multifd = MultifdReader(page_bytes=1 << notes.page_bits, unpack=False)
        elif role == "recovery":
            self._back = ReturnPathReader()
            notes.remark(f"{self._name} resumes a postcopy: carried unread")
        else:
            notes.remark(f"{self._name} is of no known kind: carried unread")

    def forward(self, data: memoryview | bytes) -> None:
        """What the source sent; no bytes: it ended."""
        try:
            if self._main is not None:
                self._read_main(self._main, data)
            elif self._multifd is not None:
                self._read_channel(self._multifd, data)
        except StreamError as error:
            self._notes.fault(f"{self._name}: {error}; carried unread from there on")
            self._main = self._multifd = None

    def backward(self, data: memoryview | bytes) -> None:
        """What the destination sent; no bytes: it ended."""
        if self._back is None:
            return
        try:
            self._read_back(self._back, data)
        except StreamError as error:
            self._notes.fault(f"{self._name}, return path: {error}; carried unread from there on")
            self._back = None

    def give_up(self, reason: str) -> None:
        """Bytes are missing: nothing that follows can be understood."""
        if self._main is not None or self._multifd is not None or self._back is not None:
            self._notes.remark(f"{self._name} is carried unread from there on: {reason}")
        self._main = self._multifd = self._back = None

    def _read_main(self, reader: StreamReader, data: memoryview | bytes) -> None:
        report = self._inspector.report
        report.nbytes += len(data)
        if data:
            reader.feed(data)
        else:
            reader.feed_eof()
        while (event := reader.next_event()) is not None:
            self._inspector.take(event)
            del report.commands[MAX_NOTES:]
            del report.remarks[MAX_NOTES:]

    def _read_channel(self, reader: MultifdReader, data: memoryview | bytes) -> None:
        notes = self._notes
        if data:
            reader.feed(data)
        else:
            reader.feed_eof()
        while (event := reader.next_event()) is not None:
            if isinstance(event, ChannelHello):
                self.channel = event.channel
                continue
            notes.channel_packets += 1
            if isinstance(event, PagesPacket):
                notes.channel_normal_pages += len(event.normal)
                notes.channel_zero_pages += len(event.zero)
                if len(event.normal):
                    notes.compressions.add(event.compression.name.lower())

    def _read_back(self, reader: ReturnPathReader, data: memoryview | bytes) -> None:
        if data:
            reader.feed(data)
        else:
            reader.feed_eof()
        while (message := reader.next_message()) is not None:
            if isinstance(message, Shut):
                self._notes.shut = message.status
            elif isinstance(message, PageRequest):
                self._notes.page_requests += 1
