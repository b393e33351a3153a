# SPDX-License-Identifier: Apache-2.0
"""Device state on its way, as it is and packed: what arrives is what left, whatever the pieces."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmth.errors import StreamError
from vmth.guest import StateStream
from vmth.state_streams import (
    FAR_NS,
    PACKED_MAX_BYTES,
    SLOW_BPS,
    STATE_CHUNK_BYTES,
    StateCollector,
    StateSender,
    packing_pays,
)
from vmth.stats import RoundStats, TransferCounters
from vmth.wire.messages import PackedState, Seal, State

BYTES = st.one_of(
    st.binary(max_size=300),
    st.integers(0, 2 * STATE_CHUNK_BYTES + 5).map(lambda n: bytes(n)),
    st.tuples(st.binary(min_size=1, max_size=40), st.integers(1, 20_000)).map(
        lambda given: given[0] * given[1]
    ),
)


def carried(streams: list[StateStream], packed: bool) -> tuple[list[State | PackedState], Seal]:
    messages: list[State | PackedState] = []
    sender = StateSender(messages.append, packed)
    for stream in streams:
        sender.write(stream)
    summary = sender.summary
    return messages, Seal(0, 0, 0, summary.streams, summary.total_bytes, summary.crc32)


@settings(max_examples=60, deadline=None)
@given(st.lists(BYTES, max_size=4), st.booleans())
def test_what_arrives_is_what_left(contents: list[bytes], packed: bool) -> None:
    streams = [StateStream(f"s{index}", 1, data) for index, data in enumerate(contents)]
    messages, seal = carried(streams, packed)
    collector = StateCollector()
    for message in messages:
        collector.feed(message)
    collector.check(seal)
    assert [(one.name, bytes(one.data)) for one in collector.streams] == [
        (one.name, one.data) for one in streams
    ]
    if not packed:
        assert not any(isinstance(message, PackedState) for message in messages)


def test_only_what_gets_smaller_is_packed() -> None:
    noise = random.Random(1).randbytes(100_000)
    messages, _ = carried([StateStream("a", 1, bytes(100_000)), StateStream("b", 1, noise)], True)
    assert [type(message) for message in messages] == [PackedState, State]
    assert isinstance(messages[0], PackedState) and len(messages[0].frame) < 1000


def test_much_state_is_packed_in_part() -> None:
    messages, _ = carried([StateStream("a", 1, bytes(PACKED_MAX_BYTES + STATE_CHUNK_BYTES))], True)
    kinds = [type(message) for message in messages]
    assert kinds == [PackedState] * (PACKED_MAX_BYTES // STATE_CHUNK_BYTES) + [State]


@pytest.mark.parametrize("at", [0, 5, -1])
def test_a_damaged_frame_is_found(at: int) -> None:
    messages, seal = carried([StateStream("a", 1, b"registers " * 500)], True)
    (message,) = messages
    assert isinstance(message, PackedState)
    frame = bytearray(message.frame)
    frame[at] ^= 0x10
    collector = StateCollector()

    def take() -> None:
        collector.feed(PackedState("a", 1, 0, bytes(frame), message.nbytes, True))
        collector.check(seal)

    with pytest.raises(StreamError):
        take()


@pytest.mark.parametrize("nbytes", [1, 4999, 5001, 1 << 20])
def test_a_frame_that_holds_something_else_than_it_says(nbytes: int) -> None:
    messages, _ = carried([StateStream("a", 1, b"registers " * 500)], True)
    (message,) = messages
    assert isinstance(message, PackedState)
    with pytest.raises(StreamError):
        StateCollector().feed(PackedState("a", 1, 0, message.frame, nbytes, True))


@pytest.mark.parametrize(
    ("rtt_ns", "rates", "pays"),
    [
        (0, [], False),
        (FAR_NS - 1, [SLOW_BPS + 1], False),
        (FAR_NS, [1e9], True),
        (0, [SLOW_BPS - 1], True),
        (0, [SLOW_BPS + 1, 1e3], False),  # a short round says little
    ],
)
def test_state_is_packed_for_far_and_for_slow_links(
    rtt_ns: int, rates: list[float], pays: bool
) -> None:
    rounds = [RoundStats(n, 1, 1, 0, 0, 4096, 1, rate, 0, 0.0, 0) for n, rate in enumerate(rates)]
    assert packing_pays(TransferCounters(base_rtt_ns=rtt_ns), rounds) is pays
