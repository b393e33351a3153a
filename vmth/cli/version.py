# SPDX-License-Identifier: Apache-2.0
"""``vmth version``: the release, and the protocol versions that it speaks."""

from __future__ import annotations

import click

from vmth import __version__
from vmth.cli.answers import answer, say
from vmth.wire.messages import PROTOCOL_VERSION, PROTOCOL_VERSION_MIN

__all__ = ["version"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def version(as_json: bool) -> None:
    """Print the release and the protocol versions that it speaks."""
    if as_json:
        answer(
            {
                "version": __version__,
                "protocol_version_min": PROTOCOL_VERSION_MIN,
                "protocol_version_max": PROTOCOL_VERSION,
            }
        )
    else:
        say(f"vmth {__version__} (protocol versions {PROTOCOL_VERSION_MIN} to {PROTOCOL_VERSION})")
