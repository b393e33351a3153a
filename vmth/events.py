# SPDX-License-Identifier: Apache-2.0
"""What a job tells while it runs: one frozen record an occurrence, and the log that carries them.

Times are monotonic nanoseconds.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from dataclasses import dataclass

from vmth.policy.interface import Decision
from vmth.stats import FormDecision, MigrationResult, RoundStats

__all__ = [
    "Completed",
    "Connected",
    "DirtyLimited",
    "Event",
    "EventLog",
    "Failed",
    "FellBack",
    "FormsChosen",
    "Granted",
    "GuestPaused",
    "GuestResumed",
    "RepairStarted",
    "RoundFinished",
    "RoundStarted",
    "SealMatched",
    "ThrottleChosen",
    "Throttled",
]


@dataclass(frozen=True, slots=True)
class Event:
    at_ns: int


@dataclass(frozen=True, slots=True)
class Connected(Event):
    """Handshake done, page channels bound."""

    peer: str
    receiver_id: str
    channels: int


@dataclass(frozen=True, slots=True)
class RoundStarted(Event):
    round: int
    dirty_pages: int


@dataclass(frozen=True, slots=True)
class RoundFinished(Event):
    stats: RoundStats
    decision: Decision | None  #: None for the round sent while paused


@dataclass(frozen=True, slots=True)
class Throttled(Event):
    """``vcpu_percents``: of each vCPU, where it is known which dirties how much; else empty, and
    all give up ``percent`` of their time."""

    percent: int
    vcpu_percents: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class DirtyLimited(Event):
    """The guest's hypervisor was told to hold it to that; 0: to nothing."""

    rate_bps: int


@dataclass(frozen=True, slots=True)
class ThrottleChosen(Event):
    """How this guest is slowed down at need: "dirty-limit", "auto-converge" or "none"."""

    way: str


@dataclass(frozen=True, slots=True)
class GuestPaused(Event):
    pass


@dataclass(frozen=True, slots=True)
class GuestResumed(Event):
    """At the source: after a failure, a cancel, or a recheck that found too much left."""

    reason: str


@dataclass(frozen=True, slots=True)
class RepairStarted(Event):
    """Digests differed, or pages arrived damaged: ``pages`` are sent again."""

    pages: int


@dataclass(frozen=True, slots=True)
class SealMatched(Event):
    digest: str


@dataclass(frozen=True, slots=True)
class Granted(Event):
    pass


@dataclass(frozen=True, slots=True)
class FellBack(Event):
    """Something weaker or slower than asked is used; it is in the result's ``fallbacks`` too."""

    what: str


@dataclass(frozen=True, slots=True)
class FormsChosen(Event):
    """From the next packets on pages may take these forms."""

    decision: FormDecision


@dataclass(frozen=True, slots=True)
class Completed(Event):
    result: MigrationResult


@dataclass(frozen=True, slots=True)
class Failed(Event):
    error: str
    source_runs: bool


class EventLog:
    """Events on their way to a reader, oldest first; beyond ``KEPT`` the oldest are dropped, so
    that a job that nobody listens to stays small. None marks the end. Any thread."""

    KEPT = 8192

    def __init__(self) -> None:
        self._events: deque[Event | None] = deque(maxlen=self.KEPT)
        self._changed = threading.Condition()

    def put(self, event: Event | None) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify()

    def get(self, timeout: float) -> Event | None:
        """Raises queue.Empty when none came in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._events, timeout):
                raise queue.Empty
            return self._events.popleft()

    def empty(self) -> bool:
        return not self._events
