# SPDX-License-Identifier: Apache-2.0
"""The job's forecast against what the same policy then does, without a clock."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from policy_simulation import (
    NS,
    PAGE,
    SIMULATED_HANDOVER_NS,
    Link,
    Outcome,
    idle,
    migrate,
    sweep,
    uniform,
    zipf,
)

from vmth.policy import Action, Decision, FixedRoundsPolicy, OnStall, RoundView, StandardPolicy
from vmth.policy.forecast import (
    HANDOVER_NS,
    SCATTERED_PAGE_NS,
    bytes_per_page,
    forecast_downtime,
    page_ns,
)
from vmth.policy.outlook import BUILT_PAGE_NS
from vmth.report import forecast_lines, forecast_values
from vmth.stats import (
    DowntimeParts,
    FormCounters,
    JobForecast,
    MigrationResult,
    RoundStats,
    TransferCounters,
)

MIB = 1 << 20
MS = 1_000_000
GBIT = 117e6


DOWNTIME_LIMIT_NS = 300 * MS  #: of a simulated move, by default

moved = partial(migrate, foresee=True)


def ended_ns(out: Outcome) -> int:
    return out.total_ns + out.downtime_ns


@example(rate=75256834.0, working_set_mib=174, memory_gib=1, zero_share=0.78125, looks=False)
@given(
    rate=st.floats(1e6, 95e6),
    working_set_mib=st.integers(32, 2048),
    memory_gib=st.integers(1, 16),
    zero_share=st.floats(0.0, 0.8),
    looks=st.booleans(),
)
def test_writes_all_over_a_working_set_are_foreseen_after_round_1(
    rate: float, working_set_mib: int, memory_gib: int, zero_share: float, looks: bool
) -> None:
    out = moved(
        StandardPolicy(),
        uniform(rate / PAGE, working_set_mib * MIB),
        Link(GBIT),
        memory_bytes=memory_gib << 30,
        zero_share=zero_share,
        on_stall=OnStall.CANCEL,
        looks=looks,
    )
    assert out.downtime_ns
    made = out.forecasts[min(1, len(out.forecasts) - 1)]
    assert made.converges
    rounds = len(out.rounds) + 1
    assert abs(made.rounds - rounds) <= 1  # a short round is made or not at a hair's breadth
    short_ns = 0 if made.rounds == rounds else DOWNTIME_LIMIT_NS  # none of them takes longer
    assert abs(made.total_ns - ended_ns(out)) <= 0.05 * ended_ns(out) + short_ns
    if made.rounds == rounds:
        longer_ns = HANDOVER_NS - SIMULATED_HANDOVER_NS
        assert made.downtime_ns - longer_ns == pytest.approx(out.downtime_ns, rel=0.15, abs=4 * MS)


@given(
    rate=st.floats(1e6, 85e6),
    working_set_mib=st.integers(32, 2048),
    memory_gib=st.integers(2, 16),
)
def test_a_guest_that_goes_over_its_memory_in_turns_is_foreseen_where_it_is_looked_at(
    rate: float, working_set_mib: int, memory_gib: int
) -> None:
    out = moved(
        StandardPolicy(),
        sweep(rate / PAGE, working_set_mib * MIB),
        Link(GBIT),
        memory_bytes=memory_gib << 30,
        on_stall=OnStall.CANCEL,
        looks=True,
    )
    assert out.downtime_ns
    made = out.forecasts[min(1, len(out.forecasts) - 1)]
    assert made.converges
    short_ns = 0 if made.rounds == len(out.rounds) + 1 else DOWNTIME_LIMIT_NS
    assert abs(made.total_ns - ended_ns(out)) <= 0.05 * ended_ns(out) + short_ns


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("skew", [0.6, 0.99])
def test_the_total_time_of_a_skewed_workload_is_foreseen_after_round_1(
    skew: float, looks: bool
) -> None:
    out = moved(StandardPolicy(), zipf(60e6 / PAGE, 1 << 30, skew), Link(GBIT), looks=looks)
    assert out.downtime_ns
    assert out.forecasts[1].total_ns == pytest.approx(ended_ns(out), rel=0.05)


def view_of(*rounds: RoundStats) -> RoundView:
    """After them, 300 ms allowed, an idle queue, a round trip of 1 ms."""
    return RoundView(
        now_ns=sum(stats.duration_ns for stats in rounds),
        started_ns=0,
        rounds=rounds,
        dirty_pages=rounds[-1].dirty_pages,
        page_bytes=PAGE,
        memory_bytes=1 << 30,
        queued_bytes=0,
        rtt_ns=MS,
        state_bytes=0,
        bandwidth_limit_bps=0,
        downtime_limit_ns=300 * MS,
        timeout_ns=0,
        on_stall=OnStall.PAUSE,
        throttle_percent=0,
        can_throttle=False,
        failed_rechecks=0,
    )


def test_pages_that_had_no_base_in_round_1_have_one_later() -> None:
    """A third of them had; the rest will, so that the next rounds are as short as that third's."""
    policy, mb = StandardPolicy(), 1_000_000
    full = RoundStats(0, 1 << 18, 200_000, 0, 0, 400 * mb, 4_000 * MS, 100e6, 60_000, 61e6, 0)
    again = RoundStats(1, 60_000, 40_000, 0, 0, 100 * mb, 1_000 * MS, 100e6, 40_000, 160e6, 0)
    based = replace(again, delta_pages=20_000, delta_bytes=2 * mb)
    told = []
    for newest in (again, based):
        view = view_of(full, newest)
        told.append(policy.foresee(view, policy.decide(view)))
    assert told[0].total_ns > 6_000 * MS
    # Few bytes, but 40,000 pages that are read, hashed, encoded and applied.
    assert 5_000 * MS + 40_000 * BUILT_PAGE_NS < told[1].total_ns < 5_400 * MS


