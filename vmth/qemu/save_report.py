# SPDX-License-Identifier: Apache-2.0
"""What ``vmth save`` and ``vmth restore`` say: progress, the end for people, and as JSON. Pure.

Every key is there in every outcome; what was not reached is null.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from vmth.errors import ExitCode, MigrationError, VmthError
from vmth.qemu.restore import RestoreProgress, RestoreResult
from vmth.qemu.save import OnSuccess, SaveProgress, SaveResult
from vmth.units import format_duration, format_rate, format_size

__all__ = [
    "progress_text",
    "restore_lines",
    "restore_values",
    "save_lines",
    "save_values",
]

_NS_PER_MS = 1e6


def progress_text(progress: SaveProgress | RestoreProgress) -> str:
    """One line."""
    if isinstance(progress, RestoreProgress):
        return (
            f"{progress.phase}: {format_size(progress.done_bytes)} of "
            f"{format_size(progress.total_bytes)}"
        )
    stats = progress.stats
    stored = stats.normal_bytes // max(1, stats.normal_pages) * stats.zero_pages
    guest = "paused" if progress.guest_stopped else "running"
    return (
        f"pass {progress.passes}: {format_size(stats.normal_bytes + stored)} of "
        f"{format_size(progress.memory_bytes)} stored in {format_size(stats.file_bytes)}, "
        f"guest {guest}"
    )


def save_values(
    result: SaveResult | None, error: VmthError | None, code: ExitCode
) -> dict[str, Any]:
    """``source_runs``: does the guest run here, where that is known?"""
    runs: bool | None = None
    if result is not None:
        runs = result.ran and result.on_success == OnSuccess.RESUME.value
    elif isinstance(error, MigrationError):
        runs = error.source_runs
    return {**_result(SaveResult, result), **_error(error, code), "source_runs": runs}


def restore_values(
    result: RestoreResult | None, error: VmthError | None, code: ExitCode
) -> dict[str, Any]:
    return {**_result(RestoreResult, result), **_error(error, code)}


def save_lines(result: SaveResult) -> list[str]:
    lines = [
        (
            f"saved            {result.path}: {format_size(result.file_bytes)} for "
            f"{format_size(result.memory_bytes)} of memory ({100 * result.ratio:.1f} %), "
            f"{result.machine}"
        ),
        (
            f"pages            {result.normal_pages} normal, {result.zero_pages} zero, "
            f"{result.superseded_pages} of them superseded, in {result.passes} passes"
        ),
        (
            f"total time       {format_duration(result.total_ns)}, "
            f"{format_rate(result.memory_bytes * 1e9 / max(1, result.total_ns))} of memory; "
            f"{format_duration(result.verify_ns)} of it for reading the file back"
        ),
    ]
    if result.stopped_ns is not None:
        lines.append(f"downtime         {format_duration(result.stopped_ns)}")
    lines += [f"note             {note}" for note in result.notes]
    state = "ran" if result.ran else "was paused"
    became = {
        OnSuccess.QUIT.value: "its QEMU has quit",
        OnSuccess.KEEP.value: "it is paused here; quit it before the file is restored",
        OnSuccess.RESUME.value: "it is here as it was; the file is a snapshot",
    }[result.on_success]
    return [*lines, f"guest            {state}; {became}", f"verified         {result.digest}"]


def restore_lines(result: RestoreResult) -> list[str]:
    lines = [
        (
            f"restored         {result.path}: {format_size(result.memory_bytes)} of memory, "
            f"{result.machine}"
        ),
        f"pages            {result.normal_pages} normal, {result.zero_pages} zero",
        (
            f"total time       {format_duration(result.total_ns)}, "
            f"{format_duration(result.verify_ns)} of it for checking the file first"
        ),
    ]
    lines += [f"note             {note}" for note in result.notes]
    runs = "runs" if result.running else "is paused, give the monitor cont to run it"
    return [*lines, f"guest            {runs}", f"verified         {result.digest}"]


def _result(kind: type[Any], result: Any) -> dict[str, Any]:
    """The fields, times in milliseconds."""
    names = [field.name for field in fields(kind)]
    values = dict.fromkeys(names) if result is None else asdict(result)
    out: dict[str, Any] = {}
    for name, value in values.items():
        if name.endswith("_ns"):
            out[f"{name[:-3]}_ms"] = None if value is None else value / _NS_PER_MS
        else:
            out[name] = value
    out["ratio"] = result.ratio if result is not None else None
    out["verified"] = result is not None
    return out


def _error(error: VmthError | None, code: ExitCode) -> dict[str, Any]:
    return {"error": None if error is None else str(error), "exit_code": int(code)}
