# SPDX-License-Identifier: Apache-2.0
"""Pages of a QEMU's stream that native code reads and sends: what arrives, what is handed back, and
when a pass over the stream asks for it."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import qemu_streams as s
from hypothesis import given, settings
from hypothesis import strategies as st
from outgoing_world import FakeSource, started
from stream_pass_world import (
    DEVICES,
    LIMIT_NS,
    NOTHING,
    FakeHelm,
    FakeStream,
    ScriptedPolicy,
    StreamGuest,
    World,
    every_page,
)
from test_lent_pages import NAMES, SHAPE, Program, native

from vmth.channel import pages
from vmth.channel.pages import NativeSender
from vmth.channel.pump import FIRST_BYTES, CanPump, Pumped, PumpLimits, PumpStop
from vmth.errors import CancelledError, ChannelError, MigrationError, StreamError, UsageError
from vmth.policy.interface import Action, Decision, OnStall
from vmth.qemu import outgoing, stream_pass
from vmth.qemu import stream as q
from vmth.qemu.outgoing import OutgoingStream
from vmth.qemu.ram import BlockTable
from vmth.qemu.stream_pass import StreamPass
from vmth.rounds import RoundTools
from vmth.tuning import Tuning

BLOCKS = [(name, n * s.PAGE) for name, n in zip(NAMES, SHAPE, strict=True)]
LIMITS = PumpLimits(20_000_000, 2_000_000, 1 << 40, 1 << 40, 1 << 20)
HEAD = s.header() + s.start(s.block_list(BLOCKS) + s.eos())
NO_BLOCK = (1 << 32) - 1  #: no record named one yet
TAIL = s.end(s.eos()) + DEVICES


def table() -> BlockTable:
    return BlockTable(BLOCKS)


@contextmanager
def running() -> Iterator[Program]:
    """The program behind the destination, until it has read all."""
    program = Program()
    program.start()
    try:
        yield program
    finally:
        program.end()


@contextmanager
def sending(source: FakeSource, data: bytes) -> Iterator[None]:
    """More than a socket holds."""
    thread = threading.Thread(target=source.send_more, args=(data,))
    thread.start()
    try:
        yield
    finally:
        thread.join()


def next_of(stream: OutgoingStream, kind: type[q.Event]) -> q.Event:
    while not isinstance(event := stream.next_event(10), kind):
        assert event is not None
    return event


# -- the stream's side --------------------------------------------------------------------------


def test_what_the_pump_leaves_is_given_out_behind_what_it_sent() -> None:
    """Its section's end, and what has no place in a pump."""
    body = s.normal(0, NAMES[0]) + b"".join(s.normal(page) for page in range(1, 30))
    data = HEAD + s.part(body + s.eos()) + s.part(s.zero(30, NAMES[0]) + s.flush() + s.eos()) + TAIL
    source = FakeSource(HEAD + s.part(body + s.eos())[: 9 + 5 * 4104])
    with running() as program, native(program) as (sender, receiver), started(source) as stream:
        first = next_of(stream, q.RamPages)
        assert isinstance(first, q.RamPages)
        npages = first.runs["npages"].sum()
        sender.send_pages(first.runs, first.data, 0)
        stream.in_use(lambda: sender.wait_read(1))
        source.send_more(data[len(HEAD) + 9 + 5 * 4104 :])
        pumped = stream.pump_pages(sender, 0, LIMITS)
        assert pumped is not None and pumped.stop is PumpStop.OTHER
        assert npages + pumped.pages == 30
        left = next_of(stream, q.RamEnd)
        assert left == q.RamEnd()
        assert stream.pump_pages(sender, 0, LIMITS) is None  # between sections
        last = next_of(stream, q.RamPages)
        assert isinstance(last, q.RamPages) and last.runs["page"].tolist() == [30]
        sender.send_pages(last.runs, last.data, 0)
        kinds = set()
        while not stream.finished:
            event = stream.next_event(10)
            kinds.add(type(event))
        assert {q.RamFlush, q.RamEnd, q.RawBytes} <= kinds
        assert stream.given_out_bytes == len(data)
        assert sender.barrier(0)
        sender.finish()
        assert receiver.wait()
    for page in range(30):
        assert program.memory[0][page].tobytes() == s.page_of(page)
    assert not program.memory[0][30].any()


