# SPDX-License-Identifier: Apache-2.0
"""Sizes, rates and durations as people write them, and back.

Units of size are virsh's, in any case: ``k``, ``K`` and ``KiB`` are 1024 bytes, ``KB`` is 1000, and
so on for M, G, T, P, E. Rates are bytes (``50MB/s``) or bits (``1Gbit/s``, always a power of 1000
unless written ``Gibit``) a second; ``/s`` may be left out. ``Mb/s`` and ``Mbps`` are refused: half
of their readers take them for bits, the other half for bytes.

A plain number is bytes in a size, bytes a second in a rate (as in QMP; libvirt's API counts MiB/s),
and of the unit that the caller names in a duration.

Formatting keeps three significant digits and gives what parsing accepts; it never turns something
into nothing. Pure: no I/O.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

from vmth.errors import UsageError

__all__ = [
    "MAX_VALUE",
    "format_duration",
    "format_rate",
    "format_size",
    "parse_duration_ns",
    "parse_rate_bps",
    "parse_size",
]

#: The largest size, rate or duration (ns) accepted: it fits a signed 64-bit integer.
MAX_VALUE = 2**63 - 1

_NUMBER = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-zµ/]*)", re.ASCII)
_PREFIXES = "KMGTPE"

_SIZE_FACTORS: Mapping[str, Fraction] = {
    "": Fraction(1),
    "b": Fraction(1),
    **{prefix.lower(): Fraction(1024**i) for i, prefix in enumerate(_PREFIXES, 1)},
    **{f"{prefix.lower()}ib": Fraction(1024**i) for i, prefix in enumerate(_PREFIXES, 1)},
    **{f"{prefix.lower()}b": Fraction(1000**i) for i, prefix in enumerate(_PREFIXES, 1)},
}
_BIT_FACTORS: Mapping[str, Fraction] = {
    "bit": Fraction(1, 8),
    **{f"{prefix.lower()}bit": Fraction(1000**i, 8) for i, prefix in enumerate(_PREFIXES, 1)},
    **{f"{prefix.lower()}ibit": Fraction(1024**i, 8) for i, prefix in enumerate(_PREFIXES, 1)},
}
_DURATION_NS: Mapping[str, Fraction] = {
    "ns": Fraction(1),
    "us": Fraction(1_000),
    "µs": Fraction(1_000),
    "ms": Fraction(1_000_000),
    "s": Fraction(1_000_000_000),
    "min": Fraction(60_000_000_000),
    "h": Fraction(3_600_000_000_000),
}

_SIZE_HELP = "B, KiB or K (1024), KB (1000), and so for M, G, T, P, E"
_RATE_HELP = "B/s, KiB/s or K (1024), KB/s (1000), kbit/s (1000 bits), and so for M, G, T, P, E"
_DURATION_HELP = "ns, us, ms, s, min, h"


def _split(kind: str, text: str, help_: str) -> tuple[Fraction, str]:
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"{kind} {text!r} is not understood; allowed: a number of at least 0, then {help_}"
        )
    return Fraction(match[1]), match[2]


def _scale(kind: str, text: str, number: Fraction, factor: Fraction | None, help_: str) -> int:
    if factor is None:
        raise UsageError(f"{kind} {text!r} has an unknown unit; allowed: {help_}")
    exact = number * factor
    value = round(exact)
    if value > MAX_VALUE:
        raise UsageError(f"{kind} {text!r} is too large; allowed: at most {MAX_VALUE}")
    if value == 0 and exact > 0:
        raise UsageError(f"{kind} {text!r} is too small; allowed: 0 or at least one whole unit")
    return value


def parse_size(text: str) -> int:
    """Bytes, rounded to whole ones. ``UsageError`` for anything else than a number and a unit."""
    number, unit = _split("size", text, _SIZE_HELP)
    return _scale("size", text, number, _SIZE_FACTORS.get(unit.lower()), _SIZE_HELP)


def parse_rate_bps(text: str) -> int:
    """Bytes a second, rounded to whole ones. ``UsageError`` for anything else."""
    number, unit = _split("rate", text, _RATE_HELP)
    stem = unit.removesuffix("/s")
    if stem.endswith("b"):
        raise UsageError(
            f"rate {text!r} may mean bits or bytes; allowed: {stem[:-1]}bit/s or {stem[:-1]}B/s"
        )
    factor = _BIT_FACTORS.get(stem.lower(), _SIZE_FACTORS.get(stem.lower()))
    if unit == "/s":
        factor = None
    return _scale("rate", text, number, factor, _RATE_HELP)


def parse_duration_ns(text: str, *, default_unit: str = "ms") -> int:
    """Nanoseconds. ``default_unit`` is that of a plain number: ``ms`` for a downtime limit (as in
    QMP), ``s`` for a timeout (as in virsh). ``UsageError`` for anything else."""
    number, unit = _split("duration", text, _DURATION_HELP)
    return _scale("duration", text, number, _DURATION_NS.get(unit or default_unit), _DURATION_HELP)


def _three_digits(value: float) -> str:
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    shown = f"{value:.{decimals}f}"
    return shown.rstrip("0").rstrip(".") if decimals else shown


def _format(value: float, units: Sequence[str], step: int) -> str:
    """``value`` in the largest of ``units`` (each ``step`` times the one before) that fits."""
    if value < 0:
        raise UsageError(f"value {value} cannot be shown; allowed: at least 0")
    index = 0
    # The carry (1023.7 KiB is 1 MiB) is decided on what would be shown.
    while round(value) >= step and index + 1 < len(units):
        value /= step
        index += 1
    if index == 0:
        return f"{max(round(value), 1 if value > 0 else 0)}{units[0]}"
    return f"{_three_digits(value)}{units[index]}"


def format_size(nbytes: int) -> str:
    """``1536`` as ``1.5KiB``: powers of 1024, three significant digits."""
    return _format(nbytes, ["B", *(f"{prefix}iB" for prefix in _PREFIXES)], 1024)


def format_rate(bytes_per_second: float) -> str:
    """``50e6`` as ``50MB/s``: powers of 1000, as links are sold; three significant digits."""
    return _format(bytes_per_second, ["B/s", *(f"{prefix}B/s" for prefix in _PREFIXES)], 1000)


def format_duration(duration_ns: int) -> str:
    """``300_000_000`` as ``300ms``; seconds are the largest unit. Three significant digits."""
    return _format(duration_ns, ["ns", "us", "ms", "s"], 1000)
