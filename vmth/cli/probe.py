# SPDX-License-Identifier: Apache-2.0
"""``vmth probe``: what this machine offers."""

from __future__ import annotations

import click

from vmth.cli.answers import answer, say
from vmth.host import host_lines, host_report

__all__ = ["probe"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def probe(as_json: bool) -> None:
    """Print what this machine offers: KVM, dirty sources, known kernel faults, kernels.

    Nothing is guessed from versions: each answer is what a small try found. A fault is reported
    and what has it is not used; none of them makes this command fail.
    """
    report = host_report()
    if as_json:
        answer(report)
        return
    for line in host_lines(report):
        say(line)
