# SPDX-License-Identifier: Apache-2.0
"""Every row of both tables as docs/handover.md states it, every missing row, and what stands around
the tables: classification of messages, restarts, undo."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from vmth.errors import StreamError, UsageError
from vmth.wire import handover as h
from vmth.wire import messages as m
from vmth.wire.handover import Action, Record, SourceEvent, SourceState

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "handover.md").read_text()
SIDES: dict[str, tuple[Any, Any, Any]] = {
    "Source": (h.SOURCE_TABLE, h.SourceState, h.SourceEvent),
    "Destination": (h.DESTINATION_TABLE, h.DestinationState, h.DestinationEvent),
}
ROW = re.compile(r"^\| ([A-Z_]+) \| ([\w-]+) \| ([A-Z_]+) \| (.+) \|$", re.MULTILINE)
SESSION, RECEIVER, OTHER = b"s" * 16, b"r" * 16, b"x" * 16


def documented(side: str) -> dict[tuple[Any, Any], tuple[Any, tuple[Action, ...]]]:
    _, states, events = SIDES[side]
    text = DOCUMENT.split(f"\n## {side}\n")[1].split("\n## ")[0]
    return {
        (states[state], events(event)): (
            states[after],
            () if actions == "-" else tuple(Action(one) for one in actions.split(", ")),
        )
        for state, event, after, actions in ROW.findall(text)
    }


@pytest.mark.parametrize("side", SIDES)
def test_every_transition_is_as_documented(side: str) -> None:
    table, states, events = SIDES[side]
    expected = documented(side)
    assert len(expected) == len(table) > 50
    for state, event in itertools.product(states, events):
        handover = h.Handover(table, state)
        if (state, event) in expected:
            actions = handover.on(event)
            assert (handover.state, actions) == expected[state, event], (state, event)
            handover.undo()
        else:
            kind = StreamError if event in h.PEER_EVENTS else UsageError
            with pytest.raises(kind) as caught:
                handover.on(event)
            allowed = {str(e.value) for s, e in expected if s is state}
            head, _, tail = str(caught.value).partition(", allowed ")
            assert head == f"handover in state {state.value}: {event.value}"
            assert set(tail.split(", ")) == allowed
        assert handover.state is state


def test_the_documents_generated_part_is_current() -> None:
    path = ROOT / "scripts" / "handover_tables.py"
    spec = importlib.util.spec_from_file_location("handover_tables", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert DOCUMENT.split(script.MARK)[1] == script.generated()


@pytest.mark.parametrize("side", SIDES)
def test_every_state_can_be_reached(side: str) -> None:
    table, states, _ = SIDES[side]
    beginning = next(iter(states))
    restarts = h._SOURCE_RECORDS if side == "Source" else h._DESTINATION_RECORDS
    reached = {beginning, *restarts.values(), *(row.next_state for row in table.values())}
    assert reached == set(states)


def test_every_action_has_a_user() -> None:
    tables: tuple[Any, ...] = (h.SOURCE_TABLE, h.DESTINATION_TABLE)
    used = {action for table in tables for row in table.values() for action in row.actions}
    assert used == set(Action)


def test_journal_actions_name_their_record() -> None:
    named = {action.record for action in Action if action.record is not None}
    assert named == set(Record)
    assert Action.JOURNAL_GRANTED.record is Record.GRANTED
    assert Action.SEND_GRANT.record is None


def test_the_grant_in_order() -> None:
    handover = h.source_handover()
    events = (SourceEvent.START, SourceEvent.PAUSE, SourceEvent.SEAL, SourceEvent.SEALED)
    for event in events:
        handover.on(event)
    assert handover.on(SourceEvent.GRANT) == (
        Action.HOLD_GUEST,
        Action.JOURNAL_GRANTED,
        Action.SEND_GRANT,
    )
    assert handover.state is SourceState.GRANTED
    handover.undo()
    assert handover.on(SourceEvent.FAILURE)[0] is Action.RESUME_GUEST


ANSWERS = m.AnswerState
MEANINGS: list[tuple[m.Message, SourceEvent | None]] = [
    (m.Running(0), SourceEvent.RUNNING),
    (m.Mismatch(0, 0, 0), SourceEvent.MISMATCH),
    (m.ReleasedSeen(), SourceEvent.RELEASED_SEEN),
    (m.Abort(m.AbortCode.FAILED, ""), SourceEvent.PEER_ABORT),
    (m.Refuse(m.RefuseCode.BUSY, ""), SourceEvent.PEER_ABORT),
    (m.Aborted(RECEIVER, ""), SourceEvent.ABORTED),
    (m.Aborted(OTHER, ""), SourceEvent.UNKNOWN),
    (m.Answer(SESSION, RECEIVER, ANSWERS.ABORTED, ""), SourceEvent.ABORTED),
    (m.Answer(SESSION, RECEIVER, ANSWERS.RUNNING, ""), SourceEvent.RUNNING),
    (m.Answer(SESSION, RECEIVER, ANSWERS.STARTING, ""), SourceEvent.STARTING),
    (m.Answer(SESSION, RECEIVER, ANSWERS.UNKNOWN, ""), SourceEvent.UNKNOWN),
    (m.Answer(SESSION, OTHER, ANSWERS.ABORTED, ""), SourceEvent.UNKNOWN),
    (m.Answer(SESSION, OTHER, ANSWERS.RUNNING, ""), SourceEvent.UNKNOWN),
    (m.Answer(OTHER, RECEIVER, ANSWERS.ABORTED, ""), SourceEvent.UNKNOWN),
    (m.Sealed(0, 0, 0), None),
    (m.Pong(1), None),
]


@pytest.mark.parametrize(("message", "event"), MEANINGS, ids=lambda value: str(value)[:60])
def test_what_messages_mean_to_a_source(message: m.Message, event: SourceEvent | None) -> None:
    assert h.source_event(message, SESSION, RECEIVER) is event


def test_a_query_for_another_receiver_fences_nothing() -> None:
    ours = h.query_event(m.Query(SESSION, RECEIVER), RECEIVER)
    other = h.query_event(m.Query(SESSION, OTHER), RECEIVER)
    sealed = h.DestinationState.SEALED
    assert h.destination_handover(sealed).on(ours)[0] is Action.JOURNAL_ABORTED
    fenced = h.destination_handover(sealed)
    assert fenced.on(other) == (Action.ANSWER_UNKNOWN,)
    assert fenced.state is sealed


@pytest.mark.parametrize("record", Record)
def test_restarts_know_their_own_records(record: Record) -> None:
    source = record in (Record.MIGRATING, Record.GRANTED, Record.RELEASED, Record.KEPT)
    if source:
        state = h.source_state_after_restart(record)
        assert (state, SourceEvent.RESTARTED) in h.SOURCE_TABLE
        with pytest.raises(UsageError, match=f"destination journal: found {record.name}"):
            h.destination_state_after_restart(record)
    else:
        after = h.destination_state_after_restart(record)
        assert (after, h.DestinationEvent.RESTARTED) in h.DESTINATION_TABLE
        with pytest.raises(UsageError, match=f"source journal: found {record.name}"):
            h.source_state_after_restart(record)
    assert h.destination_state_after_restart(None) is h.DestinationState.NO_RECORD


def test_the_invariants_name_tests_that_exist() -> None:
    text = (ROOT / "docs" / "invariants.md").read_text()
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", text))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
