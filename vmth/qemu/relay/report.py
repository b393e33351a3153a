# SPDX-License-Identifier: Apache-2.0
"""What a relay says at its end: connections, bytes each way, migrations as far as understood."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vmth.errors import ExitCode
from vmth.qemu.relay.migration import MigrationNotes
from vmth.units import format_size

__all__ = ["ConnectionReport", "RelayReport", "migration_lines", "report_lines", "report_values"]

#: Connections and migrations that a report names; older ones are only counted.
MAX_NAMED = 256


@dataclass(slots=True)
class ConnectionReport:
    """One carried connection. ``wire_*_bytes``: frames to and from the other relay."""

    number: int
    peer: str
    role: str = "empty"
    channel: int | None = None
    state: str = "open"
    reason: str = ""
    damaged: bool = False
    forward_bytes: int = 0
    backward_bytes: int = 0
    wire_sent_bytes: int | None = None
    wire_received_bytes: int | None = None


@dataclass(slots=True)
class RelayReport:
    """Sums are of all connections, the lists have the last 256."""

    listen: str
    connect: str
    peer: str | None = None
    compress: bool = False
    fallbacks: list[str] = field(default_factory=list)
    connections: int = 0
    open_connections: int = 0
    broken_connections: int = 0
    damaged_connections: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0
    wire_sent_bytes: int = 0
    wire_received_bytes: int = 0
    migrations: int = 0
    named_connections: list[ConnectionReport] = field(default_factory=list)
    named_migrations: list[MigrationNotes] = field(default_factory=list)
    interrupted: bool = False

    def add_connection(self, connection: ConnectionReport) -> None:
        self.named_connections.append(connection)
        del self.named_connections[:-MAX_NAMED]
        self.forward_bytes += connection.forward_bytes
        self.backward_bytes += connection.backward_bytes
        self.wire_sent_bytes += connection.wire_sent_bytes or 0
        self.wire_received_bytes += connection.wire_received_bytes or 0
        self.broken_connections += connection.state == "broken"
        self.damaged_connections += connection.damaged

    def add_migration(self, notes: MigrationNotes) -> None:
        self.migrations += 1
        self.named_migrations.append(notes)
        del self.named_migrations[:-MAX_NAMED]

    @property
    def exit_code(self) -> ExitCode:
        if self.interrupted:
            return ExitCode.INTERRUPTED
        if self.damaged_connections:
            return ExitCode.VERIFICATION_FAILED
        return ExitCode.FAILED if self.broken_connections else ExitCode.OK


def _answer(notes: MigrationNotes) -> str:
    if notes.shut is None:
        return "no answer of the destination"
    return "loaded" if notes.shut == 0 else f"failed at the destination (status {notes.shut})"


def _pages(notes: MigrationNotes) -> dict[str, int]:
    pages = dict(notes.stream.pages) if notes.stream is not None else {}
    if notes.channels:
        pages["multifd_normal"] = notes.channel_normal_pages
        pages["multifd_zero"] = notes.channel_zero_pages
    return pages


def report_values(report: RelayReport) -> dict[str, Any]:
    """The report as the object of ``--json``."""
    return {
        "listen": report.listen,
        "connect": report.connect,
        "peer": report.peer,
        "compress": report.compress,
        "fallbacks": report.fallbacks,
        "connections": report.connections,
        "open_connections": report.open_connections,
        "broken_connections": report.broken_connections,
        "damaged_connections": report.damaged_connections,
        "forward_bytes": report.forward_bytes,
        "backward_bytes": report.backward_bytes,
        "wire_sent_bytes": report.wire_sent_bytes,
        "wire_received_bytes": report.wire_received_bytes,
        "migrations": report.migrations,
        "last_migrations": [_migration_values(notes) for notes in report.named_migrations],
        "last_connections": [
            {
                "number": c.number, "peer": c.peer, "role": c.role, "channel": c.channel,
                "state": c.state, "reason": c.reason, "forward_bytes": c.forward_bytes,
                "backward_bytes": c.backward_bytes, "wire_sent_bytes": c.wire_sent_bytes,
                "wire_received_bytes": c.wire_received_bytes,
            }
            for c in report.named_connections
        ],
        "exit_code": int(report.exit_code),
    }  # fmt: skip


def _migration_values(notes: MigrationNotes) -> dict[str, Any]:
    stream = notes.stream
    return {
        "number": notes.number,
        "connections": notes.connections,
        "machine": stream.machine if stream else None,
        "hints": stream.hints if stream else [],
        "ram_bytes": stream.ram_bytes if stream else 0,
        "blocks": [
            {"idstr": b.idstr, "used_length": b.used_length, "pages": b.pages}
            for b in (stream.blocks if stream else ())
        ],
        "pages": _pages(notes),
        "rounds": stream.rounds if stream else 0,
        "flushes": stream.flushes if stream else 0,
        "commands": stream.commands if stream else [],
        "devices": len(stream.devices) if stream else 0,
        "device_bytes": stream.device_bytes if stream else 0,
        "multifd_channels": notes.channels,
        "multifd_packets": notes.channel_packets,
        "compressions": sorted(notes.compressions),
        "page_requests": notes.page_requests,
        "shut": notes.shut,
        "passed_through_bytes": stream.passed_through_bytes if stream else 0,
        "remarks": [*notes.remarks, *(stream.remarks if stream else ())],
        "faults": [*notes.faults, *(stream.faults if stream else ())],
    }


def migration_lines(notes: MigrationNotes) -> Iterator[str]:
    """One migration, for people."""
    values = _migration_values(notes)
    machine = values["machine"] or "machine not said"
    numbers = ", ".join(str(number) for number in notes.connections)
    yield f"migration {notes.number} (connections {numbers}): {machine}, {_answer(notes)}"
    if notes.stream is not None:
        pages = ", ".join(f"{count} {kind}" for kind, count in values["pages"].items()) or "none"
        yield (
            f"  ram: {format_size(values['ram_bytes'])} in {len(values['blocks'])} blocks, "
            f"{values['rounds']} rounds; pages: {pages}"
        )
        yield f"  devices: {values['devices']} sections, {format_size(values['device_bytes'])}"
    if notes.channels:
        yield (
            f"  multifd: {notes.channels} channels, {notes.channel_packets} packets, "
            f"{'/'.join(sorted(notes.compressions)) or 'no pages'}"
        )
    if notes.page_requests:
        yield f"  postcopy: {notes.page_requests} page requests"
    for remark in values["remarks"]:
        yield f"  remark: {remark}"
    for fault in values["faults"]:
        yield f"  FAULT: {fault}"


def report_lines(report: RelayReport) -> Iterator[str]:
    """The sums at the end, for people; migrations were told as they ended."""
    yield (
        f"{report.connections} connections, {report.migrations} migrations, "
        f"{format_size(report.forward_bytes)} forward, {format_size(report.backward_bytes)} back"
    )
    if report.peer is not None:
        yield (
            f"  frames: {format_size(report.wire_sent_bytes)} sent, "
            f"{format_size(report.wire_received_bytes)} received"
        )
    for fallback in report.fallbacks:
        yield f"  {fallback}"
    if report.broken_connections:
        yield (
            f"  broken: {report.broken_connections} connections, {report.damaged_connections} of "
            "them by damage between the relays"
        )
    if report.open_connections:
        yield f"  still open at the end: {report.open_connections}"
