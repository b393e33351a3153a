# SPDX-License-Identifier: Apache-2.0
"""CPU and device state on its way: streams cut into bounded messages, and put together again."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vmth.codec import Codec
from vmth.errors import GuestError, StreamError, UsageError, VmthError
from vmth.guest import Guest, StateStream
from vmth.stats import RoundStats, TransferCounters
from vmth.wire.messages import Message, PackedState, Paused, Seal, State

__all__ = [
    "STATE_CHUNK_BYTES",
    "STATE_MAX_BYTES",
    "StateCollector",
    "StateSender",
    "StateSummary",
    "StateTeller",
    "packing_pays",
]

STATE_CHUNK_BYTES = 256 << 10
#: Of all streams of one guest together. A destination holds them in memory until the seal.
STATE_MAX_BYTES = 256 << 20
STATE_MAX_STREAMS = 1024
#: Device state shrinks to a tenth: a connection that was idle then needs fewer round trips for it.
#: Beyond so much it is like memory, and packing it takes longer than a fast link.
PACKED_MAX_BYTES = 4 << 20
PACKED_LEVEL = 1
FAR_NS = 1_000_000
SLOW_BPS = 200e6


@dataclass(frozen=True, slots=True)
class StateSummary:
    """What the seal says of the state: CRC-32 over the streams' bytes in the order sent."""

    streams: int = 0
    total_bytes: int = 0
    crc32: int = 0


class StateSender:
    """Hand ``write`` to ``Guest.save_state``; each stream goes out as it comes. ``packed``: in zstd
    frames, which takes time here and there, up to PACKED_MAX_BYTES."""

    def __init__(self, send: Callable[[State | PackedState], None], packed: bool = False) -> None:
        self._send = send
        self._codec = Codec() if packed else None
        self.summary = StateSummary()

    def write(self, stream: StateStream) -> None:
        """Raises UsageError for a stream that the protocol cannot carry."""
        if not 1 <= len(stream.name.encode()) <= 255:
            raise UsageError(f"state stream name {stream.name!r}: allowed 1 to 255 bytes")
        if not 0 <= stream.version < 1 << 32:
            raise UsageError(f"state stream {stream.name}: version {stream.version} out of range")
        done = self.summary
        total = done.total_bytes + len(stream.data)
        if total > STATE_MAX_BYTES or done.streams >= STATE_MAX_STREAMS:
            raise UsageError(
                f"state stream {stream.name}: received {total} bytes in {done.streams + 1} streams "
                f"so far, allowed {STATE_MAX_BYTES} bytes in {STATE_MAX_STREAMS}"
            )
        for offset, data, last in _chunks(stream.data):
            frame = None
            if self._codec is not None and done.total_bytes + offset < PACKED_MAX_BYTES:
                frame = self._codec.compress(data, PACKED_LEVEL)
            piece = (stream.name, stream.version, offset)
            self._send(
                State(*piece, data, last)
                if frame is None
                else PackedState(*piece, frame, len(data), last)
            )
        self.summary = StateSummary(done.streams + 1, total, zlib.crc32(stream.data, done.crc32))


class StateTeller:
    """Says Paused, and then all state of the paused guest. One thread."""

    def __init__(
        self,
        send: Callable[[Message], None],
        guest: Guest,
        was_running: Callable[[], bool],
        packed: Callable[[], bool],
        clock: Callable[[], int],
        check: Callable[[], None],
    ) -> None:
        """``was_running`` and ``packed`` are asked when it is said; ``check`` before each piece: it
        raises what ends the job."""
        self._tell = send
        self._check = check
        self._guest = guest
        self._was_running = was_running
        self._packed = packed
        self._clock = clock
        self.said_ns = (0, 0)  #: from, to, on the clock
        self._paused_said = False

    def _send(self, message: Message) -> None:
        self._check()
        self._tell(message)

    def say_paused(self) -> None:
        """Once, and before ``say()`` if it is to be known earlier. Raises what ``send`` raises."""
        if not self._paused_said:
            self._send(Paused(time.time_ns(), self._was_running()))
            self._paused_said = True

    def say(self) -> StateSummary:
        """Raises GuestError for a guest that cannot save it, and what ``send`` raises."""
        began_ns = self._clock()
        self.say_paused()
        state = StateSender(self._send, self._packed())
        try:
            self._guest.save_state(state.write)
        except VmthError:
            raise
        except Exception as error:
            raise GuestError(f"the source guest could not save its state: {error}") from error
        self.said_ns = began_ns, self._clock()
        return state.summary


def packing_pays(counters: TransferCounters, rounds: Sequence[RoundStats]) -> bool:
    """On links where less state takes less time: far ones, by the round trips in which an idle
    connection gets up to speed, and slow ones."""
    bps = max((stats.bandwidth_bps for stats in rounds), default=0.0)
    return counters.base_rtt_ns >= FAR_NS or 0 < bps < SLOW_BPS


def _chunks(data: bytes) -> Iterator[tuple[int, bytes, bool]]:
    for offset in range(0, max(1, len(data)), STATE_CHUNK_BYTES):
        end = offset + STATE_CHUNK_BYTES
        yield offset, data[offset:end], end >= len(data)


class StateCollector:
    """Puts the destination's streams together. The peer's numbers are checked here."""

    def __init__(self) -> None:
        self.streams: list[StateStream] = []
        self._codec = Codec()
        self._open: State | None = None
        self._parts: list[bytes] = []
        self._offset = 0
        self._total = 0
        self._crc32 = 0

    def feed(self, message: State | PackedState) -> None:
        """Raises StreamError when chunks do not continue one another or grow beyond the bound, and
        for a frame that does not hold what it should."""
        if isinstance(message, PackedState):
            message = self._unpacked(message)
        opened = self._open
        if opened is None:
            if len(self.streams) >= STATE_MAX_STREAMS:
                raise StreamError(f"State: stream {len(self.streams) + 1} of {STATE_MAX_STREAMS}")
            self._open, self._parts, self._offset = message, [], 0
        elif (message.name, message.version) != (opened.name, opened.version):
            raise StreamError(
                f"State: received a piece of {message.name!r} version {message.version} inside "
                f"{opened.name!r} version {opened.version}"
            )
        if message.offset != self._offset:
            raise StreamError(
                f"State {message.name!r}: received offset {message.offset}, allowed {self._offset}"
            )
        self._total += len(message.data)
        if self._total > STATE_MAX_BYTES:
            raise StreamError(
                f"State: received {self._total} bytes, allowed at most {STATE_MAX_BYTES}"
            )
        if not message.data and not message.last:
            raise StreamError(f"State {message.name!r}: received an empty piece, allowed: the last")
        self._parts.append(message.data)
        self._offset += len(message.data)
        self._crc32 = zlib.crc32(message.data, self._crc32)
        if message.last:
            self.streams.append(StateStream(message.name, message.version, b"".join(self._parts)))
            self._open, self._parts = None, []

    def _unpacked(self, message: PackedState) -> State:
        data = self._codec.decompress(message.frame, message.nbytes)
        return State(message.name, message.version, message.offset, data, message.last)

    def check(self, seal: Seal) -> None:
        """Raises StreamError unless everything that the seal speaks of has arrived intact."""
        if self._open is not None:
            raise StreamError(f"Seal: state stream {self._open.name!r} was never finished")
        ours = (len(self.streams), self._total, self._crc32)
        theirs = (seal.streams, seal.state_bytes, seal.state_crc32)
        if ours != theirs:
            raise StreamError(
                f"Seal: state (streams, bytes, CRC-32): announced {theirs}, received {ours}"
            )
