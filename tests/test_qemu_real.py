# SPDX-License-Identifier: Apache-2.0
"""Streams of a real QEMU: read without faults, and rebuilt so that a real QEMU loads them.

The guests are paused: what is compared is memory, not a program's behaviour. Their RAM is a shared
file, which the tests fill and compare.
"""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from qemu_process import MEMORY_BYTES, Qemu, accept_all, fill

from vmth.qemu import stream as q
from vmth.qemu.inspect import inspect_files

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


def load(folder: Path, stream: bytes, machine: str) -> None:
    """Give the stream to a destination; it must report success and hold the source's memory."""
    file = folder / "rebuilt.bin"
    file.write_bytes(stream)
    with Qemu(folder, "DST", "-incoming", "defer", machine=machine) as destination:
        destination.capabilities("events")
        destination.execute("migrate-incoming", uri=f"exec:cat {file}")
        destination.wait_migrated()
        # As the source was, which never ran; "inmigrate" would mean that something is missing.
        assert destination.status() == "prelaunch"
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


def test_other_capabilities_are_read(tmp_path: Path) -> None:
    (main,) = capture(tmp_path, "x-ignore-shared")
    report = inspect_files([main])
    assert report.faults == []
    assert "x-ignore-shared" in report.configuration["capabilities"]
    assert report.blocks[0].pages == {} and report.blocks[0].gpa == 0
