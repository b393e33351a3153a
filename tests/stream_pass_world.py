# SPDX-License-Identifier: Apache-2.0
"""The world of one pass over a QEMU's stream: streams written by hand, page channels in memory, a
helm that notes its orders. No socket, no clock, no QEMU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import qemu_streams as s

from vmth.channel.fake import FakeLink
from vmth.errors import CancelledError
from vmth.events import Event
from vmth.guest import StateStream
from vmth.policy.interface import Action, Decision, Forecast, OnStall, RoundView
from vmth.qemu import stream as q
from vmth.qemu.stream_pass import StreamPass
from vmth.rounds import RoundTools
from vmth.tuning import Tuning
from vmth.types import Gpa, Mapping, RamBlock

LIMIT_NS = 300_000_000
NOTHING = Forecast(0, 0, 0, 0)
LATE = Forecast(LIMIT_NS, LIMIT_NS, 0, 0)
MACHINE = "pc-q35-7.2"
DEVICES = b"".join((s.full(7, "timer", s.TRICKY), b"\x00", s.description([("timer", 59)])))


class StreamGuest:
    """Only blocks and a pause: what the pass needs."""

    dirty = ()

    def __init__(self, blocks: Sequence[tuple[str, int]]) -> None:
        self.blocks = [RamBlock(name, length, Gpa(0), Mapping()) for name, length in blocks]
        self.paused = False

    def pause(self) -> bool:
        self.paused = True
        return True

    def resume(self) -> None:
        raise AssertionError("not the pass's business")

    def save_state(self, write: Callable[[StateStream], None]) -> None:
        raise AssertionError("not the pass's business")

    def load_state(self, streams: Iterable[StateStream]) -> None:
        raise AssertionError("not the pass's business")

    def release(self) -> None:
        raise AssertionError("not the pass's business")


@dataclass
class FakeHelm:
    passes: int = 1
    remaining_bytes: int = 0
    throttle_percent: int = 0
    stopped_ns: int | None = None
    allowed: list[int] = field(default_factory=list)
    rooms: list[int] = field(default_factory=list)  #: of those
    orders: list[str] = field(default_factory=list)  #: all, in their order
    held: list[int] = field(default_factory=list)
    trouble: Exception | None = None

    def hold_dirty_rate(self, rate_bps: int) -> None:
        self.orders.append("held")
        self.held.append(rate_bps)

    def allow_downtime(self, limit_ns: int, room_bytes: int = 0) -> None:
        self.orders.append("allowed")
        self.allowed.append(limit_ns)
        self.rooms.append(room_bytes)

    def allow_no_downtime(self) -> None:
        self.orders.append("not allowed")

    def check(self) -> None:
        if self.trouble is not None:
            raise self.trouble


class FakeStream:
    """The events of some bytes, fed in pieces from one buffer that is overwritten as soon as the
    pass may expect. ``before(n)`` runs before piece n is read; None in ``pieces``: silence."""

    def __init__(
        self,
        pieces: Sequence[bytes | None],
        before: Callable[[int], None],
        channel: int | None = None,
    ) -> None:
        self._channel = channel
        self._reader = q.StreamReader(opaque_devices=True)
        self._pieces = deque(pieces)
        self._before = before
        self._read = 0
        self._buffer = bytearray()
        self._until: Callable[[], object] | None = None
        self.given_out_bytes = self._fed = 0
        self.read_bytes = 0  #: last limit
        self.patience: list[float] = []  #: in seconds, as it was asked for

    @property
    def unread_bytes(self) -> int:
        return self._fed - self.given_out_bytes

    def in_use(self, until: Callable[[], object]) -> None:
        self._until = until

    def limit_read(self, nbytes: int) -> None:
        self.read_bytes = nbytes

    def wait_for_more(self, patience_s: float) -> None:
        self.patience.append(patience_s)

    def next_event(self, timeout_s: float) -> q.Event | None:
        while (event := self._reader.next_event()) is None:
            self.given_out_bytes = self._fed
            if not self._pieces:
                return q.StreamFinished()
            self._before(self._read)
            self._read += 1
            piece = self._pieces.popleft()
            if piece is None:
                return None
            if self._until is not None:
                self._until()
            self._buffer[:] = bytes([0xA5]) * len(self._buffer)
            self._buffer = bytearray(piece)
            self._fed += len(piece)
            self._reader.feed(self._buffer)
        return replace(event, channel=self._channel) if isinstance(event, q.RamPages) else event


class ScriptedPolicy:
    """Answers from a list; the last answer repeats."""

    def __init__(self, *answers: Decision) -> None:
        self.views: list[RoundView] = []
        self._answers = deque(answers or [Decision(Action.CONTINUE, "scripted", NOTHING)])

    def decide(self, view: RoundView) -> Decision:
        self.views.append(view)
        return self._answers.popleft() if len(self._answers) > 1 else self._answers[0]

    def recheck(self, view: RoundView, forecast: Forecast) -> Decision:
        raise AssertionError("QEMU has stopped its guest for good")


class World:
    """One pass over ``pieces`` behind a head that lists ``blocks``."""

    def __init__(
        self,
        pieces: Sequence[bytes | None],
        *,
        policy: ScriptedPolicy | None = None,
        blocks: Sequence[tuple[str, int]] = s.BLOCKS,
        tuning: Tuning | None = None,
        before: Callable[[int], None] = lambda piece: None,
        channel: int | None = None,
    ) -> None:
        """``channel``: the one of multifd that brings the pages."""
        self.guest = StreamGuest(blocks)
        shapes = [(block.npages, s.PAGE) for block in self.guest.blocks]
        self.arrived = [np.full(shape, 0xEE, dtype=np.uint8) for shape in shapes]
        self.link = FakeLink(
            [np.zeros(shape, dtype=np.uint8) for shape in shapes],
            self.arrived,
            hostless=frozenset(range(len(shapes))),
        )
        self.helm = FakeHelm()
        self.events: list[Event] = []
        self.now_ns = 0
        self.cancelled = False
        self.policy = policy or ScriptedPolicy()
        self.stream = FakeStream(
            [s.header(MACHINE) + s.start(s.block_list(blocks) + s.eos()), *pieces], before, channel
        )
        self.tools = RoundTools(
            sender=self.link.sender,
            policy=self.policy,
            tuning=tuning or Tuning(0, LIMIT_NS, 0, OnStall.PAUSE),
            clock=self.clock,
            emit=self.events.append,
            page_bytes=s.PAGE,
            live=True,
            pause_guest=self.guest.pause,
            resume_guest=self.guest.resume,
            check=self.check,
            delta_cache_pages=77,
        )
        self.engine = StreamPass(self.guest, self.tools, self.stream, self.helm)

    def clock(self) -> int:
        self.now_ns += 1000
        return self.now_ns

    def check(self) -> None:
        if self.cancelled:
            raise CancelledError("cancelled by the caller")

    def page(self, block: int, page: int) -> bytes:
        return bytes(self.arrived[block][page])


def every_page(blocks: Sequence[tuple[str, int]] = s.BLOCKS) -> bytes:
    """Each page of each block once."""
    records = b"".join(
        s.normal(page, name, 1000 * index + page)
        for index, (name, length) in enumerate(blocks)
        for page in range(length // s.PAGE)
    )
    return s.part(records + s.eos())


END = s.end(s.normal(3, "pc.ram", 777) + s.eos())
