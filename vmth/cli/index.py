# SPDX-License-Identifier: Apache-2.0
"""``vmth index``: index files ahead of the migration that reuses them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from vmth.cli.answers import answer, say
from vmth.cli.reuse import index_options
from vmth.errors import ExitCode
from vmth.reuse.report import file_line, file_values, index_progress
from vmth.reuse.warm import ReuseChoice

__all__ = ["index"]


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@index_options
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on stdout, the rest on stderr."
)
def index(files: tuple[Path, ...], as_json: bool, **given: Any) -> None:
    """Find the contents of FILEs, and keep the index that --reuse of the same FILEs uses.

    FILE is a kept memory image, an image of vmth save, or a raw disk. An index that fits its file
    is left as it is; any other is built again, which reads the whole file. Files that are to be
    reused together are indexed together: their indexes share a key.

    \b
    Examples:
      vmth index vm.memory
      vmth index --reuse-index /var/cache/vmth base.raw vm.memory
    """

    tell = partial(say, err=as_json)
    choice = ReuseChoice(files, given["reuse_index"], given["reuse_memory"])
    with choice.open(index_progress(tell)) as warm:
        if as_json:
            answer(
                {
                    "files": [file_values(file) for file in warm.files],
                    "index_memory_bytes": warm.memory_bytes,
                    "notes": warm.notes,
                    "exit_code": int(ExitCode.OK),
                    "error": None,
                }
            )
        for file in warm.files:
            tell(file_line(file))
        for note in warm.notes:
            tell(f"note: {note}")
