# SPDX-License-Identifier: Apache-2.0
"""A model of both ends of a handover, their journals, guests and network, that can be explored.

The ends run the real tables (or broken ones). The network is a set of messages under way: any may
be delivered at any time, or be lost, or be delivered and stay (a repeat, however late). Either
process may crash between any two actions; what is journaled, the guests and the messages survive.
Torn records count as not written: tests/test_journal.py proves that. Each fault has a budget.

``explore()`` walks every reachable world, breadth first: what it finds has the shortest trace.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from vmth.errors import StreamError
from vmth.wire.handover import (
    DESTINATION_TABLE,
    SOURCE_TABLE,
    Action,
    DestinationEvent,
    DestinationState,
    DestinationTable,
    Handover,
    Record,
    SourceEvent,
    SourceState,
    SourceTable,
    destination_state_after_restart,
    query_event,
    source_event,
    source_state_after_restart,
)
from vmth.wire.messages import (
    Abort,
    AbortCode,
    Aborted,
    Answer,
    AnswerState,
    Message,
    Mismatch,
    Query,
    ReleasedSeen,
    Running,
)

SESSION, RECEIVER, STRANGER = b"s" * 16, b"r" * 16, b"x" * 16

#: What travels to the source, as the real messages that source_event() classifies.
TO_SOURCE: dict[str, Message] = {
    "Mismatch": Mismatch(0, 0, 0),
    "Running": Running(0),
    "Aborted": Aborted(RECEIVER, ""),
    "Abort>source": Abort(AbortCode.FAILED, ""),
    "ReleasedSeen": ReleasedSeen(),
    "stranger Aborted": Aborted(STRANGER, ""),
    "stranger ABORTED": Answer(SESSION, STRANGER, AnswerState.ABORTED, ""),
    **{f"answer {state.name}": Answer(SESSION, RECEIVER, state, "") for state in AnswerState},
}
#: Messages that the destination's table takes by event; Seal and Query are handled apart.
TO_DESTINATION = {
    "Grant": DestinationEvent.GRANT,
    "Released": DestinationEvent.RELEASED,
    "Abort>destination": DestinationEvent.PEER_ABORT,
}
SOURCE_SENDS = {
    Action.SEND_SEAL: "Seal",
    Action.SEND_GRANT: "Grant",
    Action.SEND_RELEASED: "Released",
    Action.SEND_ABORT: "Abort>destination",
    Action.QUERY_PEER: "Query",
}
DESTINATION_SENDS = {
    Action.SEND_SEALED: "Sealed",
    Action.SEND_MISMATCH: "Mismatch",
    Action.SEND_RUNNING: "Running",
    Action.SEND_ABORTED: "Aborted",
    Action.SEND_ABORT: "Abort>source",
    Action.SEND_RELEASED_SEEN: "ReleasedSeen",
    Action.ANSWER_ABORTED: "answer ABORTED",
    Action.ANSWER_STARTING: "answer STARTING",
    Action.ANSWER_RUNNING: "answer RUNNING",
    Action.ANSWER_UNKNOWN: "answer UNKNOWN",
}
#: A control connection brings a Mismatch once: repeating it would need a correlation number.
NEVER_REPEATED = {"Mismatch"}
#: Write ahead: what must stand in the journal when an action is executed.
BACKED_BY: dict[str, dict[Action, set[Record | None]]] = {
    "source": {
        Action.SEND_GRANT: {Record.GRANTED},
        Action.QUERY_PEER: {Record.GRANTED},
        Action.RELEASE_GUEST: {Record.RELEASED},
        Action.SEND_RELEASED: {Record.RELEASED},
        Action.RESUME_GUEST: {Record.MIGRATING, Record.KEPT},
    },
    "destination": {
        Action.SEND_SEALED: {Record.RECEIVING},
        Action.RESUME_GUEST: {Record.STARTING},
        Action.SEND_RUNNING: {Record.RUNNING},
        Action.ANSWER_RUNNING: {Record.RUNNING},
        Action.SEND_ABORTED: {Record.ABORTED},
        Action.ANSWER_ABORTED: {Record.ABORTED},
    },
}

Event = SourceEvent | DestinationEvent


class Source(NamedTuple):
    state: SourceState | None = SourceState.NEW  #: None: the process is down
    before: SourceState = SourceState.NEW
    event: SourceEvent | None = None  #: that todo belongs to
    todo: tuple[Action, ...] = ()
    record: Record | None = None
    guest: str = "running"  #: running, paused, freed
    held: bool = False


class Destination(NamedTuple):
    state: DestinationState | None = DestinationState.NO_RECORD
    before: DestinationState = DestinationState.NO_RECORD
    event: DestinationEvent | None = None
    todo: tuple[Action, ...] = ()
    fact: DestinationEvent | None = None  #: happened, and is fed when todo is empty
    record: Record | None = None
    guest: str = "none"  #: none, loaded, running
    ran: bool = False
    accepted: bool = False
    can_ask: bool = True
    wiped: bool = False  #: the state directory was lost: another receiver id, no record


class World(NamedTuple):
    source: Source = Source()
    destination: Destination = Destination()
    network: frozenset[str] = frozenset()


class Budget(NamedTuple):
    crash: int = 0
    lose: int = 0
    repeat: int = 0
    trouble: int = 0  #: failures, refusals to resume or be asked, full disks, strangers, lost state


@dataclass(frozen=True)
class Rules:
    """The tables and classifiers under test; mutation tests replace some."""

    source: SourceTable = field(default_factory=lambda: SOURCE_TABLE)
    destination: DestinationTable = field(default_factory=lambda: DESTINATION_TABLE)
    classify: Callable[[Message, bytes, bytes], SourceEvent | None] = source_event
    source_restart: Callable[[Record], SourceState] = source_state_after_restart
    write_ahead: bool = True  #: check BACKED_BY


class Violation(Exception):  # noqa: N818
    """What must never be."""


Step = tuple[str | None, str, World]  #: (fault it costs, label, what follows)


class Model:
    def __init__(self, rules: Rules) -> None:
        self.rules = rules

    def steps(self, world: World) -> list[Step]:
        """Everything that may happen next. Raises Violation."""
        steps = []
        for fault, label, after in self._all_steps(world):
            check(after, label)
            steps.append((fault, label, _settled(after)))
        return steps

    def _all_steps(self, world: World) -> Iterator[Step]:
        yield from self._source_steps(world)
        yield from self._destination_steps(world)
        yield from self._network_steps(world)

    # --- source ---

    def _feed_source(self, world: World, event: SourceEvent) -> World:
        source = world.source
        assert source.state is not None
        handover = Handover(self.rules.source, source.state)
        try:
            actions = handover.on(event)
        except StreamError:  # as a session does: the peer broke the rules
            return self._feed_source(world, SourceEvent.FAILURE)
        return world._replace(
            source=source._replace(
                state=handover.state, before=source.state, event=event, todo=actions
            )
        )

    def _source_steps(self, world: World) -> Iterator[Step]:
        source, network = world.source, world.network
        if source.state is None:
            if source.record is None:  # nothing to find: whatever the guest does, it goes on doing
                ended = SourceState.DONE if source.guest == "freed" else SourceState.KEPT
                yield None, "source restarts", world._replace(source=source._replace(state=ended))
                return
            back = source._replace(state=self.rules.source_restart(source.record))
            yield (
                None,
                "source restarts",
                self._feed_source(world._replace(source=back), SourceEvent.RESTARTED),
            )
            return
        if source.record is not None or source.todo:
            down = source._replace(state=None, todo=(), event=None)
            yield "crash", "source crashes", world._replace(source=down)
            if source.guest == "paused" and not source.held:
                alone = down._replace(guest="running")
                yield "crash", "source crashes, holder resumes", world._replace(source=alone)
        if source.todo:
            yield from self._source_action(world)
            return
        for event in self._source_choices(world):
            yield None, f"source: {event.value}", self._feed_source(world, event)
        if source.state not in (SourceState.NEW, SourceState.KEPT, SourceState.DONE):
            for event in (SourceEvent.FAILURE, SourceEvent.CONNECTION_LOST):
                yield "trouble", f"source: {event.value}", self._feed_source(world, event)
        if source.state in (SourceState.GRANTED, SourceState.IN_DOUBT):
            for message in ("stranger Aborted", "stranger ABORTED"):
                yield "trouble", message, world._replace(network=network | {message})

    def _source_choices(self, world: World) -> Iterator[SourceEvent]:
        state, network = world.source.state, world.network
        quiet = not network and not world.destination.todo and not world.destination.fact
        if state is SourceState.NEW:
            yield SourceEvent.START
        elif state is SourceState.RUNNING and world.destination.accepted:
            yield SourceEvent.PAUSE
        elif state is SourceState.PAUSED:
            yield SourceEvent.SEAL
            yield SourceEvent.RESUME
        elif state is SourceState.SEALED:
            yield SourceEvent.GRANT
        elif state in (SourceState.SEALING, SourceState.GRANTED) and quiet:
            yield SourceEvent.CONNECTION_LOST  # the peer timeout
        elif state is SourceState.IN_DOUBT:
            yield SourceEvent.GIVE_UP
            if not network & {"Query", *(name for name in network if name.startswith("answer"))}:
                yield SourceEvent.ASK_AGAIN
        elif state is SourceState.RELEASED and not network & {"Released", "ReleasedSeen"}:
            yield SourceEvent.ASK_AGAIN

    def _source_action(self, world: World) -> Iterator[Step]:
        source = world.source
        action, rest = source.todo[0], source.todo[1:]
        label = f"source: {action.value}"
        self._check_backing("source", action, source.record)
        done = source._replace(todo=rest)
        network = world.network
        if action.record is not None:
            yield None, label, world._replace(source=done._replace(record=action.record))
            if source.event is not SourceEvent.START:
                undone = source._replace(state=source.before, todo=())
                world = world._replace(source=undone)
                failed = self._feed_source(world, SourceEvent.FAILURE)
                yield "trouble", f"{label} fails", failed
            return
        if action is Action.FORGET_RECORD:
            done = done._replace(record=None)
        elif action is Action.PAUSE_GUEST:
            done = done._replace(guest="paused")
        elif action is Action.HOLD_GUEST:
            done = done._replace(held=True)
        elif action is Action.RESUME_GUEST:
            if source.guest == "freed":
                raise Violation("the source resumes a guest that it freed")
            done = done._replace(guest="running", held=False)
        elif action is Action.RELEASE_GUEST:
            done = done._replace(guest="freed")
        elif action in SOURCE_SENDS:
            network |= {SOURCE_SENDS[action]}
        yield None, label, world._replace(source=done, network=network)

    # --- destination ---

    def _feed_destination(self, world: World, event: DestinationEvent) -> World:
        destination, state = world.destination, world.destination.state
        assert state is not None
        handover = Handover(self.rules.destination, state)
        try:
            actions = handover.on(event)
        except StreamError:
            return self._feed_destination(world, DestinationEvent.FAILURE)
        if event is DestinationEvent.SEAL_EQUAL and destination.guest == "none":
            loaded = state is DestinationState.RECEIVING
            destination = destination._replace(guest="loaded" if loaded else "none")
        return world._replace(
            destination=destination._replace(
                state=handover.state, before=state, event=event, todo=actions
            )
        )

    def _destination_steps(self, world: World) -> Iterator[Step]:
        destination, source = world.destination, world.source
        if destination.state is None:
            back = destination._replace(state=destination_state_after_restart(destination.record))
            restarted = world._replace(destination=back)
            if destination.record is not None:
                restarted = self._feed_destination(restarted, DestinationEvent.RESTARTED)
            yield None, "destination restarts", restarted
            return
        if destination.record is not None or destination.todo:
            down = destination._replace(state=None, todo=(), fact=None, event=None)
            yield "crash", "destination crashes", world._replace(destination=down)
            if destination.can_ask:
                mute = world._replace(destination=down._replace(can_ask=False))
                yield "trouble", "destination crashes, guest mute", mute
            if not destination.wiped:
                lost = world._replace(destination=down._replace(record=None, wiped=True))
                yield "trouble", "destination loses its state", lost
        if destination.todo:
            yield from self._destination_action(world)
            return
        if destination.fact is not None:
            fed = world._replace(destination=destination._replace(fact=None))
            fed = self._feed_destination(fed, destination.fact)
            yield None, f"destination: {destination.fact.value}", fed
            return
        if source.state is SourceState.RUNNING and not destination.accepted:
            fed = world._replace(destination=destination._replace(accepted=True))
            yield None, "destination: accept", self._feed_destination(fed, DestinationEvent.ACCEPT)
        if destination.state is DestinationState.NO_RECORD:
            return
        alone = source.state in (
            None,
            SourceState.KEPT,
            SourceState.DONE,
            SourceState.IN_DOUBT,
        )
        cut = self._feed_destination(world, DestinationEvent.CONNECTION_LOST)
        yield None if alone else "trouble", "destination: connection-lost", cut
        failed = self._feed_destination(world, DestinationEvent.FAILURE)
        yield "trouble", "destination: failure", failed

    def _destination_action(self, world: World) -> Iterator[Step]:
        destination = world.destination
        action, rest = destination.todo[0], destination.todo[1:]
        label = f"destination: {action.value}"
        self._check_backing("destination", action, destination.record)
        done = destination._replace(todo=rest)
        network = world.network
        if action.record is not None:
            yield None, label, world._replace(destination=done._replace(record=action.record))
            if destination.event is not DestinationEvent.ACCEPT:
                undone = destination._replace(state=destination.before, todo=())
                world = world._replace(destination=undone)
                failed = self._feed_destination(world, DestinationEvent.FAILURE)
                yield "trouble", f"{label} fails", failed
            return
        if action is Action.RESUME_GUEST:
            if destination.guest == "none":
                raise Violation("the destination resumes a guest that it does not have")
            ran = done._replace(guest="running", ran=True, fact=DestinationEvent.RESUME_OK)
            yield None, label, world._replace(destination=ran)
            if destination.guest == "loaded":
                refused = done._replace(fact=DestinationEvent.RESUME_FAILED)
                yield "trouble", f"{label} fails", world._replace(destination=refused)
            return
        if action is Action.ASK_GUEST:
            running = destination.guest == "running"
            told = DestinationEvent.GUEST_RUNS if running else DestinationEvent.GUEST_DOES_NOT_RUN
            if not destination.can_ask:
                told = DestinationEvent.GUEST_UNKNOWN
            done = done._replace(fact=told)
        elif action is Action.FORGET_RECORD:
            done = done._replace(record=None)
        elif action is Action.DISCARD_GUEST:
            if destination.guest == "running":
                raise Violation("the destination discards a running guest")
            done = done._replace(guest="none")
        elif action in DESTINATION_SENDS:
            network |= {DESTINATION_SENDS[action]}
        yield None, label, world._replace(destination=done, network=network)

    # --- network ---

    def _network_steps(self, world: World) -> Iterator[Step]:
        for message in sorted(world.network):
            gone = world._replace(network=world.network - {message})
            yield "lose", f"{message} is lost", gone
            for fault, label, after in self._deliver(gone, message):
                yield fault, label, after
                if message not in NEVER_REPEATED and fault is None:
                    late = after._replace(network=after.network | {message})
                    yield "repeat", f"{label}, and stays under way", late

    def _deliver(self, world: World, message: str) -> Iterator[Step]:
        source, destination = world.source, world.destination
        label = f"{message} arrives"
        if message in TO_SOURCE or message == "Sealed":
            if source.state is None:
                yield None, f"{label} at a dead source", world
            elif not source.todo:
                event: SourceEvent | None = SourceEvent.SEALED
                if message != "Sealed":
                    event = self.rules.classify(TO_SOURCE[message], SESSION, RECEIVER)
                assert event is not None
                yield None, label, self._feed_source(world, event)
            return
        if destination.state is None:
            yield None, f"{label} at a dead destination", world
        elif destination.todo or destination.fact:
            return
        elif message == "Seal":
            yield None, label, self._feed_destination(world, DestinationEvent.SEAL_EQUAL)
            if destination.state is DestinationState.RECEIVING:
                differs = self._feed_destination(world, DestinationEvent.SEAL_DIFFERS)
                yield "trouble", f"{label} and differs", differs
        elif message == "Query":
            receiver = STRANGER if destination.wiped else RECEIVER
            heard = query_event(Query(SESSION, RECEIVER), receiver)
            yield None, label, self._feed_destination(world, heard)
        else:
            yield None, label, self._feed_destination(world, TO_DESTINATION[message])

    def _check_backing(self, side: str, action: Action, record: Record | None) -> None:
        if not self.rules.write_ahead:
            return
        allowed = BACKED_BY[side].get(action, {record})
        if record not in allowed:
            raise Violation(f"the {side} does '{action.value}' while its journal says {record}")


def _settled(world: World) -> World:
    """Without what only an unfinished transition needs, so that equal worlds are equal."""
    source, destination = world.source, world.destination
    if not source.todo and source.event is not None:
        source = source._replace(before=SourceState.NEW, event=None)
    if not destination.todo and destination.event is not None:
        destination = destination._replace(before=DestinationState.NO_RECORD, event=None)
    return World(source, destination, world.network)


def check(world: World, label: str) -> None:
    """Safety: holds in every world."""
    source, destination = world.source, world.destination
    if source.guest == "running" and destination.guest == "running":
        raise Violation(f"two guests run after '{label}'")
    if source.guest == "running" and destination.ran:
        raise Violation(f"the source runs again after the destination ran: '{label}'")
    if source.guest == "freed" and not destination.ran:
        raise Violation(f"the only guest was freed: '{label}'")


def ended_well(world: World) -> bool:
    """Exactly one guest runs and both ends know, or an operator is rightly asked."""
    source, destination = world.source, world.destination
    if source.todo or destination.todo or source.state is None or destination.state is None:
        return False
    if source.state is SourceState.KEPT:
        return source.guest == "running"
    if source.state is SourceState.DONE:
        return destination.guest == "running"
    asked = destination.wiped or destination.state is DestinationState.IN_DOUBT
    return source.state is SourceState.IN_DOUBT and asked


class Exploration:
    """Breadth-first walk over (world number, faults left); remembers how each was reached."""

    def __init__(self, rules: Rules, budget: Budget) -> None:
        self.model = Model(rules)
        self.worlds: list[World] = []
        self.numbers: dict[World, int] = {}
        self.edges: dict[int, list[tuple[str | None, str, int]]] = {}
        self.parents: dict[tuple[int, Budget], tuple[tuple[int, Budget], str] | None] = {
            (self.number(World()), budget): None
        }

    def number(self, world: World) -> int:
        number = self.numbers.setdefault(world, len(self.worlds))
        if number == len(self.worlds):
            self.worlds.append(world)
        return number

    def walk(self) -> None:
        cheaper = {
            (left, fault): left._replace(**{fault: getattr(left, fault) - 1})
            for left in _all_budgets(next(iter(self.parents))[1])
            for fault in Budget._fields
            if getattr(left, fault)
        }
        queue = deque(self.parents)
        while queue:
            here = queue.popleft()
            for fault, label, after in self.edges_of(here):
                remaining = here[1] if fault is None else cheaper.get((here[1], fault))
                there = (after, remaining)
                if remaining is not None and there not in self.parents:
                    self.parents[after, remaining] = (here, label)
                    queue.append((after, remaining))

    def edges_of(self, node: tuple[int, Budget]) -> list[tuple[str | None, str, int]]:
        if node[0] not in self.edges:
            try:
                steps = self.model.steps(self.worlds[node[0]])
            except Violation as found:
                raise Violation(f"{found}; trace: {self.trace(node)}") from None
            self.edges[node[0]] = [
                (fault, label, self.number(after)) for fault, label, after in steps
            ]
        return self.edges[node[0]]

    def check_endings(self) -> None:
        """From every world some course without further faults ends well."""
        backwards: dict[int, list[int]] = {}
        for number, edges in self.edges.items():
            for fault, _, after in edges:
                if fault is None:
                    backwards.setdefault(after, []).append(number)
        good = {number for number, world in enumerate(self.worlds) if ended_well(world)}
        queue = deque(good)
        while queue:
            for before in backwards.get(queue.popleft(), ()):
                if before not in good:
                    good.add(before)
                    queue.append(before)
        for node in self.parents:
            if node[0] not in good:
                raise Violation(f"stuck in {self.worlds[node[0]]}; trace: {self.trace(node)}")

    def trace(self, node: tuple[int, Budget]) -> str:
        """How it came to this, oldest first."""
        labels = []
        step = self.parents[node]
        while step is not None:
            labels.append(step[1])
            step = self.parents[step[0]]
        return " / ".join(reversed(labels))


def _all_budgets(budget: Budget) -> list[Budget]:
    return [Budget(*left) for left in product(*(range(most + 1) for most in budget))]


def explore(rules: Rules, budget: Budget) -> int:
    """Visit every world that can be reached within the budget; the number of worlds.

    Raises Violation, with the shortest trace, for an unsafe world, and for one from which no course
    without further faults ends well.
    """
    exploration = Exploration(rules, budget)
    exploration.walk()
    exploration.check_endings()
    return len({number for number, _ in exploration.parents})


def random_run(rules: Rules, seed: int, length: int, fault_percent: int) -> dict[str, int]:
    """One long walk with faults at random, then one without faults to a good end. Raises Violation.
    Returns how often each label occurred, so that a test can see that faults did happen."""
    rng = random.Random(seed)
    model = Model(rules)
    world, seen = World(), dict[str, int]()
    for _ in range(length):
        steps = model.steps(world)
        calm = [one for one in steps if one[0] is None]
        rough = [one for one in steps if one[0] is not None]
        if not steps or (ended_well(world) and rng.randrange(8) == 0):
            world = World()  # the next session
            continue
        use_rough = rough and (not calm or rng.randrange(100) < fault_percent)
        _, label, world = rng.choice(rough if use_rough else calm)
        seen[label] = seen.get(label, 0) + 1
    for _ in range(10_000):
        if ended_well(world):
            return seen
        _, _, world = rng.choice([one for one in model.steps(world) if one[0] is None])
    raise Violation(f"seed {seed}: no good end from {world}")
