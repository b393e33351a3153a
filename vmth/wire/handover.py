# SPDX-License-Identifier: Apache-2.0
"""The handover: who may run the guest, as two tables. Everything about it is decided here.

Two rules. Every transition of either end is a row; what has no row is refused by name. The actions
of a row are executed in the order in which they stand, one after the other, and a decision is
journaled (fsync) before it is acted on: a crash between any two actions is safe, and so are lost,
repeated and late messages. tests/test_handover_model.py checks that by exhaustion;
docs/handover.md draws it.

This file knows no guest, journal or connection. A session feeds what happened to ``Handover.on()``
and executes the actions that it returns. If HOLD_GUEST or a JOURNAL action fails, nothing after it
is executed and ``undo()`` takes the transition back; then FAILURE is fed.

After GRANTED stands in the source's journal the source does not run until it *knows* that the
destination never will. After STARTING stands in the destination's journal the destination never
says ABORTED, unless its own resume() raised with no vCPU having run.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from vmth.errors import StreamError, UsageError
from vmth.wire.messages import (
    Abort,
    Aborted,
    Answer,
    AnswerState,
    Message,
    Mismatch,
    Query,
    Refuse,
    ReleasedSeen,
    Running,
)

__all__ = [
    "DESTINATION_TABLE",
    "PEER_EVENTS",
    "SOURCE_TABLE",
    "Action",
    "DestinationEvent",
    "DestinationState",
    "Handover",
    "Record",
    "SourceEvent",
    "SourceState",
    "Transition",
    "destination_handover",
    "destination_state_after_restart",
    "query_event",
    "source_event",
    "source_handover",
    "source_state_after_restart",
]


class SourceState(enum.Enum):
    NEW = "new"  #: nothing journaled yet
    RUNNING = "running"  #: the guest runs here, rounds are sent
    PAUSED = "paused"  #: may resume for another round
    SEALING = "sealing"  #: Seal was sent: the CPU state is out, another round needs another session
    SEALED = "sealed"  #: the destination holds all that it needs, digests are equal
    GRANTED = "granted"  #: journaled: the destination may run
    IN_DOUBT = "in-doubt"  #: granted, and not known what became of it; asks by session id
    RELEASED = "released"  #: the guest runs there; freed here
    KEPT = "kept"  #: the end: the guest stays here, as it was before the pause
    DONE = "done"  #: the end: the destination knows that the guest was freed here


class DestinationState(enum.Enum):
    NO_RECORD = "no-record"  #: the beginning and the end; also every session never heard of
    RECEIVING = "receiving"
    SEALED = "sealed"  #: digests equal, load_state() returned, every resource held
    STARTING = "starting"  #: journaled: resume() is called or was called
    ABORTING = "aborting"  #: a restart found RECEIVING, Sealed may have been said: will never run
    ASKING = "asking"  #: a restart found STARTING: does the guest run?
    RUNNING = "running"  #: journaled: the guest runs here
    IN_DOUBT = "in-doubt"  #: the guest cannot be asked
    ABORTED = "aborted"  #: journaled: will never run here


class SourceEvent(enum.Enum):
    START = "start"  #: a session begins
    PAUSE = "pause"  #: switch over now
    RESUME = "resume"  #: the last set was too large: another round
    SEAL = "seal"  #: all is sent, compare the digests
    GRANT = "grant"  #: every check has passed: let it run there
    FAILURE = (
        "failure"  #: cancelled, the guest raised, a journal write failed, the peer broke rules
    )
    CONNECTION_LOST = "connection-lost"  #: or silent beyond the peer timeout
    RESTARTED = "restarted"  #: a new process found the record
    ASK_AGAIN = "ask-again"  #: time for another query, or to tell again
    GIVE_UP = "give-up"  #: asked long enough
    SEALED = "Sealed"  #: with our digest; with another one it is a FAILURE
    MISMATCH = "Mismatch"
    RUNNING = "Running"
    ABORTED = "Aborted"  #: from the receiver that stands in the journal, for a session it knows
    STARTING = "Starting"  #: that receiver cannot tell yet
    UNKNOWN = "Unknown"  #: any other answer, and any answer of another receiver
    RELEASED_SEEN = "ReleasedSeen"
    PEER_ABORT = "Abort"  #: Abort or Refuse


class DestinationEvent(enum.Enum):
    ACCEPT = "accept"  #: the offer is good, the guest was made
    SEAL_EQUAL = "seal-equal"  #: digests equal *and* load_state() returned
    SEAL_DIFFERS = "seal-differs"
    RESUME_OK = "resume-ok"  #: resume() returned
    RESUME_FAILED = "resume-failed"  #: resume() raised and no vCPU has run
    GUEST_RUNS = "guest-runs"
    GUEST_DOES_NOT_RUN = "guest-does-not-run"
    GUEST_UNKNOWN = (
        "guest-unknown"  #: it cannot be asked, or resume() raised and a vCPU may have run
    )
    FAILURE = "failure"
    CONNECTION_LOST = "connection-lost"
    RESTARTED = "restarted"
    GRANT = "Grant"
    QUERY = "Query"  #: for this session and this receiver
    QUERY_OTHER = "QueryOther"  #: for another receiver
    RELEASED = "Released"
    PEER_ABORT = "Abort"


class Record(enum.IntEnum):
    """What a journal record says; the last one counts. 0 is invalid."""

    MIGRATING = 1  #: source: began; it may always resume
    GRANTED = 2  #: source
    RELEASED = 3  #: source
    KEPT = 4  #: source: the destination will never run; resume
    RECEIVING = 5  #: destination: began; nothing runs
    STARTING = 6  #: destination
    RUNNING = 7  #: destination
    ABORTED = 8  #: destination


class Action(enum.Enum):
    """What a session does for a transition. SEND goes to the control connection if there is one,
    else, like ANSWER, to the connection that brought the event; a send that fails is a lost
    message, never an error."""

    JOURNAL_MIGRATING = "journal MIGRATING"
    JOURNAL_GRANTED = "journal GRANTED"
    JOURNAL_RELEASED = "journal RELEASED"
    JOURNAL_KEPT = "journal KEPT"
    JOURNAL_RECEIVING = "journal RECEIVING"
    JOURNAL_STARTING = "journal STARTING"
    JOURNAL_RUNNING = "journal RUNNING"
    JOURNAL_ABORTED = "journal ABORTED"
    FORGET_RECORD = "forget the record"
    PAUSE_GUEST = "pause the guest"
    HOLD_GUEST = "hold the guest"  #: CanHold.hold(): it stays paused even if this process vanishes
    RESUME_GUEST = "resume the guest"  #: if it had been running; a destination feeds the outcome
    RELEASE_GUEST = "release the guest"
    DISCARD_GUEST = "discard the guest"
    ASK_GUEST = "ask the guest"  #: does it run? feeds GUEST_RUNS, _DOES_NOT_RUN or _UNKNOWN
    SEND_SEAL = "send Seal"
    SEND_GRANT = "send Grant"
    SEND_RELEASED = "send Released"
    SEND_ABORT = "send Abort"
    QUERY_PEER = "query the peer"  #: on a query connection; ASK_AGAIN comes later
    SEND_ACCEPT = "send Accept"
    SEND_SEALED = "send Sealed"
    SEND_MISMATCH = "send Mismatch"
    SEND_RUNNING = "send Running"
    SEND_ABORTED = "send Aborted"
    SEND_RELEASED_SEEN = "send ReleasedSeen"
    ANSWER_ABORTED = "answer ABORTED"
    ANSWER_STARTING = "answer STARTING"
    ANSWER_RUNNING = "answer RUNNING"
    ANSWER_UNKNOWN = "answer UNKNOWN"
    TELL_OPERATOR = "tell the operator"

    @property
    def record(self) -> Record | None:
        """The record that a JOURNAL action appends."""
        name = self.name.removeprefix("JOURNAL_")
        return Record[name] if name != self.name else None


SomeState = TypeVar("SomeState", bound=SourceState | DestinationState)
SomeEvent = TypeVar("SomeEvent", bound=SourceEvent | DestinationEvent)


@dataclass(frozen=True, slots=True)
class Transition(Generic[SomeState]):
    """One row: the state that follows, and what to do, in this order."""

    next_state: SomeState
    actions: tuple[Action, ...] = ()


SourceTable: TypeAlias = Mapping[tuple[SourceState, SourceEvent], Transition[SourceState]]
DestinationTable: TypeAlias = Mapping[
    tuple[DestinationState, DestinationEvent], Transition[DestinationState]
]

#: What a peer causes: without a row it is the peer's fault (StreamError), else ours (UsageError).
PEER_EVENTS: frozenset[SourceEvent | DestinationEvent] = frozenset(
    {
        SourceEvent.SEALED,
        SourceEvent.MISMATCH,
        SourceEvent.RUNNING,
        SourceEvent.ABORTED,
        SourceEvent.STARTING,
        SourceEvent.UNKNOWN,
        SourceEvent.RELEASED_SEEN,
        SourceEvent.PEER_ABORT,
        DestinationEvent.GRANT,
        DestinationEvent.QUERY,
        DestinationEvent.QUERY_OTHER,
        DestinationEvent.RELEASED,
        DestinationEvent.PEER_ABORT,
    }
)


def _row(state: SomeState, *actions: Action) -> Transition[SomeState]:
    return Transition(state, actions)


def _nothing(
    states: Iterable[SomeState], events: Iterable[SomeEvent]
) -> dict[tuple[SomeState, SomeEvent], Transition[SomeState]]:
    """Late and repeated events that change nothing, on purpose."""
    events = tuple(events)
    return {(state, event): Transition(state) for state in states for event in events}


def _source_table() -> SourceTable:
    state, event, do = SourceState, SourceEvent, Action
    table: dict[tuple[SourceState, SourceEvent], Transition[SourceState]] = {
        (state.NEW, event.START): _row(state.RUNNING, do.JOURNAL_MIGRATING),
        (state.RUNNING, event.PAUSE): _row(state.PAUSED, do.PAUSE_GUEST),
        (state.RUNNING, event.FAILURE): _row(state.KEPT, do.SEND_ABORT, do.FORGET_RECORD),
        (state.RUNNING, event.CONNECTION_LOST): _row(state.KEPT, do.FORGET_RECORD),
        (state.RUNNING, event.PEER_ABORT): _row(state.KEPT, do.FORGET_RECORD),
        (state.PAUSED, event.RESUME): _row(state.RUNNING, do.RESUME_GUEST),
        (state.PAUSED, event.SEAL): _row(state.SEALING, do.SEND_SEAL),
        # A restart knows MIGRATING and not whether the guest was paused: resume() is idempotent.
        (state.PAUSED, event.RESTARTED): _row(state.KEPT, do.RESUME_GUEST, do.FORGET_RECORD),
        (state.SEALING, event.MISMATCH): _row(state.PAUSED),
        (state.SEALING, event.SEALED): _row(state.SEALED),
        (state.SEALED, event.GRANT): _row(
            state.GRANTED, do.HOLD_GUEST, do.JOURNAL_GRANTED, do.SEND_GRANT
        ),
        (state.GRANTED, event.CONNECTION_LOST): _row(state.IN_DOUBT, do.QUERY_PEER),
        (state.GRANTED, event.FAILURE): _row(state.IN_DOUBT, do.QUERY_PEER),
        (state.GRANTED, event.PEER_ABORT): _row(state.IN_DOUBT, do.QUERY_PEER),
        (state.GRANTED, event.RESTARTED): _row(state.IN_DOUBT, do.QUERY_PEER),
        (state.IN_DOUBT, event.ASK_AGAIN): _row(state.IN_DOUBT, do.QUERY_PEER),
        (state.IN_DOUBT, event.GIVE_UP): _row(state.IN_DOUBT, do.TELL_OPERATOR),
        (state.RELEASED, event.ASK_AGAIN): _row(state.RELEASED, do.SEND_RELEASED),
        (state.RELEASED, event.RESTARTED): _row(state.RELEASED, do.RELEASE_GUEST, do.SEND_RELEASED),
        (state.RELEASED, event.RELEASED_SEEN): _row(state.DONE, do.FORGET_RECORD),
        (state.KEPT, event.RESTARTED): _row(state.KEPT, do.RESUME_GUEST, do.FORGET_RECORD),
    }
    for paused in (state.PAUSED, state.SEALING, state.SEALED):
        table[paused, event.FAILURE] = _row(
            state.KEPT, do.RESUME_GUEST, do.SEND_ABORT, do.FORGET_RECORD
        )
        for over in (event.CONNECTION_LOST, event.PEER_ABORT, event.ABORTED):
            table[paused, over] = _row(state.KEPT, do.RESUME_GUEST, do.FORGET_RECORD)
    for granted in (state.GRANTED, state.IN_DOUBT):
        table[granted, event.RUNNING] = _row(
            state.RELEASED, do.JOURNAL_RELEASED, do.RELEASE_GUEST, do.SEND_RELEASED
        )
        table[granted, event.ABORTED] = _row(
            state.KEPT, do.JOURNAL_KEPT, do.RESUME_GUEST, do.SEND_ABORT, do.FORGET_RECORD
        )
        table[granted, event.UNKNOWN] = _row(state.IN_DOUBT, do.TELL_OPERATOR)
    answers = (event.SEALED, event.STARTING, event.UNKNOWN)
    table |= _nothing([state.SEALED], [event.SEALED])
    table |= _nothing([state.GRANTED], [event.SEALED, event.STARTING])
    table |= _nothing(
        [state.IN_DOUBT],
        [
            event.SEALED,
            event.STARTING,
            event.CONNECTION_LOST,
            event.FAILURE,
            event.PEER_ABORT,
        ],
    )
    table |= _nothing(
        [state.RELEASED, state.DONE],
        [*answers, event.RUNNING, event.CONNECTION_LOST, event.FAILURE, event.GIVE_UP],
    )
    table |= _nothing([state.DONE], [event.RELEASED_SEEN, event.ASK_AGAIN])
    table |= _nothing(
        [state.KEPT],
        [
            *answers,
            event.MISMATCH,
            event.ABORTED,
            event.PEER_ABORT,
            event.CONNECTION_LOST,
            event.FAILURE,
            event.ASK_AGAIN,
            event.GIVE_UP,
        ],
    )
    return table


def _destination_table() -> DestinationTable:
    state, event, do = DestinationState, DestinationEvent, Action
    table: dict[tuple[DestinationState, DestinationEvent], Transition[DestinationState]] = {
        (state.NO_RECORD, event.ACCEPT): _row(
            state.RECEIVING, do.JOURNAL_RECEIVING, do.SEND_ACCEPT
        ),
        (state.NO_RECORD, event.QUERY): _row(state.NO_RECORD, do.ANSWER_UNKNOWN),
        (state.NO_RECORD, event.RELEASED): _row(state.NO_RECORD, do.SEND_RELEASED_SEEN),
        (state.RECEIVING, event.SEAL_DIFFERS): _row(state.RECEIVING, do.SEND_MISMATCH),
        (state.RECEIVING, event.SEAL_EQUAL): _row(state.SEALED, do.SEND_SEALED),
        # Sealed was not said, so no grant can be on its way: nothing needs to be remembered.
        (state.RECEIVING, event.FAILURE): _row(
            state.NO_RECORD, do.DISCARD_GUEST, do.SEND_ABORT, do.FORGET_RECORD
        ),
        (state.RECEIVING, event.CONNECTION_LOST): _row(
            state.NO_RECORD, do.DISCARD_GUEST, do.FORGET_RECORD
        ),
        (state.SEALED, event.SEAL_EQUAL): _row(state.SEALED, do.SEND_SEALED),
        (state.SEALED, event.GRANT): _row(state.STARTING, do.JOURNAL_STARTING, do.RESUME_GUEST),
        (state.ABORTING, event.RESTARTED): _row(
            state.ABORTED, do.JOURNAL_ABORTED, do.DISCARD_GUEST
        ),
        (state.ABORTING, event.GRANT): _row(
            state.ABORTED, do.JOURNAL_ABORTED, do.DISCARD_GUEST, do.SEND_ABORTED
        ),
        (state.STARTING, event.RESUME_FAILED): _row(
            state.ABORTED, do.JOURNAL_ABORTED, do.DISCARD_GUEST, do.SEND_ABORTED
        ),
        (state.STARTING, event.RESTARTED): _row(state.ASKING, do.ASK_GUEST),
        # Not running now does not prove that it never ran: resume here, never give back.
        (state.ASKING, event.GUEST_DOES_NOT_RUN): _row(state.ASKING, do.RESUME_GUEST),
        (state.ASKING, event.RESUME_FAILED): _row(state.IN_DOUBT, do.TELL_OPERATOR),
        (state.RUNNING, event.QUERY): _row(state.RUNNING, do.ANSWER_RUNNING),
        (state.RUNNING, event.GRANT): _row(state.RUNNING, do.SEND_RUNNING),
        # Forgotten first: the source tells again, and a destination without a record confirms.
        (state.RUNNING, event.RELEASED): _row(
            state.NO_RECORD, do.FORGET_RECORD, do.SEND_RELEASED_SEEN
        ),
        (state.ABORTED, event.QUERY): _row(state.ABORTED, do.ANSWER_ABORTED),
        (state.ABORTED, event.GRANT): _row(state.ABORTED, do.SEND_ABORTED),
        (state.ABORTED, event.PEER_ABORT): _row(state.NO_RECORD, do.FORGET_RECORD),
        (state.ABORTED, event.RESTARTED): _row(state.ABORTED, do.DISCARD_GUEST),
    }
    # From Sealed on a grant may be on its way: ABORTED must be remembered.
    for sealed in (state.SEALED, state.ABORTING):
        table[sealed, event.FAILURE] = _row(
            state.ABORTED, do.JOURNAL_ABORTED, do.DISCARD_GUEST, do.SEND_ABORTED
        )
        table[sealed, event.CONNECTION_LOST] = _row(
            state.ABORTED, do.JOURNAL_ABORTED, do.DISCARD_GUEST
        )
    for waiting in (state.RECEIVING, state.SEALED, state.ABORTING):
        # The fence: whoever asks before the start will be told that there will be none.
        table[waiting, event.QUERY] = _row(
            state.ABORTED, do.JOURNAL_ABORTED, do.DISCARD_GUEST, do.ANSWER_ABORTED
        )
        # Abort says that the source keeps the guest: no grant was or will be given.
        table[waiting, event.PEER_ABORT] = _row(state.NO_RECORD, do.DISCARD_GUEST, do.FORGET_RECORD)
    for starting in (state.STARTING, state.ASKING):
        table[starting, event.RESUME_OK] = _row(state.RUNNING, do.JOURNAL_RUNNING, do.SEND_RUNNING)
        table[starting, event.GUEST_UNKNOWN] = _row(state.IN_DOUBT, do.TELL_OPERATOR)
        # After resume() only a journal write can fail: what the guest does is asked anew.
        table[starting, event.FAILURE] = _row(state.ASKING, do.ASK_GUEST)
        table[starting, event.QUERY] = _row(starting, do.ANSWER_STARTING)
    table[state.ASKING, event.GUEST_RUNS] = _row(state.RUNNING, do.JOURNAL_RUNNING, do.SEND_RUNNING)
    # Queries come on other threads than the guest's: only a restart asks the guest again.
    table[state.IN_DOUBT, event.QUERY] = _row(state.IN_DOUBT, do.ANSWER_STARTING)
    table |= _nothing([state.IN_DOUBT], [event.FAILURE])
    for unsure in (state.STARTING, state.ASKING, state.IN_DOUBT):
        table |= _nothing([unsure], [event.GRANT, event.PEER_ABORT, event.CONNECTION_LOST])
    for every in state:
        table[every, event.QUERY_OTHER] = _row(every, do.ANSWER_UNKNOWN)
    settled = (state.NO_RECORD, state.RUNNING, state.ABORTED)
    table |= _nothing(settled, [event.CONNECTION_LOST, event.FAILURE])
    table |= _nothing([state.NO_RECORD], [event.GRANT, event.PEER_ABORT])
    table |= _nothing([state.RUNNING], [event.PEER_ABORT, event.RESTARTED])
    unsealed = (state.RECEIVING, state.SEALED)
    table |= _nothing([s for s in state if s not in unsealed], [event.SEAL_EQUAL])
    return table


SOURCE_TABLE: SourceTable = _source_table()
DESTINATION_TABLE: DestinationTable = _destination_table()


class Handover(Generic[SomeState, SomeEvent]):
    """One end's position in its table. Not thread-safe: grant and query go through one lock of the
    caller's, held from ``on()`` until the last action was executed."""

    def __init__(
        self,
        table: Mapping[tuple[SomeState, SomeEvent], Transition[SomeState]],
        state: SomeState,
    ) -> None:
        self._table = table
        self._previous = state
        self.state: SomeState = state

    def on(self, event: SomeEvent) -> tuple[Action, ...]:
        """Take the transition and return its actions, to be executed in this order.

        Without a row the state stays, and StreamError (the peer's event) or UsageError (ours) names
        the state, the event and what is allowed.
        """
        row = self._table.get((self.state, event))
        if row is None:
            allowed = ", ".join(sorted(str(e.value) for s, e in self._table if s == self.state))
            kind = StreamError if event in PEER_EVENTS else UsageError
            raise kind(f"handover in state {self.state.value}: {event.value}, allowed {allowed}")
        self._previous, self.state = self.state, row.next_state
        return row.actions

    def undo(self) -> None:
        """Back to the state before the last ``on()``: its journal write failed, so nothing was
        decided. Only for that; what its earlier actions did to the guest is undone by FAILURE."""
        self.state = self._previous