def test_the_reader_goes_on_in_the_pumps_block() -> None:
    """A record that leaves its block's name out means the one that the pump saw last."""
    first = s.normal(0, NAMES[0])
    rest = s.normal(2, NAMES[1]) + s.flush() + s.zero(3) + s.eos()
    at = len(HEAD) + 5 + len(first)
    data = HEAD + s.part(first + rest) + TAIL
    source = FakeSource(data[:at])
    with running() as program, native(program) as (sender, _), started(source) as stream:
        next_of(stream, q.RamPages)
        source.send_more(data[at:])
        pumped = stream.pump_pages(sender, 0, LIMITS)
        assert pumped is not None and (pumped.pages, pumped.block) == (1, 1)
        last = next_of(stream, q.RamPages)
        assert isinstance(last, q.RamPages)
        assert last.runs[["block", "page"]].tolist() == [(1, 3)]


def test_a_fault_behind_pages_is_told_at_its_byte() -> None:
    """As without a pump: the same error, and the pages before it are out."""
    bad = s.normal(0, NAMES[0]) + s.normal(1) + s.normal(SHAPE[0])
    data = HEAD + s.part(bad)
    reader = q.StreamReader(opaque_devices=True)
    reader.feed(data)
    with pytest.raises(StreamError) as expected:
        deque(iter(reader.next_event, None), maxlen=0)
    with running() as program, native(program) as (sender, _):
        source = FakeSource(data[: len(HEAD) + 9 + 4104 + len(NAMES[0]) + 1])
        with started(source) as stream:
            next_of(stream, q.RamPages)
            source.send_more(data[len(HEAD) + 9 + 4104 + len(NAMES[0]) + 1 :])
            pumped = stream.pump_pages(sender, 0, LIMITS)
            assert pumped is not None and (pumped.pages, pumped.stop) == (1, PumpStop.OTHER)
            with pytest.raises(StreamError) as raised:
                stream.next_event(10)
        assert str(raised.value) == str(expected.value)


def test_a_multifd_source_has_no_pump() -> None:
    sync = s.multifd_hello(0) + s.multifd_packet(0, flags=1) * 2
    source = FakeSource(HEAD + TAIL, [sync])
    with running() as program, native(program) as (sender, _), started(source, 1) as stream:
        assert stream.pump_pages(sender, 0, LIMITS) is None


def test_a_lost_channel_is_told() -> None:
    with running() as program, native(program) as (sender, _):
        source = FakeSource(HEAD + s.part(s.normal(0, NAMES[0]) + s.normal(1))[:-5])
        with started(source) as stream:
            next_of(stream, q.RamPages)
            source.send_more(s.normal(2))
            sender.cancel("enough")
            with pytest.raises(CancelledError, match="enough"):
                stream.pump_pages(sender, 0, LIMITS)


def test_a_source_that_closes_within_pages_is_told_of() -> None:
    """Of the pages that came none is lost, and the end is seen by who reads on."""
    source = FakeSource(HEAD + s.part(s.normal(0, NAMES[0]) + s.normal(1))[:-5])
    source.closes_after_sending = True
    with running() as program, native(program) as (sender, _), started(source) as stream:
        stream.limit_read(64 << 10)
        next_of(stream, q.SectionFinished)
        next_of(stream, q.SectionStarted)
        source.status = {"status": "failed", "error-desc": "had enough"}
        pumped = stream.pump_pages(sender, 0, LIMITS)
        assert pumped is None or pumped.stop is PumpStop.IDLE
        with pytest.raises(MigrationError, match="had enough"):
            deque(iter(lambda: stream.next_event(1), None), maxlen=0)


def test_a_reset_is_an_end() -> None:
    """Of a QEMU that died with something unread on its return path."""
    ours, its = socket.socketpair()
    with running() as program, native(program) as (sender, _), ours:
        pump = sender.page_pump(ours.fileno(), table().lengths, table().wire_names, s.PAGE)
        ours.send(b"unread")
        its.close()
        pumped = pump.run(b"", 0, 0, LIMITS)
        assert (pumped.stop, pumped.read_bytes) == (PumpStop.IDLE, 0)
        assert ours.recv(1) == b""


