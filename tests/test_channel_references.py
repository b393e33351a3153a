# SPDX-License-Identifier: Apache-2.0
"""dedup and delta through the page channels: whatever is written, torn, queued, switched or lost,
both memories end equal, or the pages that do not are reported and the next round repairs them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmth.channel.forms import FORM_NAMES, forms_mask
from vmth.channel.pages import NativeReceiver, NativeSender
from vmth.errors import VmthError
from vmth.memory import MappedBlock, address_of
from vmth.types import Gpa, Mapping, RamBlock

PAGE = 4096
NPAGES = 192
SEED = 0xFEED
U8 = npt.NDArray[np.uint8]


def _mapped(array: U8) -> list[MappedBlock]:
    address = address_of(array)
    return [
        MappedBlock(RamBlock("ram", array.nbytes, Gpa(0), Mapping(address=address)), address, array)
    ]


class Ends:
    """A sender and a receiver over several channels, and the pages that are dirty."""

    def __init__(self, channels: int, agreed: int) -> None:
        self.source = np.zeros(NPAGES * PAGE, dtype=np.uint8)
        self.destination = np.zeros(NPAGES * PAGE, dtype=np.uint8)
        self.dirty = np.zeros(NPAGES // 64, dtype=np.uint64)
        self.round = 0
        self.sockets = [socket.socketpair() for _ in range(channels)]
        self.sender = NativeSender(
            _mapped(self.source),
            PAGE,
            hash_seed=SEED,
            packet_bytes=32 * PAGE,
            forms=agreed,
        )
        self.receiver = NativeReceiver(
            _mapped(self.destination),
            PAGE,
            hash_seed=SEED,
            maybe_nonzero=[np.full(NPAGES // 64, 2**64 - 1, dtype=np.uint64)],
            channels=channels,
            forms=agreed,
        )
        for index, (ours, theirs) in enumerate(self.sockets):
            self.sender.add_channel(ours.fileno(), index)
            self.receiver.attach(theirs.fileno(), index)

    def page(self, index: int) -> U8:
        return self.source[index * PAGE : (index + 1) * PAGE]

    def mark(self, index: int) -> None:
        self.dirty[index // 64] |= np.uint64(1 << (index % 64))

    def pass_round(self) -> None:
        """Send what is dirty; what was missed is dirty afterwards."""
        sending = self.dirty.copy()
        self.dirty.fill(0)
        self.sender.send(0, 0, NPAGES, sending, self.round)
        self.sender.barrier(self.round)
        self.round += 1
        self.sender.take_missed([self.dirty])

    def equal_digests(self) -> bool:
        return self.sender.digest() == self.receiver.digest()

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        for pair in self.sockets:
            for end in pair:
                end.close()


@contextmanager
def ends(channels: int, agreed: int | None = None) -> Iterator[Ends]:
    both = Ends(channels, forms_mask(FORM_NAMES) if agreed is None else agreed)
    try:
        yield both
    finally:
        both.close()


def settle(both: Ends) -> None:
    """The guest has stopped: what is dirty goes, and what that misses goes in the next round."""
    for _ in range(3):
        both.pass_round()
        if not both.dirty.any():
            break
    assert not both.dirty.any()
    assert both.equal_digests()
    assert np.array_equal(both.source, both.destination)


WRITES = st.lists(
    st.tuples(
        st.sampled_from(["poke", "poke", "copy", "copy", "fill", "zero", "silent", "back"]),
        st.integers(0, NPAGES - 1),
        st.integers(0, NPAGES - 1),
    ),
    max_size=40,
)
ROUNDS = st.lists(
    st.tuples(WRITES, st.lists(st.sampled_from(FORM_NAMES), unique=True)), min_size=1, max_size=6
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rounds=ROUNDS, channels=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
@pytest.mark.slow
def test_any_writes_in_any_forms_end_equal(
    rounds: list[tuple[list[tuple[str, int, int]], list[str]]], channels: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    with ends(channels) as both:
        both.source[:] = generator.integers(0, 256, len(both.source), dtype=np.uint8)
        both.dirty.fill(2**64 - 1)
        for writes, forms in rounds:
            both.sender.set_forms(forms_mask(forms))
            both.pass_round()
            assert not both.dirty.any()  # nothing was written meanwhile
            assert both.equal_digests()
            for what, page, other in writes:
                both.mark(page)
                if what == "poke":
                    both.page(page)[other * 20] ^= 1
                elif what == "copy":
                    both.page(page)[:] = both.page(other)
                elif what == "fill":
                    both.page(page)[:] = generator.integers(0, 256, PAGE, dtype=np.uint8)
                elif what == "zero":
                    both.page(page).fill(0)
                elif what == "back":
                    both.page(page)[other * 20] ^= 1
                    both.page(page)[other * 20] ^= 1
        settle(both)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), channels=st.integers(1, 3))
@pytest.mark.slow
def test_a_guest_that_writes_while_its_pages_are_sent(seed: int, channels: int) -> None:
    """Torn pages, also A-B-A: the writer puts old contents back and copies pages about."""
    with ends(channels) as both:
        generator = np.random.default_rng(seed)
        both.source[:] = generator.integers(0, 256, len(both.source), dtype=np.uint8)
        contents = both.source.copy()
        both.sender.set_forms(forms_mask(FORM_NAMES))
        stop = threading.Event()
        written: list[int] = []

        def write() -> None:
            mine = np.random.default_rng(seed + 1)
            while not stop.is_set():
                page, other = (int(n) for n in mine.integers(0, NPAGES, 2))
                written.append(page)
                both.page(page)[100:110] = mine.integers(0, 256, 10, dtype=np.uint8)
                both.page(page)[:] = contents[other * PAGE : (other + 1) * PAGE]
                if page % 2:
                    both.page(page)[:] = contents[page * PAGE : (page + 1) * PAGE]

        writer = threading.Thread(target=write)
        both.dirty.fill(2**64 - 1)
        writer.start()
        try:
            for _ in range(12):
                written.clear()
                both.pass_round()
                for page in list(written):
                    both.mark(page)
        finally:
            stop.set()
            writer.join()
        both.dirty.fill(2**64 - 1)
        settle(both)


@pytest.mark.parametrize("form", ["dedup", "delta"])
def test_a_destination_that_changed_is_a_miss(form: str) -> None:
    with ends(1) as both:
        generator = np.random.default_rng(5)
        both.source[:] = generator.integers(0, 256, len(both.source), dtype=np.uint8)
        both.sender.set_forms(forms_mask([form]))
        both.dirty.fill(2**64 - 1)
        both.pass_round()
        both.destination[7 * PAGE + 9] ^= 1  # what the form would be based on
        page = 7 if form == "delta" else 60
        both.page(page)[:] = both.page(7)
        if form == "delta":
            both.page(7)[50] ^= 1
        both.mark(page)
        both.pass_round()
        missed = np.unpackbits(both.dirty.view(np.uint8), bitorder="little")
        assert list(np.flatnonzero(missed)) == [page]
        assert both.sender.counters().forms[form].pages == 1
        assert both.receiver.counters().missed_pages == 1
        both.sender.forget(0, 7, 1)
        both.mark(7)
        settle(both)


def test_a_lost_channel_ends_both_and_harms_nothing() -> None:
    with ends(2) as both:
        generator = np.random.default_rng(5)
        both.source[:] = generator.integers(0, 256, len(both.source), dtype=np.uint8)
        both.sender.set_forms(forms_mask(FORM_NAMES))
        both.dirty.fill(2**64 - 1)
        both.pass_round()
        before = both.source.copy()
        both.sockets[1][1].shutdown(socket.SHUT_RDWR)
        both.dirty.fill(2**64 - 1)
        with pytest.raises(VmthError):
            both.pass_round()
        with pytest.raises(VmthError):
            both.receiver.wait()
        assert np.array_equal(both.source, before)
