# SPDX-License-Identifier: Apache-2.0
"""``vmth restore``: a saved VM back into a QEMU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vmth.cli.answers import answer, complain, say
from vmth.cli.interruptible import Line, interruptible
from vmth.cli.values import DURATION_S
from vmth.qemu.restore import RestoreOptions
from vmth.qemu.restore import restore as restore_vm
from vmth.qemu.save_report import progress_text, restore_lines, restore_values

__all__ = ["restore"]


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--qmp", required=True, metavar="SOCK", help="Monitor of a QEMU started with -incoming defer."
)
@click.option("--running/--paused", default=None, help="What it does then.  [as when it was saved]")
@click.option(
    "--workers",
    type=click.IntRange(0, 64),
    default=0,
    help="Threads that unpack.  [one a CPU, at most 8]",
)
@click.option(
    "--timeout",
    type=DURATION_S,
    default="120s",
    show_default=True,
    help="For QEMU to load; 0: none.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on stdout, the rest on stderr."
)
@click.pass_context
def restore(context: click.Context, /, file: Path, qmp: str, as_json: bool, **given: Any) -> None:
    """Load the VM that FILE holds into a QEMU that waits for it, and let it run if it ran.

    That QEMU is started as the saved one was, with -incoming defer, in the same or another version
    that has its machine type. The whole file is checked before QEMU is given anything: the exit
    code is 6 if a byte of it is wrong. After any failure nothing runs, and FILE is as it was.

    One file is one VM: do not restore it twice, or while the VM that was saved still runs.
    """
    line = Line()
    options = RestoreOptions(
        run=given["running"], workers=given["workers"], timeout_s=given["timeout"] / 1e9
    )
    result, error, code = interruptible(
        lambda cancelled: restore_vm(
            file,
            qmp,
            options,
            on_progress=lambda progress: line.show(progress_text(progress)),
            cancelled=cancelled,
        )
    )
    line.end()
    if as_json:
        answer(restore_values(result, error, code))
    if error is not None:
        complain(str(error))
    for text in restore_lines(result) if result is not None and not as_json else ():
        say(text)
    context.exit(int(code))
