# SPDX-License-Identifier: Apache-2.0
"""``vmth check``: can this QEMU's guest move into that QEMU?"""

from __future__ import annotations

from pathlib import Path

import click

from vmth.cli.answers import answer, say
from vmth.errors import ExitCode
from vmth.qemu.check import check_pair, check_values, finding_lines

__all__ = ["check"]


@click.command()
@click.option(
    "--qmp",
    "monitors",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    metavar="SOCK",
    help="A QEMU's QMP socket; given twice, the source's first.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_context
def check(context: click.Context, /, monitors: tuple[Path, ...], as_json: bool) -> None:
    """Compare the QEMU that has a guest with the one that is to take it; nothing is changed.

    Versions, machine type, memory, ramblocks, CPU features, devices, disks and whether they are
    the same storage, and more: each is ok, a warning, or refused, with the way out. `vmth migrate`
    checks the same before the first page. The exit code is 3 when something is refused.
    """
    if len(monitors) != 2:
        raise click.UsageError(f"--qmp given {len(monitors)} times, allowed: twice, source first")
    report = check_pair(*monitors)
    code = ExitCode.REFUSED if report.refused else ExitCode.OK
    if as_json:
        answer({**check_values(report), "exit_code": int(code)})
    else:
        for line in finding_lines(report.findings):
            say(line)
    context.exit(int(code))