def source_handover(
    state: SourceState = SourceState.NEW,
) -> Handover[SourceState, SourceEvent]:
    return Handover(SOURCE_TABLE, state)


def destination_handover(
    state: DestinationState = DestinationState.NO_RECORD,
) -> Handover[DestinationState, DestinationEvent]:
    return Handover(DESTINATION_TABLE, state)


_SOURCE_RECORDS = {
    Record.MIGRATING: SourceState.PAUSED,
    Record.GRANTED: SourceState.GRANTED,
    Record.RELEASED: SourceState.RELEASED,
    Record.KEPT: SourceState.KEPT,
}
_DESTINATION_RECORDS = {
    Record.RECEIVING: DestinationState.ABORTING,
    Record.STARTING: DestinationState.STARTING,
    Record.RUNNING: DestinationState.RUNNING,
    Record.ABORTED: DestinationState.ABORTED,
}


def source_state_after_restart(record: Record) -> SourceState:
    """Where a new process stands that found this record last; it then feeds RESTARTED."""
    if record not in _SOURCE_RECORDS:
        raise UsageError(f"source journal: found {record.name}, allowed {_names(_SOURCE_RECORDS)}")
    return _SOURCE_RECORDS[record]


def destination_state_after_restart(record: Record | None) -> DestinationState:
    """Where a new process stands that found this record last (None: no record, nothing to feed);
    it then feeds RESTARTED."""
    if record is None:
        return DestinationState.NO_RECORD
    if record not in _DESTINATION_RECORDS:
        raise UsageError(
            f"destination journal: found {record.name}, allowed {_names(_DESTINATION_RECORDS)}"
        )
    return _DESTINATION_RECORDS[record]


