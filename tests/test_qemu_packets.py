# SPDX-License-Identifier: Apache-2.0
"""multifd packets by native code, against the reader that knows all of them: the same pages in the
same order, however the bytes were cut, with and without taking cut packets back."""

from __future__ import annotations

from typing import Any

import pytest
import qemu_streams as s
from hypothesis import example, given, settings
from hypothesis import strategies as st
from outgoing_world import FakeSource, LentPages, started

from vmth.errors import StreamError
from vmth.qemu import outgoing
from vmth.qemu import stream as q
from vmth.qemu.ram import BlockTable, PageKind

NPAGES = 64
BLOCKS = (("vga", 4 * s.PAGE), ("pc.ram", NPAGES * s.PAGE))
TABLE = BlockTable(BLOCKS)
SYNC, ZLIB = 1, 2

Seen = list[tuple[Any, ...]]


def slowly(data: bytes) -> tuple[Seen, str]:
    """By ``next_event()`` alone."""
    reader = q.MultifdReader()
    reader.feed(data)
    reader.feed_eof()
    seen: Seen = []
    try:
        while (event := reader.next_event()) is not None:
            note(seen, event)
    except StreamError as error:
        return seen, str(error)
    return seen, ""


def note(seen: Seen, event: q.MultifdEvent) -> None:
    if isinstance(event, q.PagesPacket):
        pages = event.pages(TABLE)
        if pages is not None:
            note_pages(seen, pages)
        if event.sync:
            seen.append(("sync",))
    else:
        seen.append((type(event).__name__,))


def note_pages(seen: Seen, pages: q.RamPages) -> None:
    seen.extend((page.idstr, page.page, bytes(page.data)) for page in pages.pages())


def natively(data: bytes, step: int, takes_back: bool) -> tuple[Seen, str, int]:
    """As ``OutgoingStream`` reads: the number is that of native calls that brought pages."""
    reader = q.MultifdReader()
    seen: Seen = []
    native = 0
    buffer = bytearray(data)  # one piece: what is fed again lies in front of what follows it
    at = 0

    def drain() -> None:
        nonlocal native
        while True:
            pages = reader.next_pages(TABLE, 0)
            if pages is not None:
                native += 1
                assert pages.channel == 0
                note_pages(seen, pages)
                continue
            event = None if reader.cut else reader.next_event()
            if event is None:
                return
            note(seen, event)

    try:
        while at < len(data):
            back = reader.give_back() if takes_back else 0
            end = min(at + step, len(data))
            reader.feed(memoryview(buffer)[at - back : end])
            at = end
            drain()
        back = reader.give_back()
        if back:
            reader.feed(memoryview(buffer)[at - back : at])
        reader.feed_eof()
        drain()
    except StreamError as error:
        return seen, str(error), native
    return seen, "", native


def packet(normal: list[int], zero: list[int], kind: str) -> bytes:
    payload = b"".join(s.page_of(page) for page in normal)
    match kind:
        case "sync":
            return s.multifd_packet(1, normal, zero, payload, flags=SYNC)
        case "other block":
            return s.multifd_packet(1, normal, zero, payload, idstr="rom")
        case "small block":
            return s.multifd_packet(1, normal, zero, payload, idstr="vga")
        case "wrong size":
            return s.multifd_packet(1, normal, zero, payload, size=len(payload) + 1)
    return s.multifd_packet(1, normal, zero, payload)


PAGES = st.lists(st.integers(0, NPAGES - 1), max_size=6)
#: Mostly good ones.
KINDS = st.sampled_from(["plain"] * 8 + ["sync", "other block", "small block", "wrong size"])
PACKETS = st.lists(st.builds(packet, PAGES, PAGES, KINDS), max_size=8)


