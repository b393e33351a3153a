# SPDX-License-Identifier: Apache-2.0
"""The standard policy against simulated guests and links, and its decisions one by one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_simulation import (
    NS,
    PAGE,
    Link,
    Outcome,
    Workload,
    idle,
    migrate,
    phases,
    uniform,
    zipf,
)

from vmth.errors import UsageError
from vmth.policy import Action, FixedRoundsPolicy, OnStall, RoundView, StandardPolicy
from vmth.policy.forecast import forecast_downtime
from vmth.policy.throttle import first_touch_pps, next_percent
from vmth.stats import RoundStats

GBIT = 1e9 / 8
MS = 1_000_000
GIB = 1 << 30


def converged_within_limit(out: Outcome, limit_ns: int = 300 * MS) -> None:
    assert out.last.action is Action.SWITCH_OVER
    assert 0 < out.downtime_ns <= limit_ns
    assert out.downtime_ns <= out.rechecks[-1].forecast.total_ns * 1.1


CONVERGING = [
    # name, workload, link in Gbit/s, most rounds, longest downtime in ms
    ("8k w/s over 256 MiB", uniform(8e3, 256 << 20), 1, 6, 20),
    ("8k w/s over 256 MiB", uniform(8e3, 256 << 20), 10, 4, 10),
    ("50k w/s over 4 GiB", uniform(5e4, 4 * GIB), 10, 5, 10),
    ("50k w/s over 4 GiB", uniform(5e4, 4 * GIB), 25, 4, 10),
    ("50k w/s zipf", zipf(5e4, 4 * GIB), 1, 12, 300),
    ("50k w/s zipf", zipf(5e4, 4 * GIB), 10, 5, 10),
    ("400k w/s over 4 GiB", uniform(4e5, 4 * GIB), 25, 5, 200),
    ("400k w/s zipf", zipf(4e5, 4 * GIB), 10, 5, 200),
    ("1k w/s over 64 MiB", uniform(1e3, 64 << 20), 1, 4, 20),
]


@pytest.mark.parametrize(("name", "workload", "gbit", "rounds", "downtime_ms"), CONVERGING)
def test_what_can_converge_does_and_far_below_the_limit(
    name: str, workload: Workload, gbit: float, rounds: int, downtime_ms: int
) -> None:
    out = migrate(StandardPolicy(), workload, Link(gbit * GBIT))
    converged_within_limit(out)
    assert len(out.rounds) <= rounds
    assert out.downtime_ns <= downtime_ms * MS


NEVER = [
    # workload, link in Gbit/s, bandwidth that the model says would converge, in bytes/s
    (uniform(5e4, 4 * GIB), 1, 1.25 * 5e4 * PAGE),
    (uniform(4e5, 4 * GIB), 10, 1.25 * 4e5 * PAGE),
    # Every round dirties the whole set: nothing but sending it within the limit is certain.
    (uniform(4e5, 4 * GIB), 1, 4 * GIB / 0.3),
    # A small set, rewritten all the time: it needs no bandwidth above its dirty rate.
    (uniform(1e6, 512 << 20), 10, 512 * (1 << 20) / 0.3),
]


@pytest.mark.parametrize(("workload", "gbit", "needed_bps"), NEVER)
@pytest.mark.parametrize("on_stall", OnStall)
def test_a_stall_is_found_and_the_verdict_would_converge(
    workload: Workload, gbit: float, needed_bps: float, on_stall: OnStall
) -> None:
    out = migrate(
        StandardPolicy(), workload, Link(gbit * GBIT), on_stall=on_stall, can_throttle=False
    )
    stall = out.last
    assert "does not shrink" in stall.reason
    assert stall.needed_bandwidth_bps == pytest.approx(needed_bps, rel=0.1)
    assert stall.needed_dirty_rate_bps == pytest.approx(gbit * GBIT / 1.25, rel=0.02)
    if on_stall is OnStall.PAUSE:
        assert stall.action is Action.CONTINUE
        assert "no timeout" in stall.reason
    else:
        assert stall.action is Action.GIVE_UP
        assert len(out.rounds) < 20
    again = migrate(StandardPolicy(), workload, Link(1.02 * stall.needed_bandwidth_bps))
    converged_within_limit(again)


def test_pause_switches_over_after_the_timeout_and_says_the_limit_is_exceeded() -> None:
    out = migrate(StandardPolicy(), uniform(4e5, 4 * GIB), Link(10 * GBIT), timeout_ns=20 * NS)
    assert out.last.action is Action.SWITCH_OVER
    assert "timeout of 20s passed, pausing all the same" in out.last.reason
    assert "would converge with" in out.last.reason
    assert 20 * NS <= out.total_ns < 23 * NS
    assert out.downtime_ns > 1000 * MS
    assert "going on until 20s" in out.decisions[-2].reason


@pytest.mark.parametrize("on_stall", [OnStall.CANCEL, OnStall.THROTTLE])
def test_the_other_two_give_up_at_the_timeout(on_stall: OnStall) -> None:
    out = migrate(
        StandardPolicy(),
        uniform(5e4, 4 * GIB),
        Link(1 * GBIT),
        timeout_ns=70 * NS,
        on_stall=on_stall,
    )
    assert out.last.action is Action.GIVE_UP
    assert "timeout of 70s passed, giving up" in out.last.reason
    assert out.downtime_ns == 0


def test_a_timeout_that_comes_when_the_limit_holds_is_an_ordinary_switchover() -> None:
    out = migrate(
        StandardPolicy(),
        uniform(8e3, 256 << 20),
        Link(1 * GBIT),
        timeout_ns=1 * NS,
        downtime_limit_ns=4 * NS,
        on_stall=OnStall.CANCEL,
    )
    converged_within_limit(out, 4 * NS)
    assert len(out.rounds) == 1, "no extra round after the timeout"
    assert "timeout" not in out.last.reason


def test_a_throttle_holds_the_dirty_rate_just_below_the_link() -> None:
    link = Link(10 * GBIT)
    out = migrate(StandardPolicy(), uniform(4e5, 4 * GIB), link, on_stall=OnStall.THROTTLE)
    steps = [d.throttle_percent for d in out.decisions if d.action is Action.THROTTLE]
    assert 1 <= len(steps) <= 3
    first = next(d for d in out.decisions if d.action is Action.THROTTLE)
    assert "to hold the dirty rate below" in first.reason
    held = 4e5 * (1 - out.throttle_percent / 100) * PAGE / link.bandwidth_bps
    assert 0.55 < held < 0.9
    converged_within_limit(out)


@given(
    writes=st.floats(2e4, 1e6),
    working_set=st.integers(64, 4096).map(lambda mib: mib << 20),
    gbit=st.floats(0.5, 25),
    idle_share=st.floats(0, 0.6),
)
def test_any_guest_that_can_be_slowed_down_enough_converges(
    writes: float, working_set: int, gbit: float, idle_share: float
) -> None:
    """``idle_share``: of the time it has nothing to write; a throttle takes that first."""
    busy = uniform(writes, working_set)

    def guest(start_s: float, end_s: float, throttle: int) -> float:
        run = min(1 - throttle / 100, 1 - idle_share) / (1 - idle_share)
        return busy(start_s, start_s + (end_s - start_s) * run, 0)

    link = Link(gbit * GBIT)
    out = migrate(StandardPolicy(), guest, link, on_stall=OnStall.THROTTLE, max_rounds=80)
    steps = [d.throttle_percent for d in out.decisions if d.action is Action.THROTTLE]
    needed = 100 * (1 - (1 - idle_share) * link.bandwidth_bps / PAGE / writes)
    if needed < 90:
        converged_within_limit(out)
        assert len(steps) <= 8
        turns = sum(
            (b > a) != (c > b) for a, b, c in zip(steps, steps[1:], steps[2:], strict=False)
        )
        assert turns <= 2, steps
    assert all(0 <= step <= 99 for step in steps)


def test_a_throttle_is_given_back_when_the_guest_needs_it_no_more() -> None:
    """It writes to 8 GiB, then to as much at less than half of the rate."""
    calmer = phases((0, uniform(1e5, 8 * GIB)), (420, uniform(4e4, 8 * GIB)))
    out = migrate(StandardPolicy(), calmer, Link(1 * GBIT), on_stall=OnStall.THROTTLE)
    steps = [d.throttle_percent for d in out.decisions if d.action is Action.THROTTLE]
    assert max(steps) >= 60 and steps[-1] < max(steps) - 20, steps
    converged_within_limit(out)


def test_throttle_ends_at_99_percent_and_gives_up() -> None:
    def stubborn(start_s: float, end_s: float, throttle: int) -> float:
        return 300_000.0

    out = migrate(StandardPolicy(), stubborn, Link(1 * GBIT), on_stall=OnStall.THROTTLE)
    steps = [d.throttle_percent for d in out.decisions if d.action is Action.THROTTLE]
    assert steps == sorted(set(steps)) and steps[-1] == 99
    assert out.last.action is Action.GIVE_UP
    assert "throttled by 99 % already" in out.last.reason


@pytest.mark.parametrize(
    ("percent", "measured", "wanted", "expected"),
    [
        (0, 100.0, 50.0, 50),
        (50, 100.0, 50.0, 75),
        (50, 52.0, 50.0, 50),  # held
        (50, 40.0, 50.0, 50),
        (50, 25.0, 50.0, 0),
        (80, 10.0, 50.0, 0),
        (0, 1e9, 1.0, 99),
        (98, 60.0, 50.0, 99),
    ],
)
def test_the_next_throttle(percent: int, measured: float, wanted: float, expected: int) -> None:
    assert next_percent(percent, measured, wanted) == expected


def test_first_touches_are_more_than_distinct_pages_tell() -> None:
    assert first_touch_pps(1000, 2.0, math.inf) == 500
    assert first_touch_pps(500, 1.0, 1000) == pytest.approx(1000 * math.log(2))
    assert first_touch_pps(1000, 1.0, 1000) == pytest.approx(3912, rel=0.01)


def test_alternating_sets_are_a_stall_too() -> None:
    def alternating(start_s: float, end_s: float, throttle: int) -> float:
        alternating.calls += 1  # type: ignore[attr-defined]
        return 400_000.0 if alternating.calls % 2 else 200_000.0  # type: ignore[attr-defined]

    alternating.calls = 0  # type: ignore[attr-defined]
    out = migrate(StandardPolicy(), alternating, Link(1 * GBIT), on_stall=OnStall.CANCEL)
    assert out.last.action is Action.GIVE_UP
    assert len(out.rounds) <= 7


def test_sets_that_shrink_slowly_are_no_stall() -> None:
    sets = iter(round(400_000 * 0.9**n) for n in range(100))
    out = migrate(
        StandardPolicy(),
        lambda start_s, end_s, throttle: float(next(sets)),
        Link(1 * GBIT),
        on_stall=OnStall.CANCEL,
    )
    converged_within_limit(out)


def test_an_idle_guest_switches_over_after_round_0() -> None:
    out = migrate(StandardPolicy(), idle, Link(10 * GBIT))
    assert len(out.rounds) == 1
    assert out.last.reason.startswith("0B dirty")
    assert out.downtime_ns < 10 * MS


def test_nothing_dirty_is_good_enough_for_any_limit() -> None:
    out = migrate(StandardPolicy(), idle, Link(10 * GBIT), downtime_limit_ns=1)
    assert out.last.action is Action.SWITCH_OVER
    assert len(out.rounds) == 1


def test_the_operator_may_ask_for_the_switchover() -> None:
    out = migrate(StandardPolicy(), uniform(4e5, 4 * GIB), Link(1 * GBIT), ask_after_round=1)
    assert len(out.rounds) == 2
    assert out.last.action is Action.SWITCH_OVER
    assert out.last.reason.startswith("asked for")


def test_a_burst_at_every_pause_is_taken_back_three_times() -> None:
    # W13: quiet, then a jump at the moment of the switchover, again and again.
    out = migrate(
        StandardPolicy(),
        uniform(1e3, 64 << 20),
        Link(10 * GBIT),
        burst_at_pause=lambda attempt: 400_000 if attempt <= 2 else 0,
    )
    assert [d.action for d in out.rechecks] == [
        Action.CONTINUE,
        Action.CONTINUE,
        Action.SWITCH_OVER,
    ]
    assert "the last set needs 1.32s instead of" in out.rechecks[0].reason
    converged_within_limit(out)


@pytest.mark.parametrize("on_stall", OnStall)
def test_after_three_failed_pauses_the_policy_follows_on_stall(on_stall: OnStall) -> None:
    out = migrate(
        StandardPolicy(),
        uniform(1e3, 64 << 20),
        Link(10 * GBIT),
        burst_at_pause=lambda attempt: 400_000 if attempt <= 3 else 0,
        on_stall=on_stall,
        can_throttle=False,
    )
    failed = [d for d in out.rechecks if d.action is Action.CONTINUE]
    assert len(failed) == 3
    if on_stall is OnStall.PAUSE:
        # The round after the last burst sends it; four quiet rounds later the forecast is believed.
        converged_within_limit(out)
        quiet = out.rounds[-4:]
        assert all(round_.pages < 100_000 for round_ in quiet)
    else:
        assert out.last.action is Action.GIVE_UP
        assert "3 pauses were taken back" in out.last.reason


def test_a_fourth_burst_is_accepted_rather_than_pausing_for_ever() -> None:
    out = migrate(
        StandardPolicy(),
        uniform(1e3, 64 << 20),
        Link(10 * GBIT),
        burst_at_pause=lambda attempt: 400_000,
    )
    assert [d.action for d in out.rechecks].count(Action.CONTINUE) == 3
    assert out.rechecks[-1].action is Action.SWITCH_OVER
    assert out.downtime_ns > 1000 * MS


def test_a_burst_that_is_small_or_within_the_limit_is_accepted() -> None:
    small = migrate(
        StandardPolicy(),
        uniform(4e5, 4 * GIB),
        Link(25 * GBIT),
        burst_at_pause=lambda attempt: 100_000,
    )
    assert [d.action for d in small.rechecks] == [Action.SWITCH_OVER]
    assert small.downtime_ns > 300 * MS, "beyond the limit, but not another workload"
    within = migrate(
        StandardPolicy(),
        uniform(1e3, 64 << 20),
        Link(10 * GBIT),
        burst_at_pause=lambda attempt: 20_000,
    )
    assert [d.action for d in within.rechecks] == [Action.SWITCH_OVER]
    converged_within_limit(within)


def test_a_phase_jump_between_rounds_is_waited_out() -> None:
    # 400k w/s for 3 s while round 0 ends at 7 s: the set is large once, then small again.
    workload = phases(
        (0, uniform(1e3, 64 << 20)), (5, uniform(4e5, 4 * GIB)), (8, uniform(1e3, 64 << 20))
    )
    out = migrate(StandardPolicy(), workload, Link(10 * GBIT), on_stall=OnStall.CANCEL)
    converged_within_limit(out)
    assert out.rounds[0].dirty_pages > 500_000


def test_a_burst_of_zero_pages_is_not_bandwidth() -> None:
    # Round 0 handles 2.6 million pages a second because 99 % are zero; the link does 1 Gbit/s.
    workload = uniform(3e5, 512 << 20)
    out = migrate(
        StandardPolicy(), workload, Link(1 * GBIT), zero_share=0.99, on_stall=OnStall.CANCEL
    )
    assert out.last.action is Action.GIVE_UP
    first = out.decisions[0]
    sent_ns = out.rounds[1].bytes / GBIT * NS
    assert sent_ns <= first.forecast.pages_ns * 1.05 <= 2 * sent_ns


def test_a_guest_of_zero_pages_only_does_not_confuse_the_forecast() -> None:
    out = migrate(StandardPolicy(), uniform(1e3, 64 << 20), Link(10 * GBIT), zero_share=1.0)
    converged_within_limit(out)


def test_the_cap_bounds_the_forecast() -> None:
    capped = migrate(StandardPolicy(), uniform(8e3, 256 << 20), Link(10 * GBIT), cap_bps=int(GBIT))
    converged_within_limit(capped)
    view = view_of(round_stats(0, pages=1 << 20, dirty=25_000, duration_ms=3_400))
    free = StandardPolicy().decide(view)
    bounded = StandardPolicy().decide(replace(view, bandwidth_limit_bps=int(GBIT)))
    assert free.forecast.pages_ns == pytest.approx(25_000 * PAGE / (10 * GBIT) * NS, rel=0.02)
    assert bounded.forecast.pages_ns == pytest.approx(25_000 * PAGE / GBIT * NS, rel=0.02)


def test_buffered_bytes_are_downtime() -> None:
    out = migrate(StandardPolicy(), idle, Link(1 * GBIT, queued_bytes=64 << 20))
    assert out.last.forecast.queue_ns == pytest.approx((64 << 20) / GBIT * NS, rel=0.02)
    view = view_of(round_stats(0, pages=1 << 20, dirty=1, duration_ms=34_000))
    queued = StandardPolicy().decide(replace(view, queued_bytes=64 << 20))
    assert queued.action is Action.CONTINUE
    assert queued.forecast.queue_ns > 300 * MS


def round_stats(
    number: int, *, pages: int, dirty: int, duration_ms: float, zero: int = 0
) -> RoundStats:
    nbytes = (pages - zero) * PAGE
    duration_ns = round(duration_ms * MS)
    return RoundStats(
        round=number,
        pages=pages,
        normal_pages=pages - zero,
        zero_pages=zero,
        hole_pages=0,
        bytes=nbytes,
        duration_ns=duration_ns,
        bandwidth_bps=nbytes / duration_ns * NS if duration_ns else 0.0,
        dirty_pages=dirty,
        dirty_rate_bps=dirty * PAGE / duration_ns * NS if duration_ns else 0.0,
        expected_downtime_ns=0,
    )


def view_of(*rounds: RoundStats) -> RoundView:
    return RoundView(
        now_ns=sum(round_.duration_ns for round_ in rounds),
        started_ns=0,
        rounds=rounds,
        dirty_pages=rounds[-1].dirty_pages if rounds else 1,
        page_bytes=PAGE,
        memory_bytes=4 * GIB,
        queued_bytes=0,
        rtt_ns=100_000,
        state_bytes=0,
        bandwidth_limit_bps=0,
        downtime_limit_ns=300 * MS,
        timeout_ns=0,
        on_stall=OnStall.PAUSE,
        throttle_percent=0,
        can_throttle=True,
        failed_rechecks=0,
    )


def test_the_handovers_round_trips_are_those_of_a_drained_path() -> None:
    """What is queued while pages are sent makes a round trip long, and has landed by then."""
    newest = round_stats(0, pages=1 << 20, dirty=300, duration_ms=3_400)
    loaded = replace(view_of(newest), rtt_ns=9 * MS)
    unknown = forecast_downtime(loaded)
    known = forecast_downtime(replace(loaded, base_rtt_ns=MS))
    assert unknown.overhead_ns - known.overhead_ns == 3 * 8 * MS
    assert unknown.pages_ns == known.pages_ns


def test_time_in_which_nothing_came_to_be_sent_is_none_of_the_links() -> None:
    busy = [
        round_stats(0, pages=1 << 20, dirty=20_000, duration_ms=34_000),
        round_stats(1, pages=20_000, dirty=2_000, duration_ms=650),
        round_stats(2, pages=2_000, dirty=2_000, duration_ms=66),
    ]
    waits = [
        *busy[:2],
        replace(busy[2], duration_ns=busy[2].duration_ns + 2 * NS, idle_ns=2 * NS),
    ]
    assert forecast_downtime(view_of(*waits)) == forecast_downtime(view_of(*busy))
    slow = replace(waits[2], idle_ns=0, bandwidth_bps=waits[2].bandwidth_bps / 31)
    assert forecast_downtime(view_of(*busy[:2], slow)).pages_ns > 300 * MS


def test_extra_rounds_are_bounded() -> None:
    # Each round halves the set and promises as much of the next one: three extra ones, not more.
    policy = StandardPolicy()
    rounds: list[RoundStats] = []
    actions = []
    for number in range(5):
        # 1 % of the pages of the last round, but always the same, so that another one looks good.
        rounds.append(round_stats(number, pages=1 << 20, dirty=20_000, duration_ms=3_400))
        actions.append(policy.decide(view_of(*rounds)).action)
    assert actions == [Action.CONTINUE] * 3 + [Action.SWITCH_OVER] * 2


def test_no_extra_round_for_what_costs_less_than_a_round() -> None:
    few, more = (round_stats(0, pages=1 << 20, dirty=n, duration_ms=3_400) for n in (150, 300))
    assert StandardPolicy().decide(view_of(more)).action is Action.CONTINUE
    decision = StandardPolicy().decide(view_of(few))
    assert decision.action is Action.SWITCH_OVER
    assert "600KiB dirty, expected downtime" in decision.reason
    assert "<= limit 300ms" in decision.reason


def test_no_acknowledged_byte_is_an_unknown_link() -> None:
    # All memory is holes: nothing was sent, and the first dirty set must not look free.
    view = view_of(
        replace(
            round_stats(0, pages=1 << 20, dirty=10_000, duration_ms=20, zero=1 << 20),
            bytes=0,
            bandwidth_bps=0.0,
        )
    )
    assert StandardPolicy().decide(view).action is Action.CONTINUE


def test_a_pause_that_was_demanded_is_not_taken_back() -> None:
    view = view_of(round_stats(0, pages=1 << 20, dirty=1_000, duration_ms=3_400))
    decision = StandardPolicy().decide(view)
    grown = replace(view, dirty_pages=500_000)
    policy = StandardPolicy()
    assert policy.recheck(grown, decision.forecast).action is Action.CONTINUE
    asked = replace(grown, switchover_requested=True)
    assert policy.recheck(asked, decision.forecast).action is Action.SWITCH_OVER
    late = replace(grown, timeout_ns=view.now_ns)
    assert policy.recheck(late, decision.forecast).action is Action.SWITCH_OVER


def test_rounds_of_zero_pages_weigh_little_in_the_bandwidth() -> None:
    zero = round_stats(0, pages=1 << 20, dirty=60_000, duration_ms=300, zero=(1 << 20) - 1_000)
    full = round_stats(1, pages=60_000, dirty=50_000, duration_ms=200)
    expected = StandardPolicy().decide(view_of(zero, full)).forecast
    assert expected.pages_ns == pytest.approx(50_000 / 60_000 * 200 * MS, rel=0.02)


def test_a_link_that_became_slower_is_followed() -> None:
    fast = [round_stats(n, pages=50_000, dirty=50_000, duration_ms=200) for n in range(4)]
    slow = round_stats(4, pages=50_000, dirty=50_000, duration_ms=800)
    before = StandardPolicy().decide(view_of(*fast)).forecast
    after = StandardPolicy().decide(view_of(*fast, slow)).forecast
    assert after.pages_ns > 1.5 * before.pages_ns


def test_the_newest_mix_counts_when_pages_became_dearer() -> None:
    zero = [
        round_stats(n, pages=50_000, dirty=50_000, duration_ms=100, zero=49_000) for n in (1, 2, 3)
    ]
    first = round_stats(0, pages=1 << 20, dirty=50_000, duration_ms=3_400)
    full = round_stats(4, pages=50_000, dirty=50_000, duration_ms=170)
    cheap = StandardPolicy().decide(view_of(first, *zero)).forecast
    dear = StandardPolicy().decide(view_of(first, *zero, full)).forecast
    assert cheap.pages_ns < 20 * MS
    assert dear.pages_ns == pytest.approx(170 * MS, rel=0.05)


def test_zero_pages_cost_the_time_to_read_them() -> None:
    first = round_stats(0, pages=1 << 20, dirty=1 << 20, duration_ms=3_400)
    zero = round_stats(1, pages=1 << 20, dirty=1 << 20, duration_ms=400, zero=(1 << 20) - 8)
    decision = StandardPolicy().decide(view_of(first, zero))
    assert decision.forecast.pages_ns > 300 * MS
    assert decision.action is Action.CONTINUE


def test_a_decision_without_any_round_is_possible() -> None:
    decision = StandardPolicy().decide(replace(view_of(), timeout_ns=1, now_ns=1))
    assert decision.action is Action.SWITCH_OVER
    decision = StandardPolicy().decide(
        replace(
            view_of(round_stats(0, pages=10, dirty=10**6, duration_ms=0)),
            on_stall=OnStall.CANCEL,
            now_ns=NS,
            timeout_ns=NS,
        )
    )
    assert decision.action is Action.GIVE_UP


def test_a_limit_that_the_overhead_alone_exceeds_has_no_finite_bandwidth() -> None:
    saturated = [
        round_stats(n, pages=10_000, dirty=10_000, duration_ms=ms)
        for n, ms in enumerate([1000, 300, 300, 300])
    ]
    view = replace(view_of(*saturated), downtime_limit_ns=1 * MS, on_stall=OnStall.CANCEL)
    decision = StandardPolicy().decide(view)
    assert decision.action is Action.GIVE_UP
    assert decision.needed_bandwidth_bps == 0.0
    assert "would converge with a downtime limit of" in decision.reason


@pytest.mark.parametrize("on_stall", list(OnStall))
@pytest.mark.parametrize(("trips", "rtt_ms", "needed"), [(3, 100, "369ms"), (2, 200, "489ms")])
def test_a_link_too_far_for_the_limit_is_said_to_be(
    on_stall: OnStall, trips: int, rtt_ms: int, needed: str
) -> None:
    """With the limit that is told it converges."""
    rounds = [
        round_stats(0, pages=1 << 20, dirty=2_000, duration_ms=34_000),
        *(round_stats(n, pages=2_000, dirty=2_000, duration_ms=66) for n in (1, 2, 3)),
    ]
    far = replace(view_of(*rounds), base_rtt_ns=rtt_ms * MS, handover_trips=trips)
    decision = StandardPolicy().decide(replace(far, on_stall=on_stall))
    assert (
        decision.action
        is {
            OnStall.PAUSE: Action.CONTINUE,
            OnStall.CANCEL: Action.GIVE_UP,
            OnStall.THROTTLE: Action.THROTTLE,  # a guest that writes nothing needs no limit
        }[on_stall]
    )
    assert f"of it {trips} round trips of {rtt_ms}ms" in decision.reason
    assert f"would converge with a downtime limit of {needed}" in decision.reason
    limit_ns = int(needed.removesuffix("ms")) * MS
    fitting = replace(far, downtime_limit_ns=limit_ns, dirty_pages=100)
    assert StandardPolicy().decide(fitting).action is Action.SWITCH_OVER


def test_a_workload_that_grew_is_judged_by_its_newest_round() -> None:
    rounds = [
        round_stats(0, pages=1 << 20, dirty=1_000, duration_ms=10_000),
        round_stats(1, pages=1_000, dirty=90_000, duration_ms=300),
        round_stats(2, pages=90_000, dirty=400_000, duration_ms=1_300),
    ]
    decision = StandardPolicy().decide(replace(view_of(*rounds), on_stall=OnStall.CANCEL))
    assert decision.action is Action.GIVE_UP
    assert decision.needed_bandwidth_bps == pytest.approx(1.25 * 400_000 / 1.3 * PAGE, rel=0.02)


def test_fixed_rounds() -> None:
    for rounds in (1, 3):
        out = migrate(FixedRoundsPolicy(rounds), uniform(4e5, 4 * GIB), Link(1 * GBIT))
        assert len(out.rounds) == rounds
        assert out.last.action is Action.SWITCH_OVER
    asked = migrate(FixedRoundsPolicy(9), uniform(4e5, 4 * GIB), Link(1 * GBIT), ask_after_round=1)
    assert len(asked.rounds) == 2
    with pytest.raises(UsageError, match="0 rounds asked for; allowed: at least 1"):
        FixedRoundsPolicy(0)
