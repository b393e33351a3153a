# SPDX-License-Identifier: Apache-2.0
"""What is said at the end: one JSON object, and the same for people. Pure: no I/O.

Every key is there in every outcome; what was not reached is null, so that a reader needs no cases.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vmth import __version__
from vmth.demo.arrival import Arrival
from vmth.demo.check import GuestCheckReport
from vmth.demo.outcome import Outcome
from vmth.demo.record import TravelRecord
from vmth.report import (
    NS_PER_MS,
    cost_values,
    fact_line,
    forecast_lines,
    forecast_values,
    form_lines,
    kept_line,
    kept_values,
    part_values,
    round_values,
    transfer_values,
)
from vmth.reuse.report import reused_lines
from vmth.units import format_duration, format_rate, format_size

__all__ = ["json_object", "summary_lines"]

GAP_CLOCK = "CLOCK_REALTIME"


def json_object(outcome: Outcome) -> dict[str, Any]:
    """Keys with units in their names; ``_ms`` are fractions of milliseconds."""
    settings, result, arrival, record = (
        outcome.settings,
        outcome.result,
        outcome.arrival,
        outcome.record or (outcome.arrival.record if outcome.arrival else None),
    )
    rounds = list(result.rounds) if result else outcome.rounds
    check = arrival.check if arrival else outcome.source_check
    return {
        "verified": outcome.verified,
        "verified_scope": _verified_scope(outcome),
        "guest": outcome.guest or None,
        "guest_reason": outcome.guest_reason or None,
        "dirty_source": outcome.dirty_source or None,
        "vcpus": _vcpus(outcome),
        "mode": settings.migrate.mode.name.lower() if settings else None,
        "rounds": [round_values(stats) for stats in rounds],
        "throttles": [
            {"percent": event.percent, "vcpu_percents": list(event.vcpu_percents)}
            for event in outcome.throttles
        ],
        "total_time_ms": result.total_ns / NS_PER_MS if result else None,
        "downtime_ms": result.downtime_ns / NS_PER_MS if result else None,
        "forecast": forecast_values(result),
        "downtime_parts_ms": part_values(result.downtime_parts) if result else None,
        "heartbeat_gap_ms": _ms(arrival.heartbeat_gap_ns) if arrival else None,
        "heartbeat_gap_clock": GAP_CLOCK,
        "heartbeats_lost": check.heartbeats_lost if check else None,
        "writes_checked": check.writes_checked if check else None,
        "writes_lost": check.writes_lost if check else None,
        "memory_bytes": _memory_bytes(outcome),
        "wire_bytes": result.wire_bytes if result else arrival.wire_bytes if arrival else None,
        "digest_source": (result.digest_source or None) if result else None,
        "digest_destination": _digest_destination(outcome),
        "audited": bool(result and result.audited),
        "bytes_compared": arrival.bytes_compared if arrival else 0,
        "workload": settings.workload if settings else record.workload if record else None,
        "content": settings.content if settings else record.content if record else None,
        "content_pages": dict(outcome.prepared.pages) if outcome.prepared else None,
        "seed": settings.seed if settings else record.seed if record else None,
        "working_set_bytes": outcome.prepared.working_set_pages * 4096
        if outcome.prepared
        else None,
        "dirty_rate_asked_bps": _rate_asked(outcome),
        "dirty_rate_reached_bps": record.rate_reached_bps if record else None,
        "other_vcpus_beats_per_s": _other_beats_per_s(record),
        "transfer": transfer_values(result.transfer) if result else None,
        "form_decisions": [asdict(row) for row in result.form_decisions] if result else [],
        "kept_image": kept_values(result.kept_image) if result else None,
        "reused": [asdict(file) for file in arrival.reused] if arrival else [],
        "movers": {
            "source": cost_values(outcome.source_cost),
            "destination": cost_values(arrival.cost if arrival else None),
        },
        "fallbacks": _fallbacks(outcome),
        "notes": outcome.notes,
        "session_id": result.session_id if result else arrival.session_id if arrival else None,
        "role": outcome.role,
        "vmth_version": __version__,
        "source_runs": outcome.source_runs,
        "exit_code": int(outcome.exit_code),
        "error": outcome.error or None,
    }


def _ms(time_ns: int | None) -> float | None:
    return None if time_ns is None else time_ns / NS_PER_MS


def _verified_scope(outcome: Outcome) -> str:
    if not outcome.verified:
        return "none"
    if outcome.result is not None:
        return outcome.result.verified_scope
    return outcome.arrival.verified_scope if outcome.arrival else "none"


def _digest_destination(outcome: Outcome) -> str | None:
    if outcome.result is not None:
        return outcome.result.digest_destination or None
    return (outcome.arrival.digest or None) if outcome.arrival else None


def _memory_bytes(outcome: Outcome) -> int | None:
    if outcome.result is not None:
        return outcome.result.memory_bytes
    if outcome.arrival is not None:
        return outcome.arrival.memory_bytes
    return outcome.settings.memory_bytes if outcome.settings else None


def _rate_asked(outcome: Outcome) -> int | None:
    if outcome.prepared is not None:
        return outcome.prepared.rate_asked_bps
    record = outcome.arrival.record if outcome.arrival else None
    return record.rate_bps if record else None


def _vcpus(outcome: Outcome) -> int | None:
    if outcome.settings is not None:
        return outcome.settings.vcpus
    return len(outcome.arrival.record.other_beats) + 1 if outcome.arrival else None


def _other_beats_per_s(record: TravelRecord | None) -> list[float]:
    """Of each vCPU after the first, from its start to the pause at the source."""
    if record is None or not record.running_ns:
        return []
    return [beats * 1e9 / record.running_ns for beats in record.other_beats]


def _fallbacks(outcome: Outcome) -> list[str]:
    found = list(outcome.fallbacks)
    found += outcome.result.fallbacks if outcome.result else ()
    found += outcome.arrival.fallbacks if outcome.arrival else ()
    return list(dict.fromkeys(found))


# -- for people ------------------------------------------------------------------------------------


def summary_lines(outcome: Outcome) -> list[str]:
    """The end of a demonstration, one fact a line."""
    lines = [""]
    lines += _guest_lines(outcome)
    lines += _time_lines(outcome)
    lines += _check_lines(outcome)
    lines += _cost_lines(outcome)
    kept = outcome.result.kept_image if outcome.result else None
    if kept is not None and not kept.error:
        lines.append(kept_line(kept))
    for what in _fallbacks(outcome):
        lines.append(fact_line("fell back", what))
    for note in outcome.notes:
        lines.append(fact_line("note", note))
    if outcome.error:
        lines.append(fact_line("source guest", _source_text(outcome)))
    elif outcome.verified:
        lines.append(fact_line("verified", f"yes, {_verified_scope(outcome)}"))
    else:
        lines.append(fact_line("verified", "no: the digest is off"))
    return lines


def _source_text(outcome: Outcome) -> str:
    if outcome.role == "receive":
        return "not asked from here"
    if outcome.source_runs is None:
        return "not known: in doubt" if outcome.in_doubt else "none was started"
    return "runs here" if outcome.source_runs else "does not run here"


def _guest_lines(outcome: Outcome) -> list[str]:
    lines = []
    if outcome.guest:
        source = f", dirty pages by {outcome.dirty_source}" if outcome.dirty_source else ""
        lines.append(fact_line("guest", f"{outcome.guest} ({outcome.guest_reason}){source}"))
    record = outcome.record or (outcome.arrival.record if outcome.arrival else None)
    if record is not None:
        asked = _rate_asked(outcome)
        lines.append(
            fact_line(
                "workload",
                f"{record.workload}, seed {record.seed}; dirty rate asked "
                f"{format_rate(asked) if asked else 'none'}, "
                f"reached {format_rate(record.rate_reached_bps)}",
            )
        )
        others = ", ".join(f"{rate:.0f}" for rate in _other_beats_per_s(record))
        if others:
            lines.append(fact_line("other vCPUs", f"{others} heartbeats/s until the pause"))
    return lines


def _time_lines(outcome: Outcome) -> list[str]:
    lines = []
    result, arrival = outcome.result, outcome.arrival
    if result is not None:
        parts = ", ".join(
            f"{name.replace('_', ' ')} {ms:.2f}"
            for name, ms in part_values(result.downtime_parts).items()
        )
        lines.append(fact_line("total time", format_duration(result.total_ns)))
        lines.append(fact_line("downtime", f"{format_duration(result.downtime_ns)} ({parts} ms)"))
        lines += forecast_lines(result)
    if arrival is not None and arrival.heartbeat_gap_ns is not None:
        where = "both ends' " if outcome.role != "local" else ""
        gap = max(0, arrival.heartbeat_gap_ns)
        lines.append(fact_line("heartbeat gap", f"{format_duration(gap)} (by {where}{GAP_CLOCK})"))
    if result is not None:
        share = 100 * result.wire_bytes / max(1, result.memory_bytes)
        lines.append(
            fact_line(
                "on the wire",
                f"{format_size(result.wire_bytes)} for {format_size(result.memory_bytes)} of "
                f"memory ({share:.1f} %)",
            )
        )
        lines += form_lines(result)
        if result.digest_source:
            lines.append(fact_line("digest", f"source      {result.digest_source}"))
            lines.append(fact_line("", f"destination {result.digest_destination}"))
    elif arrival is not None:
        lines.append(
            fact_line(
                "on the wire",
                f"{format_size(arrival.wire_bytes)} for {format_size(arrival.memory_bytes)} of "
                "memory",
            )
        )
        if arrival.digest:
            lines.append(fact_line("digest", f"{arrival.digest} (equal to the source's)"))
    if arrival is not None:
        lines += [fact_line("reused", line) for line in _reused(arrival)]
    return lines


def _reused(arrival: Arrival) -> list[str]:
    return reused_lines(arrival.reused, arrival.memory_bytes)


def _check_lines(outcome: Outcome) -> list[str]:
    lines = []
    if outcome.arrival is not None:
        lines.append(fact_line("after the move", _check_text(outcome.arrival.check)))
    if outcome.source_check is not None:
        lines.append(fact_line("source guest", _check_text(outcome.source_check)))
    if outcome.result is not None and outcome.result.audited:
        lines.append(
            fact_line("audit", "both paused ends hashed all memory anew: every page equal")
        )
    if outcome.arrival is not None and outcome.arrival.bytes_compared:
        nbytes = outcome.arrival.bytes_compared
        lines.append(
            fact_line("byte comparison", f"{nbytes} bytes of both paused memories compared: equal")
        )
    return lines


def _check_text(check: GuestCheckReport) -> str:
    if not check.passed:
        return "; ".join(check.failures)
    return (
        f"{check.beats} heartbeats, none lost, repeated or skipped; "
        f"{check.writes_checked} page writes, none lost"
    )


def _cost_lines(outcome: Outcome) -> list[str]:
    lines = []
    costs = (
        ("source mover", outcome.source_cost),
        ("destin. mover", outcome.arrival.cost if outcome.arrival else None),
    )
    for name, cost in costs:
        if cost is not None:
            above = max(0, cost.peak_memory_bytes - cost.start_memory_bytes)
            lines.append(
                fact_line(
                    name,
                    f"{cost.cpu_seconds:.2f} s of CPU, {format_size(cost.peak_memory_bytes)} of "
                    f"memory at its peak ({format_size(above)} above idle)",
                )
            )
    return lines
