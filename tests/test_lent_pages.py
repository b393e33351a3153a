# SPDX-License-Identifier: Apache-2.0
"""Pages of hostless blocks: lent to the sender, handed on by the receiver as QEMU's stream."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from vmth.channel.fake import FakeLink, FakeSender
from vmth.channel.interface import StreamSink
from vmth.channel.pages import NativeReceiver, NativeSender
from vmth.errors import CancelledError, ChannelError, UsageError
from vmth.memory import map_blocks
from vmth.qemu import stream as q
from vmth.qemu.ram import RUN, PageKind, Runs
from vmth.types import Mapping, RamBlock

PAGE = 4096
SEED = 5
NAMES = ("pc.ram", "/rom@etc/acpi/tables")
SHAPE = (100, 9)  #: pages of each ramblock
SECTION = 0x01020304

Pages = npt.NDArray[np.uint8]


def run(block: int, page: int, npages: int = 1, at: int = 0, stride: int = PAGE) -> Runs:
    return np.array([(page, npages, at, stride, PAGE, block, PageKind.PAGE)], dtype=RUN)


def zeros(block: int, page: int, npages: int = 1) -> Runs:
    return np.array([(page, npages, 0, 0, 0, block, PageKind.ZERO)], dtype=RUN)


def random_pages(n: int, seed: int = SEED) -> Pages:
    return np.random.default_rng(seed).integers(1, 256, (n, PAGE), dtype=np.uint8)


class Program:
    """Stands for the QEMU behind the sink: reads its stream, keeps the pages, in a thread."""

    def __init__(self) -> None:
        self.theirs, self.ours = socket.socketpair()
        self.memory = [np.full((n, PAGE), 0xEE, dtype=np.uint8) for n in SHAPE]
        self.kinds: list[tuple[str, int, PageKind]] = []
        self.sections = 0
        self._reader = q.StreamReader()
        self._reader.feed(self._head())
        self._drain()
        self._thread = threading.Thread(target=self._read)

    def sink(self) -> StreamSink:
        return StreamSink(self.ours.fileno(), SECTION, NAMES)

    @staticmethod
    def _head() -> bytes:
        writer = q.StreamWriter()
        events: list[q.Event] = [
            q.FileHeader(3),
            q.Configuration("pc"),
            q.SectionStarted(q.SectionKind.START, SECTION, "ram", 0, 4),
            q.RamSize(sum(SHAPE) * PAGE),
            *(q.BlockListed(name, n * PAGE) for name, n in zip(NAMES, SHAPE, strict=True)),
            q.RamEnd(),
            q.SectionFinished(SECTION),
        ]
        return b"".join(bytes(writer.send(event)) for event in events)

    def start(self) -> None:
        self._thread.start()

    def _read(self) -> None:
        while data := self.theirs.recv(1 << 20):
            self._reader.feed(data)
            self._drain()

    def _drain(self) -> None:
        while (event := self._reader.next_event()) is not None:
            if isinstance(event, q.SectionFinished):
                self.sections += 1
            if isinstance(event, q.RamPages):
                for page in event.pages():
                    content = np.frombuffer(page.data, dtype=np.uint8) if page.data else 0
                    self.memory[NAMES.index(page.idstr)][page.page] = content
                    self.kinds.append((page.idstr, page.page, page.kind))

    def end(self) -> None:
        """What is on the way is read first."""
        self.ours.close()
        if self._thread.ident is not None:
            self._thread.join()
        self.theirs.close()


def hostless_blocks() -> list[RamBlock]:
    return [
        RamBlock(name, n * PAGE, i << 32, Mapping())
        for i, (name, n) in enumerate(zip(NAMES, SHAPE, strict=True))
    ]


@contextlib.contextmanager
def native(program: Program, channels: int = 1) -> Iterator[tuple[NativeSender, NativeReceiver]]:
    bits = [np.zeros((n + 63) // 64, dtype=np.uint64) for n in SHAPE]
    with (
        map_blocks(hostless_blocks()) as memory,
        NativeSender(memory, PAGE, hash_seed=SEED) as sender,
        NativeReceiver(
            memory,
            PAGE,
            hash_seed=SEED,
            maybe_nonzero=bits,
            channels=channels,
            sink=program.sink(),
        ) as receiver,
    ):
        for index in range(channels):
            near, far = socket.socketpair()
            with near, far:
                sender.add_channel(near.fileno(), index)
                receiver.attach(far.fileno(), index)
        yield sender, receiver


@dataclass
class Harness:
    sender: NativeSender | FakeSender
    digest: Callable[[], tuple[int, int, int]]  #: the receiver's
    memory: list[Pages]  #: the other program's, whole once ``settle`` has returned
    settle: Callable[[], None]


@contextlib.contextmanager
def _fake() -> Iterator[Harness]:
    source = [np.zeros((n, PAGE), dtype=np.uint8) for n in SHAPE]
    memory = [np.full((n, PAGE), 0xEE, dtype=np.uint8) for n in SHAPE]
    link = FakeLink(source, memory, hash_seed=SEED, hostless=frozenset((0, 1)))
    yield Harness(link.sender, link.receiver.digest, memory, lambda: None)


@contextlib.contextmanager
def _native(channels: int) -> Iterator[Harness]:
    program = Program()
    program.start()
    with native(program, channels) as (sender, receiver):

        def settle() -> None:
            sender.finish()
            assert receiver.wait()
            receiver.close()
            program.end()

        yield Harness(sender, receiver.digest, program.memory, settle)
        sender.close()
        receiver.close()
    program.end()


HARNESSES: dict[str, Callable[[], contextlib.AbstractContextManager[Harness]]] = {
    "fake": _fake,
    "native": lambda: _native(1),
    "native-4": lambda: _native(4),
}


@pytest.fixture(params=list(HARNESSES))
def pair(request: pytest.FixtureRequest) -> Iterator[Harness]:
    with HARNESSES[request.param]() as harness:
        yield harness


@pytest.mark.parametrize("stride", [PAGE, PAGE + 8, 3 * PAGE])
def test_lent_pages_arrive_wherever_they_lie_in_the_buffer(pair: Harness, stride: int) -> None:
    content = random_pages(90)
    content[17] = 0
    data = bytearray(5 + 90 * stride)
    for i, page in enumerate(content):
        data[5 + i * stride : 5 + i * stride + PAGE] = page.tobytes()
    runs = np.concatenate([run(0, 10, 90, 5, stride), zeros(0, 0, 10), run(1, 3, 2, 5, stride)])
    queued, ticket = pair.sender.send_pages(runs, data, 0)
    assert queued == 3
    assert pair.sender.barrier(0)
    assert pair.sender.pages_read() == ticket
    assert pair.sender.digest() == pair.digest()
    assert pair.sender.digest()[2] == 102
    counters = pair.sender.counters()
    assert (counters.normal_pages, counters.zero_pages) == (91, 11)
    pair.settle()
    assert np.array_equal(pair.memory[0][10:], content)
    assert not pair.memory[0][:10].any()
    assert np.array_equal(pair.memory[1][3:5], content[:2])
    assert (pair.memory[1][5:] == 0xEE).all()


def test_a_buffer_is_free_once_its_ticket_was_read(pair: Harness) -> None:
    buffer = bytearray(2 * PAGE)
    content = random_pages(40)
    for page in range(0, 40, 2):
        buffer[:] = content[page : page + 2].tobytes()
        queued, ticket = pair.sender.send_pages(run(0, page, 2), buffer, 0)
        assert (queued, ticket) == (1, page // 2 + 1)
        assert pair.sender.wait_read(ticket)
        assert pair.sender.pages_read() == ticket
    assert pair.sender.barrier(0)
    pair.settle()
    assert np.array_equal(pair.memory[0][:40], content)


def test_queueing_stops_at_a_page_sent_since_the_barrier(pair: Harness) -> None:
    first, second = random_pages(2, 1), random_pages(2, 2)
    data = np.concatenate([first, second]).reshape(-1)
    runs = np.concatenate([run(0, 4, 2), zeros(1, 0, 1), run(0, 5, 2, 2 * PAGE), zeros(1, 1, 1)])
    assert pair.sender.send_pages(runs, data, 0) == (2, 1)
    assert pair.sender.send_pages(runs[2:], data, 0) == (0, 1)
    assert pair.sender.barrier(0)
    assert pair.sender.send_pages(runs[2:], data, 1) == (2, 2)
    assert pair.sender.barrier(1)
    assert pair.sender.digest() == pair.digest()
    pair.settle()
    assert np.array_equal(pair.memory[0][4:7], [first[0], second[0], second[1]])
    assert not pair.memory[1][:2].any()


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (run(2, 0), "block 2"),
        (run(0, 99, 2), "pages 99 \\+ 2"),
        (run(0, 0, 1, PAGE + 1), "allowed .*8192"),
        (run(0, 0, 3), "8192"),
        (run(0, 0, 1, 2**63), "8192"),
        (np.array([(0, 1, 0, 0, 9, 0, PageKind.XBZRLE)], dtype=RUN), "run.kind 3"),
    ],
)
def test_a_bad_run_is_refused_and_nothing_is_queued(
    pair: Harness, runs: Runs, message: str
) -> None:
    good = run(0, 50)
    with pytest.raises(UsageError, match=message):
        pair.sender.send_pages(np.concatenate([good, runs]), bytes(2 * PAGE), 0)
    assert pair.sender.send_pages(good, random_pages(1).reshape(-1), 0) == (1, 1)
    assert pair.sender.barrier(0)


def test_what_was_refused_is_the_callers_at_once(pair: Harness) -> None:
    """Not when a collector comes: it may be the memory of a guest."""
    pages = random_pages(1)
    gone = weakref.ref(pages)
    gc.disable()
    try:
        with contextlib.suppress(UsageError):
            pair.sender.send_pages(run(0, 99, 2), pages.reshape(-1), 0)
        del pages
        assert gone() is None
    finally:
        gc.enable()


def test_memory_that_is_not_here_cannot_be_sent(pair: Harness) -> None:
    with pytest.raises(UsageError, match="block 0 has no memory here"):
        pair.sender.send(0, 0, 1, np.ones(2, dtype=np.uint64), 0)


def test_a_ticket_that_was_not_given_is_refused(pair: Harness) -> None:
    with pytest.raises(UsageError, match="ticket 1, allowed up to 0"):
        pair.sender.wait_read(1)


def test_holes_become_zero_records_in_bounded_sections() -> None:
    program = Program()
    program.start()
    with native(program) as (sender, receiver):
        sender.send_holes(0, np.array([[0, 60], [70, 30]], dtype=np.uint64), 0)
        sender.send_free(1, np.array([[0, 9]], dtype=np.uint64), 0)
        sender.finish()
        assert receiver.wait()
        assert sender.digest() == receiver.digest()
    program.end()
    assert not program.memory[0][:60].any() and not program.memory[0][70:].any()
    assert (program.memory[0][60:70] == 0xEE).all() and (program.memory[1] == 0xEE).all()
    assert {kind for _, _, kind in program.kinds} == {PageKind.ZERO}
    assert program.sections == 1 + 2


def test_a_sink_that_is_not_read_holds_up_the_sender_and_cancel_ends_it() -> None:
    """Nothing is landed before the socket took it; and nobody waits for a reader in vain."""
    program = Program()  # never started
    program.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with native(program, 2) as (sender, receiver):
        sender.send_pages(run(0, 0, 100), random_pages(100).reshape(-1), 0)
        assert not sender.barrier(0, 20_000_000)
        receiver.cancel("enough")
        with pytest.raises(CancelledError, match="enough"):
            receiver.wait()
        receiver.close()
        with pytest.raises(ChannelError):
            sender.barrier(0)
    program.end()


def test_a_program_that_goes_away_is_named() -> None:
    program = Program()
    program.theirs.close()
    with native(program) as (sender, receiver):
        sender.send_pages(run(0, 0, 4), random_pages(4).reshape(-1), 0)
        with pytest.raises(ChannelError, match="stream sink"):
            receiver.wait()
    program.end()


@pytest.mark.parametrize(
    ("names", "message"),
    [(NAMES[:1], "1 idstrs, allowed 2"), (("a", "x" * 256), "256 bytes"), (("", "b"), "0 bytes")],
)
def test_names_that_do_not_fit_are_refused(names: tuple[str, ...], message: str) -> None:
    program = Program()
    sink = StreamSink(program.ours.fileno(), SECTION, names)
    bits = [np.zeros((n + 63) // 64, dtype=np.uint64) for n in SHAPE]
    with map_blocks(hostless_blocks()) as memory, pytest.raises(UsageError, match=message):
        NativeReceiver(memory, PAGE, hash_seed=SEED, maybe_nonzero=bits, channels=1, sink=sink)
    with map_blocks(hostless_blocks()) as memory, pytest.raises(UsageError, match="no memory here"):
        NativeReceiver(memory, PAGE, hash_seed=SEED, maybe_nonzero=bits, channels=1)
    program.end()