def based_by_a_third(dirty_pages: int) -> RoundView:
    """After round 1, a third of whose pages had bases; so many are dirty now."""
    mb, rate = 1_000_000, dirty_pages * 4_000.0
    full = RoundStats(0, 1 << 18, 200_000, 0, 0, 400 * mb, 4_000 * MS, 100e6, 60_000, 61e6, 0)
    again = RoundStats(1, 60_000, 40_000, 0, 0, 100 * mb, 1_000 * MS, 100e6, dirty_pages, rate, 0)
    return view_of(full, replace(again, delta_pages=20_000, delta_bytes=2 * mb))


def test_what_a_page_with_a_base_takes_is_known_from_round_1() -> None:
    """Its threads' time without packing, once here and once there, of pages that had content."""
    policy, view = StandardPolicy(), based_by_a_third(40_000)
    full, again = view.rounds

    def next_ns(cpu_ms: int, **changes: Any) -> int:
        packing = FormCounters(tried_pages=40_000, cpu_ns=300 * MS)
        measured = replace(again, cpu_ns=cpu_ms * MS, forms={"zstd": packing}, **changes)
        seen = replace(view, rounds=(full, measured))
        return policy.foresee(seen, policy.decide(seen)).total_ns - 5_000 * MS

    quick, slow = next_ns(300 + 120), next_ns(300 + 240)  # 2 and 4 us a page
    assert 160 * MS < quick < 160 * MS + 80 * MS  # 40,000 pages, twice 2 us each, then fewer
    assert 320 * MS < slow < 2 * 320 * MS
    half = next_ns(300 + 120, zero_pages=10_000, hole_pages=10_000, same_pages=10_000)
    assert half > 320 * MS  # 4 us as well, of 30,000 pages
    assert next_ns(0) > 40_000 * BUILT_PAGE_NS
    assert next_ns(1, same_pages=59_900) == next_ns(0, same_pages=59_900)  # too few to tell


def test_a_cache_that_holds_few_of_the_bases_has_few_of_them_later() -> None:
    policy, view = StandardPolicy(), based_by_a_third(40_000)

    def total_ns(cache_pages: int) -> int:
        held = replace(view, delta_cache_pages=cache_pages)
        return policy.foresee(held, policy.decide(held)).total_ns

    assert total_ns(0) == total_ns(60_000) == total_ns(1 << 20)
    # 40,000 pages of 1667 bytes: 667 ms if none had a base. With half of the bases, over half.
    assert total_ns(60_000) + 150 * MS < total_ns(30_000) < total_ns(6_000)
    assert total_ns(1) > 5_667 * MS - 60 * MS


