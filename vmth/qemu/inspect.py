# SPDX-License-Identifier: Apache-2.0
"""What a stored stream holds: machine, blocks, pages by kind, rounds, device sections, faults.

A stored stream is read twice: its vmdescription, which comes last, says where device sections end;
the search for their footers is then checked against it. Pages are not touched: files are mapped and
only the records between the pages are read. multifd takes the main stream and each channel's bytes.
"""

from __future__ import annotations

import datetime
import mmap
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vmth.errors import StreamError, UsageError
from vmth.qemu.ram import PageKind
from vmth.qemu.stream import (
    BlockListed,
    ChannelHello,
    Command,
    CommandCode,
    Compression,
    Configuration,
    ConfigurationField,
    Description,
    DeviceState,
    Event,
    MultifdReader,
    PackageStarted,
    PagesPacket,
    PassThrough,
    RamEnd,
    RamFlush,
    RamPages,
    RamSize,
    RawBytes,
    SectionKind,
    SectionStarted,
    StreamReader,
    description_at_end,
    device_sizes,
)

__all__ = [
    "ImageReport",
    "Inspector",
    "Report",
    "inspect_files",
    "report_lines",
    "report_values",
]

FEED_BYTES = 4 << 20
#: How far from the end a vmdescription is looked for.
TAIL_BYTES = 16 << 20
CHANNEL_MAGIC = b"\x11\x22\x33\x44"
RESENT_ORDER_BITS = 40
KIND_NAMES = {int(kind): kind.name.lower() for kind in PageKind}
KINDS = max(KIND_NAMES) + 1


@dataclass(slots=True)
class BlockReport:
    """One ramblock; pages as the records said, a page sent twice counts twice."""

    idstr: str
    used_length: int
    gpa: int | None = None
    pages: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class DeviceReport:
    idstr: str
    instance_id: int
    version_id: int
    nbytes: int


@dataclass(slots=True)
class ChannelReport:
    """One multifd channel."""

    file: str
    channel: int | None = None
    nbytes: int = 0
    packets: int = 0
    syncs: int = 0
    normal_pages: int = 0
    zero_pages: int = 0
    payload_bytes: int = 0
    compressions: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class ImageReport:
    """What only an image of a saved VM says (docs/images.md)."""

    version: int
    name: str
    uuid: str
    created_unix_ns: int
    qemu_version: str
    vmth_version: str
    running: bool
    live: bool
    page_bytes: int
    memory_bytes: int
    frames: int
    superseded_pages: int  #: stored, and stored again later
    absent_pages: int  #: of the VM, not stored
    digest: str


@dataclass(slots=True)
class Report:
    """What was found. ``faults``: no QEMU would load it; ``remarks``: what was not understood."""

    file: str
    nbytes: int = 0
    machine: str | None = None
    configuration: dict[str, Any] = field(default_factory=dict)
    hints: list[str] = field(default_factory=list)
    ram_bytes: int = 0
    blocks: list[BlockReport] = field(default_factory=list)
    pages: dict[str, int] = field(default_factory=dict)
    page_payload_bytes: int = 0
    ram_sections: int = 0
    rounds: int = 0
    flushes: int = 0
    commands: list[str] = field(default_factory=list)
    devices: list[DeviceReport] = field(default_factory=list)
    device_bytes: int = 0
    channels: list[ChannelReport] = field(default_factory=list)
    passed_through_bytes: int = 0
    remarks: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    image: ImageReport | None = None


def inspect_files(paths: Sequence[Path]) -> Report:
    """Inspect the main stream and, if there are more files, its multifd channels.

    The order of the files is free. Raises UsageError if not exactly one of them is a main stream,
    OSError if one cannot be read; what is wrong inside is in the report's ``faults``.
    """
    mains = [path for path in paths if not _is_channel(path)]
    if len(mains) != 1:
        raise UsageError(f"main streams: received {len(mains)} files, allowed 1")
    with _mapped(mains[0]) as data:
        report = Inspector(str(mains[0]), data).run()
    for path in paths:
        if path is not mains[0]:
            with _mapped(path) as data:
                _inspect_channel(report, path, data)
    _check_syncs(report)
    return report


