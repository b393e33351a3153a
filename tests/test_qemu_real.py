# SPDX-License-Identifier: Apache-2.0
"""Streams of a real QEMU: read without faults, and rebuilt so that a real QEMU loads them.

Most guests are paused: what is compared is memory, not a program's behaviour. Their RAM is a shared
file, which the tests fill and compare.
"""

from __future__ import annotations

import json
import random
import socket
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from qemu_process import MEMORY_BYTES, RAM_ID, Qemu, accept_all, fill, relay, walker_rom

from vmth.qemu import stream as q
from vmth.qemu.inspect import inspect_files
from vmth.qemu.ram import PageKind

pytestmark = pytest.mark.slow

SEED = 20260101
PAGE = 4096


def content() -> list[tuple[int, bytes]]:
    """12 MiB that do not compress, every other page of 2 MiB, and pages that do compress."""
    chance = random.Random(SEED)
    pieces = [(1 << 20, chance.randbytes(12 << 20))]
    pieces += [((16 << 20) + i * PAGE, chance.randbytes(PAGE)) for i in range(0, 512, 2)]
    pieces += [(MEMORY_BYTES - (i + 1) * PAGE, bytes([i + 1]) * PAGE) for i in range(0, 200, 3)]
    return pieces


def capture(folder: Path, *capabilities: str, compression: str = "none") -> list[Path]:
    """Migrate a paused guest into the test; the connections' bytes as files, main first."""
    listener = socket.socket(socket.AF_UNIX)
    path = folder / "capture.sock"
    listener.bind(str(path))
    listener.listen(8)
    count = 3 if "multifd" in capabilities else 1
    with listener, Qemu(folder, "SRC") as source:
        fill(source.memory, content())
        source.capabilities("events", *capabilities)
        source.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 34})
        if count > 1:
            source.execute(
                "migrate-set-parameters",
                **{"multifd-channels": count - 1, "multifd-compression": compression},
            )
        source.execute("migrate", uri=f"unix:{path}")
        received = accept_all(listener, count)
        source.wait_migrated()
    received.sort(key=lambda data: not data.startswith(b"QEVM"))
    files = [folder / f"connection{i}.bin" for i in range(count)]
    for file, data in zip(files, received, strict=True):
        file.write_bytes(data)
    return files


def load(
    folder: Path,
    stream: bytes,
    machine: str,
    *arguments: str,
    capabilities: Sequence[str] = (),
    status: str = "prelaunch",
) -> None:
    """Give the stream to a destination; it must report success and hold the source's memory."""
    file = folder / "rebuilt.bin"
    file.write_bytes(stream)
    incoming = ("-incoming", "defer", *arguments)
    with Qemu(folder, "DST", *incoming, machine=machine) as destination:
        destination.capabilities("events", *capabilities)
        destination.execute("migrate-incoming", uri=f"exec:cat {file}")
        destination.wait_migrated()
        # As the source was; "inmigrate" would mean that something is missing.
        assert destination.status() == status
        assert destination.memory.read_bytes() == (folder / "SRC.ram").read_bytes()


def rebuilt(events: Iterable[q.Event]) -> bytes:
    writer = q.StreamWriter()
    return b"".join(bytes(writer.send(event)) for event in events)


def machine_of(events: Iterable[q.Event]) -> str:
    return next(event.machine for event in events if isinstance(event, q.Configuration))


def read(data: bytes, **options: Any) -> list[q.Event]:
    reader = q.StreamReader(**options)
    events: list[q.Event] = []
    for at in range(0, len(data), 100_000):
        reader.feed(data[at : at + 100_000])
        events += drained(reader)
    reader.feed_eof()
    return events + drained(reader)


def drained(reader: q.StreamReader | q.MultifdMerger) -> list[q.Event]:
    events = []
    while (event := reader.next_event()) is not None:
        events.append(event)
    return events


