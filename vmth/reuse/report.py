# SPDX-License-Identifier: Apache-2.0
"""What is said of files that are reused: values for JSON, lines for people. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vmth.channel.reuse import ReusedFile
from vmth.reuse.warm import IndexProgress, WarmFile
from vmth.units import format_size

__all__ = ["FileReused", "file_line", "file_values", "index_progress", "reused_lines", "reused_of"]

#: Of one file, in pages, between two lines: a tenth of it, but not less than this (1 GiB).
LEAST_STEP_PAGES = 1 << 18


def file_values(file: WarmFile) -> dict[str, Any]:
    return asdict(file)


def file_line(file: WarmFile) -> str:
    """One file and its index."""
    parts = [
        f"{file.contents} different contents in {file.pages} pages",
        f"{file.zero_pages + file.hole_pages} zero or holes",
        f"{file.repeated_pages} repeated",
    ]
    if file.left_pages:
        parts.append(f"{file.left_pages} left out")
    where = f"index {file.index}" if file.index else "index in memory only"
    return (
        f"{file.path} ({file.kind}): {', '.join(parts)}; {where}, {format_size(file.memory_bytes)}"
    )


@dataclass(frozen=True, slots=True)
class FileReused:
    """What one file gave to a guest."""

    path: str
    kind: str
    pages: int
    nbytes: int
    contents: int  #: different ones that it has
    left_pages: int  #: of the file, not in the index
    index_bytes: int  #: memory of the index


def reused_of(
    files: Sequence[WarmFile], reused: Sequence[ReusedFile], page_bytes: int
) -> tuple[FileReused, ...]:
    """``reused`` has a row for each file."""
    return tuple(
        FileReused(
            file.path,
            file.kind,
            given.pages,
            given.pages * page_bytes,
            file.contents,
            file.left_pages,
            file.memory_bytes,
        )
        for file, given in zip(files, reused, strict=True)
    )


def reused_lines(files: Sequence[FileReused], memory_bytes: int) -> list[str]:
    """A line a file; ``memory_bytes`` of the guest."""
    return [
        f"{file.pages} pages, {format_size(file.nbytes)} "
        f"({100 * file.nbytes / max(1, memory_bytes):.1f} % of memory), from {file.path}; "
        f"its index takes {format_size(file.index_bytes)}"
        for file in files
    ]


def index_progress(say: Callable[[str], None]) -> Callable[[IndexProgress], None]:
    """Say now and then how far a large file has come."""
    told: dict[str, int] = {}

    def show(progress: IndexProgress) -> None:
        step = max(LEAST_STEP_PAGES, progress.pages // 10)
        if progress.done_pages // step > told.get(progress.path, 0):
            told[progress.path] = progress.done_pages // step
            share = 100 * progress.done_pages // max(1, progress.pages)
            say(f"indexing {progress.path}: {share} %")

    return show
