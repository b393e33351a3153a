# SPDX-License-Identifier: Apache-2.0
"""What a command prints: one JSON object on stdout, or an error line on stderr."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from vmth.errors import ExitCode

__all__ = ["answer", "fail"]


def answer(values: Mapping[str, Any]) -> None:
    """The one object of ``--json``."""
    click.echo(json.dumps(values, allow_nan=False))


def fail(message: str, code: ExitCode, as_json: bool) -> ExitCode:
    """Tell why a command did not even begin; no guest was touched. Returns ``code``."""
    click.echo(f"vmth: error: {message}", err=True)
    if as_json:
        answer({"error": message, "exit_code": int(code), "source_runs": None, "verified": False})
    return code
