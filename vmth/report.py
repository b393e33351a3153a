# SPDX-License-Identifier: Apache-2.0
"""Plain values of what is counted, as they stand in the JSON of every command. Pure: no I/O."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vmth.meter import MoverCost
from vmth.stats import (
    DowntimeParts,
    JobForecast,
    KeptMemory,
    MigrationResult,
    RoundStats,
    TransferCounters,
)
from vmth.units import format_duration, format_size

__all__ = [
    "NS_PER_MS",
    "cost_values",
    "fact_line",
    "forecast_lines",
    "forecast_values",
    "form_lines",
    "kept_line",
    "kept_values",
    "part_values",
    "round_values",
    "transfer_values",
]

NS_PER_MS = 1e6


def round_values(stats: RoundStats) -> dict[str, Any]:
    return {
        "round": stats.round,
        "pages": stats.pages,
        "normal_pages": stats.normal_pages,
        "zero_pages": stats.zero_pages,
        "hole_pages": stats.hole_pages,
        "missed_pages": stats.missed_pages,
        "delta_pages": stats.delta_pages,
        "same_pages": stats.same_pages,
        "cpu_ns": stats.cpu_ns,
        "forms": {name: asdict(form) for name, form in stats.forms.items()},
        "bytes": stats.bytes,
        "dirty_pages": stats.dirty_pages,
        "dirty_growth": [{"ns": ns, "pages": pages} for ns, pages in stats.dirty_growth],
        "duration_ns": stats.duration_ns,
        "idle_ns": stats.idle_ns,
        "bandwidth_bps": stats.bandwidth_bps,
        "dirty_rate_bps": stats.dirty_rate_bps,
        "expected_downtime_ms": stats.expected_downtime_ns / NS_PER_MS,
        "paused": stats.paused,
        "forecast": _job_forecast(stats.forecast),
    }


def _job_forecast(forecast: JobForecast | None) -> dict[str, Any] | None:
    if forecast is None:
        return None
    return {
        "after_round": forecast.after_round,
        "converges": forecast.converges,
        "total_time_ms": forecast.total_ns / NS_PER_MS,
        "downtime_ms": forecast.downtime_ns / NS_PER_MS,
        "rounds": forecast.rounds,
    }


def forecast_values(result: MigrationResult | None) -> dict[str, Any] | None:
    """The job's forecast beside what came: errors are shares of what came, positive where too much
    was forecast; None where the forecast was that it would not converge."""
    forecast = result.forecast if result is not None else None
    if result is None or forecast is None:
        return None
    errors = {
        "total_time_error": forecast.total_ns / result.total_ns - 1,
        "downtime_error": forecast.downtime_ns / result.downtime_ns - 1,
    }
    return {
        **(_job_forecast(forecast) or {}),
        **(errors if forecast.converges else dict.fromkeys(errors)),
    }


def forecast_lines(result: MigrationResult) -> list[str]:
    """For people; none where none was made."""
    forecast = result.forecast
    if forecast is None:
        return []
    told = (
        f"total time {format_duration(forecast.total_ns)} and downtime "
        f"{format_duration(forecast.downtime_ns)} in {forecast.rounds} rounds"
        if forecast.converges
        else "that the rounds would not converge"
    )
    return [fact_line("forecast", f"after round {forecast.after_round}: {told}")]


def form_lines(result: MigrationResult) -> list[str]:
    """For people: pages by the form that they took, as often as they were sent."""
    transfer = result.transfer
    told = [
        f"{pages} {what}"
        for pages, what in (
            (transfer.normal_pages, "as they are"),
            (transfer.zero_pages, "zero"),
            (transfer.hole_pages, "holes"),
            (transfer.free_pages, "free"),
        )
        if pages
    ]
    taken = [(form, name) for name, form in transfer.forms.items() if form.pages]
    for form, name in sorted(taken, key=lambda one: -one[0].pages):
        spent = f" in {format_size(form.wire_bytes)}" if form.wire_bytes else ""
        told.append(f"{form.pages} {name}{spent}")
    return [fact_line("pages", ", ".join(told))] if told else []


def part_values(parts: DowntimeParts) -> dict[str, float]:
    """Milliseconds."""
    return {
        "pause": parts.pause_ns / NS_PER_MS,
        "last_pages": parts.last_pages_ns / NS_PER_MS,
        "state": parts.state_ns / NS_PER_MS,
        "seal": parts.seal_ns / NS_PER_MS,
        "grant": parts.grant_ns / NS_PER_MS,
        "resume": parts.resume_ns / NS_PER_MS,
    }


def cost_values(cost: MoverCost | None) -> dict[str, Any] | None:
    if cost is None:
        return None
    return {
        "cpu_seconds": cost.cpu_seconds,
        "peak_memory_bytes": cost.peak_memory_bytes,
        "start_memory_bytes": cost.start_memory_bytes,
    }


def transfer_values(counters: TransferCounters) -> dict[str, Any]:
    return asdict(counters)


def kept_values(kept: KeptMemory | None) -> dict[str, Any] | None:
    return None if kept is None else asdict(kept)


def kept_line(kept: KeptMemory) -> str:
    """For people; only of a file that was written."""
    return fact_line(
        "memory kept",
        f"{kept.path}: {format_size(kept.stored_bytes)} of {format_size(kept.memory_bytes)} are "
        f"not zeros; written in {format_duration(kept.duration_ns)} while the guest ran there",
    )


def fact_line(name: str, text: str) -> str:
    """One line of a summary for people."""
    return f"{name:<16} {text}"
