# SPDX-License-Identifier: Apache-2.0
"""What an embedder implements: ``Guest`` and ``DirtySource``.

vmth calls the methods of one guest one at a time, from one thread that it names ``vmth-job``; they
may raise. A raise before the grant ends the migration, and vmth calls ``resume()`` if it had called
``pause()``; a raise of ``resume()`` at the source after a failure is reported as
``NotResumedError`` and the guest is left paused. Dirty sources are stopped before ``release()``.
docs/embedding.md walks through an implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from vmth.errors import GuestError
from vmth.types import Bitmap, Bitmaps, RamBlock

if TYPE_CHECKING:
    from vmth.channel.interface import StreamSink
    from vmth.memory import Memory

__all__ = [
    "USUAL_STATE_BYTES",
    "CanAnnounce",
    "CanClose",
    "CanDescribe",
    "CanEstimateState",
    "CanHold",
    "CanNameThreads",
    "CanNote",
    "CanPeek",
    "CanReadMemory",
    "CanReportPopulated",
    "CanTakePages",
    "CanTell",
    "CanThrottle",
    "CanThrottleVcpus",
    "DirtySource",
    "Guest",
    "StateStream",
    "expected_state_bytes",
]

#: Of a guest that does not estimate its state.
USUAL_STATE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class StateStream:
    """One named, versioned piece of CPU or device state."""

    name: str
    version: int
    data: bytes


@runtime_checkable
class DirtySource(Protocol):
    """Reports which pages were written. Several are ORed.

    The contract, checked by one conformance suite for every implementation: after ``start()``, a
    write that is not followed by ``rearm()`` of its page is reported by every later ``fetch()``
    until the page is re-armed (or once, where fetch itself clears: ``rearm`` is then a no-op); a
    write after ``rearm()`` is reported again. Pages may be reported that were not written. Which
    writes it cannot see is in each implementation's docstring.
    """

    def start(self) -> None:
        """From its return on, every later write will be reported."""

    def fetch(self, bitmaps: Bitmaps) -> None:
        """OR in what was dirtied since ``start()`` and is not re-armed. Bitmaps: one a ramblock."""

    def rearm(self, block: int, page: int, npages: int) -> None:
        """Called just before pages [page, page + npages) of ``blocks[block]`` are read."""

    def stop(self) -> None:
        """End the tracking and free what it held. Idempotent; allowed without start()."""


class Guest(Protocol):
    """A virtual machine, or anything with memory, a state and a run button."""

    @property
    def blocks(self) -> Sequence[RamBlock]:
        """The block table. It must not change while a job runs."""

    @property
    def dirty(self) -> Sequence[DirtySource]:
        """At least one at a source of a live migration; not used at a destination or in cold
        mode."""

    def pause(self) -> bool:
        """Stop every vCPU; True if it was running. No vCPU runs, and no device writes memory, after
        it returns. ``resume()`` undoes it. Idempotent."""

    def resume(self) -> None:
        """Let the vCPUs run. At a destination it is called after ``load_state`` and needs nothing
        that could still be missing."""

    def save_state(self, write: Callable[[StateStream], None]) -> None:
        """Hand each stream of CPU and device state to ``write``. The guest is paused; the last of
        its memory may be on its way, so nothing is written to that here."""

    def load_state(self, streams: Iterable[StateStream]) -> None:
        """Load them; afterwards ``resume()`` needs nothing more: every resource is held. Raises
        VerificationError (which reaches the source as one) if the guest finds itself damaged."""

    def release(self) -> None:
        """Source: the guest runs elsewhere, free it. Destination: discard what has arrived.
        Idempotent."""


@runtime_checkable
class CanNote(Protocol):
    """Optional, for a dirty source and for a guest at a destination: what it did more weakly or
    slowly than asked."""

    def notes(self) -> Sequence[str]:
        """Sentences for the result's ``fallbacks``; read after each fetch, at a destination once
        the guest runs."""


@runtime_checkable
class CanPeek(Protocol):
    """Optional, for a dirty source: what was written can be looked at while a round goes on."""

    def peek(self, bitmaps: Bitmaps) -> bool:
        """OR in what ``fetch`` would and change nothing: a later fetch reports it all the same, and
        ``rearm`` clears no page that only this has reported. Pages may be missing. False where that
        cannot be told, and the bitmaps are of no use then. Called a few times a round, from the
        thread that fetches; forecasts are made of it, and nothing is sent or left out by it."""


@runtime_checkable
class CanReportPopulated(Protocol):
    """Optional: the guest knows which pages were never populated better than the mapping tells."""

    def populated(self, block: int, page: int, npages: int, out: Bitmap) -> None:
        """Set bit (page + i) of ``out`` (a whole-block bitmap) for every page that may hold
        non-zero bytes. A page left clear is sent as a hole and must read as zeros."""


@runtime_checkable
class CanReadMemory(Protocol):
    """Optional, for a source with blocks that have no memory in this process: their bytes can be
    read once more before the guest is released."""

    def read_memory(
        self, blocks: Sequence[int], take: Callable[[int, int, Memory], None]
    ) -> Sequence[str]:
        """Call ``take(block, offset, bytes)`` for stretches of the blocks with these numbers: whole
        pages of 4096 bytes, each page once at least. Stretches of zeros may be left out. Returns
        what could not be read, for people. The guest is paused."""


@runtime_checkable
class CanThrottle(Protocol):
    """Optional: slow the vCPUs down so that a migration converges."""

    def throttle(self, percent: int) -> None:
        """Take 0 (let go) to 99 percent of the vCPUs' time."""


