# SPDX-License-Identifier: Apache-2.0
"""What handovers took is remembered by class of guests and host; the next forecast counts it."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
from memory_guest import MemoryGuest
from test_precopy import Loop, LoopGuest, ScriptedPolicy, answer

import vmth
from vmth.handover_cost import FILE_NAME, KEPT, LEAST_NS, MOST_NS, PAIRS, HandoverCosts
from vmth.handshake import Incoming
from vmth.listener import Listener
from vmth.options import MigrateOptions, ReceiveOptions
from vmth.policy.forecast import (
    HANDOVER_NS,
    HURRIED_HANDOVER_NS,
    first_handover_ns,
    forecast_downtime,
)
from vmth.policy.interface import Action, Decision, Forecast, RoundView
from vmth.policy.standard import StandardPolicy
from vmth.realtime import permitted
from vmth.uri import parse_endpoint

MS = 1_000_000


class Guest:
    pass


class OtherGuest:
    pass


def costs(path: Path, host: str = "b", guest: object = None) -> HandoverCosts:
    return HandoverCosts(path, guest or Guest(), host)


def test_the_median_of_the_last_ones_counts(tmp_path: Path) -> None:
    assert costs(tmp_path).expected_ns() == 0
    assert costs(tmp_path).expected_ns(hurried=True) == HURRIED_HANDOVER_NS
    slow = costs(tmp_path).expected_ns(hurried=True, journal_ns=5 * MS)
    assert slow == HURRIED_HANDOVER_NS + 15 * MS
    for ms in (90, 4, 5, 80, 6):
        costs(tmp_path).learn(ms * MS)
    assert costs(tmp_path).expected_ns() == 6 * MS
    assert costs(tmp_path).expected_ns(hurried=True) == 6 * MS
    for _ in range(KEPT):
        costs(tmp_path).learn(3 * MS)
    assert costs(tmp_path).expected_ns() == 3 * MS
    (kept,) = json.loads((tmp_path / FILE_NAME).read_text()).values()
    assert kept == [3 * MS] * KEPT


def test_another_host_is_better_than_none_and_another_class_is_not(tmp_path: Path) -> None:
    costs(tmp_path, "b").learn(4 * MS)
    costs(tmp_path, "c").learn(8 * MS)
    assert costs(tmp_path, "c").expected_ns() == 8 * MS
    assert costs(tmp_path, "d").expected_ns() == 6 * MS
    assert costs(tmp_path, "b", OtherGuest()).expected_ns() == 0


@pytest.mark.parametrize("took_ns", [-5, 0, LEAST_NS - 1, MOST_NS + 1])
def test_what_was_no_handover_is_not_learned(tmp_path: Path, took_ns: int) -> None:
    costs(tmp_path).learn(took_ns)
    assert costs(tmp_path).expected_ns() == 0
    costs(tmp_path).learn(4 * MS)
    costs(tmp_path).learn(took_ns)
    assert costs(tmp_path).expected_ns() == 4 * MS


def test_the_file_stays_small(tmp_path: Path) -> None:
    for number in range(PAIRS + 10):
        costs(tmp_path, f"host-{number}").learn(4 * MS)
    known = json.loads((tmp_path / FILE_NAME).read_text())
    assert len(known) == PAIRS
    assert not any(key.endswith("host-9") for key in known)
    costs(tmp_path, "host-99").learn(4 * MS)
    assert len(json.loads((tmp_path / FILE_NAME).read_text())) == PAIRS  # it takes nobody's place
    costs(tmp_path, "host-10").learn(5 * MS)  # the oldest pair is the newest now
    costs(tmp_path, "one-more").learn(5 * MS)
    assert costs(tmp_path, "host-10").expected_ns() == round(4.5 * MS)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"a": 5}', b'{"a": ["x"]}', b"\xff\xfe", b'{"a": [1.5]}'],
)
def test_a_damaged_file_counts_as_empty_and_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    assert costs(tmp_path).expected_ns() == 0
    costs(tmp_path).learn(4 * MS)
    assert costs(tmp_path).expected_ns() == 4 * MS


def test_numbers_out_of_range_in_the_file_are_left_out(tmp_path: Path) -> None:
    key = f"{Guest.__module__}.{Guest.__qualname__} b"
    (tmp_path / FILE_NAME).write_text(json.dumps({key: [-1, 10**15, 4 * MS]}))
    assert costs(tmp_path).expected_ns() == 4 * MS


def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE_NAME)  # opening it must not wait for a writer
    costs(tmp_path).learn(4 * MS)
    assert costs(tmp_path).expected_ns() == 0
    costs(tmp_path / "missing").learn(4 * MS)
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    ("limit_ms", "learned_ms", "counted_ms"),
    [(300, 0, 0), (300, 20, 20), (300, 900, 150), (30, 20, 15), (5, 20, HANDOVER_NS / MS)],
)
def test_slow_handovers_leave_room_for_pages(
    limit_ms: int, learned_ms: int, counted_ms: float
) -> None:
    guest = LoopGuest([64])
    loop = Loop(guest, ScriptedPolicy([answer(Action.SWITCH_OVER)]))
    loop.precopy.handover_ns = learned_ms * MS
    loop.precopy.tuning.downtime_limit_ns = limit_ms * MS
    loop.precopy.run()
    assert isinstance(loop.precopy.policy, ScriptedPolicy)
    assert {view.handover_ns for view in loop.precopy.policy.views} == {counted_ms * MS}


class Seeing(StandardPolicy):
    def __init__(self) -> None:
        super().__init__()
        self.views: list[RoundView] = []

    def recheck(self, view: RoundView, forecast: Forecast) -> Decision:
        self.views.append(view)
        return super().recheck(view, forecast)


def test_the_next_move_counts_with_what_the_last_one_took(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:

        def guest(npages: int = 2048, *, filled: bool = True) -> MemoryGuest:
            made = MemoryGuest(npages=npages, filled=filled)
            return stack.enter_context(contextlib.closing(made))

        def make_guest(incoming: Incoming) -> MemoryGuest:
            return guest(incoming.blocks[0].npages, filled=False)

        where = parse_endpoint("tcp:127.0.0.1:0", listening=True)
        listener = stack.enter_context(
            Listener(where, make_guest, ReceiveOptions(state_dir=tmp_path / "there"))
        )
        counted = []
        for _ in range(2):
            source, policy = guest(), Seeing()
            source.resume()
            result = vmth.migrate(
                source,
                listener.endpoint.display,
                MigrateOptions(
                    state_dir=tmp_path / "here",
                    policy=policy,
                    downtime_limit_ns=60_000 * MS,  # half of it is more than is ever learned
                ),
            )
            listener.wait_for_guest(5)
            view = policy.views[-1]
            off_ns = result.downtime_ns - forecast_downtime(view).total_ns
            counted.append((view.handover_ns, off_ns, view.journal_ns))
    (none, first_off, journal_ns), (learned, _, _) = counted
    assert none == (first_handover_ns(HURRIED_HANDOVER_NS, journal_ns) if permitted() else 0)
    assert learned == (none or first_handover_ns(HANDOVER_NS, journal_ns)) + first_off
