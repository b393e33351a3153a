# SPDX-License-Identifier: Apache-2.0
"""QEMU's main stream: every record, sections, commands, packages; whole, byte by byte, hostile."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qemu_streams import (
    BLOCKS,
    PAGE,
    TRICKY,
    block_list,
    capabilities,
    command,
    description,
    end,
    eos,
    flush,
    footer,
    full,
    header,
    normal,
    page_of,
    part,
    plain,
    postcopy,
    record,
    start,
    str8,
    u16,
    u32,
    u64,
    zero,
)

from vmth.errors import StreamError, UsageError
from vmth.qemu import stream as q
from vmth.qemu.ram import PageKind

PageRow = tuple[str, int, str, bytes]
PREFIX = header() + start(block_list() + eos())
TAIL = end(eos()) + b"\0"


def flat(events: Iterable[q.Event]) -> list[Any]:
    """Events without what depends on how the bytes were cut."""
    out: list[Any] = []
    for event in events:
        if isinstance(event, q.RamPages):
            out += [(p.idstr, p.page, p.kind.name, bytes(p.data)) for p in event.pages()]
        elif isinstance(event, q.RawBytes):
            if out and isinstance(out[-1], bytes):
                out[-1] += bytes(event.data)
            else:
                out.append(bytes(event.data))
        else:
            out.append(event)
    return out


def feed_again(reader: q.StreamReader, before: bytes, piece: bytes, at_most: int) -> bytes:
    """Feed a piece behind what the reader gives back of what was fed ``before``; what was fed."""
    fed = before[len(before) - reader.give_back(at_most) :] + piece
    reader.feed(fed)
    return fed


def read(
    pieces: Iterable[bytes], *, give_back: int = 0, **options: Any
) -> tuple[list[Any], str, bytes]:
    """Events, the error if there was one, and what the writer makes of the events."""
    reader, writer = q.StreamReader(**options), q.StreamWriter(flush_records=True)
    events: list[q.Event] = []
    written = b""

    def drain() -> None:
        nonlocal written
        while (event := reader.next_event()) is not None:
            events.append(event)
            written += bytes(writer.send(event))

    fed = b""
    try:
        for piece in pieces:
            fed = feed_again(reader, fed, piece, give_back)
            drain()
        reader.feed_eof()
        drain()
    except StreamError as error:
        with pytest.raises(StreamError):
            reader.next_event()
        return flat(events), str(error), written
    assert reader.next_event() is None
    return flat(events), "", written


def bytewise(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def pages(events: list[Any]) -> list[PageRow]:
    return [event for event in events if isinstance(event, tuple)]


def only(events: list[Any], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def test_plain_stream() -> None:
    events, error, written = read([plain()])
    assert error == ""
    assert written == plain()
    assert events[:4] == [
        q.FileHeader(3),
        q.Configuration("pc-q35-7.2"),
        q.Command(1, b""),
        q.Command(2, u32(1)),
    ]
    assert only(events, q.BlockListed) == [q.BlockListed(*block) for block in BLOCKS]
    assert pages(events) == [
        *[("pc.ram", page, "ZERO", b"") for page in range(5)],
        *[("pc.ram", page, "PAGE", page_of(page)) for page in (5, 6, 9)],
        ("/rom@etc/acpi/tables", 0, "PAGE", page_of(100)),
        ("/rom@etc/acpi/tables", 1, "ZERO", b""),
        ("/rom@etc/acpi/tables", 2, "PAGE", page_of(101)),
        ("pc.ram", 5, "PAGE", page_of(102)),
        ("pc.ram", 6, "PAGE", page_of(103)),
    ]
    assert [event.body for event in only(events, q.DeviceState)] == [TRICKY, bytes(1000)]
    assert isinstance(events[-2], q.Description)
    assert events[-1] == q.StreamFinished()


CASES = {
    "plain": plain(),
    "postcopy": postcopy(),
    "no configuration": b"QEVM" + u32(3) + start(block_list() + eos()) + TAIL,
    "all configuration": header(
        "virt-9.0",
        ("target-page-bits", u32(12)),
        capabilities("x-ignore-shared"),
        ("uuid", bytes(range(16))),
    )
    + start(block_list(extra=u64(1 << 32)) + eos())
    + TAIL,
    "xbzrle and compress": PREFIX
    + part(
        record(7, 0x40, b"\x01" + u16(3) + b"\x01\x01x", "pc.ram")
        + record(8, 0x40, b"\x01" + u16(1) + b"\x00")
        + record(8, 0x100, u32(5) + b"zlib!")
        + normal(9)
        + flush()
        + eos()
    )
    + TAIL,
    "hugetlb postcopy": header()
    + command(3, u64(2 << 20 | PAGE) + u64(PAGE))
    + start(block_list(extra=u64(2 << 20)) + eos())
    + TAIL,
    "advised without page sizes": header()
    + command(3, u64(PAGE) + u64(PAGE))
    + start(block_list() + flush() + eos())
    + TAIL,
    "unknown command": PREFIX + command(31, b"news") + TAIL,
    "switchover start": PREFIX + command(11) + TAIL,
    "unknown iterable": PREFIX
    + start(b"\x80 anything", "dirty-bitmap", section_id=3)
    + bytes(range(256)) * 9,
    "other ram version": header() + start(b"whatever", "ram", 5) + b"\x7e",
    "unknown section type": PREFIX + b"\x42" + b"rest" * 99,
    "unknown configuration": header("pc", ("novelty", b"body")) + b"rest",
    "no footers": header() + start(block_list() + eos())[:-5] + b"\x02" + u32(2) + b"rest",
    "behind the end": PREFIX + TAIL + b"more",
    "behind the description": PREFIX + TAIL + description([]) + b"more",
    "no vmdescription": PREFIX + end(eos()) + full(7, "timer", TRICKY) + b"\0",
    "recovery": command(10, str8("pc.ram")) + command(9) + b"\0",
}


@pytest.mark.parametrize("data", CASES.values(), ids=CASES)
def test_cut_anywhere_it_is_the_same(data: bytes) -> None:
    whole = read([data])
    assert whole[1] == ""
    # Everything comes out as it went in, also what was passed through.
    assert whole[2] == data
    assert read(bytewise(data)) == whole
    in_pieces = [data[i : i + 777] for i in range(0, len(data), 777)]
    assert read(in_pieces) == whole
    assert read(in_pieces, give_back=1 << 20) == whole


def test_a_record_that_is_given_back_is_no_event_of_its_own() -> None:
    records = normal(3, "pc.ram") + b"".join(normal(page) for page in range(4, 9))
    data = PREFIX + part(records + eos()) + TAIL
    half = data.index(normal(6)) + 1000
    reader = q.StreamReader()
    whole_records = []
    fed = b""
    for piece in (data[:half], data[half:]):
        fed = feed_again(reader, fed, piece, PAGE + 8)
        while (event := reader.next_event()) is not None:
            if isinstance(event, q.RamPages):
                whole_records.append([page.page for page in event.pages()])
                assert event.data.obj is fed  # not copied
    assert whole_records == [[3, 4, 5], [6, 7, 8]]


def test_more_than_is_allowed_is_not_given_back() -> None:
    reader = q.StreamReader()
    reader.feed(PREFIX)
    while reader.next_event() is not None:
        pass
    reader.feed(part(normal(3, "pc.ram"))[:1000])
    while reader.next_event() is not None:
        pass
    assert reader.give_back(900) == 0
    assert reader.give_back(1000) == 995  # behind the section's head
    assert reader.give_back(1000) == 0


def test_what_is_passed_through_is_reported() -> None:
    data = CASES["unknown iterable"]
    events, _, _ = read([data])
    at = len(PREFIX)
    assert events[-3:] == [
        q.PassThrough("iterable section 'dirty-bitmap' version 4", at),
        data[at:],
        q.StreamFinished(),
    ]


def test_package() -> None:
    events, _, _ = read([postcopy()])
    begin = next(i for i, e in enumerate(events) if isinstance(e, q.PackageStarted))
    finish = events.index(q.PackageFinished())
    inside = events[begin + 1 : finish]
    assert inside[0] == q.Command(4, b"") and inside[-1] == q.Command(5, b"")
    assert [event.body for event in only(inside, q.DeviceState)] == [TRICKY, bytes(64)]
    assert only(events, q.BlockListed)[0].page_size is None


def test_optional_fields_of_blocks() -> None:
    events, _, _ = read([CASES["hugetlb postcopy"]])
    assert [block.page_size for block in only(events, q.BlockListed)] == [2 << 20, 2 << 20]
    events, _, _ = read([CASES["all configuration"]])
    assert [block.gpa for block in only(events, q.BlockListed)] == [1 << 32, 1 << 32]
    fields = {event.name: event.body for event in only(events, q.ConfigurationField)}
    assert fields["uuid"] == bytes(range(16))


def test_delta_and_compressed_payload() -> None:
    events, _, _ = read([CASES["xbzrle and compress"]])
    assert pages(events)[:3] == [
        ("pc.ram", 7, PageKind.XBZRLE.name, b"\x01\x01x"),
        ("pc.ram", 8, PageKind.XBZRLE.name, b"\x00"),
        ("pc.ram", 8, PageKind.COMPRESS.name, b"zlib!"),
    ]
    assert q.RamFlush() in events


def test_vmdescription_ends_sections_that_fool_the_search() -> None:
    body = b"x" + footer(7) + b"\x04" + u32(8) + b"\x03abcy"
    data = (
        PREFIX + end(eos()) + full(7, "timer", body) + b"\0" + description([("timer", len(body))])
    )
    fooled, error, _ = read([data])
    assert only(fooled, q.DeviceState)[0].body == b"x"
    assert "device section 'abc' does not end" in error
    said = q.description_at_end(data)
    assert said is not None
    for pieces in ([data], bytewise(data)):
        events, error, written = read(pieces, device_sizes=q.device_sizes(said))
        assert error == "" and written == data
        assert only(events, q.DeviceState)[0].body == body


def test_description_sizes() -> None:
    text = b"""{"devices": [{"name": "a", "instance_id": 1, "fields": [
        {"name": "x", "size": 4}, {"name": "y", "size": 2, "array_len": 3}],
        "subsections": [{"vmsd_name": "a/sub", "fields": [{"name": "z", "size": 1}]}]}]}"""
    assert q.device_sizes(text) == {("a", 1): 4 + 6 + (1 + 1 + 5 + 4 + 1)}
    for bad in (
        b"{",
        b"[]",
        b'{"devices": [{}]}',
        b'{"devices": [{"name": 1, "instance_id": "x"}]}',
    ):
        with pytest.raises(StreamError):
            q.device_sizes(bad)
    assert q.description_at_end(b"no such thing") is None


def test_opaque_devices() -> None:
    events, error, written = read([plain()], opaque_devices=True)
    assert error == "" and written == plain()
    assert only(events, q.DeviceState) == []
    assert only(events, q.PassThrough)[0].reason == "device state, as asked"


def test_settle_ends_the_last_device_section() -> None:
    reader = q.StreamReader()
    reader.feed(CASES["no vmdescription"])
    events = []
    while (event := reader.next_event()) is not None:
        events.append(event)
    assert not only(events, q.DeviceState)
    reader.settle()
    while (event := reader.next_event()) is not None:
        events.append(event)
    assert only(events, q.DeviceState)[0].body == TRICKY
    assert events[-1] == q.EndOfState()


def test_resumed_postcopy_keeps_blocks() -> None:
    reader = q.StreamReader()
    reader.feed(PREFIX)
    while reader.next_event() is not None:
        pass
    reader.reconnected()
    reader.feed(command(9) + part(normal(1, "pc.ram") + eos()))
    events = []
    while (event := reader.next_event()) is not None:
        events.append(event)
    assert pages(flat(events)) == [("pc.ram", 1, "PAGE", page_of(1))]


def mapped_file() -> bytes:
    """A mapped-ram file of one block of 3 pages; page 1 is zero, its place holds old bytes."""
    head = header("pc", capabilities("mapped-ram"))
    name = str8("pc.ram") + u64(3 * PAGE)
    begin = head + b"\x01" + u32(2) + str8("ram") + u32(0) + u32(4) + u64(3 * PAGE | 4) + name
    bitmap_at = len(begin) + 28
    pages_at = 4 * PAGE
    begin += u32(1) + u64(PAGE) + u64(bitmap_at) + u64(pages_at)
    begin += (0b101).to_bytes(8, "little")
    data = begin.ljust(pages_at, b"?") + page_of(0) + b"o" * PAGE + page_of(2)
    return data + eos() + footer(2) + end(eos()) + b"\0"


def test_mapped_ram() -> None:
    data = mapped_file()
    reader = q.StreamReader()
    outcomes = []
    for step in (len(data), 11, 5000):
        pieces = [data[i : i + step] for i in range(0, len(data), step)]
        reader = q.StreamReader()
        events = []
        for piece in pieces:
            reader.feed(piece)
            while (event := reader.next_event()) is not None:
                events.append(event)
        reader.feed_eof()
        while (event := reader.next_event()) is not None:
            events.append(event)
        outcomes.append(flat(events))
    assert pages(outcomes[0]) == [
        ("pc.ram", 0, "PAGE", page_of(0)),
        ("pc.ram", 1, "ZERO", b""),
        ("pc.ram", 2, "PAGE", page_of(2)),
    ]
    assert outcomes[0][-1] == q.StreamFinished()
    assert outcomes[1] == outcomes[0] and outcomes[2] == outcomes[0]


FAULTS = {
    "empty": (b"", "ends before the end of state"),
    "magic": (b"QEVN" + u32(3), "file magic: received 0x5145564e"),
    "version": (b"QEVM" + u32(2), "file version: received 0x2, allowed 0x3"),
    "cut header": (b"QEVM\0", "ends within a record: received 5, needs 8"),
    "machine name": (b"QEVM" + u32(3) + b"\x07" + u32(1 << 30), "allowed at most 4096"),
    "page bits": (header("a", ("target-page-bits", u32(17))), "received 17, allowed 10 to 16"),
    "stray footer": (header() + b"\x7e", "section type: received 0x7e"),
    "stray subsection": (PREFIX + b"\x05", "section type: received 0x5"),
    "part of nothing": (header() + part(eos()), "section id of PART: received 2"),
    "second ram": (PREFIX + start(eos()), "section id 2: received again"),
    "wrong footer": (header() + start(block_list() + eos())[:-1] + b"\x09", "footer's id"),
    "lost footer": (PREFIX + part(eos())[:-5] + TAIL, "section footer: received 0x3"),
    "second list": (PREFIX + part(block_list() + eos()), "block list: received again"),
    "list too long": (
        header() + start(u64(PAGE | 4) + str8("a") + u64(2 * PAGE) + eos()),
        "length of block 'a': received 8192, allowed at most 4096",
    ),
    "same block": (header() + start(block_list([("a", PAGE), ("a", PAGE)]) + eos()), "'a'"),
    "unknown block": (PREFIX + part(zero(0, "vga") + eos()), "idstr of no block"),
    "outside the block": (PREFIX + part(zero(64, "pc.ram") + eos()), "offset in block"),
    "continue nothing": (PREFIX + part(zero(1) + eos()), "CONTINUE before any block"),
    "not zero": (PREFIX + part(record(0, 2, b"\x01", "pc.ram")), "zero page's byte"),
    "rdma hook": (PREFIX + part(u64(0x80)), "RDMA"),
    "two kinds": (PREFIX + part(u64(0xA)), "ram record flags: received 0xa"),
    "xbzrle encoding": (PREFIX + part(record(0, 0x40, b"\2\0\1x", "pc.ram")), "xbzrle encoding"),
    "xbzrle length": (PREFIX + part(record(0, 0x40, b"\1\x10\1x", "pc.ram")), "0x1001"),
    "compressed length": (PREFIX + part(record(0, 0x100, u32(8193), "pc.ram")), "0x2001"),
    "end mark with offset": (PREFIX + part(u64(PAGE | 0x10)), "record without page"),
    "command length": (PREFIX + command(2, b"x"), "command 2: received 1 bytes"),
    "empty package": (PREFIX + command(7, u32(0)), "package: received 0 bytes"),
    "package cut": (
        PREFIX + command(7, u32(20)) + command(2, u32(1)) + full(9, "cpu", b"") + b"\0",
        "package: 11 bytes left",
    ),
    "package in package": (PREFIX + command(7, u32(9)) + command(7, u32(1)), "within a package"),
    "device without end": (PREFIX + full(9, "cpu", b"state")[:-5], "'cpu' does not end"),
    "description length": (PREFIX + TAIL + b"\x06" + u32(1 << 31), "vmdescription: received"),
    "cut description": (PREFIX + TAIL + description([])[:-1], "ends within a record"),
    "cut page": (PREFIX + part(normal(0, "pc.ram"))[:-600], "ends within a record"),
}


@pytest.mark.parametrize(("data", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_say_received_and_allowed(data: bytes, message: str) -> None:
    events, error, written = read([data])
    assert message in error and "of the stream" in error
    again = read(bytewise(data))
    assert again == (events, error, written)
    assert data.startswith(written)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(
    data=st.sampled_from([plain(), postcopy(), mapped_file(), CASES["xbzrle and compress"]]),
    damage=st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(max_size=9)), max_size=3),
    cuts=st.lists(st.integers(0, 1 << 20), max_size=8),
)
def test_any_bytes_give_events_or_a_stream_error(
    data: bytes, damage: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    for at, replacement in damage:
        at %= len(data)
        data = data[:at] + replacement + data[at + len(replacement) :]
    assert both_ways(data, cuts)


@settings(max_examples=15, deadline=None)
@given(tail=st.binary(max_size=60), cuts=st.lists(st.integers(0, 400), max_size=5))
def test_any_bytes_behind_a_good_begin(tail: bytes, cuts: list[int]) -> None:
    assert both_ways(PREFIX + tail, cuts)


def both_ways(data: bytes, cuts: list[int]) -> bool:
    """The same in one piece, in pieces, and in pieces of which what is not used is fed again."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    pieces = [data[a:b] for a, b in itertools.pairwise(places)]
    outcomes = []
    for given_pieces, at_most in (([data], 0), (pieces, 0), (pieces, len(data))):
        reader = q.StreamReader()
        events: list[q.Event] = []
        error = ""
        fed = b""
        try:
            for piece in given_pieces:
                fed = feed_again(reader, fed, piece, at_most)
                while (event := reader.next_event()) is not None:
                    events.append(event)
            reader.feed_eof()
            while (event := reader.next_event()) is not None:
                events.append(event)
        except StreamError as caught:
            error = str(caught)
        outcomes.append((flat(events), error))
    return outcomes[0] == outcomes[1] == outcomes[2]


def test_writer_refuses_what_the_format_cannot_say() -> None:
    writer = q.StreamWriter()
    table = q.StreamReader().table
    assert table is None
    with pytest.raises(UsageError, match="left"):
        writer.send(q.BlockListed("pc.ram", PAGE))
    writer.send(q.RamSize(PAGE))
    with pytest.raises(UsageError, match="mapped-ram"):
        writer.send(q.BlockListed("pc.ram", PAGE, mapped=q.MappedPages(PAGE, 0, 0)))
    with pytest.raises(UsageError, match="command 1"):
        writer.send(q.Command(1, bytes(65536)))
