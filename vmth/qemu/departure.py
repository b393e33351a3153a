# SPDX-License-Identifier: Apache-2.0
"""``vmth migrate`` from its options to what it says at the end, for people and as JSON."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vmth import __version__
from vmth.errors import ExitCode, InDoubtError, VmthError
from vmth.events import RoundFinished, ThrottleChosen
from vmth.interrupts import Interrupts
from vmth.job_socket import JobSocket
from vmth.meter import MoverCost, MoverMeter
from vmth.option_names import for_users
from vmth.progress import Console
from vmth.qemu.migrate import QemuMigrateOptions, start_qemu_migration
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
from vmth.stats import MigrationResult, RoundStats
from vmth.units import format_duration, format_size

__all__ = ["Departure", "depart", "departure_lines", "departure_values"]


@dataclass(slots=True)
class Departure:
    """How it went; what was never reached stays None or empty. ``source_runs`` None: not known."""

    qmp: str
    uri: str
    options: QemuMigrateOptions
    rounds: list[RoundStats] = field(default_factory=list)
    result: MigrationResult | None = None
    cost: MoverCost | None = None
    source_runs: bool | None = True
    throttle: str = "none"  #: how the guest would be slowed down
    notes: list[str] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    error: str = ""
    exit_code: ExitCode = ExitCode.OK


def depart(
    qmp: str | os.PathLike[str],
    uri: str,
    options: QemuMigrateOptions,
    console: Console,
    job_socket: Path | None = None,
) -> Departure:
    """Move the guest and show how it goes. The first Ctrl-C or SIGTERM cancels, the guest runs on;
    at ``job_socket`` others steer it. Raises UsageError and RefusedError, before anything is
    touched."""
    departure = Departure(os.fspath(qmp), uri, options)
    with contextlib.ExitStack() as stack:
        interrupts, meter = stack.enter_context(Interrupts()), stack.enter_context(MoverMeter())
        steered = stack.enter_context(JobSocket(job_socket)) if job_socket else None
        job = start_qemu_migration(qmp, uri, options)
        if steered is not None:
            steered.serve(job)
        try:
            with interrupts.cancelling(job.cancel), console.live(job.stats):
                for event in job.events():
                    console.show(event)
                    if isinstance(event, RoundFinished):
                        departure.rounds.append(event.stats)
                    elif isinstance(event, ThrottleChosen):
                        departure.throttle = event.way
                departure.result = job.wait()
        except VmthError as error:
            _fail(departure, error)
    departure.cost = meter.cost
    _account_for(departure, interrupts.exit_code)
    return departure


def _fail(departure: Departure, error: VmthError) -> None:
    departure.error, departure.exit_code = for_users(error), error.exit_code
    departure.source_runs = getattr(error, "source_runs", True)
    if isinstance(error, InDoubtError):
        departure.source_runs = None
        where = f" --state-dir {departure.options.state_dir}" if departure.options.state_dir else ""
        departure.notes.append(
            f"in doubt: the source guest stays paused; ask again with: vmth recover{where}"
        )


def _account_for(departure: Departure, signalled: ExitCode | None) -> None:
    """What the result means, and what a signal does to the exit code."""
    result = departure.result
    if result is None:
        if signalled is not None and departure.exit_code is ExitCode.CANCELLED:
            departure.exit_code = signalled
        return
    departure.source_runs = False
    departure.fallbacks += result.fallbacks
    if signalled is not None:
        departure.notes.append("a signal came when the guest had been moved already")
    limit_ns = departure.options.downtime_limit_ns
    if result.downtime_ns > limit_ns:
        departure.notes.append(
            f"the downtime of {format_duration(result.downtime_ns)} exceeds the limit of "
            f"{format_duration(limit_ns)}"
        )


def departure_values(departure: Departure) -> dict[str, Any]:
    """The object of ``--json``, with the keys of ``vmth demo``; every key in every outcome."""
    result = departure.result
    rounds = result.rounds if result else departure.rounds
    return {
        "verified": bool(result and result.verified),
        "verified_scope": result.verified_scope if result else "none",
        "guest": "qemu",
        "qmp": departure.qmp,
        "mode": "live",
        "rounds": [round_values(stats) for stats in rounds],
        "total_time_ms": result.total_ns / NS_PER_MS if result else None,
        "downtime_ms": result.downtime_ns / NS_PER_MS if result else None,
        "forecast": forecast_values(result),
        "downtime_parts_ms": part_values(result.downtime_parts) if result else None,
        "memory_bytes": result.memory_bytes if result else None,
        "wire_bytes": result.wire_bytes if result else None,
        "digest_source": (result.digest_source or None) if result else None,
        "digest_destination": (result.digest_destination or None) if result else None,
        "transfer": transfer_values(result.transfer) if result else None,
        "form_decisions": [asdict(row) for row in result.form_decisions] if result else [],
        "kept_image": kept_values(result.kept_image) if result else None,
        "movers": {"source": cost_values(departure.cost)},
        "on_success": departure.options.on_success,
        "throttle": departure.throttle,
        "fallbacks": departure.fallbacks,
        "notes": departure.notes,
        "session_id": result.session_id if result else None,
        "peer": departure.uri,
        "role": "migrate",
        "vmth_version": __version__,
        "source_runs": departure.source_runs,
        "exit_code": int(departure.exit_code),
        "error": departure.error or None,
    }


def departure_lines(departure: Departure) -> list[str]:
    """The same for people, one fact a line; the error is not among them."""
    lines = [""]
    result = departure.result
    if result is not None:
        parts = ", ".join(
            f"{name.replace('_', ' ')} {ms:.2f}"
            for name, ms in part_values(result.downtime_parts).items()
        )
        share = 100 * result.wire_bytes / max(1, result.memory_bytes)
        lines += [
            fact_line("total time", format_duration(result.total_ns)),
            fact_line("downtime", f"{format_duration(result.downtime_ns)} ({parts} ms)"),
            *forecast_lines(result),
            fact_line(
                "on the wire",
                f"{format_size(result.wire_bytes)} for {format_size(result.memory_bytes)} of "
                f"memory ({share:.1f} %)",
            ),
            *form_lines(result),
            fact_line("digest", f"source      {result.digest_source or '-'}"),
            fact_line("", f"destination {result.digest_destination or '-'}"),
        ]
    if departure.cost is not None:
        above = max(0, departure.cost.peak_memory_bytes - departure.cost.start_memory_bytes)
        lines.append(
            fact_line(
                "this mover",
                f"{departure.cost.cpu_seconds:.2f} s of CPU, "
                f"{format_size(departure.cost.peak_memory_bytes)} of memory at its peak "
                f"({format_size(above)} above idle)",
            )
        )
    kept = result.kept_image if result else None
    if kept is not None and not kept.error:
        lines.append(kept_line(kept))
    if departure.throttle != "none":
        lines.append(fact_line("throttle", departure.throttle))
    lines += [fact_line("fell back", what) for what in departure.fallbacks]
    lines += [fact_line("note", note) for note in departure.notes]
    return [*lines, *_end_lines(departure)]


def _end_lines(departure: Departure) -> list[str]:
    if departure.error:
        runs = {
            True: "is here as before",
            False: "does not run here",
            None: "not known: in doubt",
        }[departure.source_runs]
        return [fact_line("source guest", runs)]
    assert departure.result is not None
    kept = "was quit" if departure.options.on_success == "quit" else "is kept, paused"
    proof = (
        f"yes, {departure.result.verified_scope}"
        if departure.result.verified
        else "no: the digest is off"
    )
    return [fact_line("source QEMU", kept), fact_line("verified", proof)]
