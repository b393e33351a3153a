# SPDX-License-Identifier: Apache-2.0
"""What is said of files that are reused: values for JSON, lines for people. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from vmth.reuse.warm import IndexProgress, WarmFile
from vmth.units import format_size

__all__ = ["file_line", "file_values", "index_progress", "reused_line"]

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


def reused_line(path: str, pages: int, page_bytes: int, of_bytes: int) -> str:
    """What one file gave to a guest."""
    nbytes = pages * page_bytes
    share = 100 * nbytes / max(1, of_bytes)
    return f"{pages} pages, {format_size(nbytes)} ({share:.1f} % of memory), from {path}"


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
