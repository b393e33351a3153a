# SPDX-License-Identifier: Apache-2.0
"""The native page channels behind the Protocols of ``vmth.channel.interface``.

Only translation happens here: errors of ``vmth._native._xfer`` become the classes of
``vmth.errors``, counters become ``TransferCounters``. Threading and blocking rules are the stub's.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import numpy as np
import numpy.typing as npt

from vmth._native import _xfer
from vmth.channel.interface import Digest, PageContent, PageRuns, StreamSink
from vmth.channel.pump import FIRST_BYTES, Pumped, PumpLimits, PumpStop
from vmth.channel.reuse import ReuseSource, native_files
from vmth.channel.sockets import local_address
from vmth.errors import CancelledError, ChannelError, StreamError, UsageError, VmthError
from vmth.memory import MappedBlock
from vmth.stats import ChannelCounters, FormCounters, TransferCounters
from vmth.types import Bitmap, Bitmaps

__all__ = ["FAST_PACKET_BYTES", "NativeReceiver", "NativeSender"]

#: Without a digest loopback carries 16 % more in packets of this size than in those of 256 KiB, and
#: 4 to 6 % more than in those of half as much; those of 4 MiB leave the caches before they are
#: hashed.
FAST_PACKET_BYTES = 2 << 20

#: A ring of these: as much as may wait to be sent, in pieces that stay in a cache.
PUMP_PIECE_BYTES = 1 << 20
PUMP_PIECES = 6
_AT_CLOSE = 1 << 64  # no ticket is ever that high


def _translated(error: _xfer.TransferError) -> VmthError:
    message = str(error)
    match error.kind:
        case "protocol":
            return StreamError(message)
        case "cancelled":
            return CancelledError(message)
        case "usage":
            return UsageError(message)
        case _:
            return ChannelError(message)


class _Translate:
    """Context manager that turns a native error into ours. Stateless: one serves every call."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if isinstance(error, _xfer.TransferError):
            raise _translated(error) from error


_translate = _Translate()


