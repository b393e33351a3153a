# SPDX-License-Identifier: Apache-2.0
"""What every pair of page channels must do: one suite over the fake and the native ones."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
from channel_proxy import PageProxy
from waiting import wait_until

from vmth._native import _xfer
from vmth.channel.fake import FakeLink, FakeSender
from vmth.channel.forms import FORM_NAMES, forms_mask
from vmth.channel.interface import PageReceiver
from vmth.channel.pages import NativeReceiver, NativeSender
from vmth.errors import CancelledError, UsageError
from vmth.memory import MappedBlock, address_of
from vmth.types import Mapping, RamBlock

PAGE = 4096
SHAPE = (150, 64)  #: pages of each ramblock
SEED = 11

Pages = npt.NDArray[np.uint8]


@dataclass
class Harness:
    """A coupled pair over two ramblocks; ``damage`` names pages to be changed on the way, once."""

    sender: NativeSender | FakeSender
    receiver: PageReceiver
    source: list[Pages]
    destination: list[Pages]
    damage: set[tuple[int, int]]
    bits: list[npt.NDArray[np.uint64]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bits = [self.mask(block, range(n)) for block, n in enumerate(SHAPE)]
        rng = np.random.default_rng(SEED)
        for array in self.source:
            array[:] = rng.integers(1, 256, array.shape, dtype=np.uint8)

    @staticmethod
    def mask(block: int, pages: range | list[int]) -> npt.NDArray[np.uint64]:
        bits = np.zeros(((SHAPE[block] + 63) // 64) * 64, dtype=np.bool_)
        bits[list(pages)] = True
        return np.packbits(bits, bitorder="little").view(np.uint64)

    def send_all(self, round_: int) -> None:
        for block, npages in enumerate(SHAPE):
            self.sender.send(block, 0, npages, self.bits[block], round_)

    def equal(self) -> bool:
        return all(
            np.array_equal(ours, theirs)
            for ours, theirs in zip(self.source, self.destination, strict=True)
        )


def _memory() -> list[Pages]:
    return [np.zeros((npages, PAGE), dtype=np.uint8) for npages in SHAPE]


def _mapped(memory: list[Pages]) -> list[MappedBlock]:
    return [
        MappedBlock(
            RamBlock(f"b{i}", array.nbytes, i << 32, Mapping(address=address_of(array))),
            address_of(array),
            array.reshape(-1),
        )
        for i, array in enumerate(memory)
    ]


@contextlib.contextmanager
def _fake() -> Iterator[Harness]:
    source, destination = _memory(), _memory()
    link = FakeLink(source, destination, hash_seed=SEED)
    yield Harness(link.sender, link.receiver, source, destination, link.damage)
    link.sender.close()
    link.receiver.close()


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far


Connect = Callable[[], tuple[socket.socket, socket.socket]]


@contextlib.contextmanager
def _native(
    connect: Connect, channels: int, proxied: bool = False, forms: int = 0
) -> Iterator[Harness]:
    source, destination = _memory(), _memory()
    damage: set[tuple[int, int]] = set()
    full = [np.full((n + 63) // 64, 2**64 - 1, dtype=np.uint64) for n in SHAPE]
    with contextlib.ExitStack() as stack:
        sender = stack.enter_context(
            NativeSender(_mapped(source), PAGE, hash_seed=SEED, forms=forms)
        )
        sender.set_forms(forms)
        receiver = stack.enter_context(
            NativeReceiver(
                _mapped(destination),
                PAGE,
                hash_seed=SEED,
                maybe_nonzero=full,
                channels=channels,
                forms=forms,
            )
        )
        for index in range(channels):
            near, far = connect()
            if proxied:
                inner_near, inner_far = connect()
                proxy = PageProxy(far, inner_near, damage, SEED + index)
                stack.callback(proxy.close)
                far = inner_far
            with near, far:
                sender.add_channel(near.fileno(), index)
                receiver.attach(far.fileno(), index)
        yield Harness(sender, receiver, source, destination, damage)
        sender.close()
        receiver.close()


HARNESSES: dict[str, Callable[[], contextlib.AbstractContextManager[Harness]]] = {
    "fake": _fake,
    "unix": lambda: _native(socket.socketpair, 1),
    "unix-4": lambda: _native(socket.socketpair, 4),
    "tcp-2": lambda: _native(_tcp_pair, 2),
    "forms-2": lambda: _native(socket.socketpair, 2, forms=forms_mask(FORM_NAMES)),
    "proxied": lambda: _native(socket.socketpair, 1, proxied=True),
    "proxied-3": lambda: _native(_tcp_pair, 3, proxied=True),
}
DAMAGING = ("fake", "proxied", "proxied-3")


@pytest.fixture(params=list(HARNESSES))
def pair(request: pytest.FixtureRequest) -> Iterator[Harness]:
    with HARNESSES[request.param]() as harness:
        yield harness


@pytest.fixture(params=DAMAGING)
def damaging(request: pytest.FixtureRequest) -> Iterator[Harness]:
    with HARNESSES[request.param]() as harness:
        yield harness


def test_a_round_makes_both_ends_equal(pair: Harness) -> None:
    pair.send_all(0)
    assert pair.sender.barrier(0)
    assert pair.equal()
    assert pair.sender.digest() == pair.receiver.digest()
    assert pair.sender.digest()[2] == sum(SHAPE)


def test_later_rounds_replace_pages(pair: Harness) -> None:
    pair.send_all(0)
    assert pair.sender.barrier(0)
    first = pair.sender.digest()
    pair.source[0][70] = 0
    pair.source[1][5, 9] ^= 1
    pair.sender.send(0, 64, 20, pair.mask(0, [3, 70]), 1)
    pair.sender.send(1, 0, SHAPE[1], pair.mask(1, [5]), 1)
    assert pair.sender.barrier(1)
    assert pair.equal()
    assert first != pair.sender.digest() == pair.receiver.digest()
    counters = pair.sender.counters()
    content_pages = counters.normal_pages + counters.formed_pages
    assert (content_pages, counters.zero_pages) == (sum(SHAPE) + 1, 1)


def test_memory_is_read_no_earlier_than_send_and_no_later_than_the_barrier(pair: Harness) -> None:
    pair.source[1][7] = 1
    pair.sender.send(1, 7, 1, pair.bits[1], 0)
    assert pair.sender.barrier(0)
    pair.source[1][7] = 2
    assert (pair.destination[1][7] == 1).all()


def test_holes_and_free_pages(pair: Harness) -> None:
    pair.send_all(0)
    assert pair.sender.barrier(0)
    pair.source[0][10:30] = 0
    pair.sender.send_holes(0, np.array([[10, 15], [25, 5]], dtype=np.uint64), 1)
    pair.sender.send_free(1, np.array([[60, 4]], dtype=np.uint64), 1)
    assert pair.sender.barrier(1)
    assert np.array_equal(pair.source[0], pair.destination[0])
    assert pair.sender.digest() == pair.receiver.digest()
    assert pair.sender.digest()[2] == sum(SHAPE) - 4
    for counters in (pair.sender.counters(), pair.receiver.counters()):
        assert (counters.hole_pages, counters.free_pages) == (20, 4)


def test_acknowledged_bytes_reach_the_bytes_sent(pair: Harness) -> None:
    pair.send_all(0)
    assert pair.sender.barrier(0)
    counters = pair.sender.counters()
    assert counters.acked_bytes == counters.wire_bytes > sum(SHAPE) * PAGE
    assert pair.sender.in_flight() == 0


@pytest.mark.parametrize(("name", "known"), [("tcp-2", True), ("unix-4", True)])
def test_round_trips_are_those_of_the_kernel(name: str, known: bool) -> None:
    with HARNESSES[name]() as harness:
        harness.send_all(0)
        assert harness.sender.barrier(0)
        counters = harness.sender.counters()
    assert (0 < counters.base_rtt_ns <= counters.rtt_ns < 60_000_000_000) is known
    assert known or counters.base_rtt_ns == counters.rtt_ns == 0
    assert name.startswith("tcp") or counters.carrying_ns == 0


def test_while_the_far_end_has_no_room_the_link_carries_nothing() -> None:
    memory, full = _memory(), np.full(4, 2**64 - 1, dtype=np.uint64)
    memory[0][:] = 7
    near, far = _tcp_pair()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with near, far, NativeSender(_mapped(memory), PAGE, hash_seed=SEED) as sender:
        sender.add_channel(near.fileno(), 0, 0)
        assert sender.counters().carrying_ns == 0
        assert sender.counters().starved_ns < sender.counters().starved_ns
        sender.send(0, 0, SHAPE[0], full, 0)
        wait_until(lambda: _xfer.tcp_info(near.fileno())["peer_full_ns"] > 0)
        before, carried = _xfer.tcp_info(near.fileno())["busy_ns"], sender.counters().carrying_ns
        starved_ns = sender.counters().starved_ns
        wait_until(lambda: _xfer.tcp_info(near.fileno())["busy_ns"] > before + 200_000_000)
        assert sender.counters().carrying_ns - carried < 100_000_000
        assert sender.counters().starved_ns == starved_ns  # the rest is still queued
        sender.cancel("enough")


@pytest.mark.parametrize(
    ("connect", "trip_ms", "counts"),
    [(_tcp_pair, 1, False), (_tcp_pair, 500, True), (socket.socketpair, 1, True)],
    ids=["processes", "tunnel", "unix"],
)
def test_of_a_short_trip_the_ends_own_time_is_none_of_the_paths(
    connect: Connect, trip_ms: int, counts: bool
) -> None:
    trip_ns = trip_ms * 1_000_000
    memory = _memory()
    near, far = connect()
    with near, far, NativeSender(_mapped(memory), PAGE, hash_seed=SEED) as sender:
        sender.add_channel(near.fileno(), 0, trip_ns)
        told = sender.counters()
    assert told.rtt_ns >= trip_ns
    assert (told.base_rtt_ns == trip_ns) is counts
    assert told.base_rtt_ns > 0


def test_what_was_sent_has_its_digest_before_it_has_landed(pair: Harness) -> None:
    assert not pair.receiver.wait_barriers(1, 1)
    pair.send_all(0)
    assert pair.sender.sent(0)
    digest = pair.sender.digest()
    assert digest[2] == sum(SHAPE)
    assert pair.receiver.wait_barriers(1)  # whoever waits at the other end
    assert pair.sender.barrier(0)
    assert pair.receiver.digest() == pair.sender.digest() == digest
    assert not pair.receiver.wait_barriers(2, 1)
    assert pair.sender.sent(1)
    with pytest.raises(UsageError, match="round 2, allowed 1"):
        pair.sender.barrier(2)
    assert pair.sender.barrier(1)
    assert pair.receiver.wait_barriers(2)


def test_barriers_are_counted_whatever_their_round(pair: Harness) -> None:
    """A round may have several: the second of a name is not the first."""
    for count in (1, 2, 3):
        pair.send_all(0)
        assert pair.sender.barriers() == count - 1
        assert not pair.receiver.wait_barriers(count, 1)
        assert pair.sender.barrier(0)
        assert pair.sender.barriers() == count
        assert pair.receiver.wait_barriers(count)


def test_a_page_twice_between_two_barriers_is_refused(pair: Harness) -> None:
    pair.sender.send(0, 0, 10, pair.bits[0], 0)
    with pytest.raises(UsageError, match="already sent"):
        pair.sender.send(0, 9, 3, pair.bits[0], 0)
    with pytest.raises(UsageError, match="already sent"):
        pair.sender.send_holes(0, np.array([[0, 1]], dtype=np.uint64), 0)
    assert pair.sender.barrier(0)
    pair.sender.send(0, 9, 3, pair.bits[0], 1)
    assert pair.sender.barrier(1)


@pytest.mark.parametrize(("block", "page", "npages"), [(2, 0, 1), (0, 150, 1), (1, 60, 5)])
def test_a_range_outside_the_blocks_is_refused(
    pair: Harness, block: int, page: int, npages: int
) -> None:
    with pytest.raises(UsageError, match="allowed"):
        pair.sender.send(block, page, npages, pair.bits[0], 0)
    with pytest.raises(UsageError, match="allowed"):
        pair.sender.hashes(block, page, npages)


def test_subdigests_are_the_hashes_at_step_1_and_sums_above(pair: Harness) -> None:
    pair.send_all(0)
    assert pair.sender.barrier(0)
    for end in (pair.sender, pair.receiver):
        assert np.array_equal(end.subdigests(0, 3, 100, 1), end.hashes(0, 3, 100))
        assert end.subdigests(0, 0, 150, 64).shape == (3, 2)
    ours, theirs = (end.subdigests(0, 0, 150, 64) for end in (pair.sender, pair.receiver))
    assert np.array_equal(ours, theirs)


def test_a_damaged_page_is_sent_again(damaging: Harness) -> None:
    damaging.damage.add((0, 33))
    damaging.send_all(0)
    assert damaging.sender.barrier(0)
    assert damaging.sender.digest() != damaging.receiver.digest()
    missed = [np.zeros_like(bits) for bits in damaging.bits]
    taken = damaging.sender.take_missed(missed)
    assert taken == sum(int(np.bitwise_count(bits).sum()) for bits in missed) > 0
    assert int(missed[0][0]) >> 33 & 1
    assert damaging.sender.take_missed([np.zeros_like(bits) for bits in damaging.bits]) == 0
    for block, npages in enumerate(SHAPE):
        damaging.sender.send(block, 0, npages, missed[block], 1)
    assert damaging.sender.barrier(1)
    assert damaging.equal()
    assert damaging.sender.digest() == damaging.receiver.digest()
    counters = damaging.sender.counters()
    assert (counters.torn_packets, counters.missed_pages) == (1, taken)


def test_a_dirty_page_explains_its_packet(damaging: Harness) -> None:
    """What differs was torn by a write, and the write is what sends it again."""
    damaging.damage.add((0, 33))
    damaging.send_all(0)
    assert damaging.sender.barrier(0)
    dirty = [np.zeros_like(bits) for bits in damaging.bits]
    dirty[0][0] = np.uint64(1 << 33)
    assert damaging.sender.take_missed(dirty) == 0
    assert int(dirty[0][0]) == 1 << 33 and not dirty[0][1:].any()
    damaging.sender.send(0, 0, SHAPE[0], dirty[0], 1)
    assert damaging.sender.barrier(1)
    assert damaging.equal()
    assert damaging.sender.digest() == damaging.receiver.digest()
    counters = damaging.sender.counters()
    assert (counters.torn_packets, counters.missed_pages) == (1, 0)


def test_finish_ends_the_receiver(pair: Harness) -> None:
    pair.send_all(0)
    assert pair.sender.barrier(0)
    assert not pair.receiver.wait(1)
    pair.sender.finish()
    assert pair.receiver.wait()
    with pytest.raises(UsageError, match="finished"):
        pair.send_all(1)
    assert pair.sender.digest() == pair.receiver.digest()


def test_cancel_is_what_every_later_call_says(pair: Harness) -> None:
    pair.sender.cancel("by the operator")
    pair.sender.cancel("again")
    for call in (lambda: pair.send_all(0), lambda: pair.sender.barrier(0), pair.sender.finish):
        with pytest.raises(CancelledError, match="by the operator"):
            call()


def test_cancel_wakes_a_waiting_receiver(pair: Harness) -> None:
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            pair.receiver.wait()
        except CancelledError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    pair.receiver.cancel("stop")
    thread.join()
    assert [str(error) for error in raised] == ["stop"]


def test_settings_are_taken_at_any_time(pair: Harness) -> None:
    pair.sender.set_bandwidth(1 << 30)
    pair.sender.set_window(1)
    pair.send_all(0)
    pair.sender.set_window(0)
    pair.sender.set_bandwidth(0)
    assert pair.sender.barrier(0)
    assert pair.equal()
    assert all(isinstance(name, str) for name in pair.sender.fallbacks())


@pytest.mark.parametrize("name", HARNESSES)
def test_nothing_is_left_behind(name: str) -> None:
    def open_fds() -> int:
        return len(os.listdir("/proc/self/fd"))

    with HARNESSES[name]():
        pass  # what the first use keeps for good
    before = open_fds(), threading.active_count()
    with HARNESSES[name]() as harness:
        harness.send_all(0)
    assert (open_fds(), threading.active_count()) == before