def _names(records: Iterable[Record]) -> str:
    return ", ".join(record.name for record in records)


_ANSWERS = {
    AnswerState.UNKNOWN: SourceEvent.UNKNOWN,
    AnswerState.ABORTED: SourceEvent.ABORTED,
    AnswerState.STARTING: SourceEvent.STARTING,
    AnswerState.RUNNING: SourceEvent.RUNNING,
}


def source_event(message: Message, session_id: bytes, receiver_id: bytes) -> SourceEvent | None:
    """What a destination's message means to the source of ``session_id`` whose journal names
    ``receiver_id``; None for messages that are none of the handover's business (and for Sealed,
    which the session compares with its own digest first).

    An answer about another session or of another receiver proves nothing: UNKNOWN.
    """
    if isinstance(message, Answer):
        ours = message.session_id == session_id and message.receiver_id == receiver_id
        return _ANSWERS[AnswerState(message.state)] if ours else SourceEvent.UNKNOWN
    if isinstance(message, Aborted):
        return SourceEvent.ABORTED if message.receiver_id == receiver_id else SourceEvent.UNKNOWN
    if isinstance(message, Running):
        return SourceEvent.RUNNING
    if isinstance(message, Mismatch):
        return SourceEvent.MISMATCH
    if isinstance(message, ReleasedSeen):
        return SourceEvent.RELEASED_SEEN
    if isinstance(message, Abort | Refuse):
        return SourceEvent.PEER_ABORT
    return None


def query_event(query: Query, receiver_id: bytes) -> DestinationEvent:
    """A query fences a session only if it was meant for this receiver."""
    if query.receiver_id == receiver_id:
        return DestinationEvent.QUERY
    return DestinationEvent.QUERY_OTHER
