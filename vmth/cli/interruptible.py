# SPDX-License-Identifier: Apache-2.0
"""One long act of a command: cancelled by the first Ctrl-C or SIGTERM, its error told with its exit
code, its progress in one line of the terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import TypeVar

from vmth.errors import CancelledError, ExitCode, VmthError
from vmth.interrupts import Interrupts
from vmth.outlet import write_line

__all__ = ["Line", "interruptible"]

T = TypeVar("T")


def interruptible(
    act: Callable[[threading.Event], T],
) -> tuple[T | None, VmthError | None, ExitCode]:
    """Call it with the event that a signal sets. (result, error, exit code)"""
    cancelled = threading.Event()
    with Interrupts() as interrupts, interrupts.cancelling(cancelled.set):
        try:
            return act(cancelled), None, ExitCode.OK
        except CancelledError as error:
            return None, error, interrupts.exit_code or error.exit_code
        except VmthError as error:
            return None, error, error.exit_code


class Line:
    """A line on stderr that each call writes anew; nothing where that is no terminal."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()
        self._used = False

    def show(self, text: str) -> None:
        if self._on:
            self._used = True
            write_line(f"\r\x1b[K{text}", sys.stderr, end="")

    def end(self) -> None:
        if self._used:
            write_line("\r\x1b[K", sys.stderr, end="")
