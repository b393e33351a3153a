# SPDX-License-Identifier: Apache-2.0
"""The options that say which forms pages may take, for every command that moves pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from vmth.cli.values import SIZE
from vmth.options import ALL_FORMS

__all__ = ["form_choices", "form_options"]

Command = Callable[..., Any]


def form_options(delta_cache: str) -> Callable[[Command], Command]:
    """Adds ``--forms``, ``--fixed-forms``, ``--zstd-level`` and the two bounds, of which that of
    the delta cache is ``delta_cache`` where the user says nothing."""

    def decorate(command: Command) -> Command:
        for option in _options(delta_cache):
            command = option(command)
        return command

    return decorate


def _options(delta_cache: str) -> tuple[Callable[[Command], Command], ...]:
    return (
        click.option(
            "--delta-cache",
            type=SIZE,
            default=delta_cache,
            show_default=True,
            help="Memory for what was sent, at most; pays up to the size of what is rewritten.",
        ),
        click.option(
            "--dedup-index",
            type=SIZE,
            default="64MiB",
            show_default=True,
            help="Memory for where contents are, at most; 32 bytes a page are enough.",
        ),
        click.option(
            "--zstd-level",
            type=click.IntRange(-10, 19),
            default=0,
            help="Of fixed forms; else it is chosen.",
        ),
        click.option(
            "--fixed-forms",
            is_flag=True,
            help="Use all of --forms from start to end instead of choosing by what they cost.",
        ),
        click.option(
            "--forms",
            default=",".join(ALL_FORMS),
            show_default=True,
            metavar="NAME,...",
            help="Which forms pages may take.",
        ),
    )


def form_choices(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of MigrateOptions from the options above."""
    return {
        "forms": tuple(name for name in given["forms"].split(",") if name),
        "fixed_forms": given["fixed_forms"],
        "zstd_level": given["zstd_level"],
        "dedup_index_bytes": given["dedup_index"],
        "delta_cache_bytes": given["delta_cache"],
    }