def test_a_stream_that_was_closed_is_not_read() -> None:
    """By the pump's own descriptor; it is let go."""
    source = FakeSource(HEAD + s.part(s.normal(0, NAMES[0]) + s.normal(1))[:-5])
    with running() as program, native(program) as (sender, _), started(source) as stream:
        next_of(stream, q.RamPages)
        assert stream.pump_pages(sender, 0, LIMITS) is not None
        stream.close()
        assert stream.pump_pages(sender, 0, LIMITS) is None
        with pytest.raises(ChannelError, match="closed"):
            stream.next_event(1)


def test_what_a_pump_does_not_take() -> None:
    with running() as program, native(program) as (sender, _):
        assert isinstance(sender, CanPump)
        with pytest.raises(UsageError, match="bytes of names"):
            sender.page_pump(0, table().lengths, b"", s.PAGE)
        with pytest.raises(ChannelError, match="Bad file descriptor"):
            sender.page_pump(-1, table().lengths, table().wire_names, s.PAGE)
        pump = sender.page_pump(0, table().lengths, table().wire_names, s.PAGE)
        with pytest.raises(UsageError, match="allowed 65536"):
            pump.run(bytes(FIRST_BYTES + 1), 0, 0, LIMITS)


def test_a_pump_may_outlive_its_sender_and_the_reverse() -> None:
    """The ring is the threads' that read it, and the sender the pump's."""
    near, far = socket.socketpair()
    with near, far, running() as program, native(program) as (sender, receiver):
        pump = sender.page_pump(near.fileno(), table().lengths, table().wire_names, s.PAGE)
        far.sendall(s.normal(0, NAMES[0]) + s.normal(1))
        assert pump.run(b"", NO_BLOCK, 0, LIMITS).pages == 2
        del pump
        other = sender.page_pump(near.fileno(), table().lengths, table().wire_names, s.PAGE)
        assert sender.barrier(0)
        sender.finish()
        assert receiver.wait()
        sender.close()
        far.sendall(s.normal(2, NAMES[0]))
        with pytest.raises(UsageError):
            other.run(b"", NO_BLOCK, 1, LIMITS)
    assert program.memory[0][1].tobytes() == s.page_of(1)


# -- a whole pass -------------------------------------------------------------------------------


