# SPDX-License-Identifier: Apache-2.0
"""``vmth recover``: after a crash of the source's mover, or a handover whose end is not known."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import click

from vmth.cli.answers import answer, say
from vmth.cli.values import DURATION_S
from vmth.errors import ExitCode, UsageError
from vmth.qemu.source import find_guest
from vmth.recovery import recover as recover_sessions

__all__ = ["recover"]


@click.command()
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where the decisions are journaled.  [default: that of the migration commands]",
)
@click.option("--session", "session_id", help="Only this one, 32 hex digits.")
@click.option(
    "--timeout", type=DURATION_S, default="10s", show_default=True, help="For each destination."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_context
def recover(
    context: click.Context,
    /,
    state_dir: Path | None,
    session_id: str | None,
    timeout: int,
    as_json: bool,
) -> None:
    """Ask again what became of the guests of this source, and carry out the answer.

    A guest that was not granted runs here again. One that was granted is freed here if the
    destination runs it, runs here again if the destination will never run it, and stays paused
    while that is not known: then the exit code is 7, and the command may be given again.
    """
    if session_id is not None and not re.fullmatch("[0-9a-f]{32}", session_id):
        raise UsageError(f"--session: received {session_id!r}, allowed 32 hex digits")
    sessions = recover_sessions(
        find_guest, state_dir=state_dir, session_id=session_id, timeout_s=timeout / 1e9
    )
    code = ExitCode.IN_DOUBT if any(row.in_doubt for row in sessions) else ExitCode.OK
    if as_json:
        answer({"sessions": [asdict(row) for row in sessions], "exit_code": int(code)})
    else:
        for row in sessions:
            say(f"{row.session_id}  {row.peer}  {row.state}  {row.note}")
        if not sessions:
            say("no source session is on record")
    context.exit(int(code))
