# SPDX-License-Identifier: Apache-2.0
"""The option of both ends that says how the time is spent in which the guest is paused."""

from __future__ import annotations

import click

from vmth.cli.values import ON_OFF

__all__ = ["realtime_option"]

realtime_option = click.option(
    "--realtime",
    type=ON_OFF,
    default="on",
    show_default=True,
    help="The few threads that a paused guest waits for run before all others (SCHED_FIFO 1), and "
    "idle cores stay awake, where that is permitted.",
)