class Counted:
    """Pages that a stream's pumps have sent."""

    def __init__(self, stream: OutgoingStream, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pages = 0
        self._pump_pages = stream.pump_pages
        monkeypatch.setattr(stream, "pump_pages", self._counted)

    def _counted(self, sender: CanPump, round_: int, limits: PumpLimits) -> Pumped | None:
        pumped = self._pump_pages(sender, round_, limits)
        self.pages += pumped.pages if pumped is not None else 0
        return pumped


def tools_of(sender: NativeSender, guest: StreamGuest) -> RoundTools:
    now = iter(range(0, 1 << 40, 1000))
    return RoundTools(
        sender=sender,
        policy=ScriptedPolicy(),
        tuning=Tuning(0, LIMIT_NS, 0, OnStall.PAUSE),
        clock=lambda: next(now),
        emit=lambda event: None,
        page_bytes=s.PAGE,
        live=True,
        pause_guest=guest.pause,
        resume_guest=guest.resume,
        check=lambda: None,
    )


WRITES = st.lists(
    st.tuples(st.integers(0, SHAPE[0] - 1), st.integers(0, 50)), min_size=1, max_size=80
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(WRITES, st.integers(1, 12))
def test_the_last_content_of_every_page_arrives(
    writes: list[tuple[int, int]], at_once: int
) -> None:
    """However pages repeat, over sections and within one."""
    expected = {page: s.page_of(page) for page in range(SHAPE[0])}
    expected |= {page: s.page_of(seed) if seed else bytes(s.PAGE) for page, seed in writes}
    data = HEAD + every_page(BLOCKS)
    for first in range(0, len(writes), at_once):
        name: str | None = NAMES[0]
        body = b""
        for page, seed in writes[first : first + at_once]:
            body += s.normal(page, name, seed) if seed else s.zero(page, name)
            name = None
        data += s.part(body + s.eos())
    guest = StreamGuest(BLOCKS)
    with (
        pytest.MonkeyPatch.context() as patch,
        running() as program,
        native(program) as (sender, receiver),
        started(FakeSource(data + TAIL)) as stream,
    ):
        patch.setattr(stream_pass, "NEAR_BYTES", -(1 << 40))
        patch.setattr(outgoing, "BUFFER_BYTES", 192 << 10)
        patch.setattr(pages, "PUMP_PIECE_BYTES", 128 << 10)
        patch.setattr(pages, "PUMP_PIECES", 2)
        stream.limit_read(64 << 10)
        while not isinstance(stream.next_event(10), q.RamEnd):
            pass
        counted = Counted(stream, patch)
        StreamPass(guest, tools_of(sender, guest), stream, FakeHelm()).run()
        assert counted.pages > 0
        sender.finish()
        assert receiver.wait()
        assert sender.digest() == receiver.digest()
    assert guest.paused
    for page, content in expected.items():
        assert program.memory[0][page].tobytes() == content


@contextmanager
def long_pass(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[StreamPass, Counted, Program]]:
    """A pass of which most is pages, in a section each of 40."""
    body = [s.normal(page, NAMES[0]) for page in range(SHAPE[0])]
    body += [s.zero(page, NAMES[1]) for page in range(SHAPE[1])]
    data = HEAD + b"".join(
        s.part(b"".join(body[at : at + 40]) + s.eos()) for at in range(0, len(body), 40)
    )
    guest = StreamGuest(BLOCKS)
    source = FakeSource(data[: len(HEAD) + 3 * 4096])
    with running() as program, native(program) as (sender, receiver), started(source) as stream:
        while not isinstance(stream.next_event(10), q.RamEnd):
            pass
        counted = Counted(stream, monkeypatch)
        engine = StreamPass(guest, tools_of(sender, guest), stream, FakeHelm())
        with sending(source, data[len(HEAD) + 3 * 4096 :] + TAIL):
            yield engine, counted, program
        sender.finish()
        assert receiver.wait()


def test_most_of_a_pass_goes_by_the_pump(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_pass, "NEAR_BYTES", 0)
    with long_pass(monkeypatch) as (engine, counted, program):
        engine.run()
    assert 0 < counted.pages < sum(SHAPE)
    assert all(program.memory[0][page].tobytes() == s.page_of(page) for page in range(SHAPE[0]))
    assert not program.memory[1].any()


def test_a_pass_that_is_near_its_end_goes_event_by_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with long_pass(monkeypatch) as (engine, counted, program):
        engine.run()
    assert counted.pages == 0
    assert program.memory[0][99].tobytes() == s.page_of(99)


@dataclass
class PumpingStream:
    """A World's stream that answers pumps from a list, and notes what was asked."""

    inner: FakeStream
    answers: list[Pumped | None] = field(default_factory=list)
    asked: list[PumpLimits] = field(default_factory=list)

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def pump_pages(self, sender: CanPump, round_: int, limits: PumpLimits) -> Pumped | None:
        if self.inner._reader.in_pages(1 << 20) is None:
            return None
        self.asked.append(limits)
        return self.answers.pop(0) if self.answers else None


def pumping(
    pieces: Sequence[bytes], answers: Sequence[Pumped | None], **more: object
) -> tuple[World, PumpingStream]:
    """A World of one large block of which only ``pieces`` are sent."""
    world = World(pieces, blocks=[("pc.ram", 400 * s.PAGE)], **more)  # type: ignore[arg-type]
    world.link.sender.page_pump = lambda *_: None  # type: ignore[attr-defined]
    stream = PumpingStream(world.stream, list(answers))
    world.engine = StreamPass(world.guest, world.tools, stream, world.helm)  # type: ignore[arg-type]
    return world, stream


SENT = Pumped(PumpStop.TIME, 0, 4104, 4104, 100, 0, 0, b"")
PART = s.part(s.normal(0, "pc.ram") + s.normal(1) + s.eos())
PIECES = [PART[:5000], PART[5000:]]
LAST = [s.end(s.normal(3, "pc.ram", 777) + s.eos()), DEVICES]


def test_a_pump_is_asked_for_what_is_left_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_pass, "NEAR_BYTES", 50 * s.PAGE)
    world, stream = pumping([*PIECES, *LAST], [SENT, SENT, SENT, replace(SENT, pages=50)])
    world.engine.run()
    # Of 400 pages the last 50 go event by event.
    assert [limits.pages for limits in stream.asked] == [350, 250, 150, 50]
    assert all(limits.time_ns == stream_pass.PUMP_NS for limits in stream.asked)


def test_what_ends_a_pump_is_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_pass, "NEAR_BYTES", 50 * s.PAGE)
    other = replace(SENT, stop=PumpStop.OTHER, pages=10)
    world, stream = pumping([*PIECES, *LAST], [other, other])
    world.engine.run()
    assert [limits.pages for limits in stream.asked[:2]] == [350, 340]
    assert world.events


