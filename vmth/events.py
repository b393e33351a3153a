# SPDX-License-Identifier: Apache-2.0
"""What a job tells while it runs: one frozen record an occurrence. Times are monotonic
nanoseconds."""

from __future__ import annotations

from dataclasses import dataclass

from vmth.policy.interface import Decision
from vmth.stats import MigrationResult, RoundStats

__all__ = [
    "Completed",
    "Connected",
    "Event",
    "Failed",
    "FellBack",
    "Granted",
    "GuestPaused",
    "GuestResumed",
    "RepairStarted",
    "RoundFinished",
    "RoundStarted",
    "SealMatched",
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
    percent: int


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
class Completed(Event):
    result: MigrationResult


@dataclass(frozen=True, slots=True)
class Failed(Event):
    error: str
    source_runs: bool
