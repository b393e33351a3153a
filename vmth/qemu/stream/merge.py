# SPDX-License-Identifier: Apache-2.0
"""A main stream and its multifd channels as one order of events, which a plain destination loads.

    main       START .. sync | PART zero pages .. sync | END .. sync | devices, end
    channel 0  ......... SYNC| pages ............. SYNC| pages . SYNC|
    channel 1  ......... SYNC| pages ............. SYNC| pages . SYNC|
                             ^ nothing behind it is read until all are here

Within such a window the order of pages is free, between windows it is not. Pages are given out as
they come, since a window can be all of RAM; what stands behind a channel's SYNC waits. The main
stream synchronises at each FLUSH record (8.1 and later) or, if its START section has none, at the
end of each ram section (older machine types).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from vmth.errors import StreamError, UsageError
from vmth.qemu.ram import BlockTable
from vmth.qemu.stream.events import (
    Event,
    PassThrough,
    RamEnd,
    RamFlush,
    RamPages,
    SectionFinished,
    SectionKind,
    SectionStarted,
)
from vmth.qemu.stream.multifd import ChannelHello, MultifdReader, PagesPacket
from vmth.qemu.stream.reader import StreamReader

__all__ = ["MultifdMerger"]


class _Channel:
    def __init__(self, page_bytes: int) -> None:
        self.reader = MultifdReader(page_bytes=page_bytes)
        self.waits = False
        self.hello: ChannelHello | None = None
        self.ended = False


class MultifdMerger:
    """``feed_main()`` and ``feed_channel()`` bytes, take ``next_event()``.

    The events are those of a stream without channels: pages that a channel brings while the main
    stream is between ram sections get a PART section of their own. ``windows`` counts
    synchronisations. Raises StreamError as the readers do, and for channels and main stream that
    do not fit together; then always.
    """

    def __init__(self, main: StreamReader, nchannels: int, *, page_bytes: int = 4096) -> None:
        if nchannels < 1:
            raise UsageError(f"multifd channels: received {nchannels}, allowed at least 1")
        self._main = main
        self._channels = [_Channel(page_bytes) for _ in range(nchannels)]
        self._events: deque[Event] = deque()
        self._main_waits: Event | None = None
        self._at_flush: bool | None = None  # None: the START section is not over
        self._section: SectionStarted | None = None
        #: Held back until the footer is there: pages may come between the two.
        self._payload_end: RamEnd | None = None
        self._over = False
        self._failure: StreamError | None = None
        self.windows = 0

    def feed_main(self, data: bytes | bytearray | memoryview) -> None:
        self._main.feed(data)

    def feed_main_eof(self) -> None:
        self._main.feed_eof()

    def feed_channel(self, index: int, data: bytes | bytearray | memoryview) -> None:
        """More of the channel that was ``index``-th to connect."""
        self._channels[index].reader.feed(data)

    def feed_channel_eof(self, index: int) -> None:
        self._channels[index].reader.feed_eof()
        self._channels[index].ended = True

    @property
    def hellos(self) -> Sequence[ChannelHello | None]:
        return [channel.hello for channel in self._channels]

    def main_may_read(self) -> bool:
        """False while the main stream waits for the channels: it need not be fed."""
        return self._main_waits is None

    def channel_may_read(self, index: int) -> bool:
        """False while this channel waits for the others: feeding it would only buffer."""
        return not self._channels[index].waits

    def give_back(self, index: int) -> int:
        """Forget the begin of a packet that this channel was fed last: how many bytes must be fed
        again in front of those that follow. Only when ``next_event()`` has returned None."""
        return self._channels[index].reader.give_back()

    def next_event(self) -> Event | None:
        """The next event, or None when more bytes are needed of any input."""
        while not self._events:
            if self._failure is not None:
                raise self._failure
            try:
                if not (self._main_step() or self._channel_step() or self._release()):
                    return None
            except StreamError as error:
                self._failure = error
        return self._events.popleft()

    def _main_step(self) -> bool:
        if self._main_waits is not None:
            return False
        event = self._main.next_event()
        if event is None:
            return False
        if self._payload_end is not None:
            self._events.append(self._payload_end)
            self._payload_end = None
        match event:
            case SectionStarted():
                self._section = event
            case SectionFinished():
                self._over |= self._section is not None and self._section.kind is SectionKind.END
                self._section = None
            case PassThrough():
                self._over = True
            case RamFlush():
                self._at_flush = True
                self._main_waits = event
                return True
            case RamEnd():
                if self._at_flush is None:
                    self._at_flush = False
                if self._at_flush:
                    self._payload_end = event
                else:
                    self._main_waits = event
                return True
        self._events.append(event)
        return True

    def _channel_step(self) -> bool:
        for index, channel in enumerate(self._channels):
            if channel.waits:
                continue
            if self._whole_packets(index, channel.reader):
                return True
            event = None if channel.reader.cut else channel.reader.next_event()
            if event is None:
                if channel.ended and self._main_waits is not None:
                    raise StreamError(f"multifd channel {index} ended before it synchronised")
                continue
            if isinstance(event, ChannelHello):
                channel.hello = event
            elif isinstance(event, PagesPacket):
                self._pages(index, event)
                channel.waits = event.sync
            else:
                raise StreamError(f"multifd device state of {event.idstr!r} cannot be merged")
            return True
        return False

    def _whole_packets(self, index: int, reader: MultifdReader) -> bool:
        """Pages of a channel, many at once. False where something else comes, or nothing."""
        ram = self._ram()
        pages = reader.next_pages(ram[0], index) if ram is not None else None
        if ram is None or pages is None:
            return False
        self._place(pages, ram[1])
        return True

    def _pages(self, index: int, packet: PagesPacket) -> None:
        if not len(packet.normal) and not len(packet.zero):
            return
        ram = self._ram()
        if ram is None:
            raise StreamError(f"multifd channel {index}: pages outside the ram sections' time")
        pages = packet.pages(ram[0], index)
        assert pages is not None
        self._place(pages, ram[1])

    def _ram(self) -> tuple[BlockTable, int] | None:
        """The blocks and ram's section id, while channels may bring pages."""
        table, section_id = self._main.table, self._main.ram_section_id
        if table is None or section_id is None or self._at_flush is None or self._over:
            return None
        return table, section_id

    def _place(self, pages: RamPages, section_id: int) -> None:
        if self._section is not None and self._section.section_id == section_id:
            self._events.append(pages)
            return
        if self._section is not None:
            raise StreamError("multifd pages within a section that is not ram's")
        self._events += (
            SectionStarted(SectionKind.PART, section_id, "ram", 0, 4),
            pages,
            RamEnd(),
            SectionFinished(section_id),
        )

    def _release(self) -> bool:
        """All have synchronised: the next window begins."""
        if self._main_waits is None or not all(channel.waits for channel in self._channels):
            return False
        self.windows += 1
        for channel in self._channels:
            channel.waits = False
        if isinstance(self._main_waits, RamEnd):
            self._payload_end = self._main_waits
        self._main_waits = None
        return True
