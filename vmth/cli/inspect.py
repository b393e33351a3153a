# SPDX-License-Identifier: Apache-2.0
"""``vmth inspect``: what a stored QEMU migration stream or a saved VM holds."""

from __future__ import annotations

from pathlib import Path

import click

from vmth.cli.answers import answer, say
from vmth.errors import ExitCode
from vmth.qemu.inspect import report_lines, report_values
from vmth.qemu.inspect_image import inspect_stored

__all__ = ["inspect"]


@click.command()
@click.argument(
    "files",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_context
def inspect(context: click.Context, /, files: tuple[Path, ...], as_json: bool) -> None:
    """Show what QEMU migration streams hold: FILE is a stream, further FILEs multifd channels.

    Or FILE is the image of a saved VM, which is then read and verified as a whole.

    Machine type, hints at QEMU's version, ramblocks, pages by kind, rounds, device sections with
    their sizes, and faults. The exit code is 6 when something is wrong with the stream.
    """
    report = inspect_stored(files)
    code = ExitCode.VERIFICATION_FAILED if report.faults else ExitCode.OK
    if as_json:
        answer({**report_values(report), "exit_code": int(code)})
    else:
        for line in report_lines(report):
            say(line)
    context.exit(int(code))
