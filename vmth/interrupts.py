# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM: the first cancels, the second ends this process at once.

While a migration runs the first signal cancels it, and the caller goes on to show that the source
guest still runs. At any other time it raises ``Interrupted`` in the main thread, and context
managers end what was started. Children see no signal of the terminal's: they are in process groups
of their own, and end by themselves when this process is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from vmth.errors import ExitCode

__all__ = ["Interrupted", "Interrupts", "Terminated", "raise_on_sigterm"]


class Interrupted(KeyboardInterrupt):
    """The first signal, outside of a migration."""


class Terminated(Interrupted):
    """SIGTERM, where nothing was begun yet or all has ended."""


def raise_on_sigterm() -> None:
    """Outside of any ``Interrupts`` too SIGTERM raises, as SIGINT does. Main thread."""

    def on_sigterm(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, on_sigterm)


class Interrupts:
    """Context manager for the main thread; the handlers that were there are put back at its end."""

    def __init__(self) -> None:
        self.signal_number = 0
        self._cancel: Callable[[], None] | None = None
        self._before: dict[int, Any] = {}

    @property
    def exit_code(self) -> ExitCode | None:
        """What a first signal means for the exit code; None when there was none."""
        if self.signal_number == 0:
            return None
        return ExitCode.INTERRUPTED if self.signal_number == signal.SIGINT else ExitCode.CANCELLED

    @contextlib.contextmanager
    def cancelling(self, cancel: Callable[[], None]) -> Iterator[None]:
        """Inside, the first signal calls ``cancel`` (from the main thread) and raises nothing."""
        self._cancel = cancel
        try:
            yield
        finally:
            self._cancel = None

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number:
            os._exit(self.exit_code or ExitCode.INTERRUPTED)
        self.signal_number = number
        if self._cancel is None:
            raise Interrupted
        self._cancel()
