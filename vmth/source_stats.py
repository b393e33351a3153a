# SPDX-License-Identifier: Apache-2.0
"""A source session's numbers: a running one's under libvirt's names, and what is its result."""

from __future__ import annotations

from collections.abc import Sequence

from vmth.channel.interface import Digest
from vmth.guest import Guest
from vmth.options import MigrateOptions
from vmth.rounds import FinalPass, RoundEngine
from vmth.seal import digest_text
from vmth.stats import DowntimeParts, JobStats, MigrationResult, TransferCounters
from vmth.tuning import Tuning

__all__ = ["downtime_parts", "draft_result", "job_stats"]


def job_stats(
    status: str,
    memory_bytes: int,
    page_bytes: int,
    elapsed_ns: int,
    counters: TransferCounters,
    engine: RoundEngine | None,
    tuning: Tuning,
) -> JobStats:
    """``engine`` None: the rounds have not begun. Any thread."""
    last = engine.rounds[-1] if engine is not None and engine.rounds else None
    sent = counters.normal_pages + counters.zero_pages + counters.hole_pages
    sent += counters.formed_pages
    left = memory_bytes - sent * page_bytes if last is None else last.dirty_pages * page_bytes
    reached_bps = counters.acked_bytes * 1e9 / max(1, elapsed_ns)
    return JobStats(
        status=status,
        memory_iteration=len(engine.rounds) if engine is not None else 0,
        memory_total=memory_bytes,
        memory_remaining=max(0, left),
        memory_processed=sent * page_bytes,
        memory_bps=last.bandwidth_bps if last is not None else reached_bps,
        memory_dirty_rate=last.dirty_rate_bps / page_bytes if last is not None else 0.0,
        memory_page_size=page_bytes,
        time_elapsed_ns=elapsed_ns,
        downtime_expected_ns=last.expected_downtime_ns if last is not None else 0,
        downtime_limit_ns=tuning.downtime_limit_ns,
        bandwidth_limit_bps=tuning.bandwidth_bps,
        throttle_percent=engine.throttle_percent if engine is not None else 0,
        transfer=counters,
    )


def downtime_parts(
    final: FinalPass,
    state_saved_ns: tuple[int, int],
    sealed_ns: int,
    granted_ns: int,
    running_ns: int,
) -> DowntimeParts:
    """Of one clock; ``state_saved_ns``: from, to. State that was saved while the last pages were
    under way counts as state."""
    from_ns, to_ns = state_saved_ns
    meanwhile_ns = max(0, min(to_ns, final.landed_ns) - from_ns)
    return DowntimeParts(
        pause_ns=final.paused_ns - final.pause_started_ns,
        last_pages_ns=final.landed_ns - final.paused_ns - meanwhile_ns,
        state_ns=max(to_ns, final.landed_ns) - final.landed_ns + meanwhile_ns,
        seal_ns=sealed_ns - max(to_ns, final.landed_ns),
        grant_ns=granted_ns - sealed_ns,
        resume_ns=running_ns - granted_ns,
    )


def draft_result(
    options: MigrateOptions,
    scope: str,
    guest: Guest,
    counters: TransferCounters,
    ours: Digest | None,
    fallbacks: Sequence[str],
) -> MigrationResult:
    """What is known before the seal is answered: no rounds, no times and nothing of the
    destination's. ``ours``: the source's digest, None with the digest off."""
    unverified = (
        ()
        if ours is not None
        else ("digest off: nothing was verified, and no page went as same, dedup, delta or reuse",)
    )
    return MigrationResult(
        verified=ours is not None,
        verified_scope=scope if ours is not None else "none",
        mode=options.mode.name.lower(),
        rounds=(),
        total_ns=0,
        downtime_ns=0,
        downtime_parts=DowntimeParts(),
        memory_bytes=sum(block.used_length for block in guest.blocks),
        wire_bytes=counters.wire_bytes,
        digest_source=digest_text(ours) if ours is not None else "",
        digest_destination="",
        transfer=counters,
        fallbacks=(*fallbacks, *unverified),
        audited=options.audit,
    )
