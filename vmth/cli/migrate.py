# SPDX-License-Identifier: Apache-2.0
"""``vmth migrate``: move the guest of a QEMU to a ``vmth receive``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from vmth.cli.answers import answer, complain
from vmth.cli.forms import form_choices, form_options
from vmth.cli.job import job_socket_option
from vmth.cli.link import link_choices, link_options
from vmth.cli.switchover import realtime_option
from vmth.cli.values import DURATION_MS, DURATION_S, ON_OFF, RATE, SIZE
from vmth.errors import UsageError
from vmth.policy.interface import OnStall
from vmth.progress import Console
from vmth.qemu.departure import depart, departure_lines, departure_values
from vmth.qemu.migrate import ON_SUCCESS, QemuMigrateOptions

__all__ = ["migrate"]


@click.command()
@click.argument("uri")
@click.option(
    "--qmp", required=True, metavar="PATH", help="Monitor of the QEMU that has the guest."
)
@click.option("--insecure", is_flag=True, help="Allow plaintext beyond this machine.")
@click.option(
    "--bandwidth", type=RATE, default="0", help="Cap over all channels, as 1Gbit/s or 125MB/s."
)
@click.option(
    "--downtime-limit",
    type=DURATION_MS,
    default="300ms",
    show_default=True,
    help="Switch over when the rest fits into this.",
)
@click.option("--timeout", type=DURATION_S, default="0", help="Of the rounds; 0: none.")
@click.option(
    "--on-stall",
    type=click.Choice([choice.value for choice in OnStall]),
    default=OnStall.PAUSE.value,
    show_default=True,
    help="When rounds stop shrinking or the timeout comes: pause the guest and send the rest, "
    "cancel, or throttle it (by QEMU's dirty limit where it has one, else by auto-converge) and "
    "cancel if that does not help.",
)
@click.option(
    "--auto-converge", is_flag=True, help="QEMU slows all of the guest's vCPUs down at need."
)
@click.option("--parallel", is_flag=True, help="QEMU sends over several connections (multifd).")
@click.option(
    "--parallel-connections",
    type=click.IntRange(1, 64),
    help="How many, and as many page channels; implies --parallel.  [default: 2]",
)
@click.option(
    "--channels", type=int, help="Page channels, 1 to 64.  [default: 1, or as many as QEMU's]"
)
@click.option(
    "--on-success",
    type=click.Choice(ON_SUCCESS),
    default="quit",
    show_default=True,
    help="What becomes of the QEMU here when its guest runs elsewhere; keep: it stays, paused.",
)
@click.option(
    "--digest",
    type=ON_OFF,
    default="on",
    show_default=True,
    help="Digest of all memory, compared before the source is let go. Off: nothing is verified.",
)
@form_options("64MiB")
@click.option(
    "--kept-copies",
    type=SIZE,
    default="64MiB",
    show_default=True,
    help="Memory for copies of pages on their way as dedup or reuse, at most.",
)
@click.option(
    "--keep-image",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep the guest's memory here once it runs over there, for --reuse when it comes back.",
)
@click.option("--postcopy", is_flag=True, help="Not supported yet.")
@link_options
@realtime_option
@job_socket_option
@click.option("--state-dir", type=click.Path(path_type=Path), help="Where decisions are journaled.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on stdout, the rest on stderr."
)
@click.pass_context
def migrate(
    context: click.Context, /, uri: str, qmp: str, as_json: bool, postcopy: bool, **given: Any
) -> None:
    """Move the guest of a running QEMU to the vmth receive at URI.

    QEMU is not changed: its settings for migrations are set for this one and put back. The guest
    runs at the destination only when the digests of all its memory were equal there and this QEMU
    has given it up; until then any failure leaves it running here. A paused guest arrives paused.

    Ctrl-C cancels, the guest runs on here; a second Ctrl-C ends everything at once.

    \b
    Examples:
      vmth migrate --qmp src.sock tcp:HOST:4444 --insecure
      vmth migrate --qmp src.sock tcp:HOST:4444 --insecure --parallel-connections 4
    """
    if postcopy:
        raise UsageError("--postcopy: not supported yet; allowed: a migration without it")
    console = Console(sys.stderr if as_json else sys.stdout)
    departure = depart(qmp, uri, _options(given), console, given["job_socket"])
    if as_json:
        answer(departure_values(departure))
    for line in () if as_json else departure_lines(departure):
        console.say(line)
    if departure.error:
        complain(departure.error)
    context.exit(int(departure.exit_code))


def _options(given: dict[str, Any]) -> QemuMigrateOptions:
    connections = given["parallel_connections"] or (2 if given["parallel"] else 0)
    return QemuMigrateOptions(
        channels=given["channels"] or max(1, connections),
        multifd_channels=connections,
        bandwidth_bps=given["bandwidth"],
        downtime_limit_ns=given["downtime_limit"],
        timeout_ns=given["timeout"],
        on_stall=OnStall(given["on_stall"]),
        auto_converge=given["auto_converge"],
        on_success=given["on_success"],
        digest=given["digest"],
        **form_choices(given),
        kept_copies_bytes=given["kept_copies"],
        insecure=given["insecure"],
        realtime=given["realtime"],
        state_dir=given["state_dir"],
        keep_image=given["keep_image"],
        link=link_choices(given),
    )