def test_no_pump_where_qemu_may_stop_its_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was allowed to behind the first round: the pages of the second go one by one."""
    monkeypatch.setattr(stream_pass, "NEAR_BYTES", 0)
    again = s.part(s.normal(0, "pc.ram", 5) + s.eos())
    world, stream = pumping(
        [*PIECES, again, *LAST],
        [],
        policy=ScriptedPolicy(Decision(Action.SWITCH_OVER, "fits", NOTHING)),
    )
    world.helm.remaining_bytes = 100 * s.PAGE
    orders: list[list[str]] = []
    pump_pages = stream.pump_pages

    def noted(sender: CanPump, round_: int, limits: PumpLimits) -> Pumped | None:
        orders.append(world.helm.orders.copy())
        return pump_pages(sender, round_, limits)

    monkeypatch.setattr(stream, "pump_pages", noted)
    world.engine.run()
    assert "allowed" in world.helm.orders
    assert orders and all("allowed" not in given for given in orders)
    assert world.page(0, 0) == s.page_of(5)


def test_a_pass_that_has_begun_at_qemus_is_found_between_pumps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_pass, "NEAR_BYTES", 0)
    world, stream = pumping([*PIECES, *LAST], [SENT, SENT, SENT])
    pump_pages = stream.pump_pages

    def next_pass(sender: CanPump, round_: int, limits: PumpLimits) -> Pumped | None:
        if len(stream.asked) == 1:
            world.helm.passes += 1
        return pump_pages(sender, round_, limits)

    monkeypatch.setattr(stream, "pump_pages", next_pass)
    world.engine.run()
    assert [stats.round for stats in world.engine.rounds] == [0, 1]


def test_nothing_that_a_pump_has_lent_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last ticket is waited for before what QEMU left out goes behind its pages."""
    monkeypatch.setattr(stream_pass, "NEAR_BYTES", 0)
    waited: list[int] = []
    one = s.part(s.normal(0, "pc.ram") + s.eos())
    lent = replace(SENT, stop=PumpStop.IDLE, pages=0, ticket=77)
    cut = len(one) - len(s.eos() + s.footer(s.RAM_ID))
    pieces = [one[:cut], one[cut:], s.end(s.eos()), DEVICES]
    world, stream = pumping(pieces, [None, None, lent])  # behind its page
    sender = world.link.sender
    wait_read = sender.wait_read

    def wait(ticket: int, timeout_ns: int = 0) -> bool:
        waited.append(ticket)
        return wait_read(min(ticket, sender._tickets), timeout_ns)

    monkeypatch.setattr(sender, "wait_read", wait)
    world.engine.run()
    assert stream.answers == [] and 77 in waited


def test_no_pump_once_qemu_was_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is left: the user has asked for it."""
    monkeypatch.setattr(stream_pass, "NEAR_BYTES", 0)
    monkeypatch.setattr(stream_pass, "LOOK_NS", 0)
    world, stream = pumping([*PIECES, *LAST], [])
    world.tools.tuning.switchover_requested = True
    world.engine.run()
    assert world.helm.allowed == [0]
    assert len(stream.asked) <= 1  # what came before the first look


def test_no_pump_where_qemu_has_said_that_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_pass, "NEAR_BYTES", 0)
    world, stream = pumping([*PIECES, *LAST], [])
    world.helm.stopped_ns = 1
    world.engine.run()
    assert stream.asked == []
