# SPDX-License-Identifier: Apache-2.0
"""The cheaper forms of a page: agreed on by two ends, switched from Python, and counted."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from memory_guest import MemoryGuest

from vmth import handshake
from vmth.channel.forms import FORM_NAMES, agreed_forms, forms_mask
from vmth.channel.pages import FAST_PACKET_BYTES, NativeReceiver, NativeSender
from vmth.errors import UsageError
from vmth.guest import Guest
from vmth.handshake import Incoming
from vmth.listener import Listener
from vmth.memory import MappedBlock, address_of
from vmth.options import MigrateOptions, ReceiveOptions
from vmth.precopy import make_precopy
from vmth.rounds import RoundEngine, RoundTools
from vmth.source_session import SourceSession
from vmth.stats import FormCounters, MigrationResult, round_stats
from vmth.types import Gpa, Mapping, RamBlock
from vmth.uri import parse_endpoint
from vmth.wire.messages import Offer

PAGE = 4096
NPAGES = 160

Pages = npt.NDArray[np.uint8]


def _mapped(array: Pages) -> list[MappedBlock]:
    address = address_of(array)
    block = RamBlock("ram", array.nbytes, Gpa(0), Mapping(address=address))
    return [MappedBlock(block, address, array.reshape(-1))]


def _memory(seed: int) -> Pages:
    """A third text, a third random, a third zero."""
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 256, (NPAGES, PAGE), dtype=np.uint8)
    array[::3] = rng.choice(np.frombuffer(b"etaoin shrdlu", dtype=np.uint8), (54, PAGE))
    array[1::3] = 0
    return array


@contextlib.contextmanager
def _pair(
    source: Pages, there: Pages, *, digest: bool = True, sizes: tuple[int, int] = (262144, 0)
) -> Iterator[NativeSender]:
    forms, full = forms_mask(FORM_NAMES), np.full(3, 2**64 - 1, dtype=np.uint64)
    with (
        NativeSender(
            _mapped(source),
            PAGE,
            hash_seed=1,
            digest=digest,
            forms=forms,
            packet_bytes=sizes[0],
            fast_packet_bytes=sizes[1],
        ) as sender,
        NativeReceiver(
            _mapped(there),
            PAGE,
            hash_seed=1,
            digest=digest,
            maybe_nonzero=[full],
            channels=1,
            forms=forms,
        ) as receiver,
    ):
        near, far = socket.socketpair()
        with near, far:
            sender.add_channel(near.fileno(), 0)
            receiver.attach(far.fileno(), 0)
        yield sender
        assert sender.digest() == receiver.digest()
        forms_there = receiver.counters().forms
        assert forms_there["zstd"].pages == sender.counters().forms["zstd"].pages


def test_packets_grow_to_what_a_fast_channel_carries_in_half_a_millisecond() -> None:
    """From a page each; a channel of over 16 MB/s has two and more."""
    source = _memory(3)
    there = np.zeros_like(source)
    bits = np.full(3, 2**64 - 1, dtype=np.uint64)
    with _pair(source, there, sizes=(PAGE, 32 * PAGE)) as sender:
        packets = [0]
        while len(packets) < 2000 and (len(packets) < 3 or packets[-1] - packets[-2] > NPAGES // 4):
            source[0, 0] ^= 1
            sender.send(0, 0, NPAGES, bits, len(packets))
            assert sender.barrier(len(packets))
            packets.append(sender.counters().packets)
        assert packets[1] >= NPAGES // 2  # nothing was known of the channel
        assert packets[-1] - packets[-2] <= NPAGES // 4
        sender.set_forms(forms_mask(["zstd"]), 3)  # frames have room in the larger packets
        sender.send(0, 0, NPAGES, bits, len(packets))
        assert sender.barrier(len(packets))
        assert sender.counters().forms["zstd"].pages == 54
    assert np.array_equal(source, there)


def test_a_packet_size_beyond_the_wire_is_refused() -> None:
    with pytest.raises(UsageError, match="fast_packet_bytes 8388609, allowed 0 to 8388608"):
        NativeSender(_mapped(_memory(4)), PAGE, hash_seed=1, fast_packet_bytes=(8 << 20) + 1)


def test_what_each_form_took_and_saved_is_counted() -> None:
    source = _memory(1)
    there = np.zeros_like(source)
    bits = np.full(3, 2**64 - 1, dtype=np.uint64)
    with _pair(source, there) as sender:
        assert sender.counters().formed_pages == 0
        sender.set_forms(forms_mask(["zstd"]), 3)
        before = sender.counters()
        sender.send(0, 0, NPAGES, bits, 0)
        assert sender.barrier(0)
        zstd = (after := sender.counters()).forms["zstd"]
        assert (zstd.pages, zstd.tried_pages) == (54, 107)
        assert zstd.content_bytes == 54 * PAGE > 1.5 * zstd.wire_bytes > 0
        assert after.cpu_ns > zstd.cpu_ns > 0
        assert (after.normal_pages, after.zero_pages) == (53, 53)
        assert round_stats(0, before, after, 1, 0, PAGE, False).pages == NPAGES
        sender.set_forms(forms_mask(["same"]))
        source[5] ^= 1
        sender.send(0, 0, NPAGES, bits, 1)
        assert sender.barrier(1)
        last = sender.counters()
        assert last.forms["same"].pages == NPAGES - 1
        assert last.forms["same"].content_bytes == (NPAGES - 1) * PAGE
        assert last.wire_bytes - after.wire_bytes < 2 * PAGE
        again = round_stats(1, after, last, 1, 0, PAGE, False)
        assert again.same_pages == NPAGES - 1 == again.forms["same"].pages
        assert again.forms["zstd"] == FormCounters() and again.formed_pages == NPAGES - 1
    assert np.array_equal(source, there)


def test_without_a_digest_nothing_is_known_to_be_the_same() -> None:
    source = _memory(2)
    with _pair(source, np.zeros_like(source), digest=False) as sender:
        with pytest.raises(UsageError, match="forms without a digest same, allowed zstd"):
            sender.set_forms(forms_mask(["same"]))
        sender.set_forms(forms_mask(["zstd"]))


def test_names_and_masks() -> None:
    assert forms_mask([]) == 0
    assert agreed_forms(["scope-stream", "zstd", "of-the-future"]) == 1 << 8
    with pytest.raises(UsageError, match="form: received 'raw', allowed same"):
        forms_mask(["same", "raw"])


class Session:
    """A migration of a ``MemoryGuest`` with all forms that are agreed on; its engine asks for
    ``wanted`` first."""

    def __init__(self, tmp_path: Path, wanted: list[str]) -> None:
        self.source = MemoryGuest()
        text = np.frombuffer(b"etaoin shrdlu", dtype=np.uint8)
        half = self.source.views[0].reshape(-1, PAGE)[:1024, 8:]
        half[:] = np.random.default_rng(3).choice(text, half.shape)
        self.made: list[MemoryGuest] = []
        self._wanted = wanted
        self.listener = Listener(
            parse_endpoint("tcp:127.0.0.1:0", listening=True),
            self._make_guest,
            ReceiveOptions(state_dir=tmp_path / "destination"),
        )
        self._options = MigrateOptions(state_dir=tmp_path / "source", audit=True, fixed_forms=True)

    def _make_guest(self, incoming: Incoming) -> MemoryGuest:
        self.made.append(MemoryGuest(npages=incoming.blocks[0].npages, filled=False))
        return self.made[-1]

    def _engine(self, guest: Guest, tools: RoundTools) -> RoundEngine:
        tools.sender.set_forms(forms_mask(self._wanted))
        return make_precopy(guest, tools)

    def run(self) -> MigrationResult:
        session = SourceSession(
            self.source, self.listener.endpoint, self._options, make_engine=self._engine
        )
        return session.run()

    def close(self) -> None:
        self.listener.close()
        for guest in (self.source, *self.made):
            guest.close()


def test_a_session_agrees_on_the_forms_that_both_speak(tmp_path: Path) -> None:
    session = Session(tmp_path, ["same", "zstd"])
    with contextlib.closing(session):
        session.source.resume()
        result = session.run()
        session.listener.wait_for_guest(5)
        assert result.verified and result.audited
        assert result.transfer.forms["zstd"].pages >= 1000
        there = session.made[-1]
        there.pause()
        assert there.counted() == there.total


def test_packets_of_a_session_grow_on_a_fast_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Asked(NativeSender):
        def __init__(self, *args: Any, fast_packet_bytes: int = 0, **kwargs: Any) -> None:
            asked.append(fast_packet_bytes)
            super().__init__(*args, fast_packet_bytes=fast_packet_bytes, **kwargs)

    monkeypatch.setattr("vmth.source_session.NativeSender", Asked)
    session = Session(tmp_path, ["same"])
    with contextlib.closing(session):
        session.source.resume()
        assert session.run().verified
        session.listener.wait_for_guest(5)
    assert asked == [FAST_PACKET_BYTES]


def test_a_form_that_the_destination_does_not_speak_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def older(offer: Offer) -> list[str]:
        assert set(FORM_NAMES) <= set(offer.features)
        return ["same"]

    monkeypatch.setattr("vmth.destination_session.common_features", older)
    session = Session(tmp_path, ["zstd"])
    with contextlib.closing(session):
        session.source.resume()
        with pytest.raises(UsageError, match="forms zstd, allowed same"):
            session.run()
        assert session.source.running


def test_a_source_that_offers_none_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    block = RamBlock("ram", PAGE, Gpa(0), Mapping())
    monkeypatch.setattr(handshake, "FEATURES", ())
    offer = handshake.make_offer(b"0" * 16, 1, [block], MigrateOptions(), {}, ["scope-stream"])
    monkeypatch.undo()
    seal, packed = handshake.SEAL_AHEAD, handshake.PACKED_STATE
    others = [seal, handshake.HANDED_ON, packed, "scope-stream"]
    assert offer.features == others  # no form among them
    assert handshake.common_features(offer) == [seal, packed]
