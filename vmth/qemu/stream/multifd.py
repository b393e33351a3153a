# SPDX-License-Identifier: Apache-2.0
"""A multifd channel's bytes to events: the hello, packets of pages, packets of device state.

    hello, 64 bytes | packet header, 320 bytes + be64 offset[pages that fit] | payload | ...

The header is as long as 512 KiB of pages ask for, however few there are. Payload is the normal
pages back to back, or what the compression made of them: zlib and zstd are one stream a channel,
flushed after each packet. No I/O; what a peer sent wrong is a StreamError, then always.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from vmth.errors import StreamError
from vmth.qemu.ram import RUN, BlockTable, PacketParser, PacketStop, PageKind, Runs
from vmth.qemu.stream.events import RamPages
from vmth.qemu.stream.fields import be, bound, expect, name_text
from vmth.qemu.stream.unzstd import Unzstd
from vmth.qemu.stream.window import ShortError, Window

__all__ = [
    "ChannelHello",
    "Compression",
    "DevicePacket",
    "MultifdEvent",
    "MultifdReader",
    "PagesPacket",
]

MAGIC = 0x11223344
VERSION = 1
HELLO_BYTES = 64
PACKET_BYTES = 512 << 10  #: pages of one packet, in bytes
HEADER_BYTES = 320
DEVICE_HEADER_BYTES = 276
#: What a compression may add to incompressible pages.
MAX_PAYLOAD_BYTES = 2 * PACKET_BYTES
MAX_DEVICE_PACKET_BYTES = 64 << 20

FLAG_SYNC = 1
FLAG_DEVICE_STATE = 32 << 1
COMPRESSION_MASK = 0x1F << 1
#: magic, version, flags, pages_alloc, normal_pages, next_packet_size, packet_num, zero_pages, block
HEADER = struct.Struct(">IIIIIIQI4x24x256s")

Offsets: TypeAlias = npt.NDArray[np.uint64]


class Compression(enum.IntEnum):
    """The method's bit of the flags, without its shift."""

    NONE = 0
    ZLIB = 1
    ZSTD = 2
    QPL = 4
    UADK = 8
    QATZIP = 16


@dataclass(frozen=True, slots=True)
class ChannelHello:
    """The channel's first bytes: the source's UUID (all zero when unset) and its number."""

    uuid: bytes
    channel: int


@dataclass(frozen=True, slots=True, eq=False)
class PagesPacket:
    """Pages of one block. ``sync``: the channel's part of a window ends with this packet.

    ``normal`` and ``zero`` are byte offsets in the block. ``data`` has the normal pages in their
    order, or is None for a compression that is not read here; ``payload_bytes`` is the wire's.
    """

    number: int
    flags: int
    compression: Compression
    idstr: str
    normal: Offsets
    zero: Offsets
    payload_bytes: int
    page_bytes: int
    data: memoryview | None = field(repr=False)

    @property
    def sync(self) -> bool:
        return bool(self.flags & FLAG_SYNC)

    def pages(self, table: BlockTable, channel: int | None = None) -> RamPages | None:
        """As runs of the main stream's blocks; None if there are none.

        Raises StreamError for a block that is not there, a page outside it, or a payload that
        cannot be read.
        """
        if not len(self.normal) and not len(self.zero):
            return None
        if self.data is None:
            raise StreamError(f"multifd compression {self.compression.name} cannot be read")
        block = table.index.get(self.idstr)
        if block is None:
            raise StreamError(f"multifd packet: block {self.idstr!r} is not listed")
        most = table.lengths[block]
        for offsets in (self.normal, self.zero):
            if len(offsets) and int(offsets.max()) >= most:
                raise StreamError(
                    f"multifd packet: offset {int(offsets.max())} in {self.idstr!r}, allowed below "
                    f"{most}"
                )
        runs = np.concatenate(
            (
                _runs(self.normal, block, PageKind.PAGE, self.page_bytes),
                _runs(self.zero, block, PageKind.ZERO, self.page_bytes),
            )
        )
        return RamPages(table, runs, self.data, channel)


@dataclass(frozen=True, slots=True)
class DevicePacket:
    """Device state of a section that is loaded in parallel (VFIO, 10.0 and later)."""

    flags: int
    idstr: str
    instance_id: int
    data: bytes = field(repr=False)


MultifdEvent: TypeAlias = ChannelHello | PagesPacket | DevicePacket


