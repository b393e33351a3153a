# SPDX-License-Identifier: Apache-2.0
"""What the round loop asks a policy, and what a policy may answer."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from vmth.stats import JobForecast, RoundStats

__all__ = ["Action", "CanForesee", "Decision", "Forecast", "OnStall", "Policy", "RoundView"]


class OnStall(enum.Enum):
    """What to do when rounds stop shrinking (or the timeout comes)."""

    PAUSE = "pause"  #: after the timeout: switch over although the downtime limit is exceeded
    CANCEL = "cancel"  #: give up, the source runs on
    THROTTLE = "throttle"  #: slow the guest down; cancel if even that does not help


class Action(enum.Enum):
    CONTINUE = "continue"  #: another round
    SWITCH_OVER = "switch-over"  #: pause and send the rest
    THROTTLE = "throttle"  #: set the throttle to ``Decision.throttle_percent``, or the limit to
    #: ``Decision.dirty_limit_bps`` of a guest that takes one, and do another round
    GIVE_UP = "give-up"  #: NotConvergedError with ``Decision.reason``


@dataclass(frozen=True, slots=True)
class Forecast:
    """Expected downtime by part, if the guest were paused now."""

    pages_ns: int
    queue_ns: int
    state_ns: int
    overhead_ns: int  #: pause, seal, grant, resume, round trips

    @property
    def total_ns(self) -> int:
        return self.pages_ns + self.queue_ns + self.state_ns + self.overhead_ns


@dataclass(frozen=True, slots=True)
class RoundView:
    """What is known at the end of a round. Times are monotonic nanoseconds."""

    now_ns: int
    started_ns: int
    rounds: tuple[RoundStats, ...]  #: finished ones, oldest first
    dirty_pages: int  #: to send in the next round
    page_bytes: int
    memory_bytes: int
    queued_bytes: int  #: handed to sockets and not yet landed
    rtt_ns: int
    state_bytes: int  #: estimate of CPU and device state
    bandwidth_limit_bps: int  #: 0: none
    downtime_limit_ns: int
    timeout_ns: int  #: 0: none
    on_stall: OnStall
    throttle_percent: int
    can_throttle: bool
    failed_rechecks: int  #: times the guest was paused and resumed because the last set had grown
    switchover_requested: bool = False
    job_started_ns: int | None = None  #: before its connections; None: with the rounds
    handover_ns: int = 0  #: pause, seal, records and resume beside round trips; 0: as usual
    takes_rate: bool = False  #: its hypervisor holds it to a dirty rate instead of a share of time
    dirty_limit_bps: float = 0.0  #: to which it is held; 0: not
    limited_at_ns: int = 0  #: since when
    #: One durable record here, of which the downtime has three, while ``handover_ns`` is 0.
    journal_ns: int = 0
    handover_trips: int = 3  #: round trips of last pages, seal and grant: those that follow another
    base_rtt_ns: int = 0  #: the least of the last minutes, with little queued; 0: as ``rtt_ns``
    #: After round 1: of dirty_pages, those that it has sent as well. None: not known.
    resent_pages: int | None = None
    delta_cache_pages: int = 0  #: of which both ends keep a base; 0: not known
    streamed: bool = False  #: the hypervisor sends the pages here, one behind the other

    @property
    def throttled(self) -> bool:
        return self.throttle_percent > 0 or self.dirty_limit_bps > 0


@dataclass(frozen=True, slots=True)
class Decision:
    action: Action
    reason: str  #: one sentence with numbers and units, for the log and the result
    forecast: Forecast
    throttle_percent: int = 0
    dirty_limit_bps: float = 0.0  #: bytes of pages a second that the guest may dirty
    needed_bandwidth_bps: float = 0.0  #: what would converge; 0: not asked or already does
    needed_dirty_rate_bps: float = 0.0


class Policy(Protocol):
    """Pluggable: pure, no clock, no I/O; one object a job."""

    def decide(self, view: RoundView) -> Decision:
        """After each round while the guest runs."""

    def recheck(self, view: RoundView, forecast: Forecast) -> Decision:
        """After the pause, with ``view.dirty_pages`` = the last set: SWITCH_OVER to go on, CONTINUE
        to resume the guest and do another round."""


@runtime_checkable
class CanForesee(Protocol):
    """A policy that can tell how the job should go on."""

    def foresee(self, view: RoundView, decision: Decision) -> JobForecast:
        """After ``decision`` on this view. Decides nothing and leaves the policy as it was."""
