# SPDX-License-Identifier: Apache-2.0
"""``vmth receive``: take in the guest of a ``vmth migrate`` into a QEMU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from vmth.cli.answers import answer
from vmth.cli.reuse import reuse_choice, reuse_options
from vmth.cli.switchover import realtime_option
from vmth.errors import MigrationError
from vmth.interrupts import Interrupts
from vmth.options import ReceiveOptions
from vmth.progress import Console
from vmth.qemu.landing import Land
from vmth.qemu.receive import (
    Arrival,
    QemuReceiver,
    QemuTarget,
    outcome_lines,
    outcome_values,
    serve,
)
from vmth.reuse.report import index_progress

__all__ = ["receive"]


@click.command()
@click.argument("uri")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--qmp", default="", metavar="PATH", help="Monitor of a QEMU started with -S -incoming defer."
)
@click.option(
    "--land",
    type=click.Choice([choice.value for choice in Land]),
    default=Land.AUTO.value,
    show_default=True,
    help="Write pages into QEMU's shared memory, or into its stream; auto: memory where it is "
    "shared.",
)
@reuse_options
@click.option(
    "--once/--keep-listening", default=True, show_default=True, help="End after one migration."
)
@click.option("--insecure", is_flag=True, help="Allow plaintext beyond this machine.")
@realtime_option
@click.option("--state-dir", type=click.Path(path_type=Path), help="Where decisions are journaled.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="One JSON object a migration on stdout, the rest on stderr.",
)
@click.pass_context
def receive(
    context: click.Context,
    /,
    uri: str,
    command: tuple[str, ...],
    qmp: str,
    once: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Take in the guest of a vmth migrate at URI.

    It goes into the QEMU whose monitor --qmp names, or into one that is started with the command
    line after --: then vmth adds -S, -incoming defer and a monitor, and QEMU lives on when vmth
    ends. QEMU is not let run before the source has given its guest up; if anything fails before
    that, QEMU is quit and the source's guest runs on.

    \b
    Examples:
      vmth receive --qmp dst.sock tcp:0.0.0.0:4444 --insecure
      vmth receive --qmp dst.sock --reuse vm.memory tcp:0.0.0.0:4444 --insecure
      vmth receive tcp:127.0.0.1:4444 -- qemu-system-x86_64 -machine q35 -m 1G -accel kvm
    """
    console = Console(sys.stderr if as_json else sys.stdout)
    options = ReceiveOptions(
        insecure=given["insecure"], realtime=given["realtime"], state_dir=given["state_dir"]
    )

    def show(outcome: Arrival | MigrationError) -> None:
        if as_json:
            answer(outcome_values(outcome))
        for line in outcome_lines(outcome):
            console.say(line)

    target, land = QemuTarget(qmp, command), Land(given["land"])
    with (
        Interrupts() as interrupts,
        reuse_choice(given).open(index_progress(console.say)) as warm,
        QemuReceiver(uri, target, options, land=land, warm=warm) as receiver,
    ):
        console.say(f"listening at {receiver.display} for {qmp or command[0]}")
        with interrupts.cancelling(receiver.cancel):
            code = serve(receiver, once=once, show=show)
    context.exit(int(code and (interrupts.exit_code or code)))