def test_plain_stream_is_understood_and_rebuilt(tmp_path: Path) -> None:
    (main,) = capture(tmp_path)
    report = inspect_files([main])
    assert report.faults == [] and report.passed_through_bytes == 0
    assert sum(report.blocks[0].pages.values()) >= MEMORY_BYTES // PAGE
    data = main.read_bytes()
    events = read(data)
    assert events[-1] == q.StreamFinished()
    # The search for footers and the vmdescription agree on every device section.
    said = q.description_at_end(data)
    assert said is not None
    described = read(data, device_sizes=q.device_sizes(said))
    devices = [event for event in events if isinstance(event, q.DeviceState)]
    assert devices == [event for event in described if isinstance(event, q.DeviceState)]
    assert len(devices) == len(json.loads(said)["devices"]) > 20
    load(tmp_path, rebuilt(events), machine_of(events))


@pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])
def test_multifd_becomes_one_plain_stream(tmp_path: Path, compression: str) -> None:
    main, *channels = capture(tmp_path, "multifd", compression=compression)
    report = inspect_files([main, *channels])
    assert report.faults == [] and report.passed_through_bytes == 0
    assert report.pages["multifd_normal"] >= (12 << 20) // PAGE
    assert {name for channel in report.channels for name in channel.compressions} == {compression}
    merger = q.MultifdMerger(q.StreamReader(), len(channels))
    merger.feed_main(main.read_bytes())
    merger.feed_main_eof()
    for i, channel in enumerate(channels):
        merger.feed_channel(i, channel.read_bytes())
        merger.feed_channel_eof(i)
    events = drained(merger)
    assert events[-1] == q.StreamFinished()
    load(tmp_path, rebuilt(events), machine_of(events))


class Memory:
    """Guest memory as the events make it: what a destination must hold."""

    def __init__(self) -> None:
        self.ram = bytearray(MEMORY_BYTES)
        self.kinds: set[str] = set()

    def take(self, event: q.RamPages) -> None:
        for page in event.pages():
            if page.idstr != RAM_ID:
                continue
            self.kinds.add(page.kind.name)
            at = page.page * PAGE
            if page.kind is PageKind.XBZRLE:
                self._delta(at, bytes(page.data))
            else:
                data = bytes(page.data)
                if page.kind is PageKind.COMPRESS:
                    data = zlib.decompress(data)
                self.ram[at : at + PAGE] = data or bytes(PAGE)

    def _delta(self, at: int, delta: bytes) -> None:
        """Runs of unchanged and changed bytes in turn, lengths of seven bits a byte."""
        end, i, changed = at + PAGE, 0, False
        while i < len(delta):
            nbytes = delta[i] & 0x7F
            if delta[i] & 0x80:
                i += 1
                nbytes |= delta[i] << 7
            i += 1
            if changed:
                self.ram[at : at + nbytes] = delta[i : i + nbytes]
                i += nbytes
            at += nbytes
            changed = not changed
        assert at <= end


def memory_of(events: Iterable[q.Event]) -> Memory:
    memory = Memory()
    for event in events:
        if isinstance(event, q.RamPages):
            memory.take(event)
    return memory


def needs(qemu: Qemu, capability: str) -> None:
    if not qemu.supports(capability):
        pytest.skip(f"this QEMU has no {capability}")


def test_deltas_of_a_busy_guest(tmp_path: Path) -> None:
    """Pages that are sent again and again, as deltas; our reading is compared with QEMU's."""
    rom = tmp_path / "rom"
    rom.write_bytes(walker_rom())
    main = tmp_path / "main.bin"
    with Qemu(tmp_path, "SRC", "-bios", str(rom)) as source:
        if source.version() < (9, 0):
            pytest.skip("before 9.0 TCG loses writes of a busy guest: no page is sent three times")
        fill(source.memory, content())
        source.capabilities("events", "xbzrle")
        source.execute("migrate-set-parameters", **{"max-bandwidth": 64 << 20, "downtime-limit": 1})
        source.execute("cont")
        source.execute("migrate", uri=f"exec:cat > {main}")
        source.wait_pass(4)
        source.execute("migrate-set-parameters", **{"downtime-limit": 2000})
        source.wait_migrated()
    report = inspect_files([main])
    assert report.faults == [] and report.rounds >= 2
    events = read(main.read_bytes())
    memory = memory_of(events)
    assert {"XBZRLE", "PAGE", "ZERO"} <= memory.kinds
    (tmp_path / "SRC.ram").write_bytes(memory.ram)
    load(
        tmp_path,
        rebuilt(events),
        machine_of(events),
        *("-bios", str(rom)),
        status="paused",
    )


