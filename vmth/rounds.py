# SPDX-License-Identifier: Apache-2.0
"""What a source session needs of whatever brings the pages, and what it lends to it.

``vmth.precopy`` reads memory that it can map, guided by dirty sources; ``vmth.qemu.stream_pass``
takes pages out of a stream whose source runs the rounds itself. The session, the handover and the
seal are the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from vmth.channel.interface import PageSender
from vmth.events import Event
from vmth.guest import Guest
from vmth.policy.interface import Policy
from vmth.stats import RoundStats
from vmth.tuning import Tuning

__all__ = ["FinalPass", "MakeEngine", "RoundEngine", "RoundTools", "SealAhead"]


@dataclass(frozen=True, slots=True)
class FinalPass:
    """Everything has landed; the guest is paused."""

    rounds: tuple[RoundStats, ...]
    was_running: bool
    pause_started_ns: int
    paused_ns: int  #: pause() had returned and the last set was known
    landed_ns: int
    #: Of the downtime, what was known when the last set was: pages, queue, state and round trips.
    #: 0: not known.
    known_ns: int = 0


class SealAhead(Protocol):
    """Says the seal behind the last pages, without waiting for them to land."""

    def stays_paused(self) -> None:
        """The guest is paused and will not run here again unless the job fails: the destination
        gets ready while the last pages are on their way. Before ``last_pages_sent()``, or not at
        all. Raises what ends the job."""

    def last_pages_sent(self) -> int:
        """The guest is paused, no page waits and none was kept: the digest is that of all memory
        before the barrier that was begun last. Returns the ns that the guest's state took. Raises
        what a guest that cannot save it raises, and what ends the job."""

    def pages_missed(self) -> None:
        """Some of those pages have not landed, so the seal cannot have been equal: it is taken
        back, and rounds may follow. Once after each ``last_pages_sent()`` at most."""


@dataclass(frozen=True, slots=True)
class RoundTools:
    """The session's side, used from its one thread."""

    sender: PageSender
    policy: Policy
    tuning: Tuning
    clock: Callable[[], int]
    emit: Callable[[Event], None]
    page_bytes: int
    live: bool
    pause_guest: Callable[[], bool]  #: guest.pause(), by way of the handover's table
    resume_guest: Callable[[], None]
    check: Callable[[], None]  #: raises when the job was cancelled or the peer is gone
    job_started_ns: int | None = None  #: on the clock; what the job's total time counts from
    journal_ns: int = 0  #: what a durable record takes here
    seal_ahead: SealAhead | None = None  #: None: everything lands first
    delta_cache_pages: int = 0  #: of which both ends keep a base; 0: not known
    handover_ns: int = 0  #: what else the last handovers took; 0: not known
    #: The guest, which runs still, is about to be paused. Idempotent; ``resume_guest`` ends it.
    get_ready: Callable[[], None] = lambda: None


class RoundEngine(Protocol):
    """Brings all pages to the destination and pauses the guest."""

    @property
    def rounds(self) -> Sequence[RoundStats]:
        """Those that are finished; any thread."""

    @property
    def notes(self) -> Sequence[str]:
        """What was done more weakly or slowly than asked: for the result's ``fallbacks``."""

    @property
    def throttle_percent(self) -> int: ...

    @property
    def taken_back_ns(self) -> int:
        """Pauses that ended with the guest running here again."""

    def run(self) -> FinalPass:
        """Returns with the guest paused and all pages landed. After an exception the caller resumes
        the guest if it is paused."""

    def resend(self, block: int, pages: Sequence[int]) -> None:
        """While paused, after ``run()``: send these pages again and wait until they have landed.
        Raises VerificationError where that cannot be done."""

    def let_go(self) -> None:
        """The guest is about to run on here: it is not throttled any more. Never raises."""

    def close(self) -> None:
        """Stop tracking and throttling: when the guest runs somewhere again, or before it is
        released. Only the first call does anything."""


#: Called once a session, when the destination has accepted.
MakeEngine: TypeAlias = Callable[[Guest, RoundTools], RoundEngine]
