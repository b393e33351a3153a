# SPDX-License-Identifier: Apache-2.0
"""What a command prints: lines or one JSON object on stdout, or an error line on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from vmth.errors import ExitCode
from vmth.outlet import write_line

__all__ = ["answer", "complain", "fail", "say"]


def say(text: str, *, err: bool = False) -> None:
    """A line for people."""
    write_line(text, sys.stderr if err else sys.stdout)


def answer(values: Mapping[str, Any]) -> None:
    """The one object of ``--json``."""
    say(json.dumps(values, allow_nan=False))


def complain(message: str) -> None:
    """An error, on stderr."""
    say(f"vmth: error: {message}", err=True)


def fail(message: str, code: ExitCode, as_json: bool) -> ExitCode:
    """Tell why a command did not even begin; no guest was touched. Returns ``code``."""
    complain(message)
    if as_json:
        answer({"error": message, "exit_code": int(code), "source_runs": None, "verified": False})
    return code
