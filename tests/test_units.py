# SPDX-License-Identifier: Apache-2.0
"""Units: tables of what is read and refused, and the round trip through formatting."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmth.errors import UsageError
from vmth.units import (
    MAX_VALUE,
    format_duration,
    format_rate,
    format_size,
    parse_duration_ns,
    parse_rate_bps,
    parse_size,
)

SIZES = [
    ("0", 0),
    ("1", 1),
    ("4096", 4096),
    ("1B", 1),
    ("1k", 1024),
    ("1K", 1024),
    ("1KiB", 1024),
    ("1kib", 1024),
    ("1KB", 1000),
    ("1kb", 1000),
    ("4GiB", 4 << 30),
    ("4g", 4 << 30),
    ("4 GiB", 4 << 30),
    (" 256MiB ", 256 << 20),
    ("1.5GiB", 3 << 29),
    ("0.1K", 102),
    ("2TB", 2 * 10**12),
    ("1P", 1 << 50),
    ("7EiB", 7 << 60),
    (str(MAX_VALUE), MAX_VALUE),
]

RATES = [
    ("0", 0),
    ("1000", 1000),
    ("50MB/s", 50_000_000),
    ("50MB", 50_000_000),
    ("50MiB/s", 50 << 20),
    ("50m", 50 << 20),
    ("8bit/s", 1),
    ("100Mbit/s", 12_500_000),
    ("1Gbit/s", 125_000_000),
    ("1gbit", 125_000_000),
    ("1Gibit/s", 1 << 27),
    ("2.5Gbit/s", 312_500_000),
    ("400Gbit/s", 50_000_000_000),
]

DURATIONS = [
    ("0", 0),
    ("300", 300_000_000),
    ("300ms", 300_000_000),
    ("0.5ms", 500_000),
    ("5s", 5_000_000_000),
    ("7us", 7_000),
    ("7µs", 7_000),
    ("9ns", 9),
    ("2min", 120_000_000_000),
    ("1h", 3_600_000_000_000),
]


@pytest.mark.parametrize(("text", "expected"), SIZES)
def test_size_is_read(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(("text", "expected"), RATES)
def test_rate_is_read(text: str, expected: int) -> None:
    assert parse_rate_bps(text) == expected


@pytest.mark.parametrize(("text", "expected"), DURATIONS)
def test_duration_is_read(text: str, expected: int) -> None:
    assert parse_duration_ns(text) == expected


def test_a_plain_duration_has_the_unit_that_the_caller_names() -> None:
    assert parse_duration_ns("2", default_unit="s") == 2_000_000_000
    assert parse_duration_ns("2ms", default_unit="s") == 2_000_000


REFUSED: list[tuple[Callable[[str], int], str, str]] = [
    (parse_size, "", "a number"),
    (parse_size, "GiB", "a number"),
    (parse_size, "-1", "at least 0"),
    (parse_size, "+1", "a number"),
    (parse_size, "1e3", "a number"),
    (parse_size, "1,5G", "a number"),
    (parse_size, ".5G", "a number"),
    (parse_size, "0x10", "a number"),
    (parse_size, "nan", "a number"),
    (parse_size, "1_000", "a number"),
    (parse_size, "٣", "a number"),
    (parse_size, "1Gbit", "unit"),
    (parse_size, "1GiB/s", "unit"),
    (parse_size, "8EiB", str(MAX_VALUE)),
    (parse_size, "9" * 31, "a number"),
    (parse_size, "0.1", "too small"),
    (parse_rate_bps, "1/s", "unit"),
    (parse_rate_bps, "1MB/m", "unit"),
    (parse_rate_bps, "1MB/s/s", "unit"),
    (parse_rate_bps, "1Mb/s", "Mbit/s or MB/s"),
    (parse_rate_bps, "1b", "bit/s or B/s"),
    (parse_rate_bps, "1Mbps", "unit"),
    (parse_rate_bps, "1bit/s", "too small"),
    (parse_duration_ns, "1m", "min"),
    (parse_duration_ns, "1S", "unit"),
    (parse_duration_ns, "0.4ns", "too small"),
    (parse_duration_ns, "-5s", "at least 0"),
]


@pytest.mark.parametrize(("parse", "text", "allowed"), REFUSED)
def test_a_refusal_names_what_came_and_what_is_allowed(
    parse: Callable[[str], int], text: str, allowed: str
) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert repr(text) in str(caught.value)
    assert allowed in str(caught.value)


SHOWN: list[tuple[Callable[[int], str], int, str]] = [
    (format_size, 0, "0B"),
    (format_size, 1023, "1023B"),
    (format_size, 1024, "1KiB"),
    (format_size, 1536, "1.5KiB"),
    (format_size, (1 << 20) - 1, "1MiB"),
    (format_size, 1_000_000, "977KiB"),
    (format_size, 10 << 30, "10GiB"),
    (format_size, 1 << 63, "8EiB"),
    (format_rate, 999, "999B/s"),
    (format_rate, 125_000_000, "125MB/s"),
    (format_rate, 999_999, "1MB/s"),
    (format_duration, 1, "1ns"),
    (format_duration, 12_345_678, "12.3ms"),
    (format_duration, 71_500_000_000, "71.5s"),
    (format_duration, 5_000_000_000_000, "5000s"),
]


@pytest.mark.parametrize(("show", "value", "expected"), SHOWN)
def test_formatting(show: Callable[[int], str], value: int, expected: str) -> None:
    assert show(value) == expected


def test_a_rate_below_one_is_not_shown_as_none() -> None:
    assert format_rate(0.2) == "1B/s"


@pytest.mark.parametrize("show", [format_size, format_rate, format_duration])
def test_a_negative_value_is_refused(show: Callable[[int], str]) -> None:
    with pytest.raises(UsageError, match="at least 0"):
        show(-1)


PAIRS = [
    (format_size, parse_size),
    (format_rate, parse_rate_bps),
    (format_duration, parse_duration_ns),
]


@pytest.mark.parametrize(("show", "parse"), PAIRS)
@given(value=st.integers(0, 10**18))
def test_round_trip_keeps_three_digits(
    show: Callable[[int], str], parse: Callable[[str], int], value: int
) -> None:
    again = parse(show(value))
    assert abs(again - value) <= 0.0051 * value
    assert parse(show(again)) == again


@given(text=st.text(max_size=12))
def test_any_text_is_read_or_refused_by_the_one_error(text: str) -> None:
    for parse in (parse_size, parse_rate_bps, parse_duration_ns):
        try:
            value = parse(text)
        except UsageError:
            continue
        assert 0 <= value <= MAX_VALUE
