# SPDX-License-Identifier: Apache-2.0
"""``vmth save``: a QEMU's VM to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vmth.cli.answers import answer, complain, say
from vmth.cli.interruptible import Line, interruptible
from vmth.cli.values import DURATION_MS, DURATION_S, RATE
from vmth.qemu.image import DEFAULT_LEVEL, MAX_LEVEL
from vmth.qemu.save import OnSuccess, SaveOptions
from vmth.qemu.save import save as save_vm
from vmth.qemu.save_report import progress_text, save_lines, save_values

__all__ = ["save"]


@click.command()
@click.option("--qmp", required=True, metavar="SOCK", help="Monitor of the QEMU whose VM it is.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--live", is_flag=True, help="Let the guest run while its memory is saved for the first time."
)
@click.option(
    "--on-success",
    type=click.Choice([choice.value for choice in OnSuccess]),
    default=OnSuccess.QUIT.value,
    show_default=True,
    help="Then its QEMU quits, keeps it paused, or resumes it: the file is a snapshot then.",
)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@click.option(
    "--level",
    type=click.IntRange(0, MAX_LEVEL),
    default=DEFAULT_LEVEL,
    show_default=True,
    help="Of zstd; 0: pages are stored as they are.",
)
@click.option(
    "--workers",
    type=click.IntRange(0, 64),
    default=0,
    help="Threads that compress.  [one a CPU, at most 8]",
)
@click.option("--bandwidth", type=RATE, default="0", help="Cap on what QEMU sends; 0: none.")
@click.option(
    "--downtime-limit",
    type=DURATION_MS,
    default="300ms",
    show_default=True,
    help="With --live: the last pages are saved when they fit into this.",
)
@click.option(
    "--timeout",
    type=DURATION_S,
    default="0",
    help="With --live: then the guest is stopped and the rest saved; 0: none.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on stdout, the rest on stderr."
)
@click.pass_context
def save(
    context: click.Context, /, qmp: str, file: Path, as_json: bool, force: bool, **given: Any
) -> None:
    """Save the VM of a running QEMU to FILE: memory, device state, and whether it ran.

    The guest is stopped first (or later, with --live). FILE appears when it is whole, on the disk,
    and was read back; if anything fails before, there is no file and the VM is as it was. A file
    that exists is refused without --force. The VM's disks are not part of it.

    \b
    Examples:
      vmth save --qmp /run/vm.qmp vm.vmth
      vmth save --qmp /run/vm.qmp --live --on-success resume snapshot.vmth
    """
    line = Line()
    options = SaveOptions(
        live=given["live"],
        on_success=OnSuccess(given["on_success"]),
        replace=force,
        level=given["level"],
        workers=given["workers"],
        bandwidth_bps=given["bandwidth"],
        downtime_limit_ns=given["downtime_limit"],
        timeout_ns=given["timeout"],
    )
    result, error, code = interruptible(
        lambda cancelled: save_vm(
            qmp,
            file,
            options,
            on_progress=lambda progress: line.show(progress_text(progress)),
            cancelled=cancelled,
        )
    )
    line.end()
    if as_json:
        answer(save_values(result, error, code))
    if error is not None:
        complain(str(error))
    for text in save_lines(result) if result is not None and not as_json else ():
        say(text)
    context.exit(int(code))