def test_pages_that_no_round_has_sent_before_cost_as_much_as_in_round_1() -> None:
    policy, view = StandardPolicy(), based_by_a_third(20_000)
    full, again = view.rounds

    def total_ns(view: RoundView) -> int:
        return policy.foresee(view, policy.decide(view)).total_ns

    unknown, all_, half, none = (
        total_ns(replace(view, resent_pages=pages)) for pages in (None, 20_000, 10_000, 0)
    )
    assert unknown == all_ < half < none
    # The 20,000 pages take 1667 bytes each, as in round 1: 333 ms, and what is dirtied then.
    assert 333 * MS < none - 5_000 * MS < 600 * MS
    # Of round 1, half cost nothing, being the same: the others twice as much, and so will these.
    same = replace(view, rounds=(full, replace(again, same_pages=30_000)), resent_pages=0)
    assert total_ns(same) - 5_000 * MS > 667 * MS
    # No page costs more than a whole one.
    most, all_same = (
        total_ns(replace(same, rounds=(full, replace(again, same_pages=pages))))
        for pages in (36_000, 60_000)
    )
    assert total_ns(same) < most == all_same


def test_what_is_dirtied_until_the_pause_is_in_the_forecast() -> None:
    full = RoundStats(0, 1 << 18, 200_000, 0, 0, 400_000_000, 4_000 * MS, 100e6, 20_000, 20e6, 0)
    again = RoundStats(1, 20_000, 20_000, 0, 0, 80_000_000, 800 * MS, 100e6, 16_000, 25e6, 0)
    short = RoundStats(2, 500, 500, 0, 0, 2_000_000, 20 * MS, 100e6, 800, 163e6, 0)
    view = view_of(full, again, short)
    policy = StandardPolicy()
    decision = policy.decide(view)
    assert decision.action is Action.SWITCH_OVER
    told = policy.foresee(view, decision)
    # 1.5 ms more than the round's 20, of a set that has hardly begun to saturate, at their price.
    late_ns = told.downtime_ns - decision.forecast.total_ns
    assert late_ns / decision.forecast.pages_ns == pytest.approx(1.5 / 20, rel=0.05)


def test_a_saturated_set_is_not_foreseen_to_grow_until_the_pause() -> None:
    """Nor to cost what round 1 did, as a set does that is larger than any whose price is known."""
    full = RoundStats(0, 1 << 18, 200_000, 0, 0, 400_000_000, 4_000 * MS, 100e6, 40_000, 20e6, 0)
    first = RoundStats(1, 40_000, 40_000, 0, 0, 84_000_000, 840 * MS, 100e6, 40_000, 195e6, 0)
    second = RoundStats(2, 40_000, 0, 0, 0, 4_000_000, 220 * MS, 20e6, 40_000, 745e6, 0)
    view = view_of(full, first, built(second))
    policy = StandardPolicy()
    decision = policy.decide(view)
    assert decision.action is Action.SWITCH_OVER
    told = policy.foresee(view, decision)
    assert told.downtime_ns == pytest.approx(decision.forecast.total_ns, rel=0.01)


def test_a_few_pages_that_take_no_bytes_are_read_all_the_same() -> None:
    full = RoundStats(0, 1 << 18, 200_000, 0, 0, 400_000_000, 4_000 * MS, 100e6, 60_000, 20e6, 0)
    silent = RoundStats(1, 60_000, 0, 0, 0, 1_000, 30 * MS, 1e6, 700, 25e6, 0, same_pages=60_000)
    view = view_of(full, silent)
    assert forecast_downtime(view).pages_ns == 700 * SCATTERED_PAGE_NS
    # Nobody reads them here where a hypervisor sends them: it may send many at the price of few.
    assert forecast_downtime(replace(view, streamed=True)).pages_ns < 700 * SCATTERED_PAGE_NS / 3
    # Many are read side by side, in the order of memory.
    assert forecast_downtime(view, 100_000).pages_ns < 100_000 * SCATTERED_PAGE_NS / 3