class MultifdReader:
    """One channel. ``feed()`` bytes, take ``next_event()``.

    ``hello``: False where the channel begins with packets. ``unpack``: False for who only counts:
    payloads of pages are skipped, their packets have no ``data`` and come before their payload.
    What was fed must not change as long as events that refer to it are used.
    """

    def __init__(self, *, page_bytes: int = 4096, hello: bool = True, unpack: bool = True) -> None:
        self._window = Window()
        self._events: deque[MultifdEvent] = deque()
        self._page_bytes = page_bytes
        self._most_pages = PACKET_BYTES // page_bytes
        self._state: Callable[[memoryview], int] = self._hello if hello else self._header
        self._want = 1
        self._failure: StreamError | None = None
        self._packet: PagesPacket | DevicePacket | None = None
        self._payload_bytes = 0
        self._inflate = zlib.decompressobj()
        self._unzstd: Unzstd | None = None
        self._unpacks = unpack
        self._packets = PacketParser()
        self._cut = False

    @property
    def position(self) -> int:
        """Bytes that were used so far."""
        return self._window.position

    @property
    def cut(self) -> bool:
        """Did ``next_pages()`` find the begin of a packet and nothing else? Its bytes may be taken
        back (``give_back()``), and fed again with more behind them, so that it is not copied."""
        return self._cut

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        self._cut = False
        self._window.feed(data)

    def give_back(self) -> int:
        """Forget the begin of a packet that was fed last. How many bytes: they must be fed again in
        front of those that follow. 0 where there is none, or where it cannot be forgotten."""
        if not self._cut:
            return 0
        self._cut = False
        return self._window.forget()

    def feed_eof(self) -> None:
        self._cut = False
        self._window.eof = True

    def next_pages(self, table: BlockTable, channel: int | None = None) -> RamPages | None:
        """Packets of plain pages that were fed whole, as many as there are in one piece, by native
        code; None where something else comes, which ``next_event()`` reads, or ``cut``. Needs
        ``unpack``."""
        window = self._window
        if self._state != self._header or window.carried or self._events or not window.available:
            return None
        if table.page_bytes != self._page_bytes:
            return None
        with window.view() as view:
            parsed = self._packets.parse(table, view)
            whole = len(view) == window.available and not window.eof
            self._cut = whole and parsed.stop is PacketStop.SHORT and parsed.used < len(view)
            if not parsed.used:
                return None
            pages = RamPages(table, parsed.runs, view[: parsed.used], channel)
        window.use(parsed.used)
        return pages

    def next_event(self) -> MultifdEvent | None:
        """The next event, or None when more bytes are needed (or all were used)."""
        if self._failure is not None:
            raise self._failure
        try:
            while not self._events:
                if not self._advance():
                    return None
        except StreamError as error:
            self._failure = StreamError(f"{error} (byte {self._window.position} of the channel)")
            raise self._failure from None
        return self._events.popleft()

    def _advance(self) -> bool:
        window = self._window
        if window.available < self._want:
            if window.eof and (window.available or self._state != self._header):
                raise StreamError(
                    f"the channel ends within a packet: received {window.available} bytes, needs "
                    f"{self._want}"
                )
            window.gather(self._want)  # what was fed is let go before more is asked for
            return False
        if self._want > len(window.view()):
            window.gather(self._want)
        with window.view() as view:
            try:
                used = self._state(view)
            except ShortError as short:
                self._want = short.need
                return True
        window.use(used)
        self._want = self._payload_bytes if self._state == self._payload else 1
        return True

    def _hello(self, view: memoryview) -> int:
        expect("multifd magic", be(view, 0, 4), MAGIC)
        expect("multifd version", be(view, 4, 4), VERSION)
        if len(view) < HELLO_BYTES:
            raise ShortError(HELLO_BYTES)
        self._events.append(ChannelHello(bytes(view[8:24]), view[24]))
        self._state = self._header
        return HELLO_BYTES

    def _header(self, view: memoryview) -> int:
        expect("multifd magic", be(view, 0, 4), MAGIC)
        expect("multifd version", be(view, 4, 4), VERSION)
        if be(view, 8, 4) & FLAG_DEVICE_STATE:
            return self._device_header(view)
        header_bytes = HEADER_BYTES + 8 * self._most_pages
        if len(view) < header_bytes:
            raise ShortError(header_bytes)
        _, _, flags, alloc, normal, size, number, zero, block = HEADER.unpack_from(view)
        bound("multifd pages_alloc", alloc, self._most_pages)
        bound("multifd pages", normal + zero, self._most_pages)
        try:
            compression = Compression((flags & COMPRESSION_MASK) >> 1)
        except ValueError:
            raise StreamError(f"multifd flags: received {flags:#x}") from None
        raw = np.frombuffer(view[HEADER_BYTES:header_bytes], dtype=">u8", count=normal + zero)
        offsets = raw.astype(np.uint64)
        if np.any(offsets % np.uint64(self._page_bytes)):
            raise StreamError(f"multifd offsets: allowed multiples of {self._page_bytes}")
        # A packet that only synchronises has no payload, whatever its size says (up to 7.2).
        self._payload_bytes = bound("multifd payload", size, MAX_PAYLOAD_BYTES) if normal else 0
        if normal and compression is Compression.NONE:
            expect("multifd payload", size, normal * self._page_bytes)
        self._packet = PagesPacket(
            number,
            flags,
            compression,
            name_text(bytes(block).partition(b"\0")[0]),
            offsets[:normal],
            offsets[normal:],
            self._payload_bytes,
            self._page_bytes,
            memoryview(b""),
        )
        self._begin_payload()
        return header_bytes

    def _device_header(self, view: memoryview) -> int:
        if len(view) < DEVICE_HEADER_BYTES:
            raise ShortError(DEVICE_HEADER_BYTES)
        idstr = name_text(bytes(view[12:268]).partition(b"\0")[0])
        size = bound("multifd device state", be(view, 272, 4), MAX_DEVICE_PACKET_BYTES)
        self._packet = DevicePacket(be(view, 8, 4), idstr, be(view, 268, 4), b"")
        self._payload_bytes = size
        self._begin_payload()
        return DEVICE_HEADER_BYTES

    def _begin_payload(self) -> None:
        assert self._packet is not None
        if self._payload_bytes == 0:
            if isinstance(self._packet, PagesPacket) and len(self._packet.normal):
                raise StreamError("multifd payload: received 0 bytes for pages")
            self._events.append(self._packet)
            self._packet = None
        elif isinstance(self._packet, PagesPacket) and not self._unpacks:
            self._events.append(replace(self._packet, data=None))
            self._packet = None
            self._state = self._skip
        else:
            self._state = self._payload

    def _skip(self, view: memoryview) -> int:
        nbytes = min(len(view), self._payload_bytes)
        self._payload_bytes -= nbytes
        if self._payload_bytes == 0:
            self._state = self._header
        return nbytes

    def _payload(self, view: memoryview) -> int:
        packet, nbytes = self._packet, self._payload_bytes
        if len(view) < nbytes:
            raise ShortError(nbytes)
        payload = view[:nbytes]
        if isinstance(packet, DevicePacket):
            self._events.append(
                DevicePacket(packet.flags, packet.idstr, packet.instance_id, bytes(payload))
            )
        else:
            assert packet is not None
            self._events.append(
                PagesPacket(
                    packet.number,
                    packet.flags,
                    packet.compression,
                    packet.idstr,
                    packet.normal,
                    packet.zero,
                    nbytes,
                    packet.page_bytes,
                    self._unpack(packet, payload),
                )
            )
        self._packet, self._payload_bytes = None, 0
        self._state = self._header
        return nbytes

    def _unpack(self, packet: PagesPacket, payload: memoryview) -> memoryview | None:
        """The normal pages; None for a compression that is only checked."""
        nbytes = len(packet.normal) * self._page_bytes
        match packet.compression:
            case Compression.NONE:
                return memoryview(bytes(payload)) if self._window.carried else payload[:]
            case Compression.ZLIB:
                return memoryview(self._deflated(payload, nbytes))
            case Compression.ZSTD:
                self._unzstd = self._unzstd or Unzstd()
                return memoryview(self._unzstd.pages(payload, nbytes))
            case Compression.QPL | Compression.UADK:
                _check_lengths(payload, len(packet.normal), self._page_bytes)
        return None

    def _deflated(self, payload: memoryview, nbytes: int) -> bytes:
        try:
            # One byte more than there may be, so that the flush mark behind the pages is taken too.
            pages = self._inflate.decompress(payload, nbytes + 1)
        except zlib.error as error:
            raise StreamError(f"multifd zlib: {error}") from None
        if self._inflate.unconsumed_tail or self._inflate.unused_data:
            raise StreamError("multifd zlib: bytes behind the packet's pages")
        expect("multifd zlib pages, bytes", len(pages), nbytes)
        return pages


