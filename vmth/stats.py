# SPDX-License-Identifier: Apache-2.0
"""What is counted: per round, per job, and the result. Plain frozen data; units in the names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "ChannelCounters",
    "DowntimeParts",
    "FormCounters",
    "FormDecision",
    "JobForecast",
    "JobStats",
    "KeptMemory",
    "MigrationResult",
    "RoundStats",
    "TransferCounters",
    "round_stats",
]


@dataclass(frozen=True, slots=True)
class FormCounters:
    """Cumulative counters of one cheaper form (same, zstd, ...) at one end. The destination counts
    pages, wire bytes and the CPU time of undoing it."""

    pages: int = 0  #: that took this form
    tried_pages: int = 0  #: given to its encoder; those it declined took another form
    content_bytes: int = 0  #: of the pages that took it
    wire_bytes: int = 0  #: that they took on the wire: descriptors and payload
    cpu_ns: int = 0  #: of encoding, declined pages included

    def since(self, before: FormCounters) -> FormCounters:
        """What was counted after ``before``."""
        return FormCounters(
            self.pages - before.pages,
            self.tried_pages - before.tried_pages,
            self.content_bytes - before.content_bytes,
            self.wire_bytes - before.wire_bytes,
            self.cpu_ns - before.cpu_ns,
        )


@dataclass(frozen=True, slots=True)
class ChannelCounters:
    """Cumulative counters of one page channel at the source."""

    index: int
    pages: int = 0  #: sent or told over it; pages that were the same are on no channel
    packets: int = 0
    wire_bytes: int = 0
    acked_bytes: int = 0
    acked_bps: int = 0  #: bytes/s acknowledged while it had bytes under way, of late; 0: unknown
    opening: bool = False  #: its window still grows: what lands does not tell what the link carries
    local: str = ""  #: the address that it was sent from; empty where it has none


@dataclass(frozen=True, slots=True)
class TransferCounters:
    """Cumulative counters of one end of the page channels."""

    normal_pages: int = 0
    zero_pages: int = 0  #: found zero by reading
    hole_pages: int = 0  #: never populated, not read
    free_pages: int = 0
    missed_pages: int = 0  #: to be sent again: damaged on the way or torn while read
    written_pages: int = 0  #: at the destination: holes of a file, filled by writing to it
    wire_bytes: int = 0  #: headers, descriptors and payload that were handed to the sockets
    acked_bytes: int = 0  #: of those, landed and acknowledged
    packets: int = 0
    torn_packets: int = 0  #: acknowledged with another digest than was read
    zerocopy_sends: int = 0
    zerocopy_copied: int = 0  #: completions that the kernel flagged as copied
    rtt_ns: int = 0  #: of the slowest channel, TCP's smoothed one if it is more; 0: not known yet
    base_rtt_ns: int = 0  #: the least: TCP's, or to the far end of a tunnel that adds 2 ms or more
    retransmits: int = 0
    path_mtu: int = 0
    #: At the source: TCP had bytes on the way that the other end had room for, over the life of the
    #: busiest channel; 0: not known.
    carrying_ns: int = 0
    starved_ns: int = 0  #: at the source: no page was queued to be sent
    cpu_ns: int = 0  #: of the threads that send
    forms: Mapping[str, FormCounters] = field(default_factory=dict)  #: by the form's name
    channels: tuple[ChannelCounters, ...] = ()  #: the source's; none once the channels are closed

    @property
    def opening(self) -> bool:
        """At the source: no channel in use has been held by the link yet. (Channels share links: if
        one is held, what lands on all of them tells.)"""
        used = [channel.opening for channel in self.channels if channel.wire_bytes]
        return bool(used) and all(used)

    @property
    def formed_pages(self) -> int:
        """Pages that took a cheaper form: neither normal nor zero, hole or free."""
        return sum(form.pages for form in self.forms.values())


@dataclass(frozen=True, slots=True)
class FormDecision:
    """From ``after_ns`` of the job on pages might take these forms; ``reason`` has the numbers."""

    after_ns: int
    forms: tuple[str, ...]
    zstd_level: int  #: 0: no zstd
    reason: str


@dataclass(frozen=True, slots=True)
class JobForecast:
    """How a job should go on, as it looked at the end of a round."""

    after_round: int  #: made when this round had ended
    converges: bool  #: False: it gives up, or no end is in sight
    total_ns: int  #: from the job's start to the guest running there, or to giving up; 0: no end
    downtime_ns: int  #: 0 where it does not converge
    rounds: int  #: of the whole job, the one sent while paused included


@dataclass(frozen=True, slots=True)
class RoundStats:
    """One round. Round 0 is the full pass; the last is the one sent while the guest is paused."""

    round: int
    pages: int  #: handled in this round, all forms; those not named below took a cheaper one
    normal_pages: int
    zero_pages: int
    hole_pages: int
    bytes: int  #: on the wire
    duration_ns: int
    bandwidth_bps: float  #: bytes/s, landed and acknowledged, while there was something to send
    dirty_pages: int  #: dirtied while it ran: what the next round would send
    dirty_rate_bps: float  #: bytes/s of distinct dirtied pages
    expected_downtime_ns: int
    paused: bool = False
    missed_pages: int = 0
    delta_pages: int = 0  #: that took the form delta
    delta_bytes: int = 0  #: on the wire, of those
    idle_ns: int = 0  #: of duration_ns: nothing was under way, and nothing came to be sent
    forecast: JobForecast | None = None  #: None for the one sent while paused, and without a policy
    same_pages: int = 0  #: that were as they had landed before
    forms: Mapping[str, FormCounters] = field(default_factory=dict)  #: of this round, by form
    cpu_ns: int = 0  #: of the threads that sent
    #: (ns since it began, pages dirtied until then), as seen while it ran; empty where the dirty
    #: source cannot be looked at, and of short ones.
    dirty_growth: tuple[tuple[int, int], ...] = ()

    @property
    def formed_pages(self) -> int:
        """That took a cheaper form: neither normal nor zero, hole or free."""
        return sum(form.pages for form in self.forms.values())


@dataclass(frozen=True, slots=True)
class DowntimeParts:
    """Downtime: no vCPU runs anywhere, on the source's clock from pause to RUNNING received. The
    parts add up to it."""

    pause_ns: int = 0
    last_pages_ns: int = 0
    state_ns: int = 0
    seal_ns: int = 0
    grant_ns: int = 0
    resume_ns: int = 0

    @property
    def total_ns(self) -> int:
        return (
            self.pause_ns
            + self.last_pages_ns
            + self.state_ns
            + self.seal_ns
            + self.grant_ns
            + self.resume_ns
        )


@dataclass(frozen=True, slots=True)
class JobStats:
    """A snapshot of a running job (libvirt's job-statistics stems where one exists)."""

    status: str
    memory_iteration: int
    memory_total: int  #: bytes
    memory_remaining: int  #: bytes
    memory_processed: int  #: bytes
    memory_bps: float  #: bytes/s
    memory_dirty_rate: float  #: pages/s
    memory_page_size: int
    time_elapsed_ns: int
    downtime_expected_ns: int
    downtime_limit_ns: int
    bandwidth_limit_bps: int
    throttle_percent: int
    transfer: TransferCounters = field(default_factory=TransferCounters)


@dataclass(frozen=True, slots=True)
class KeptMemory:
    """The memory of a guest that has left, in a file at the source. ``stored_bytes`` are not zeros;
    ``missing``: what of it could not be read. With an ``error`` there is no new file."""

    path: str
    memory_bytes: int
    stored_bytes: int
    missing: tuple[str, ...]
    duration_ns: int  #: while the guest ran at the destination
    error: str = ""


@dataclass(frozen=True, slots=True)
class MigrationResult:
    """How a migration went. ``verified`` is True only when the digests of all guest memory were
    equal before the grant; ``verified_scope`` says how far the proof reaches: "memory", "stream"
    (as it was handed to a QEMU), "none"."""

    verified: bool
    verified_scope: str
    mode: str
    rounds: tuple[RoundStats, ...]
    total_ns: int
    downtime_ns: int
    downtime_parts: DowntimeParts
    memory_bytes: int
    wire_bytes: int
    digest_source: str  #: 32 hex digits, empty when off
    digest_destination: str
    transfer: TransferCounters
    fallbacks: tuple[str, ...] = ()
    audited: bool = False
    form_decisions: tuple[FormDecision, ...] = ()  #: the first and the latest ones
    pauses_taken_back_ns: int = 0  #: pauses that a too large last set ended, not in the downtime
    session_id: str = ""
    receiver_id: str = ""
    peer: Mapping[str, Any] = field(default_factory=dict)
    kept_image: KeptMemory | None = None  #: where it was asked for

    @property
    def forecast(self) -> JobForecast | None:
        """The one that stood when a first round of resending had ended, or the last before it."""
        made = [round_.forecast for round_ in self.rounds if round_.forecast is not None]
        later = [forecast for forecast in made if forecast.after_round >= 1]
        return later[0] if later else made[-1] if made else None


def round_stats(
    number: int,
    before: TransferCounters,
    after: TransferCounters,
    duration_ns: int,
    dirty_pages: int,
    page_bytes: int,
    paused: bool,
    idle_ns: int = 0,
) -> RoundStats:
    """A round's numbers from the counters around it; the downtime forecast is filled in later."""
    duration_ns = max(1, duration_ns)
    sending_for_ns = max(1, duration_ns - idle_ns)
    normal = after.normal_pages - before.normal_pages
    zero = after.zero_pages - before.zero_pages
    hole = after.hole_pages - before.hole_pages
    none = FormCounters()
    forms = {name: form.since(before.forms.get(name, none)) for name, form in after.forms.items()}
    delta, same = (forms.get(name, none) for name in ("delta", "same"))
    return RoundStats(
        round=number,
        pages=normal + zero + hole + after.formed_pages - before.formed_pages,
        normal_pages=normal,
        zero_pages=zero,
        hole_pages=hole,
        bytes=after.wire_bytes - before.wire_bytes,
        duration_ns=duration_ns,
        bandwidth_bps=(after.acked_bytes - before.acked_bytes) * 1e9 / sending_for_ns,
        dirty_pages=dirty_pages,
        dirty_rate_bps=0.0 if paused else dirty_pages * page_bytes * 1e9 / duration_ns,
        expected_downtime_ns=0,
        paused=paused,
        missed_pages=after.missed_pages - before.missed_pages,
        delta_pages=delta.pages,
        delta_bytes=delta.wire_bytes,
        same_pages=same.pages,
        forms=forms,
        idle_ns=idle_ns,
        cpu_ns=after.cpu_ns - before.cpu_ns,
    )
