# SPDX-License-Identifier: Apache-2.0
"""Exactly one copy runs: both tables explored through crashes and a bad network, and broken tables
that the same exploration must find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from handover_model import RECEIVER, Budget, Rules, Violation, explore, random_run

from vmth.wire.handover import (
    DESTINATION_TABLE,
    SOURCE_TABLE,
    Action,
    DestinationEvent,
    DestinationState,
    Record,
    SourceEvent,
    SourceState,
    Transition,
    source_event,
    source_state_after_restart,
)
from vmth.wire.messages import Aborted, Answer, Message

S, SE = SourceState, SourceEvent
D, DE = DestinationState, DestinationEvent
A = Action


@pytest.mark.parametrize("budget", [Budget(), Budget(lose=1), Budget(repeat=1)], ids=str)
def test_exactly_one_runs_quick(budget: Budget) -> None:
    assert explore(Rules(), budget) > 50


@pytest.mark.slow
@pytest.mark.parametrize(
    "budget",
    [
        Budget(crash=1),
        Budget(2, 2, 2, 0),
        Budget(1, 1, 1, 1),
        Budget(2, 0, 0, 1),
        Budget(0, 0, 0, 2),
    ],
    ids=str,
)
def test_exactly_one_runs(budget: Budget) -> None:
    assert explore(Rules(), budget) > 500


@pytest.mark.parametrize("seed", range(4))
def test_random_runs_keep_one_copy(seed: int) -> None:
    seen = random_run(Rules(), seed, length=1500, fault_percent=12)
    assert seen["source crashes"] and seen["destination crashes"]
    assert sum(count for label, count in seen.items() if label.endswith("is lost"))
    assert sum(count for label, count in seen.items() if label.endswith("stays under way"))


@pytest.mark.slow
def test_a_long_random_run_keeps_one_copy() -> None:
    seen = random_run(Rules(), seed=20261121, length=150_000, fault_percent=15)
    assert seen["destination: resume-ok"] > 100


def source_row(state: SourceState, event: SourceEvent, to: SourceState, *actions: Action) -> Rules:
    return Rules(source={**SOURCE_TABLE, (state, event): Transition(to, actions)})


def destination_row(
    state: DestinationState, event: DestinationEvent, to: DestinationState, *actions: Action
) -> Rules:
    return Rules(destination={**DESTINATION_TABLE, (state, event): Transition(to, actions)})


def any_aborted_counts(message: Message, session_id: bytes, _: bytes) -> SourceEvent | None:
    """Believes every receiver."""
    if isinstance(message, Answer | Aborted):
        return source_event(message, session_id, message.receiver_id)
    return source_event(message, session_id, RECEIVER)


def unknown_counts_as_aborted(message: Message, session_id: bytes, receiver: bytes) -> Any:
    event = source_event(message, session_id, receiver)
    return SE.ABORTED if event is SE.UNKNOWN else event


def granted_may_resume(record: Record) -> SourceState:
    return S.PAUSED if record is Record.GRANTED else source_state_after_restart(record)


#: (what is broken, how, faults that are enough, what is found without looking at the journal)
MUTATIONS: list[tuple[str, Rules, Budget, str]] = [
    (
        "the grant is sent before it is journaled",
        source_row(S.SEALED, SE.GRANT, S.GRANTED, A.HOLD_GUEST, A.SEND_GRANT, A.JOURNAL_GRANTED),
        Budget(crash=1),
        "two guests run",
    ),
    (
        "the grant is journaled before the guest is held",
        source_row(S.SEALED, SE.GRANT, S.GRANTED, A.JOURNAL_GRANTED, A.SEND_GRANT),
        Budget(crash=1),
        "two guests run",
    ),
    (
        "the destination resumes before it journals STARTING",
        destination_row(D.SEALED, DE.GRANT, D.STARTING, A.RESUME_GUEST, A.JOURNAL_STARTING),
        Budget(crash=1),
        "discards a running guest",
    ),
    (
        "the destination does not journal STARTING",
        destination_row(D.SEALED, DE.GRANT, D.STARTING, A.RESUME_GUEST),
        Budget(crash=1),
        "discards a running guest",
    ),
    (
        "ABORTED of another receiver counts",
        Rules(classify=any_aborted_counts),
        Budget(trouble=1),
        "two guests run|runs again",
    ),
    (
        "UNKNOWN counts as ABORTED",
        Rules(classify=unknown_counts_as_aborted),
        Budget(trouble=1),
        "two guests run|runs again",
    ),
    (
        "the destination runs after it answered ABORTED",
        destination_row(D.SEALED, DE.QUERY, D.SEALED, A.JOURNAL_ABORTED, A.ANSWER_ABORTED),
        Budget(repeat=1, trouble=1),
        "two guests run",
    ),
    (
        "a lost connection resumes a granted source",
        source_row(S.GRANTED, SE.CONNECTION_LOST, S.KEPT, A.RESUME_GUEST),
        Budget(trouble=1),
        "two guests run|runs again",
    ),
    (
        "a restart resumes a granted source",
        Rules(source_restart=granted_may_resume),
        Budget(crash=1),
        "two guests run|runs again",
    ),
    (
        "a restart that finds STARTING gives the guest back",
        destination_row(
            D.STARTING, DE.RESTARTED, D.ABORTED, A.JOURNAL_ABORTED, A.DISCARD_GUEST
        ),
        Budget(crash=1),
        "discards a running guest",
    ),
    (
        "the source frees the guest when it grants",
        source_row(
            S.SEALED, SE.GRANT, S.GRANTED, A.HOLD_GUEST, A.JOURNAL_GRANTED, A.RELEASE_GUEST
        ),
        Budget(),
        "the only guest was freed",
    ),
    (
        "the destination forgets as soon as it has told",
        destination_row(
            D.STARTING, DE.RESUME_OK, D.NO_RECORD, A.JOURNAL_RUNNING, A.FORGET_RECORD,
            A.SEND_RUNNING,
        ),
        Budget(lose=1),
        "stuck in",
    ),
    (
        "an aborted destination forgets too early",
        destination_row(
            D.SEALED, DE.CONNECTION_LOST, D.NO_RECORD, A.DISCARD_GUEST, A.FORGET_RECORD
        ),
        Budget(trouble=1),
        "stuck in",
    ),
    (
        "an aborted destination does not answer",
        destination_row(D.ABORTED, DE.QUERY, D.ABORTED),
        Budget(trouble=1),
        "stuck in",
    ),
]  # fmt: skip


#: A dead end shows only when all worlds are known, a second fault makes many.
SLOW = [row for row in MUTATIONS if (row[3] == "stuck in" and row[2].trouble) or sum(row[2]) > 1]


@pytest.mark.parametrize(
    ("rules", "budget", "found"),
    [pytest.param(*row[1:], marks=[pytest.mark.slow] * (row in SLOW)) for row in MUTATIONS],
    ids=[row[0] for row in MUTATIONS],
)
def test_a_broken_table_is_found_by_what_it_does(rules: Rules, budget: Budget, found: str) -> None:
    with pytest.raises(Violation, match=found):
        explore(replace(rules, write_ahead=False), budget)


UNJOURNALED: list[tuple[str, Callable[[], Rules], str]] = [
    (
        "ABORTED is answered without journaling",
        lambda: destination_row(D.SEALED, DE.QUERY, D.ABORTED, A.DISCARD_GUEST, A.ANSWER_ABORTED),
        "does 'answer ABORTED' while its journal says",
    ),
    (
        "RUNNING is told before it is journaled",
        lambda: destination_row(
            D.STARTING, DE.RESUME_OK, D.RUNNING, A.SEND_RUNNING, A.JOURNAL_RUNNING
        ),
        "does 'send Running' while its journal says",
    ),
    (
        "the guest is freed before RELEASED is journaled",
        lambda: source_row(S.GRANTED, SE.RUNNING, S.RELEASED, A.RELEASE_GUEST, A.JOURNAL_RELEASED),
        "does 'release the guest' while its journal says",
    ),
    (
        "a granted source resumes before KEPT is journaled",
        lambda: source_row(S.IN_DOUBT, SE.ABORTED, S.KEPT, A.RESUME_GUEST, A.JOURNAL_KEPT),
        "does 'resume the guest' while its journal says",
    ),
]


@pytest.mark.parametrize(
    ("rules", "found"), [row[1:] for row in UNJOURNALED], ids=[row[0] for row in UNJOURNALED]
)
def test_whatever_is_said_or_done_stands_in_the_journal(
    rules: Callable[[], Rules], found: str
) -> None:
    with pytest.raises(Violation, match=found):
        explore(rules(), Budget(trouble=1))


@pytest.mark.slow
def test_random_runs_find_a_broken_table_too() -> None:
    rules = replace(MUTATIONS[0][1], write_ahead=False)
    with pytest.raises(Violation, match=r"two guests run|runs again"):
        random_run(rules, seed=1, length=20_000, fault_percent=12)