def _is_channel(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == CHANNEL_MAGIC


@contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    """The file's bytes. Events hold views of them; the mapping goes when the last has gone."""
    with path.open("rb") as file:
        if file.seekable() and path.stat().st_size > 0:
            yield memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        else:
            yield memoryview(file.read())


class Inspector:
    """Takes the events of one main stream into a report: those of ``data``, or of who calls."""

    def __init__(self, name: str, data: memoryview | None = None) -> None:
        self.data = memoryview(b"") if data is None else data
        self.report = Report(name, nbytes=len(self.data))
        self.section: SectionStarted | None = None
        self.last_key = 1 << 62  # the first page begins a round
        self.sizes: dict[tuple[str, int], int] | None = None
        self.after_postcopy = False

    def run(self) -> Report:
        self.sizes = self._described_sizes()
        reader = StreamReader()
        try:
            for at in range(0, len(self.data), FEED_BYTES):
                reader.feed(self.data[at : at + FEED_BYTES])
                self._drain(reader)
            reader.feed_eof()
            self._drain(reader)
        except StreamError as error:
            self.report.faults.append(str(error))
        self._compare_sizes()
        self._hint_from_machine()
        return self.report

    def _described_sizes(self) -> dict[tuple[str, int], int] | None:
        description = description_at_end(bytes(self.data[-TAIL_BYTES:]))
        if description is None:
            self.report.remarks.append("no vmdescription at the end")
            return None
        try:
            return device_sizes(description)
        except StreamError as error:
            self.report.faults.append(str(error))
            return None

    def _drain(self, reader: StreamReader) -> None:
        while (event := reader.next_event()) is not None:
            self.take(event)

    def take(self, event: Event) -> None:
        report = self.report
        match event:
            case RamPages():
                self._pages(event)
            case SectionStarted():
                self.section = event
                report.ram_sections += event.kind is not SectionKind.FULL
            case DeviceState():
                assert self.section is not None
                nbytes = len(event.body)
                report.devices.append(
                    DeviceReport(
                        self.section.idstr,
                        self.section.instance_id,
                        self.section.version_id,
                        nbytes,
                    )
                )
                report.device_bytes += nbytes
            case RamSize():
                report.ram_bytes = event.total_bytes
            case BlockListed():
                report.blocks.append(BlockReport(event.idstr, event.used_length, event.gpa))
                if event.mapped is not None:
                    self._hint("mapped-ram: QEMU 9.0 or later")
            case RamFlush():
                report.flushes += 1
                self._hint("MULTIFD_FLUSH records: QEMU 8.1 or later")
            case RamEnd():
                pass
            case RawBytes():
                report.passed_through_bytes += len(event.data)
            case PassThrough():
                report.remarks.append(
                    f"passed through from byte {event.position} on: {event.reason}"
                )
            case _:
                self._rare(event)

    def _rare(self, event: Event) -> None:
        report = self.report
        match event:
            case Configuration():
                report.machine = event.machine
            case ConfigurationField():
                report.configuration[event.name] = _configuration_value(event)
            case Command():
                self._command(event)
            case PackageStarted():
                report.commands.append(f"PACKAGED {event.nbytes} bytes")
            case Description():
                if b'"configuration"' in event.json[:4096]:
                    self._hint("configuration in the vmdescription: a newer QEMU")

    def _command(self, event: Command) -> None:
        known = event.code in list(CommandCode)
        name = CommandCode(event.code).name if known else f"unknown command {event.code}"
        if not known:
            self.report.remarks.append(f"{name} of {len(event.data)} bytes")
        value = f" {int.from_bytes(event.data, 'big')}" if event.code == CommandCode.PING else ""
        self.report.commands.append(name + value)
        if event.code == CommandCode.SWITCHOVER_START:
            self._hint("SWITCHOVER_START: QEMU 10.0 or later, machine type 10.0 or later")
        if event.code == CommandCode.POSTCOPY_RUN:
            self.after_postcopy = True

    def _pages(self, event: RamPages) -> None:
        runs, report = event.runs, self.report
        npages = runs["npages"]
        report.page_payload_bytes += int((npages * runs["nbytes"]).sum())
        # One count for all: events are small where a stream is read as it runs.
        keys = runs["block"].astype(np.int64) * KINDS + runs["kind"]
        found = np.bincount(keys, weights=npages)
        for key in np.flatnonzero(found).tolist():
            block, kind = divmod(key, KINDS)
            name, count = KIND_NAMES[kind], int(found[key])
            report.pages[name] = report.pages.get(name, 0) + count
            counts = report.blocks[block].pages
            counts[name] = counts.get(name, 0) + count
            if kind == PageKind.COMPRESS:
                self._hint("COMPRESS_PAGE records: QEMU before 9.1")
        self._count_rounds(event)

    def _count_rounds(self, event: RamPages) -> None:
        """QEMU goes through the blocks in their order: where it goes back a round begins."""
        if self.after_postcopy:
            return
        runs = event.runs
        keys = (runs["block"].astype(np.int64) << RESENT_ORDER_BITS) | runs["page"].astype(np.int64)
        self.report.rounds += int(keys[0] < self.last_key)
        self.report.rounds += int(np.count_nonzero(keys[1:] < keys[:-1]))
        self.last_key = int(keys[-1])

    def _compare_sizes(self) -> None:
        if self.sizes is None:
            return
        for device in self.report.devices:
            said = self.sizes.get((device.idstr, device.instance_id))
            if said is not None and said != device.nbytes:
                self.report.faults.append(
                    f"device {device.idstr!r}: received {device.nbytes} bytes up to its footer, "
                    f"the vmdescription says {said}"
                )

    def _hint(self, text: str) -> None:
        if text not in self.report.hints:
            self.report.hints.append(text)

    def _hint_from_machine(self) -> None:
        match = re.search(r"-(\d+\.\d+)$", self.report.machine or "")
        if match:
            self.report.hints.insert(0, f"machine type of QEMU {match[1]}: that version or later")


def _configuration_value(event: ConfigurationField) -> Any:
    if event.name == "target-page-bits":
        return int.from_bytes(event.body, "big")
    if event.name == "capabilities":
        names, at = [], 4
        while at < len(event.body):
            end = at + 1 + event.body[at]
            names.append(event.body[at + 1 : end].decode("utf-8", "replace"))
            at = end
        return names
    return event.body.hex()


def _inspect_channel(report: Report, path: Path, data: memoryview) -> None:
    channel = ChannelReport(str(path), nbytes=len(data))
    report.channels.append(channel)
    reader = MultifdReader(page_bytes=1 << report.configuration.get("target-page-bits", 12))
    lengths = {block.idstr: block.used_length for block in report.blocks}
    try:
        for at in range(0, len(data), FEED_BYTES):
            reader.feed(data[at : at + FEED_BYTES])
            _drain_channel(reader, channel, lengths)
        reader.feed_eof()
        _drain_channel(reader, channel, lengths)
    except StreamError as error:
        report.faults.append(f"{path}: {error}")
    report.pages["multifd_normal"] = report.pages.get("multifd_normal", 0) + channel.normal_pages
    report.pages["multifd_zero"] = report.pages.get("multifd_zero", 0) + channel.zero_pages
    if channel.zero_pages and not any("in packets" in hint for hint in report.hints):
        report.hints.append("zero pages in packets: QEMU 9.0 or later")


def _drain_channel(reader: MultifdReader, channel: ChannelReport, lengths: dict[str, int]) -> None:
    while (event := reader.next_event()) is not None:
        if isinstance(event, ChannelHello):
            channel.channel = event.channel
            continue
        channel.packets += 1
        if not isinstance(event, PagesPacket):
            continue
        channel.syncs += event.sync
        channel.normal_pages += len(event.normal)
        channel.zero_pages += len(event.zero)
        channel.payload_bytes += event.payload_bytes
        if len(event.normal):
            channel.compressions.add(Compression(event.compression).name.lower())
        for offsets in (event.normal, event.zero):
            if len(offsets) and int(offsets.max()) >= lengths.get(event.idstr, 0):
                raise StreamError(
                    f"packet {event.number}: offset {int(offsets.max())} in {event.idstr!r}, "
                    f"allowed below {lengths.get(event.idstr, 0)}"
                )


def _check_syncs(report: Report) -> None:
    """Every channel synchronises as often as the main stream does."""
    if not report.channels or report.passed_through_bytes or report.faults:
        return
    expected = report.flushes or report.ram_sections
    for channel in report.channels:
        if channel.syncs != expected:
            report.faults.append(
                f"{channel.file}: received {channel.syncs} synchronisations, the main stream has "
                f"{expected}"
            )


def report_values(report: Report) -> dict[str, Any]:
    """The report as the object of ``--json``."""
    return {
        "file": report.file,
        "bytes": report.nbytes,
        "machine": report.machine,
        "configuration": report.configuration,
        "hints": report.hints,
        "ram_bytes": report.ram_bytes,
        "blocks": [
            {"idstr": b.idstr, "used_length": b.used_length, "gpa": b.gpa, "pages": b.pages}
            for b in report.blocks
        ],
        "pages": report.pages,
        "page_payload_bytes": report.page_payload_bytes,
        "ram_sections": report.ram_sections,
        "rounds": report.rounds,
        "flushes": report.flushes,
        "commands": report.commands,
        "devices": [
            {"idstr": d.idstr, "instance_id": d.instance_id, "version_id": d.version_id,
             "bytes": d.nbytes}
            for d in report.devices
        ],
        "device_bytes": report.device_bytes,
        "channels": [
            {"file": c.file, "channel": c.channel, "bytes": c.nbytes, "packets": c.packets,
             "syncs": c.syncs, "normal_pages": c.normal_pages, "zero_pages": c.zero_pages,
             "payload_bytes": c.payload_bytes, "compressions": sorted(c.compressions)}
            for c in report.channels
        ],
        "passed_through_bytes": report.passed_through_bytes,
        "remarks": report.remarks,
        "faults": report.faults,
        "image": None if report.image is None else asdict(report.image),
    }  # fmt: skip


def report_lines(report: Report) -> Iterator[str]:
    """The report for people."""
    yield f"{report.file}: {report.nbytes} bytes, machine {report.machine or 'not said'}"
    yield from _image_lines(report)
    for hint in report.hints:
        yield f"  hint: {hint}"
    for name, value in report.configuration.items():
        yield f"  {name}: {value}"
    yield (
        f"  ram: {report.ram_bytes} bytes in {len(report.blocks)} blocks, {report.ram_sections} "
        f"sections, {report.rounds} rounds, {report.page_payload_bytes} bytes of pages"
    )
    for block in report.blocks:
        yield f"    {block.idstr:<30} {block.used_length:>14}  {_counts(block.pages)}"
    yield f"  pages: {_counts(report.pages)}"
    for channel in report.channels:
        yield (
            f"  channel {channel.channel}: {channel.file}, {channel.nbytes} bytes, "
            f"{channel.packets} packets, {channel.syncs} synchronisations, "
            f"{channel.normal_pages} normal, {channel.zero_pages} zero, "
            f"{'/'.join(sorted(channel.compressions)) or 'no pages'}"
        )
    if report.commands:
        yield f"  commands: {', '.join(report.commands)}"
    yield f"  devices: {len(report.devices)} sections, {report.device_bytes} bytes"
    for device in report.devices:
        name = f"{device.idstr} {device.instance_id}"
        yield f"    {name:<30} {device.nbytes:>14}  version {device.version_id}"
    if report.passed_through_bytes:
        yield f"  passed through: {report.passed_through_bytes} bytes"
    for remark in report.remarks:
        yield f"  remark: {remark}"
    for fault in report.faults:
        yield f"  FAULT: {fault}"


def _image_lines(report: Report) -> Iterator[str]:
    image = report.image
    if image is None:
        return
    when = datetime.datetime.fromtimestamp(image.created_unix_ns // 10**9, datetime.UTC)
    was = "running" if image.running else "paused"
    how = "live" if image.live else "cold"
    yield (
        f"  saved: {when:%Y-%m-%d %H:%M:%S} UTC, {how}, the guest was {was}; QEMU "
        f"{image.qemu_version}, vmth {image.vmth_version}, image version {image.version}"
    )
    yield f"  VM: name {image.name or 'not said'}, uuid {image.uuid or 'none'}"
    yield (
        f"  memory: {image.memory_bytes} bytes in {image.frames} frames, {image.superseded_pages} "
        f"pages superseded, {image.absent_pages} not stored, digest {image.digest}"
    )


def _counts(pages: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in pages.items()) or "none"
