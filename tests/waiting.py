# SPDX-License-Identifier: Apache-2.0
"""Wait for a condition by looking at it, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Only a hang comes near it.
PATIENCE_S = 60.0


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once ``condition()`` holds; AssertionError if it never does."""
    give_up_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_s, "it never came true"
        time.sleep(0.001)