def test_more_bytes_take_the_link_longer_not_the_processors() -> None:
    """Over a link of 2 GB/s, a page's 2 us are reading and hashing: 412 bytes take 0.2."""
    full = RoundStats(0, 1 << 20, 1 << 20, 0, 0, 4 << 30, 2_000 * MS, 2e9, 200_000, 400e6, 0)
    first = RoundStats(1, 200_000, 0, 0, 0, 82_400_000, 400 * MS, 2e9, 180_000, 1e9, 0)
    first = replace(first, delta_pages=20_000, delta_bytes=2_000_000, same_pages=180_000)
    view = replace(view_of(full, first), resent_pages=0)
    made: list[RoundView] = []

    class Watching(StandardPolicy):
        def decide(self, view: RoundView) -> Decision:
            made.append(view)
            return super().decide(view)

    policy = Watching()
    policy.foresee(view, policy.decide(view))
    second = made[1].rounds[-1]
    assert second.round == 2
    assert second.bytes == pytest.approx(180_000 * PAGE, rel=0.02)
    assert second.duration_ns == pytest.approx(180_000 * PAGE / 2e9 * NS, rel=0.1)
    # Had round 1 sent them too, a tenth would change: nine of ten by 100 bytes, one without base.
    made.clear()
    view = replace(view, resent_pages=180_000)
    policy.foresee(view, policy.decide(view))
    assert made[1].resent_pages is None
    resent = made[1].rounds[-1]
    assert resent.bytes == pytest.approx(180_000 * 0.1 * (0.9 * 100 + 0.1 * PAGE), rel=0.02)


#: Measured over 100 Mbit/s: 1910 bytes a page in round 1, 314 and 271 in those after it.
FULL = RoundStats(0, 262144, 67502, 66868, 14, 390_070_000, 32_800 * MS, 11.9e6, 38038, 4.8e6, 0)
FIRST = RoundStats(1, 38038, 13774, 0, 0, 72_670_000, 6_110 * MS, 11.9e6, 25549, 17e6, 0)
SECOND = RoundStats(2, 25549, 1363, 0, 0, 8_030_000, 680 * MS, 11.8e6, 5803, 35e6, 0)
THIRD = RoundStats(3, 5803, 240, 0, 0, 1_570_000, 136 * MS, 11.6e6, 1645, 50e6, 0)


