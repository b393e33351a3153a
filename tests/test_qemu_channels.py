# SPDX-License-Identifier: Apache-2.0
"""multifd channels, their merging into one plain stream, and the return path."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from qemu_streams import (
    PAGE,
    block_list,
    end,
    eos,
    flush,
    full,
    header,
    multifd_hello,
    multifd_packet,
    page_of,
    part,
    start,
    str8,
    u16,
    u32,
    u64,
    zero,
)

from vmth.errors import StreamError, UsageError
from vmth.qemu import stream as q
from vmth.qemu.ram import BlockTable
from vmth.qemu.stream import unzstd

SYNC, ZLIB, ZSTD, QPL, UADK, QATZIP = 1, 1 << 1, 2 << 1, 4 << 1, 8 << 1, 16 << 1


def normal_pages(*pages: int) -> bytes:
    return b"".join(page_of(page) for page in pages)


def channel_plain() -> bytes:
    """Also the stale size of a packet that only synchronises, as sent up to 7.2."""
    return b"".join(
        (
            multifd_hello(0),
            multifd_packet(0, flags=SYNC, size=524288),
            multifd_packet(1, [3, 4, 7], payload=normal_pages(3, 4, 7)),
            multifd_packet(2, [8], [1, 2], normal_pages(8), flags=SYNC),
            multifd_packet(3, [], [9]),
        )
    )


def channel_zlib() -> bytes:
    packer = zlib.compressobj(1)

    def packed(*pages: int) -> bytes:
        return packer.compress(normal_pages(*pages)) + packer.flush(zlib.Z_SYNC_FLUSH)

    return multifd_hello(1) + b"".join(
        multifd_packet(i, pages, payload=packed(*pages), flags=ZLIB)
        for i, pages in enumerate(([1, 2], [7], list(range(10, 40))))
    )


def channel_zstd() -> bytes:
    packer = zstandard.ZstdCompressor(level=1).compressobj()

    def packed(*pages: int) -> bytes:
        flushed: bytes = packer.compress(normal_pages(*pages))
        return flushed + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)

    return multifd_hello(1) + b"".join(
        multifd_packet(i, pages, payload=packed(*pages), flags=ZSTD)
        for i, pages in enumerate(([1, 2], [7], list(range(10, 40))))
    )


def read_channel(pieces: Iterable[bytes]) -> tuple[list[Any], str]:
    reader = q.MultifdReader()
    events: list[Any] = []

    def drain() -> None:
        while (event := reader.next_event()) is not None:
            if isinstance(event, q.PagesPacket):
                data = None if event.data is None else bytes(event.data)
                events.append(
                    (
                        *(event.number, event.sync, event.compression.name, event.idstr),
                        *(event.normal.tolist(), event.zero.tolist(), data),
                    )
                )
            else:
                events.append(event)

    try:
        for piece in pieces:
            reader.feed(piece)
            drain()
        reader.feed_eof()
        drain()
    except StreamError as error:
        with pytest.raises(StreamError):
            reader.next_event()
        return events, str(error)
    return events, ""


def bytewise(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def test_channel_without_compression() -> None:
    events, error = read_channel([channel_plain()])
    assert error == ""
    assert events == [
        q.ChannelHello(bytes(16), 0),
        (0, True, "NONE", "pc.ram", [], [], b""),
        (1, False, "NONE", "pc.ram", [3 * PAGE, 4 * PAGE, 7 * PAGE], [], normal_pages(3, 4, 7)),
        (2, True, "NONE", "pc.ram", [8 * PAGE], [PAGE, 2 * PAGE], page_of(8)),
        (3, False, "NONE", "pc.ram", [], [9 * PAGE], b""),
    ]
    data = channel_plain()
    assert read_channel([data[i : i + 5] for i in range(0, len(data), 5)]) == (events, "")


@pytest.mark.parametrize("make", [channel_zlib, channel_zstd])
def test_channel_with_compression(make: Any) -> None:
    data = make()
    events, error = read_channel([data])
    assert error == ""
    assert [event[-1] for event in events[1:]] == [
        normal_pages(1, 2),
        normal_pages(7),
        normal_pages(*range(10, 40)),
    ]
    assert read_channel([data[i : i + 97] for i in range(0, len(data), 97)]) == (events, "")


def test_zstd_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unzstd, "zstandard", None)
    with pytest.raises(UsageError, match="zstandard is not installed"):
        read_channel([channel_zstd()])


def test_other_compressions_are_checked_and_not_read() -> None:
    packet = multifd_packet(0, [1, 2], payload=u32(3) + u32(PAGE) + b"abc" + page_of(2), flags=QPL)
    events, error = read_channel([multifd_hello(0) + packet])
    assert error == "" and events[1][-1] is None
    reader = q.MultifdReader(hello=False)
    reader.feed(packet)
    event = reader.next_event()
    assert isinstance(event, q.PagesPacket)
    with pytest.raises(StreamError, match="QPL cannot be read"):
        event.pages(BlockTable([("pc.ram", 64 * PAGE)]))


def test_device_state_packet() -> None:
    head = u32(0x11223344) + u32(1) + u32(32 << 1) + b"0000:01:00.0/vfio".ljust(256, b"\0")
    data = multifd_hello(2) + head + u32(7) + u32(5) + b"state"
    events, error = read_channel([data])
    assert error == ""
    assert events[1] == q.DevicePacket(32 << 1, "0000:01:00.0/vfio", 7, b"state")
    assert read_channel(bytewise(data)) == (events, "")


BOMB = zlib.compress(bytes(8 << 20))
ZSTD_BOMB = zstandard.compress(bytes(64 << 20))
HELLO_FAULTS = {
    "magic": (b"QEVM" + bytes(60), "multifd magic"),
    "version": (u32(0x11223344) + u32(2) + bytes(56), "multifd version: received 0x2"),
    "cut": (multifd_hello(0)[:-1], "ends within a packet: received 63 bytes, needs 64"),
}
PACKET_FAULTS = {
    "alloc": (multifd_packet(0)[:12] + u32(129) + multifd_packet(0)[16:], "pages_alloc"),
    "too many": (multifd_packet(0, range(129)), "multifd pages: received 129"),
    "method": (multifd_packet(0, flags=3 << 1), "multifd flags"),
    "offset": (
        multifd_packet(0, [1])[:320] + u64(1) + bytes(1016),
        "allowed multiples of 4096",
    ),
    "size": (multifd_packet(0, [1], payload=bytes(PAGE - 1)), "multifd payload: received 0xfff"),
    "huge": (multifd_packet(0, [1], flags=ZLIB, size=1 << 31), "allowed at most 1048576"),
    "nothing": (multifd_packet(0, [1], flags=ZLIB), "received 0 bytes for pages"),
    "no zlib": (multifd_packet(0, [1], payload=b"nothing", flags=ZLIB), "multifd zlib"),
    "zlib bomb": (multifd_packet(0, [1], payload=BOMB, flags=ZLIB), "bytes behind"),
    "zlib less": (
        multifd_packet(0, [1, 2], payload=zlib.compress(page_of(1)), flags=ZLIB),
        "multifd zlib pages, bytes: received 0x1000, allowed 0x2000",
    ),
    "no zstd": (multifd_packet(0, [1], payload=b"nothing", flags=ZSTD), "multifd zstd"),
    "zstd bomb": (multifd_packet(0, [1], payload=ZSTD_BOMB, flags=ZSTD), "multifd zstd"),
    "qpl lengths": (
        multifd_packet(0, [1], payload=u32(PAGE + 1) + bytes(PAGE + 1), flags=QPL),
        "allowed 1 to 4096",
    ),
    "uadk sum": (multifd_packet(0, [1], payload=u32(9) + b"eight by", flags=UADK), "payload"),
}
CHANNEL_FAULTS = HELLO_FAULTS | {
    name: (multifd_hello(0) + data, message) for name, (data, message) in PACKET_FAULTS.items()
}


@pytest.mark.parametrize(("data", "message"), CHANNEL_FAULTS.values(), ids=CHANNEL_FAULTS)
def test_channel_faults(data: bytes, message: str) -> None:
    events, error = read_channel([data])
    assert message in error
    assert read_channel(bytewise(data)) == (events, error)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    make=st.sampled_from([channel_plain, channel_zlib, channel_zstd]),
    damage=st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(max_size=9)), max_size=3),
    step=st.integers(1, 5000),
)
def test_any_channel_bytes(make: Any, damage: list[tuple[int, bytes]], step: int) -> None:
    data = make()
    for at, replacement in damage:
        at %= len(data)
        data = data[:at] + replacement + data[at + len(replacement) :]
    whole = read_channel([data])
    assert read_channel([data[i : i + step] for i in range(0, len(data), step)]) == whole


def test_pages_are_checked_against_the_blocks() -> None:
    reader = q.MultifdReader(hello=False)
    reader.feed(multifd_packet(1, [3, 4, 7], [0], normal_pages(3, 4, 7)))
    event = reader.next_event()
    assert isinstance(event, q.PagesPacket)
    good = event.pages(BlockTable([("vga", PAGE), ("pc.ram", 8 * PAGE)]), 5)
    assert good is not None and good.channel == 5
    assert [(p.idstr, p.page, bytes(p.data)) for p in good.pages()] == [
        ("pc.ram", 3, page_of(3)),
        ("pc.ram", 4, page_of(4)),
        ("pc.ram", 7, page_of(7)),
        ("pc.ram", 0, b""),
    ]
    assert good.runs["npages"].tolist() == [2, 1, 1]
    with pytest.raises(StreamError, match="allowed below 28672"):
        event.pages(BlockTable([("pc.ram", 7 * PAGE)]))
    with pytest.raises(StreamError, match=r"'pc\.ram' is not listed"):
        event.pages(BlockTable([("vga", 7 * PAGE)]))


# ---- merging ---------------------------------------------------------------------------------


def packets(*pages: int, flags: int = 0) -> bytes:
    return multifd_packet(0, pages, payload=normal_pages(*pages), flags=flags)


def both_ways(flushes: bool) -> tuple[bytes, list[bytes]]:
    """Main stream and two channels with three windows, synchronised by records or by sections."""
    mark = flush() if flushes else b""
    extra = part(zero(40, "pc.ram") + eos()) if flushes else b""  # a section without one
    main = b"".join(
        (
            header(),
            start(block_list() + mark + eos()),
            extra,
            part(zero(1, "pc.ram") + mark + eos()),
            end(zero(2, "pc.ram") + mark + eos()),
            full(7, "timer", b"state"),
            b"\0",
        )
    )
    sync = multifd_packet(9, flags=SYNC, size=4096)
    return main, [
        multifd_hello(0) + sync + packets(5, 6) + packets(8, flags=SYNC) + packets(5) + sync,
        multifd_hello(1) + sync + packets(20) + sync + sync,
    ]


def merge(main: bytes, channels: Sequence[bytes], seed: int) -> tuple[list[Any], int]:
    """Feed pieces in an order that follows from ``seed``, none to an input that may not read."""
    chance = random.Random(seed)
    merger = q.MultifdMerger(q.StreamReader(), len(channels))
    inputs = [main, *channels]
    at = [0] * len(inputs)
    events: list[Any] = []
    while True:
        while (event := merger.next_event()) is not None:
            events.append(event)
        open_inputs = [
            i
            for i, data in enumerate(inputs)
            if at[i] < len(data)
            and (merger.main_may_read() if i == 0 else merger.channel_may_read(i - 1))
        ]
        if not open_inputs:
            break
        which = chance.choice(open_inputs)
        piece = inputs[which][at[which] : at[which] + chance.choice([1, 100, 5000])]
        at[which] += len(piece)
        if which == 0:
            merger.feed_main(piece)
        else:
            merger.feed_channel(which - 1, piece)
    assert at == [len(data) for data in inputs], "an input was left waiting"
    merger.feed_main_eof()
    for i in range(len(channels)):
        merger.feed_channel_eof(i)
    while (event := merger.next_event()) is not None:
        events.append(event)
    assert merger.hellos == [q.ChannelHello(bytes(16), i) for i in range(len(channels))]
    return events, merger.windows


@pytest.mark.parametrize("flushes", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_merged_is_a_plain_stream(flushes: bool, seed: int) -> None:
    main, channels = both_ways(flushes)
    events, windows = merge(main, channels, seed)
    assert windows == 3
    writer = q.StreamWriter()
    written = b"".join(bytes(writer.send(event)) for event in events)
    reader = q.StreamReader()
    reader.feed(written)
    reader.feed_eof()
    memory: dict[int, bytes] = {}
    order: list[int] = []
    again = []
    while (event := reader.next_event()) is not None:
        again.append(event)
        if isinstance(event, q.RamPages):
            for page in event.pages():
                memory[page.page] = bytes(page.data)
                order.append(page.page)
    assert isinstance(again[-1], q.StreamFinished)
    assert memory[5] == page_of(5) and memory[20] == page_of(20) and memory[1] == b""
    # Page 5 of the third window comes after every page of the second, and before it is over.
    assert order.index(5) < max(i for i, page in enumerate(order) if page == 5)
    assert max(order.index(page) for page in (1, 6, 8, 20)) < len(order) - 1 - order[::-1].index(5)
    assert not any(isinstance(event, q.RamFlush) for event in again)


def test_merge_faults() -> None:
    main, channels = both_ways(True)
    with pytest.raises(StreamError, match="outside the ram sections' time"):
        merge(main, [channels[0] + packets(1), channels[1]], 0)
    merger = q.MultifdMerger(q.StreamReader(), 1)
    merger.feed_main(main)
    merger.feed_channel(0, multifd_hello(0))
    merger.feed_channel_eof(0)
    with pytest.raises(StreamError, match="channel 0 ended before it synchronised"):
        list(iter(merger.next_event, None))
    with pytest.raises(UsageError):
        q.MultifdMerger(q.StreamReader(), 0)


# ---- return path -----------------------------------------------------------------------------

MESSAGES: list[tuple[q.ReturnMessage, bytes]] = [
    (q.Pong(1), u16(2) + u16(4) + u32(1)),
    (
        q.PageRequest(PAGE, 8192, "pc.ram"),
        u16(3) + u16(19) + u64(PAGE) + u32(8192) + str8("pc.ram"),
    ),
    (q.PageRequest(PAGE, 4096, None), u16(4) + u16(12) + u64(PAGE) + u32(4096)),
    (
        q.ReceivedBitmap("pc.ram", bytes(range(16))),
        u16(5) + u16(7) + str8("pc.ram") + u64(16) + bytes(range(16)) + u64(0x0123456789ABCDEF),
    ),
    (q.ResumeAck(1), u16(6) + u16(4) + u32(1)),
    (q.SwitchoverAck(), u16(7) + u16(0)),
    (q.Shut(0), u16(1) + u16(4) + u32(0)),
]


def read_return(pieces: Iterable[bytes]) -> tuple[list[Any], str]:
    reader = q.ReturnPathReader()
    messages: list[Any] = []
    try:
        for piece in pieces:
            reader.feed(piece)
            while (message := reader.next_message()) is not None:
                messages.append(message)
        reader.feed_eof()
        while (message := reader.next_message()) is not None:
            messages.append(message)
    except StreamError as error:
        with pytest.raises(StreamError):
            reader.next_message()
        return messages, str(error)
    return messages, ""


def test_return_path() -> None:
    for message, raw in MESSAGES:
        assert q.encode_return_message(message) == raw
    data = b"".join(raw for _, raw in MESSAGES)
    assert read_return([data]) == ([message for message, _ in MESSAGES], "")
    assert read_return(bytewise(data)) == ([message for message, _ in MESSAGES], "")
    with pytest.raises(UsageError, match="multiple of 8"):
        q.encode_return_message(q.ReceivedBitmap("pc.ram", b"123"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (u16(0) + u16(0), "received type 0, allowed 1 to 7"),
        (u16(8) + u16(0), "received type 8"),
        (u16(1) + u16(5) + bytes(5), "SHUT length: received 0x5, allowed 0x4"),
        (u16(2) + u16(513), "received 513, allowed at most 512"),
        (u16(3) + u16(12) + bytes(12), "received 16 bytes, needs 17"),
        (u16(3) + u16(14) + bytes(12) + b"\2a", "length of the block's name"),
        (u16(5) + u16(2) + str8("a") + u64(7), "multiple of 8"),
        (u16(5) + u16(2) + str8("a") + u64(1 << 40), "bitmap: received"),
        (u16(5) + u16(2) + str8("a") + u64(0) + u64(1), "end mark"),
        (u16(2) + u16(4) + b"\0", "ends within a message"),
    ],
)
def test_return_path_faults(data: bytes, message: str) -> None:
    messages, error = read_return([data])
    assert messages == [] and message in error
    assert read_return(bytewise(data))[1] == error


@settings(max_examples=20, deadline=None)
@given(st.binary(max_size=80), st.integers(1, 20))
def test_any_return_path_bytes(data: bytes, step: int) -> None:
    assert read_return([data[i : i + step] for i in range(0, len(data), step)]) == read_return(
        [data]
    )


@pytest.mark.parametrize("cut", [1, 1000, 1 << 20])
def test_payloads_are_skipped_for_who_only_counts(cut: int) -> None:
    pages = b"".join(page_of(page) for page in range(3))
    data = (
        multifd_hello(4)
        + multifd_packet(1, [0, 1, 2], [9], pages)
        + multifd_packet(2, [], [], flags=SYNC, size=77)
        + multifd_packet(3, [5], [], b"never unpacked", flags=ZSTD)
    )
    reader = q.MultifdReader(unpack=False)
    events = []
    for at in range(0, len(data), cut):
        reader.feed(data[at : at + cut])
        while (event := reader.next_event()) is not None:
            events.append(event)
    assert events[0] == q.ChannelHello(bytes(16), 4)
    packets = [event for event in events if isinstance(event, q.PagesPacket)]
    assert [(p.number, len(p.normal), len(p.zero), p.sync, p.data) for p in packets] == [
        (1, 3, 1, False, None),
        (2, 0, 0, True, memoryview(b"")),
        (3, 1, 0, False, None),
    ]
    assert reader.position == len(data)
    reader.feed(multifd_packet(4, [1], [], pages[:4096])[:-1])
    reader.feed_eof()
    assert isinstance(reader.next_event(), q.PagesPacket)
    with pytest.raises(StreamError, match="ends within a packet"):
        reader.next_event()