def _runs(offsets: Offsets, block: int, kind: PageKind, page_bytes: int) -> Runs:
    if not len(offsets):
        return np.empty(0, dtype=RUN)
    pages = offsets // np.uint64(page_bytes)
    begins = np.concatenate(([0], np.flatnonzero(pages[1:] != pages[:-1] + np.uint64(1)) + 1))
    runs = np.zeros(len(begins), dtype=RUN)
    runs["page"] = pages[begins]
    runs["npages"] = np.diff(np.append(begins, len(pages)))
    runs["block"], runs["kind"] = block, kind
    if kind is PageKind.PAGE:
        runs["at"] = begins * page_bytes
        runs["stride"] = runs["nbytes"] = page_bytes
    return runs


def _check_lengths(payload: memoryview, normal: int, page_bytes: int) -> None:
    """QPL and UADK: be32 lengths, then that many bytes a page. Some receivers trust them."""
    if len(payload) < 4 * normal:
        raise StreamError(f"multifd lengths: received {len(payload)} bytes, needs {4 * normal}")
    lengths = np.frombuffer(payload, dtype=">u4", count=normal)
    if int(lengths.min()) == 0 or int(lengths.max()) > page_bytes:
        raise StreamError(
            f"multifd page length: received {int(lengths.min())} to {int(lengths.max())}, allowed "
            f"1 to {page_bytes}"
        )
    expect("multifd payload", len(payload), 4 * normal + int(lengths.sum(dtype=np.uint64)))
