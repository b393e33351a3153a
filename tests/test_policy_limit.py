# SPDX-License-Identifier: Apache-2.0
"""The policy with a guest that its hypervisor holds to a dirty rate, simulated."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_simulation import PAGE, Link, migrate, uniform
from test_policy import GBIT, GIB, MS, converged_within_limit, round_stats, view_of

from vmth.policy.interface import Action, OnStall
from vmth.policy.standard import StandardPolicy
from vmth.policy.throttle import LEAST_LIMIT_BPS, next_limit


@given(
    writes=st.floats(5e4, 1e6),
    working_set=st.integers(64, 4096).map(lambda mib: mib << 20),
    gbit=st.floats(0.5, 25),
    devices=st.floats(0, 0.5),
)
@settings(deadline=None)
def test_a_guest_that_takes_a_rate_is_held_just_below_the_link(
    writes: float, working_set: int, gbit: float, devices: float
) -> None:
    """``devices``: share of the link that they dirty, whatever the vCPUs are held to."""
    link = Link(gbit * GBIT)
    out = migrate(
        StandardPolicy(),
        uniform(writes, working_set),
        link,
        on_stall=OnStall.THROTTLE,
        takes_rate=True,
        unlimited_pps=devices * link.bandwidth_bps / PAGE,
        max_rounds=80,
    )
    limits = [d.dirty_limit_bps for d in out.decisions if d.action is Action.THROTTLE]
    assert all(LEAST_LIMIT_BPS <= limit <= 0.82 * link.bandwidth_bps for limit in limits)
    assert all(d.throttle_percent == 0 for d in out.decisions)
    converged_within_limit(out)
    if limits and not devices:
        assert limits[0] > 0.75 * link.bandwidth_bps
    assert len(limits) <= 8, limits


def test_a_guest_that_no_limit_holds_is_given_up() -> None:
    """Devices dirty more than the link carries."""
    out = migrate(
        StandardPolicy(),
        uniform(1e6, 8 * GIB),
        Link(1 * GBIT),
        on_stall=OnStall.THROTTLE,
        takes_rate=True,
        unlimited_pps=2 * GBIT / PAGE,
        max_rounds=200,
    )
    assert out.last.action is Action.GIVE_UP
    assert out.dirty_limit_bps == LEAST_LIMIT_BPS and "held to" in out.last.reason


def test_a_round_that_shows_the_set_of_the_one_before_tells_no_rate() -> None:
    """The guest is counted where QEMU's pass begins; then a few pages make a round of 3 ms."""
    rounds = [round_stats(0, pages=1 << 20, dirty=11_500, duration_ms=34_000)]
    rounds += [round_stats(n, pages=11_500, dirty=11_500, duration_ms=2_800) for n in (1, 2)]
    rounds.append(round_stats(3, pages=95, dirty=11_500, duration_ms=3))
    view = replace(
        view_of(*rounds),
        on_stall=OnStall.THROTTLE,
        takes_rate=True,
        dirty_limit_bps=32_000_000,  # for long
        downtime_limit_ns=MS,
    )
    decision = StandardPolicy().decide(view)
    assert decision.action in (Action.CONTINUE, Action.THROTTLE)
    assert decision.dirty_limit_bps == 0 or decision.dirty_limit_bps > 16_000_000


@pytest.mark.parametrize(
    ("limit", "measured", "wanted", "expected"),
    [
        (0, 500e6, 100e6, 100e6),  # the first
        (100e6, 90e6, 100e6, 100e6),  # held
        (100e6, 200e6, 100e6, 50e6),  # devices dirty as much again
        (50e6, 60e6, 100e6, 100e6 * 50 / 60),  # given back
        (100e6, 10e6, 100e6, 100e6),  # an idle guest is not given more than converges
        (100e6, 90e6, 60e6, 60e6),  # the link has become slower
        (100e6, 100e6, 97e6, 100e6),  # nearly the same
        (2e6, 100e6, 1e6, LEAST_LIMIT_BPS),
    ],
)
def test_the_next_limit(limit: float, measured: float, wanted: float, expected: float) -> None:
    assert next_limit(limit, measured, wanted) == pytest.approx(expected)
