# SPDX-License-Identifier: Apache-2.0
"""The options that say which files a destination reuses, for every command that takes a guest
in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from vmth.cli.values import SIZE
from vmth.reuse.warm import ReuseChoice

__all__ = ["index_options", "reuse_choice", "reuse_options"]

Command = Callable[..., Any]


def index_options(command: Command) -> Command:
    """Adds where indexes are kept, and what they may take."""
    for option in (
        click.option(
            "--reuse-memory",
            type=SIZE,
            default="1GiB",
            show_default=True,
            help="Memory for the indexes of all files, at most; 24 bytes a page of content.",
        ),
        click.option(
            "--reuse-index",
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Where the indexes are kept.  [default: beside each file]",
        ),
    ):
        command = option(command)
    return command


def reuse_options(command: Command) -> Command:
    """Adds ``--reuse`` and the two above."""
    return click.option(
        "--reuse",
        type=click.Path(path_type=Path),
        multiple=True,
        metavar="FILE",
        help="Pages that FILE has are not sent: a kept memory image, an image of vmth save, or a "
        "raw disk. May be given several times.",
    )(index_options(command))


def reuse_choice(given: dict[str, Any]) -> ReuseChoice:
    """From the options above."""
    return ReuseChoice(given["reuse"], given["reuse_index"], given["reuse_memory"])
