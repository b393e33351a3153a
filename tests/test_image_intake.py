# SPDX-License-Identifier: Apache-2.0
"""A stream's events into an image and the image's parts into a stream again; what vmth inspect says
of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from image_world import PAGES, STATE, MemorySink, meta, records, renumbered, saved, zeros
from qemu_streams import (
    BLOCKS,
    PAGE,
    RAM_ID,
    block_list,
    capabilities,
    command,
    end,
    eos,
    footer,
    full,
    header,
    normal,
    page_of,
    part,
    plain,
    start,
    u32,
    u64,
    zero,
)

from vmth.cli import cli
from vmth.errors import RefusedError, StreamError, UsageError
from vmth.qemu import stream as q
from vmth.qemu.image import Image, ImageWriter
from vmth.qemu.image.intake import Intake, StreamHead
from vmth.qemu.inspect_image import inspect_stored


def taken(stream: bytes, path: Path) -> StreamHead:
    """Store the stream as a save does; what its head was."""
    heads: list[StreamHead] = []
    writers: list[ImageWriter] = []
    sink = MemorySink()

    def begin(head: StreamHead) -> ImageWriter:
        heads.append(head)
        about = meta(machine=head.machine, page_bytes=head.page_bytes, blocks=head.blocks)
        writers.append(ImageWriter(sink, about, head.data, workers=1))
        return writers[0]

    reader, intake = q.StreamReader(opaque_devices=True), Intake(begin)
    try:
        for at in range(0, len(stream), 5000):
            reader.feed(stream[at : at + 5000])
            while (event := reader.next_event()) is not None:
                intake.take(event)
        writers[0].finish()
    finally:
        for writer in writers:
            writer.close()
    path.write_bytes(sink.getvalue())
    (head,) = heads
    return head


def whole_pages() -> bytes:
    """Every page of both blocks, some of them twice."""
    first = zero(0, "pc.ram") + b"".join(zero(page) for page in range(1, 64))
    table = normal(0, "/rom@etc/acpi/tables", 100) + zero(1) + zero(2)
    return part(first + table + eos()) + part(normal(5, "pc.ram") + normal(6) + eos())


DEVICES = full(7, "timer", b"abc") + b"\x00"
TAIL = end(normal(6, "pc.ram", 102) + eos()) + DEVICES


def test_a_stream_is_taken_apart_and_is_one_again(tmp_path: Path) -> None:
    begin = header() + command(1) + command(2, u32(1)) + start(block_list() + eos())
    switchover = command(11)
    path = tmp_path / "image"
    head = taken(begin + whole_pages() + switchover + TAIL, path)
    assert head.machine == "pc-q35-7.2" and head.data == begin
    assert tuple((block.idstr, block.used_length) for block in head.blocks) == BLOCKS
    with Image.open(path) as image:
        image.verify()
        assert image.head == begin
        assert b"".join(image.state()) == switchover + end(eos()) + DEVICES
        assert image.read_page(0, 6) == page_of(102) and image.read_page(0, 5) == page_of(5)
        assert image.read_page(1, 0) == page_of(100) and image.read_page(1, 2) == bytes(PAGE)
        assert image.end.superseded_pages == 3 and image.end.digest_pages == 67


def test_any_generated_stream_is_stored_and_understood(tmp_path: Path) -> None:
    """With its vmdescription, which what is left for a restore still ends with."""
    taken(plain(), tmp_path / "image")
    with Image.open(tmp_path / "image") as image:
        rest = image.head + b"".join(image.state())
    reader = q.StreamReader()
    reader.feed(rest)
    reader.feed_eof()
    events = []
    while (event := reader.next_event()) is not None:
        events.append(event)
    assert [type(event).__name__ for event in events].count("DeviceState") == 2
    assert isinstance(events[-1], q.StreamFinished)


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (header() + start(b"", "dirty-bitmap", section_id=9), "iterable section 'dirty-bitmap'"),
        (header() + start(b"", "ram", version=9), "version 9"),
        (
            header("pc-q35-7.2", capabilities("x-ignore-shared"))
            + start(block_list(extra=u64(0)) + eos()),
            "address 0",
        ),
    ],
)
def test_a_stream_that_an_image_cannot_hold_is_refused(
    tmp_path: Path, stream: bytes, says: str
) -> None:
    with pytest.raises(RefusedError, match="this VM cannot be saved") as caught:
        taken(stream, tmp_path / "image")
    assert says in str(caught.value)


def test_deltas_are_refused(tmp_path: Path) -> None:
    delta = (0x40 | 0).to_bytes(8, "big") + b"\x06pc.ram" + b"\x01\x00\x03\x00\x01\xff"
    stream = header() + start(block_list() + eos()) + part(delta + eos()) + TAIL
    with pytest.raises(StreamError, match="received form 3"):
        taken(stream, tmp_path / "image")


# ---- vmth inspect ------------------------------------------------------------------------------


def inspect(path: Path, *more: Path) -> tuple[dict[str, Any], int, list[str]]:
    arguments = ["inspect", str(path), *map(str, more)]
    told = CliRunner().invoke(cli, [*arguments, "--json"])
    text = CliRunner().invoke(cli, arguments)
    assert text.exit_code == told.exit_code
    return json.loads(told.stdout or "{}"), told.exit_code, text.stdout.splitlines()


def test_inspect_shows_an_image(tmp_path: Path) -> None:
    path = tmp_path / "image"
    taken(plain(), path)
    values, code, lines = inspect(path)
    assert code == 0 and values["faults"] == []
    assert values["machine"] == "pc-q35-7.2" and values["bytes"] == path.stat().st_size
    assert values["pages"] == {"zero": 6, "page": 7}
    assert values["blocks"][0]["pages"] == {"zero": 5, "page": 5}
    assert [row["idstr"] for row in values["devices"]] == ["timer", "0000:00:1f.2/ahci"]
    told = values["image"]
    assert (told["name"], told["running"], told["live"]) == ("guest", True, False)
    assert told["superseded_pages"] == 2 and told["absent_pages"] == 67 - 11
    assert told["digest"].endswith(" of 11 pages")
    assert any("cold, the guest was running; QEMU 7.2.22" in line for line in lines)
    assert any("67" not in line and "not stored, digest" in line for line in lines)


def test_inspect_finds_damage(tmp_path: Path) -> None:
    path = tmp_path / "image"
    taken(plain(), path)
    good = path.read_bytes()
    place = next(record.at for record in records(good) if record.kind == PAGES) + 100
    for changed in (good[:place] + b"#" + good[place + 1 :], good[:-1], good[:9] + good[10:]):
        path.write_bytes(changed)
        values, code, lines = inspect(path)
        assert code == 6 and len(values["faults"]) == 1
        assert lines[-1].startswith("  FAULT: ")
    parts = records(good)
    state = next(record for record in parts if record.kind == STATE)
    state.codec, state.payload = 1, state.content.replace(footer(7), footer(8))
    path.write_bytes(renumbered(good, parts))
    values, code, _ = inspect(path)
    assert code == 6 and values["faults"]


def test_inspect_finds_other_blocks_than_the_stream_lists(tmp_path: Path) -> None:
    path = saved(tmp_path / "image", zeros(0, 5), head=header() + start(block_list() + eos()))
    values, code, _ = inspect(path)
    assert code == 6
    assert any("the stream's begin lists" in fault for fault in values["faults"])
    assert RAM_ID == 2


def test_inspect_takes_one_image_alone(tmp_path: Path) -> None:
    path = tmp_path / "image"
    taken(plain(), path)
    other = tmp_path / "stream"
    other.write_bytes(plain())
    with pytest.raises(UsageError, match="allowed is one image alone"):
        inspect_stored([other, path])
    assert inspect(other)[0]["image"] is None