def built(stats: RoundStats, **changes: Any) -> RoundStats:
    """Nine of ten pages that are not zero went as a delta."""
    changed = replace(stats, **changes)
    return replace(changed, delta_pages=(changed.pages - changed.zero_pages) * 9 // 10)


def test_once_pages_are_built_on_bases_round_1_tells_no_more_what_they_cost() -> None:
    for younger, costs in (
        ((SECOND, THIRD), (700, 900)),
        ((built(SECOND), built(THIRD)), (271, 320)),
    ):
        view = view_of(FULL, FIRST, *younger)
        assert costs[0] < bytes_per_page(view) < costs[1]
        assert costs[0] < page_ns(view) * 11.6e6 / NS < costs[1]
    # One that costs more than those before it is believed at once.
    dear = built(THIRD, bytes=5803 * 3000)
    assert bytes_per_page(view_of(FULL, FIRST, built(SECOND), dear)) == pytest.approx(3000)


@pytest.mark.parametrize(
    "second",
    [
        # A set that is larger than what the price is known of: not all of it is as hot.
        built(SECOND, pages=400, normal_pages=40, bytes=108_000, duration_ns=10 * MS),
        # Zeros tell nothing of pages that are none.
        built(SECOND, pages=20_400, zero_pages=20_000, bytes=100_000, duration_ns=10 * MS),
        # Few had a base.
        replace(built(SECOND, bytes=2_000_000), pages=30_000, delta_pages=3_000),
    ],
)
def test_pages_without_a_base_are_not_taken_for_cheap_ones(second: RoundStats) -> None:
    burst = replace(second, dirty_pages=10_000)
    view = view_of(FULL, FIRST, burst)
    assert bytes_per_page(view) > 500
    decision = StandardPolicy().decide(view)
    assert decision.action is Action.CONTINUE
    assert decision.forecast.total_ns > 400 * MS


def test_pages_that_were_the_same_once_are_not_expected_to_be_again() -> None:
    """A guest that rewrites memory in turns, just ahead of the rounds: three of four pages that it
    had dirtied were sent as they are by the round before."""
    again = RoundStats(2, 60_000, 60_000, 0, 0, 246_000_000, 2_050 * MS, 120e6, 55_000, 110e6, 0)
    lucky = RoundStats(3, 55_000, 14_000, 0, 0, 57_400_000, 480 * MS, 120e6, 13_000, 110e6, 0)
    lucky = replace(lucky, same_pages=41_000)
    assert bytes_per_page(view_of(FULL, again, lucky)) == pytest.approx(4_100, rel=0.01)
    # Where it is so of each round it is the guest's way, which writes what was there.
    silent = replace(again, bytes=24_600_000, normal_pages=6_000, same_pages=54_000)
    assert bytes_per_page(view_of(FULL, silent, lucky)) == pytest.approx(0.255 * 4_100, rel=0.01)
    assert bytes_per_page(view_of(FULL, silent)) == pytest.approx(410)
    all_same = replace(silent, bytes=500, normal_pages=0, same_pages=60_000)
    assert bytes_per_page(view_of(FULL, all_same, all_same)) == pytest.approx(500 / 60_000)


def test_a_few_pages_tell_nothing() -> None:
    few = built(SECOND, pages=200, bytes=2_000, duration_ns=2 * MS, dirty_pages=100)
    assert bytes_per_page(view_of(FULL, FIRST, few)) > 1800


def test_a_source_that_waits_in_each_round_is_foreseen_to_wait_again() -> None:
    mb = 1_000_000
    full = RoundStats(0, 1 << 18, 1 << 18, 0, 0, 1074 * mb, 10_740 * MS, 100e6, 100_000, 38e6, 0)
    again = RoundStats(1, 100_000, 100_000, 0, 0, 410 * mb, 4_100 * MS, 100e6, 40_000, 40e6, 0)
    waits = replace(again, duration_ns=4_300 * MS, idle_ns=200 * MS)
    told = []
    for newest in (again, waits):
        view = replace(view_of(full, newest), now_ns=20_000 * MS)
        decision = StandardPolicy().decide(view)
        assert decision.action is Action.CONTINUE
        told.append(StandardPolicy().foresee(view, decision))
    assert all(each.converges for each in told)
    assert told[1].total_ns - told[0].total_ns > 190 * MS


def test_an_idle_guest_is_foreseen_after_the_full_pass() -> None:
    out = moved(StandardPolicy(), idle, Link(GBIT), memory_bytes=1 << 30)
    (made,) = out.forecasts
    assert (made.after_round, made.converges, made.rounds) == (0, True, 2)
    assert made.total_ns == pytest.approx(ended_ns(out), rel=0.01)


def test_one_that_gives_up_is_foreseen_to() -> None:
    busy = uniform(400e6 / PAGE, 1 << 30)
    out = moved(StandardPolicy(), busy, Link(GBIT), on_stall=OnStall.CANCEL)
    assert out.last.action is Action.GIVE_UP
    made = out.forecasts[1]
    assert not made.converges
    assert made.downtime_ns == 0
    assert made.total_ns == pytest.approx(out.total_ns, rel=0.1)


def test_without_a_timeout_no_end_is_in_sight() -> None:
    busy = uniform(400e6 / PAGE, 1 << 30)
    out = moved(StandardPolicy(), busy, Link(GBIT), on_stall=OnStall.PAUSE, max_rounds=5)
    assert [(made.converges, made.total_ns) for made in out.forecasts[1:]] == [(False, 0)] * 4


def test_a_timeout_that_pauses_is_in_the_forecast() -> None:
    busy = uniform(400e6 / PAGE, 512 * MIB)
    timeout_ns = 60 * NS
    out = moved(
        StandardPolicy(),
        busy,
        Link(GBIT),
        memory_bytes=1 << 30,
        on_stall=OnStall.PAUSE,
        timeout_ns=timeout_ns,
    )
    made = out.forecasts[1]
    assert made.converges
    assert made.total_ns == pytest.approx(ended_ns(out), rel=0.1)
    assert made.downtime_ns == pytest.approx(out.downtime_ns, rel=0.1)


def test_a_throttle_to_come_is_in_the_forecast() -> None:
    busy = uniform(200e6 / PAGE, 1 << 30)
    out = moved(StandardPolicy(), busy, Link(GBIT), on_stall=OnStall.THROTTLE)
    assert out.throttle_percent
    assert out.downtime_ns
    first = next(made for made in out.forecasts if made.converges)
    assert first.after_round <= 2
    assert first.total_ns == pytest.approx(ended_ns(out), rel=0.35)


def test_a_guest_that_dirties_all_of_its_set_in_every_round_is_foreseen_to_be_held() -> None:
    """How fast it writes is not known, so neither is how much a throttle leaves of it."""
    pages = 128 * MIB / PAGE

    def rewrites(start_s: float, end_s: float, throttle: int) -> float:
        return min(pages, 200e6 / PAGE * (1 - throttle / 100) * (end_s - start_s))

    out = moved(
        StandardPolicy(),
        rewrites,
        Link(GBIT),
        memory_bytes=1 << 30,
        on_stall=OnStall.THROTTLE,
    )
    assert out.throttle_percent and out.downtime_ns
    made = out.forecasts[1]
    assert (made.after_round, made.converges) == (1, True)
    assert made.downtime_ns > 0
    assert made.total_ns == pytest.approx(ended_ns(out), rel=0.2)


def test_it_counts_from_the_jobs_start_the_guests_handover_and_the_journals_records() -> None:
    policy = StandardPolicy()
    views = []

    class Watching(StandardPolicy):
        def decide(self, view):  # type: ignore[no-untyped-def]
            views.append(view)
            return super().decide(view)

    moved(Watching(), idle, Link(GBIT), memory_bytes=1 << 30)
    view = views[0]
    plain = policy.foresee(view, policy.decide(view))
    later = replace(view, job_started_ns=-500 * MS, handover_ns=26 * MS)
    told = policy.foresee(later, policy.decide(later))
    assert told.downtime_ns == plain.downtime_ns + 26 * MS - HANDOVER_NS
    assert told.total_ns == plain.total_ns + 526 * MS - HANDOVER_NS
    slow_disk = replace(view, journal_ns=20 * MS)
    assert policy.foresee(slow_disk, policy.decide(slow_disk)).downtime_ns == (
        plain.downtime_ns + 60 * MS
    )


def test_foreseeing_changes_nothing() -> None:
    """Asked or not, the same decisions follow."""

    class Mute(StandardPolicy):
        foresee = None  # type: ignore[assignment]

    workload = uniform(60e6 / PAGE, 256 * MIB)
    told, mute = (
        moved(policy, workload, Link(GBIT), memory_bytes=1 << 30)
        for policy in (StandardPolicy(), Mute())
    )
    assert len(told.forecasts) == len(told.decisions)
    assert told.decisions == mute.decisions


def test_a_policy_need_not_foresee() -> None:
    out = moved(FixedRoundsPolicy(2), idle, Link(GBIT), memory_bytes=1 << 30)
    assert not out.forecasts


# -- in the result ---------------------------------------------------------------------------------


def round_of(number: int, made: JobForecast | None) -> RoundStats:
    return RoundStats(number, 1, 1, 0, 0, 4096, 1, 1.0, 0, 0.0, 0, forecast=made)


def result_of(*made: JobForecast | None) -> MigrationResult:
    return MigrationResult(
        verified=True,
        verified_scope="memory",
        mode="live",
        rounds=tuple(round_of(number, forecast) for number, forecast in enumerate(made)),
        total_ns=2_000 * MS,
        downtime_ns=10 * MS,
        downtime_parts=DowntimeParts(),
        memory_bytes=4096,
        wire_bytes=4096,
        digest_source="",
        digest_destination="",
        transfer=TransferCounters(),
    )


def forecast_of(after: int, converges: bool = True) -> JobForecast:
    return JobForecast(after, converges, 2_200 * MS, 8 * MS if converges else 0, 4)


def test_the_one_after_round_1_counts() -> None:
    made = [forecast_of(number) for number in range(3)]
    assert result_of(*made, None).forecast == made[1]
    assert result_of(made[0], None).forecast == made[0]
    assert result_of(None).forecast is None
    told = forecast_values(result_of(*made, None))
    assert told is not None
    assert told["total_time_error"] == pytest.approx(0.1)
    assert told["downtime_error"] == pytest.approx(-0.2)
    assert (told["after_round"], told["rounds"], told["total_time_ms"]) == (1, 4, 2200)


def test_no_error_is_told_of_an_end_that_was_not_foreseen() -> None:
    told = forecast_values(result_of(forecast_of(0), forecast_of(1, converges=False), None))
    assert told is not None
    assert told["converges"] is False
    assert told["total_time_error"] is None
    assert forecast_values(None) is None


def test_people_are_told_in_one_line() -> None:
    (line,) = forecast_lines(result_of(forecast_of(0), forecast_of(1), None))
    assert "after round 1: total time 2.2s and downtime 8ms in 4 rounds" in line
    (line,) = forecast_lines(result_of(forecast_of(0, converges=False), None))
    assert "would not converge" in line
    assert forecast_lines(result_of(None)) == []