def test_compressed_pages(tmp_path: Path) -> None:
    with Qemu(tmp_path, "SRC") as source:
        needs(source, "compress")
    (main,) = capture(tmp_path, "compress")
    assert inspect_files([main]).faults == []
    events = read(main.read_bytes())
    memory = memory_of(events)
    assert "COMPRESS" in memory.kinds
    assert memory.ram == (tmp_path / "SRC.ram").read_bytes()
    load(tmp_path, rebuilt(events), machine_of(events), capabilities=("compress",))


@pytest.mark.parametrize("multifd", [False, True])
def test_mapped_ram_file(tmp_path: Path, multifd: bool) -> None:
    main = tmp_path / "main.bin"
    with Qemu(tmp_path, "SRC") as source:
        needs(source, "mapped-ram")
        fill(source.memory, content())
        source.capabilities("events", "mapped-ram", *(["multifd"] if multifd else []))
        source.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 34})
        source.execute("migrate", uri=f"file:{main}")
        source.wait_migrated()
    report = inspect_files([main])
    assert report.faults == [] and len(report.devices) > 20
    assert any("mapped-ram" in hint for hint in report.hints)
    assert memory_of(read(main.read_bytes())).ram == (tmp_path / "SRC.ram").read_bytes()


def test_postcopy_both_ways(tmp_path: Path) -> None:
    """A busy guest moves by postcopy through the test, which reads what both QEMUs say."""
    rom, middle, onward = tmp_path / "rom", tmp_path / "middle.sock", tmp_path / "onward.sock"
    rom.write_bytes(walker_rom())
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(middle))
    listener.listen(1)
    options = ("-bios", str(rom))
    incoming = ("-incoming", "defer", *options)
    with (
        listener,
        ThreadPoolExecutor(1) as pool,
        Qemu(tmp_path, "SRC", *options, shared=False) as source,
        Qemu(tmp_path, "DST", *incoming, shared=False) as destination,
    ):
        try:
            destination.capabilities("events", "postcopy-ram")
        except AssertionError as error:
            pytest.skip(f"no postcopy here (userfaultfd may be for root only): {error}")
        source.capabilities("events", "postcopy-ram")
        destination.execute("migrate-incoming", uri=f"unix:{onward}")
        source.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 20})
        carried = pool.submit(relay, listener, onward)
        source.execute("cont")
        source.execute("migrate", uri=f"unix:{middle}")
        source.wait_status("active")
        source.execute("migrate-start-postcopy")
        source.wait_migrated()
        destination.wait_migrated()
        forth, back = carried.result()
    main = tmp_path / "main.bin"
    main.write_bytes(forth)
    report = inspect_files([main])
    assert report.faults == [] and len(report.devices) > 20
    commands = [command.split()[0] for command in report.commands]
    assert commands[:3] == ["OPEN_RETURN_PATH", "PING", "POSTCOPY_ADVISE"]
    assert {"POSTCOPY_RAM_DISCARD", "PACKAGED", "POSTCOPY_LISTEN", "POSTCOPY_RUN"} <= {*commands}
    reader = q.ReturnPathReader()
    reader.feed(back)
    reader.feed_eof()
    messages = []
    while (message := reader.next_message()) is not None:
        messages.append(message)
    assert messages[0] == q.Pong(1)
    assert messages[-1] == q.Shut(0)
    events = read(bytes(forth))
    # QEMU says a block's name again after a page that was asked for; the pages are the same.
    assert memory_of(read(rebuilt(events))).ram == memory_of(events).ram


def test_other_capabilities_are_read(tmp_path: Path) -> None:
    (main,) = capture(tmp_path, "x-ignore-shared")
    report = inspect_files([main])
    assert report.faults == []
    assert "x-ignore-shared" in report.configuration["capabilities"]
    assert report.blocks[0].pages == {} and report.blocks[0].gpa == 0