def _areas(memory: Sequence[MappedBlock], page_bytes: int) -> list[tuple[int, int, bool]]:
    areas = []
    for index, area in enumerate(memory):
        nbytes = area.block.used_length if area.hostless else area.view.nbytes
        if page_bytes <= 0 or nbytes % page_bytes:
            raise UsageError(f"block {index}: {nbytes} bytes, allowed multiples of {page_bytes}")
        areas.append((area.address, nbytes // page_bytes, area.anew))
    return areas


def _memory_files(memory: Sequence[MappedBlock]) -> list[tuple[int, int]]:
    mappings = [area.block.mapping for area in memory]
    return [(-1 if of.fd is None else of.fd, of.offset) for of in mappings]


def _wire_sink(sink: StreamSink) -> tuple[int, int, list[bytes]]:
    names = [idstr.encode("utf-8", "surrogateescape") for idstr in sink.idstrs]
    return sink.fd, sink.section_id, names


class _NativeEnd:
    """What both ends have. A context manager: leaving it closes."""

    _native: _xfer.Sender | _xfer.Receiver

    def digest(self) -> Digest:
        with _translate:
            return self._native.digest()

    def hashes(self, block: int, page: int, npages: int) -> npt.NDArray[np.uint64]:
        with _translate:
            return self._native.hashes(block, page, npages)

    def subdigests(self, block: int, page: int, npages: int, step: int) -> npt.NDArray[np.uint64]:
        with _translate:
            return self._native.subdigests(block, page, npages, step)

    def counters(self) -> TransferCounters:
        with _translate:
            values = self._native.counters()
        forms = {name: FormCounters(*of) for name, of in values.pop("forms").items()}
        channels = tuple(ChannelCounters(*of) for of in values.pop("channels", ()))
        return TransferCounters(**values, forms=forms, channels=channels)

    def fallbacks(self) -> Sequence[str]:
        with _translate:
            return self._native.fallbacks()

    def cancel(self, reason: str) -> None:
        with _translate:
            self._native.cancel(reason)

    def close(self) -> None:
        with _translate:
            self._native.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NativeSender(_NativeEnd):
    """``PageSender`` over sockets. A context manager: leaving it closes.

    Every method may raise ChannelError, StreamError (the peer broke the protocol), CancelledError
    or UsageError. After any but UsageError all channels are down and every later call raises the
    same; the guest is untouched.
    """

    def __init__(
        self,
        memory: Sequence[MappedBlock],
        page_bytes: int,
        *,
        hash_seed: int,
        digest: bool = True,
        zerocopy: bool = True,
        packet_bytes: int = 262144,
        fast_packet_bytes: int = 0,
        queue_jobs: int = 2,
        forms: int = 0,
        dedup_index_bytes: int = 64 << 20,
        delta_cache_bytes: int = 256 << 20,
        kept_copies_bytes: int = 64 << 20,
        handed_on: Sequence[int] = (),
    ) -> None:
        """``forms``: what both ends agreed on (``vmth.channel.forms``); none is on at first. The
        first two bounds are of what dedup and delta remember, each beside 16 bytes a page of
        hashes; the third is of copies of lent pages that went as a reference, until they landed.
        ``packet_bytes``: the payload of a full packet, which grows to ``fast_packet_bytes`` on a
        channel that carries that much in half a millisecond.
        ``handed_on``: blocks whose pages the destination does not keep: none is based on those."""
        with _translate:
            native = _xfer.Sender(
                _areas(memory, page_bytes),
                page_bytes,
                hash_seed=hash_seed,
                digest=digest,
                zerocopy=zerocopy,
                packet_bytes=packet_bytes,
                fast_packet_bytes=fast_packet_bytes,
                queue_jobs=queue_jobs,
                forms=forms,
                dedup_index_bytes=dedup_index_bytes,
                delta_cache_bytes=delta_cache_bytes,
                kept_copies_bytes=kept_copies_bytes,
                handed_on=handed_on,
            )
        # What native threads may read is dropped after the sender that joins them.
        self._native: _xfer.Sender = native
        self._memory = memory  # stays mapped as long as its views live
        self._lent: deque[tuple[int, memoryview]] = deque()  # (ticket, what it reads)
        self._local: dict[int, str] = {}  # by the channel's index

    def begin_reuse(self, key: bytes, entries: int) -> None:
        """The destination has ``entries`` contents at most, hashed under ``key``; then the parts in
        their order, all before the first channel. StreamError for a set that is not one."""
        with _translate:
            self._native.begin_reuse(key, entries)

    def add_reuse(self, base: int, count: int, data: bytes, last: bool) -> None:
        with _translate:
            self._native.add_reuse(base, count, data, last)

    def add_channel(self, fd: int, index: int, trip_ns: int = 0) -> None:
        """A connected stream socket past its preamble, duplicated. Before the first barrier.
        ``trip_ns``: what a short message took there and back; 0: unknown."""
        with _translate:
            self._native.add_channel(fd, index, trip_ns)
        self._local[index] = local_address(fd)

    def counters(self) -> TransferCounters:
        counters = super().counters()
        # One that another thread is adding is not named yet.
        local = self._local
        channels = (replace(one, local=local.get(one.index, "")) for one in counters.channels)
        return replace(counters, channels=tuple(channels))

    def send(self, block: int, page: int, npages: int, bitmap: Bitmap, round_: int) -> None:
        with _translate:
            self._native.send(block, page, npages, bitmap, round_)

    def send_pages(self, runs: PageRuns, data: PageContent, round_: int) -> tuple[int, int]:
        """Queue pages whose content lies in ``data``, as ``runs`` (``vmth.qemu.ram.RUN``, kinds
        ZERO and PAGE) say. Returns (runs queued, ticket): whole runs in order, up to the first that
        has a page already sent since the last barrier; end the round then and call again with the
        rest.

        Not copied: ``data`` must not change until ``pages_read()`` has reached the ticket. (It is
        kept alive until then, or until close().) Raises UsageError, with nothing queued, for a run
        that is not within its block or its data.
        """
        view = data.data if isinstance(data, np.ndarray) else memoryview(data)
        read = self.pages_read()
        while self._lent and self._lent[0][0] <= read:
            self._lent.popleft()
        # Unknown until the call returns; if it fails midway, some of it may have been queued.
        self._lent.append((_AT_CLOSE, view))
        try:
            queued, ticket = self._native.send_pages(runs, view, round_)
        except _xfer.TransferError as error:
            if error.kind == "usage":
                self._lent.pop()
            raise _translated(error) from error
        self._lent[-1] = (ticket, view)
        return queued, ticket

    def page_pump(
        self, fd: int, lengths: Sequence[int], names: bytes, page_bytes: int
    ) -> NativePump:
        """Of a QEMU's stream with these blocks: ``vmth.channel.pump``."""
        with _translate:
            native = _xfer.StreamPump(
                self._native, fd, lengths, names, page_bytes, PUMP_PIECE_BYTES, PUMP_PIECES
            )
        return NativePump(native)

    def pages_read(self) -> int:
        """The last ticket of which, and of all before it, no page is read any more. Any thread."""
        try:  # as the context manager, which takes longer than the call
            return self._native.pages_read()
        except _xfer.TransferError as error:
            raise _translated(error) from error

    def wait_read(self, ticket: int, timeout_ns: int = 0) -> bool:
        """Until ``pages_read()`` has reached ``ticket``; False at the timeout (0: none). Any
        thread."""
        with _translate:
            return self._native.wait_read(ticket, timeout_ns)

    def send_holes(self, block: int, runs: npt.NDArray[np.uint64], round_: int) -> None:
        with _translate:
            self._native.send_holes(block, runs, round_)

    def send_free(self, block: int, runs: npt.NDArray[np.uint64], round_: int) -> None:
        """(n, 2) runs that the guest calls free: no content, left out of the digest."""
        with _translate:
            self._native.send_free(block, runs, round_)

    def sent(self, round_: int, timeout_ns: int = 0) -> bool:
        """Begins the round's barrier. True when all before it was given to the sockets: the digest
        is then of all that was queued, whatever of it has landed. False at the timeout (0: none).
        """
        with _translate:
            return self._native.sent(round_, timeout_ns)

    def barriers(self) -> int:
        """How many were begun; a round may have more than one."""
        with _translate:
            return self._native.barriers()

    def barrier(self, round_: int, timeout_ns: int = 0) -> bool:
        with _translate:
            return self._native.barrier(round_, timeout_ns)

    def take_missed(self, bitmaps: Bitmaps) -> int:
        with _translate:
            return self._native.take_missed(bitmaps)

    def take_missed_pages(self) -> list[tuple[int, int, bytes]]:
        """Of the pages that ``take_missed()`` told those that came by ``send_pages()`` and were
        missed for what they refer to: (block, page, content), to be sent again behind a barrier.
        ``kept_copies_bytes`` bounds it; beyond that such pages go in forms that none can miss."""
        with _translate:
            return self._native.take_missed_pages()

    def set_bandwidth(self, bytes_per_second: int) -> None:
        with _translate:
            self._native.set_bandwidth(bytes_per_second)

    def set_forms(self, mask: int, zstd_level: int = 1) -> None:
        """Which of the agreed forms are on (``vmth.channel.forms``), from each channel's next
        packet on. Any thread. Raises UsageError, with nothing changed, for a form that was not
        agreed on, one that compares hashes where the digest is off, and a level outside -10 to 19
        or 0."""
        with _translate:
            self._native.set_forms(mask, zstd_level)

    def forget(self, block: int, page: int, npages: int) -> None:
        """The destination may not hold what it acknowledged of these pages: they go again in full,
        even if they are the same. To be called before they are queued."""
        with _translate:
            self._native.forget(block, page, npages)

    def set_window(self, nbytes: int) -> None:
        """At most so many bytes are under way over all channels; 0: any number. Until it is called
        each channel's window opens by itself, from 128 to 256 KiB on. Any thread."""
        with _translate:
            self._native.set_window(nbytes)

    def in_flight(self) -> int:
        """Bytes sent and not yet acknowledged, over all channels."""
        with _translate:
            return self._native.in_flight()

    def finish(self) -> None:
        with _translate:
            self._native.finish()

    def close(self) -> None:
        super().close()
        self._lent.clear()


class NativePump:
    """``PagePump``; keeps its sender. What it has read stays as long as the sender reads it."""

    def __init__(self, native: _xfer.StreamPump) -> None:
        self._native = native

    def run(self, first: bytes, block: int, round_: int, limits: PumpLimits) -> Pumped:
        if len(first) > FIRST_BYTES:
            raise UsageError(f"{len(first)} bytes read before, allowed {FIRST_BYTES}")
        with _translate:
            found = self._native.run(
                first,
                block,
                round_,
                time_ns=limits.time_ns,
                patience_ns=limits.patience_ns,
                pages=limits.pages,
                ahead_bytes=limits.ahead_bytes,
                piece_bytes=limits.piece_bytes,
            )
        return Pumped(PumpStop(found[0]), *found[1:])


class NativeReceiver(_NativeEnd):
    """``PageReceiver`` over sockets. A context manager: leaving it closes. Errors: the sender's."""

    def __init__(
        self,
        memory: Sequence[MappedBlock],
        page_bytes: int,
        *,
        hash_seed: int,
        digest: bool = True,
        maybe_nonzero: Sequence[Bitmap],
        channels: int,
        sink: StreamSink | None = None,
        forms: int = 0,
        reuse: Sequence[ReuseSource] = (),
    ) -> None:
        """``sink``: where the pages of hostless blocks are handed on; needed where there is one.
        ``forms``: what both ends agreed on. ``reuse``: files with pages, asked in their order. The
        files of ``memory`` are duplicated: holes are filled by writing to them, which is cheaper
        than by a fault, and ``fallbacks()`` names one that does not take it."""
        with _translate:
            native = _xfer.Receiver(
                _areas(memory, page_bytes),
                page_bytes,
                hash_seed=hash_seed,
                digest=digest,
                maybe_nonzero=maybe_nonzero,
                channels=channels,
                sink=None if sink is None else _wire_sink(sink),
                forms=forms,
                reuse=native_files(reuse),
                reuse_key=reuse[0].key if reuse else b"",
                memory_files=_memory_files(memory),
            )
        # What native threads may read is dropped after the receiver that joins them.
        self._native: _xfer.Receiver = native
        self._reuse = tuple(reuse)
        self._memory = memory  # stays mapped as long as its views live

    def reused(self) -> list[int]:
        """Pages that each file of ``reuse`` gave."""
        with _translate:
            return self._native.reused()

    def attach(self, fd: int, index: int) -> None:
        with _translate:
            self._native.attach(fd, index)

    def wait(self, timeout_ns: int = 0) -> bool:
        with _translate:
            return self._native.wait(timeout_ns)

    def wait_barriers(self, count: int, timeout_ns: int = 0) -> bool:
        """Until so many barriers have come on every channel: all before them has landed. False at
        the timeout (0: none). StreamError when all channels have ended before."""
        with _translate:
            return self._native.wait_barriers(count, timeout_ns)