def test_a_packet_that_ends_with_its_channel_is_not_taken_back() -> None:
    """Nothing comes that it could be fed in front of: it is an error."""
    reader = q.MultifdReader()
    reader.feed(s.multifd_hello(0))
    assert reader.next_pages(TABLE) is None and reader.next_event() is not None
    reader.feed(packet([1, 2], [], "plain")[:-1])
    assert reader.next_pages(TABLE) is None
    cut = [reader.cut]
    reader.feed_eof()
    assert [*cut, reader.cut] == [True, False] and reader.give_back() == 0
    with pytest.raises(StreamError, match="ends within a packet"):
        reader.next_event()


@settings(max_examples=60, deadline=None)
@given(
    packets=PACKETS,
    damage=st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(max_size=9)), max_size=2),
    cut=st.integers(0, 3000),
    step=st.integers(700, 60000),
    takes_back=st.booleans(),
)
@example([packet([3, 4, 5], [9], "plain")] * 3, [], 0, 1 << 20, True)
@example([packet([3], [], "plain"), packet([], [], "plain"), packet([4], [], "plain")], [], 0, 800,
         True)  # fmt: skip
def test_the_same_pages_in_the_same_order(
    packets: list[bytes],
    damage: list[tuple[int, bytes]],
    cut: int,
    step: int,
    takes_back: bool,
) -> None:
    data = b"".join(packets)
    for at, replacement in damage:
        at %= len(data) + 1
        data = (data[:at] + replacement + data[at + len(replacement) :])[: len(data)]
    data = s.multifd_hello(0) + data[: len(data) - cut]
    seen, error, _ = natively(data, step, takes_back)
    assert (seen, error) == slowly(data)


def test_packets_that_are_there_are_one_event() -> None:
    data = s.multifd_hello(0) + b"".join(packet([i, i + 1], [40 + i], "plain") for i in range(9))
    seen, error, native = natively(data, len(data), True)
    assert (len(seen), error, native) == (1 + 27, "", 1)


@pytest.mark.parametrize("takes_back", [False, True])
def test_a_cut_packet_is_read_once_it_is_whole(takes_back: bool) -> None:
    one = packet([1, 2, 3], [], "plain")
    data = s.multifd_hello(0) + one + one
    seen, error, native = natively(data, len(one) - 1, takes_back)
    assert error == "" and len(seen) == 1 + 6
    assert native == (2 if takes_back else 0)  # what was fed in pieces is joined by the other one


MAIN = b"".join(
    (
        s.header(),
        s.start(s.block_list(BLOCKS) + s.eos()),
        s.end(s.eos()),
        s.full(7, "timer", b"state"),
        b"\x00",
        s.description([("timer", 5)]),
    )
)


@pytest.mark.parametrize("nchannels", [1, 3])
def test_buffers_of_channels_are_filled_again_when_their_pages_were_read(
    nchannels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Much more than they hold, cut where their ends are."""
    monkeypatch.setattr(outgoing, "CHANNEL_BUFFER_BYTES", 192 << 10)
    sync = s.multifd_packet(0, flags=SYNC)
    packets = 40
    channels = [
        s.multifd_hello(index)
        + sync
        + b"".join(
            packet([(at + i) % NPAGES for i in range(16)], [(at + 20) % NPAGES], "plain")
            for at in range(packets)
        )
        + sync
        for index in range(nchannels)
    ]
    lent, zeros = LentPages(), 0
    with started(FakeSource(MAIN, channels), nchannels) as stream:
        while not isinstance(event := stream.next_event(10), q.StreamFinished):
            assert event is not None
            if isinstance(event, q.RamPages):
                for page in event.pages():
                    zeros += page.kind is PageKind.ZERO
                    content = b"" if page.kind is PageKind.ZERO else s.page_of(page.page)
                    lent.lend(page, content)
                stream.in_use(lent.check)
        assert 0 < lent.checked < nchannels * packets * 17
        lent.check()
    assert (lent.checked, zeros) == (nchannels * packets * 17, nchannels * packets)
