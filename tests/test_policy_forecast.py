# SPDX-License-Identifier: Apache-2.0
"""What the downtime is put together from, where the parts are not simply added."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_policy_outlook import view_of

from vmth.policy import Action, StandardPolicy
from vmth.policy.forecast import (
    HANDOVER_NS,
    MEANWHILE_NS,
    bandwidth_bps,
    first_handover_ns,
    forecast_downtime,
    known_downtime_ns,
)
from vmth.policy.interface import RoundView
from vmth.stats import RoundStats

MS = 1_000_000
LINK = 120e6


def sent(number: int, pages: int, nbytes: int, ms: float) -> RoundStats:
    bps = nbytes / ms * 1e3
    return RoundStats(number, pages, pages, 0, 0, nbytes, round(ms * MS), bps, 100, 1.0, 0)


LONG = sent(0, 262_144, 1_080_000_000, 9_000)


def few(dirty_pages: int, **fields: Any) -> RoundView:
    view = view_of(LONG, sent(1, 30_000, 123_600_000, 1_030))
    return replace(view, dirty_pages=dirty_pages, **fields)


@pytest.mark.parametrize("dirty_pages", [0, 10, 1_000])
def test_state_is_said_while_the_last_pages_are_under_way(dirty_pages: int) -> None:
    apart = forecast_downtime(few(dirty_pages, handover_trips=3, rtt_ns=0))
    ahead = forecast_downtime(few(dirty_pages, handover_trips=2, rtt_ns=0))
    assert ahead.pages_ns == apart.pages_ns
    assert apart.total_ns - ahead.total_ns == min(apart.pages_ns, MEANWHILE_NS)
    streamed = replace(few(dirty_pages, handover_trips=2, rtt_ns=0), streamed=True)
    assert forecast_downtime(streamed).overhead_ns == apart.overhead_ns


def test_a_short_handover_is_no_negative_one() -> None:
    view = few(1_000, handover_trips=2, rtt_ns=0, handover_ns=MEANWHILE_NS // 2)
    assert forecast_downtime(view).overhead_ns == 0


@pytest.mark.parametrize("trips", [2, 3])
@pytest.mark.parametrize("handover_ns", [0, 4 * MS])
def test_what_a_handover_took_is_learned_as_it_is_counted(trips: int, handover_ns: int) -> None:
    """With what is known beforehand it makes the downtime again, whatever it was."""
    view = few(700, handover_trips=trips, handover_ns=handover_ns, journal_ns=MS)
    took_ns = 60 * MS
    learned_ns = took_ns - known_downtime_ns(view)
    assert forecast_downtime(replace(view, handover_ns=learned_ns)).total_ns == took_ns


def test_records_count_until_a_handover_tells() -> None:
    view = few(0, rtt_ns=0, handover_trips=2)
    slow = replace(view, journal_ns=20 * MS)
    assert forecast_downtime(slow).overhead_ns == HANDOVER_NS + 60 * MS
    assert first_handover_ns(HANDOVER_NS, 20 * MS) == HANDOVER_NS + 60 * MS
    assert forecast_downtime(replace(slow, handover_ns=5 * MS)).overhead_ns == 5 * MS


def test_several_short_rounds_do_not_outweigh_a_long_one() -> None:
    """What a round takes in any case makes short ones look slow."""
    short = [sent(number, 60, 240_000, 4) for number in range(1, 5)]  # half the link's
    assert bandwidth_bps(view_of(LONG, *short)) > 0.75 * LINK
    # One that is long is believed at once.
    slower = sent(5, 60_000, 240_000_000, 4_000)
    assert bandwidth_bps(view_of(LONG, *short, slower)) < 0.62 * LINK


@pytest.mark.parametrize(
    ("scattered", "action"), [(400, Action.SWITCH_OVER), (700, Action.CONTINUE)]
)
def test_a_short_round_is_made_for_downtime_and_not_for_what_passes_meanwhile(
    scattered: int, action: Action
) -> None:
    """Pages of next to no bytes: 2 us each, of which half a millisecond is none of the downtime."""
    same = replace(sent(1, 60_000, 600_000, 20), same_pages=60_000, normal_pages=0)
    view = replace(view_of(LONG, same), dirty_pages=scattered, handover_trips=2, rtt_ns=0)
    assert StandardPolicy().decide(view).action is action
