# SPDX-License-Identifier: Apache-2.0
"""Option types: sizes, rates and durations as ``vmth.units`` reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from vmth.errors import UsageError
from vmth.units import parse_duration_ns, parse_rate_bps, parse_size

__all__ = ["DURATION_MS", "DURATION_S", "JUMP", "NAMES", "ON_OFF", "RATE", "SIZE"]


class _Value(click.ParamType[Any]):
    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


def _jump(text: str) -> tuple[int, int]:
    at, colon, rate = text.partition(":")
    if not colon:
        raise UsageError(f"phase jump {text!r}: allowed TIME:RATE, for example 5s:400MB/s")
    return parse_duration_ns(at, default_unit="s"), parse_rate_bps(rate)


def _on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise UsageError(f"received {text!r}, allowed on, off")
    return text == "on"


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


SIZE = _Value("size", parse_size)
RATE = _Value("rate", parse_rate_bps)
#: Plain numbers are milliseconds, as in QMP.
DURATION_MS = _Value("duration", lambda text: parse_duration_ns(text, default_unit="ms"))
#: Plain numbers are seconds, as in virsh.
DURATION_S = _Value("duration", lambda text: parse_duration_ns(text, default_unit="s"))
JUMP = _Value("time:rate", _jump)
ON_OFF = _Value("on|off", _on_off)
#: NAME,...: a tuple; of nothing where nothing is given.
NAMES = _Value("names", _names)