@runtime_checkable
class CanThrottleVcpus(CanThrottle, Protocol):
    """Optional: it is known which vCPU dirties how much, so that only those are slowed down."""

    def vcpu_dirty_pages(self) -> Sequence[int]:
        """Pages that each vCPU has dirtied so far, one number a vCPU in their order; numbers only
        rise. Only their differences and proportions are used. Empty while that is not known: then
        ``throttle()`` is called. A page that several write may count for one of them only. Asked
        when tracking begins, and before a throttle is set."""

    def throttle_vcpus(self, percents: Sequence[int]) -> None:
        """Take 0 to 99 percent of each vCPU's time; as many numbers as ``vcpu_dirty_pages()`` gave.
        Undone by ``throttle(0)``."""


@runtime_checkable
class CanEstimateState(Protocol):
    """Optional: it is known before the pause how much ``save_state`` will write."""

    def estimate_state_bytes(self) -> int:
        """CPU and device state, in bytes, not negative. Asked once, before the first round; a part
        of every downtime forecast. Without it 64 KiB are taken for granted."""


@runtime_checkable
class CanHold(Protocol):
    """Optional: a guest in a process of its own that resumes by itself when the mover vanishes."""

    def hold(self) -> None:
        """Stay paused from now on even if the mover vanishes: the grant is about to be
        journaled."""


@runtime_checkable
class CanNameThreads(Protocol):
    """Optional: other threads than the one that calls the guest do what the pause, the state and
    the start need."""

    def switchover_threads(self) -> Sequence[int]:
        """Their kernel ids (gettid), in this process or another: they run before all others while
        the guest is paused (``vmth.realtime``). Never a vCPU's, nor one that works without end.
        Asked just before the pause, and at a destination when that is near; again after a pause
        that did not come or was taken back."""


@runtime_checkable
class CanTell(Protocol):
    """Optional: can be asked whether it runs; needed to settle what a crash left open."""

    def is_running(self) -> bool:
        """Does any vCPU run, now? Raises when that cannot be known."""


@runtime_checkable
class CanDescribe(Protocol):
    """Optional: what a new process needs to find this guest again; kept in the journal."""

    def describe(self) -> dict[str, str]: ...


@runtime_checkable
class CanClose(Protocol):
    """Optional: lets go of the guest without ending it, as a mover that vanishes would."""

    def close(self) -> None: ...


@runtime_checkable
class CanAnnounce(Protocol):
    """Optional, for a destination: the network learns where the guest is now."""

    def announce(self) -> None:
        """Called once the guest runs here and the source was told so. What it raises is reported
        as a note; the guest runs on."""


@runtime_checkable
class CanTakePages(Protocol):
    """Optional, for a destination: pages of blocks without memory in this process (``Mapping()``)
    are handed on to another program. Such a guest cannot be audited."""

    @property
    def verified_scope(self) -> str:
        """How far the digest's proof reaches with this guest: "memory", or "stream" where guest
        memory was verified as handed on only. Constant."""

    def page_sink(self) -> StreamSink:
        """Where they are handed on. Asked once, before the first page; open until ``load_state`` or
        ``release``."""

    def trouble(self) -> Exception | None:
        """Why that program takes nothing any more; None while it does. Any thread, at any time."""


def expected_state_bytes(guest: Guest) -> int:
    """What ``save_state`` should write. Raises GuestError for an estimate that is none."""
    if not isinstance(guest, CanEstimateState):
        return USUAL_STATE_BYTES
    estimate = guest.estimate_state_bytes()
    if not isinstance(estimate, int) or estimate < 0:
        raise GuestError(f"estimate_state_bytes(): received {estimate!r}, allowed 0 or more bytes")
    return estimate
