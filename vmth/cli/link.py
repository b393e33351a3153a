# SPDX-License-Identifier: Apache-2.0
"""The options that say from where, and how marked, a command connects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from vmth.channel.sockets import UNMARKED, LinkOptions
from vmth.cli.values import NAMES
from vmth.errors import OptionError

__all__ = ["congestion_option", "dscp_choice", "link_choices", "link_options"]

congestion_option = click.option(
    "--congestion-control",
    default="",
    metavar="NAME",
    help="TCP congestion control of the connections, as the kernel names it (cubic, bbr, reno).  "
    "[default: the system's; on the same host one without pacing]",
)

_OPTIONS = (
    click.option(
        "--bind",
        type=NAMES,
        default="",
        metavar="ADDRESS,...",
        help="Local addresses to connect from; channels take them in turns, so that several "
        "network cards carry one move.",
    ),
    click.option(
        "--interface",
        type=NAMES,
        default="",
        metavar="NAME,...",
        help="Local network interfaces to use, in turns too.",
    ),
    click.option("--dscp", type=int, help="DSCP of every packet, 0 to 63."),
    congestion_option,
)


def link_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: ``--bind``, ``--interface``, ``--dscp`` and ``--congestion-control``."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def dscp_choice(given: dict[str, Any]) -> int:
    dscp: int | None = given["dscp"]
    if dscp is not None and dscp < 0:
        raise OptionError("dscp", f"received {dscp}, allowed 0 to 63")
    return UNMARKED if dscp is None else dscp


def link_choices(given: dict[str, Any]) -> LinkOptions:
    return LinkOptions(
        source_addresses=given["bind"],
        interfaces=given["interface"],
        dscp=dscp_choice(given),
        congestion_control=given["congestion_control"],
    )
