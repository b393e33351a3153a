# SPDX-License-Identifier: Apache-2.0
"""``vmth job``: look at a migration that goes on, and steer it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from vmth.cli.answers import answer, say
from vmth.cli.values import DURATION_MS, DURATION_S, RATE
from vmth.errors import VmthError
from vmth.job_socket import JobReply, JobRequest, ask_job
from vmth.report import fact_line
from vmth.units import format_duration, format_rate, format_size

__all__ = ["job", "job_socket_option"]

job_socket_option = click.option(
    "--job-socket",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="While it moves, vmth job PATH looks at it and steers it.",
)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--bandwidth", type=RATE, help="Cap over all channels from now on; 0: none.")
@click.option("--downtime-limit", type=DURATION_MS, help="Switch over when the rest fits into it.")
@click.option("--timeout", type=DURATION_S, help="Of the rounds, from their start; 0: none.")
@click.option(
    "--switchover", is_flag=True, help="Pause the guest after this round, whatever is left."
)
@click.option("--cancel", is_flag=True, help="End it: the guest runs on where it is.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def job(path: Path, as_json: bool, **given: Any) -> None:
    """Look at the migration with --job-socket PATH, and steer it.

    What is not given stays as it is. A new bandwidth counts within 50 ms, and what the pages of
    this round are compressed by follows; the other limits count with the next decision.

    \b
    Examples:
      vmth migrate --qmp src.sock tcp:HOST:4444 --insecure --job-socket job.sock
      vmth job job.sock
      vmth job job.sock --bandwidth 50MB/s
      vmth job job.sock --switchover
    """
    reply = ask_job(
        path,
        JobRequest(
            bandwidth_bps=given["bandwidth"],
            downtime_limit_ns=given["downtime_limit"],
            timeout_ns=given["timeout"],
            switchover=given["switchover"],
            cancel=given["cancel"],
        ),
    )
    if reply.error:
        raise VmthError(f"{path}: {reply.error}")
    if as_json:
        answer(_values(reply))
    for line in () if as_json else _lines(reply):
        say(line)


def _values(reply: JobReply) -> dict[str, Any]:
    assert reply.stats is not None
    return {"session_id": reply.session_id, **asdict(reply.stats)}


def _lines(reply: JobReply) -> list[str]:
    stats = reply.stats
    assert stats is not None
    cap = format_rate(stats.bandwidth_limit_bps) if stats.bandwidth_limit_bps else "none"
    dirtied, expected = "", "not known before a round is done"
    if stats.memory_iteration:
        dirty_bps = stats.memory_dirty_rate * stats.memory_page_size
        dirtied = f", dirtied at {format_rate(dirty_bps)}"
        expected = f"{format_duration(stats.downtime_expected_ns)} expected"
    return [
        fact_line("session", reply.session_id),
        fact_line("status", f"{stats.status}, {format_duration(stats.time_elapsed_ns)} so far"),
        fact_line(
            "rounds",
            f"{stats.memory_iteration} done, {format_size(stats.memory_remaining)} of "
            f"{format_size(stats.memory_total)} left{dirtied}",
        ),
        fact_line(
            "on the wire",
            f"{format_size(stats.transfer.wire_bytes)}, {format_rate(stats.memory_bps)}, cap {cap}",
        ),
        fact_line(
            "downtime",
            f"{expected}, limit {format_duration(stats.downtime_limit_ns)}",
        ),
        fact_line("throttle", f"{stats.throttle_percent} %"),
    ]
