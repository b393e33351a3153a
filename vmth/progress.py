# SPDX-License-Identifier: Apache-2.0
"""What is shown while a migration runs: a line a round, and on a terminal a live bar beside it."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TextIO

from vmth.events import (
    Connected,
    DirtyLimited,
    Event,
    FellBack,
    FormsChosen,
    GuestPaused,
    GuestResumed,
    RepairStarted,
    RoundFinished,
    Throttled,
)
from vmth.outlet import write_line
from vmth.stats import JobStats, RoundStats
from vmth.units import format_duration, format_rate, format_size

__all__ = ["Console", "round_line"]

_COLUMNS = (
    ("round", 5),
    ("pages", 9),
    ("normal", 9),
    ("zero", 9),
    ("hole", 9),
    ("cheaper", 9),
    ("sent", 9),
    ("bandwidth", 10),
    ("dirty", 8),
    ("dirty rate", 10),
    ("expected downtime", 17),
)
_REFRESH_S = 0.2


def _row(cells: tuple[str, ...]) -> str:
    return "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True))


def round_line(stats: RoundStats) -> str:
    """One round, in the columns of the head line; the round sent while paused has no forecast."""
    return _row(
        (
            str(stats.round),
            str(stats.pages),
            str(stats.normal_pages),
            str(stats.zero_pages),
            str(stats.hole_pages),
            str(stats.formed_pages),
            format_size(stats.bytes),
            format_rate(stats.bandwidth_bps),
            str(stats.dirty_pages),
            "paused" if stats.paused else format_rate(stats.dirty_rate_bps),
            "-" if stats.paused else format_duration(stats.expected_downtime_ns),
        )
    )


class Console:
    """Human text goes to ``out``; the live bar to stderr, if that is a terminal and rich is
    there."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._head_shown = False
        self._print_above_bar: Callable[[str], None] | None = None

    def say(self, text: str) -> None:
        """One line, at once. An output that takes nothing any more ends nothing."""
        if self._print_above_bar is not None:
            self._print_above_bar(text)
            return
        write_line(text, self._out)

    def show(self, event: Event) -> None:
        if isinstance(event, RoundFinished):
            if not self._head_shown:
                self._head_shown = True
                self.say(_row(tuple(name for name, _ in _COLUMNS)))
            self.say(round_line(event.stats))
            return
        text = _event_text(event)
        if text:
            self.say(text)

    @contextlib.contextmanager
    def live(self, stats: Callable[[], JobStats]) -> Iterator[None]:
        """Inside, a bar shows ``stats()`` five times a second; nothing without a terminal or
        rich."""
        if not sys.stderr.isatty():
            yield
            return
        try:
            from rich import console, progress
        except ImportError:
            yield
            return
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.percentage:5.1f} %"),
            progress.TextColumn("{task.fields[note]}"),
        )
        ended = threading.Event()
        terminal = console.Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
        bar = progress.Progress(*columns, console=terminal, transient=True)
        with bar:
            if self._out.isatty():
                self._print_above_bar = terminal.print
            task = bar.add_task("migration", total=1.0, note="")

            def refresh() -> None:
                while not ended.wait(_REFRESH_S):
                    now = stats()
                    bar.update(
                        task,
                        description=f"round {now.memory_iteration} ({now.status})",
                        completed=now.memory_total - now.memory_remaining,
                        total=now.memory_total,
                        note=f"{format_rate(now.memory_bps)}, guest dirties "
                        f"{format_rate(now.memory_dirty_rate * now.memory_page_size)}",
                    )

            thread = threading.Thread(target=refresh, name="vmth-progress", daemon=True)
            thread.start()
            try:
                yield
            finally:
                ended.set()
                thread.join()
                self._print_above_bar = None


def _event_text(event: Event) -> str:
    if isinstance(event, Connected):
        return f"connected to {event.peer} with {event.channels} page channel(s)"
    if isinstance(event, FellBack):
        return f"fell back: {event.what}"
    if isinstance(event, FormsChosen):
        return f"forms: {event.decision.reason}"
    if isinstance(event, Throttled):
        each = ", ".join(f"{share} %" for share in event.vcpu_percents)
        return f"guest throttled by {event.percent} %" + (f" (of its vCPUs {each})" if each else "")
    if isinstance(event, DirtyLimited):
        if not event.rate_bps:
            return "guest's dirty rate is not held any more"
        return f"guest's dirty rate held below {format_rate(event.rate_bps)}"
    if isinstance(event, GuestPaused):
        return "guest paused at the source"
    if isinstance(event, GuestResumed):
        return f"guest resumed at the source: {event.reason}"
    if isinstance(event, RepairStarted):
        return f"{event.pages} pages are sent again"
    return ""
