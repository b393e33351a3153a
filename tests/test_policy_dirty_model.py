# SPDX-License-Identifier: Apache-2.0
"""How a dirty set grows with time, by rounds and by what was seen of the newest."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_simulation import NS, PAGE, Link, Outcome, migrate, sweep, uniform
from test_policy_outlook import ended_ns, view_of

from vmth.policy import Action, OnStall, StandardPolicy
from vmth.policy.dirty_model import (
    ENOUGH_PAGES,
    SAME_SET,
    DirtyModel,
    SeenGrowth,
    UniformWrites,
    fit_dirty_model,
)
from vmth.stats import RoundStats

MIB = 1 << 20
MS = 1_000_000
GBIT = 117e6


def lasted(ms: float, dirty: int, *growth: tuple[int, int]) -> RoundStats:
    """A round; growth in (ms, pages)."""
    stats = RoundStats(1, 1, 1, 0, 0, 1, round(ms * MS), 1.0, dirty, 1.0, 0)
    return replace(stats, dirty_growth=tuple((at * MS, pages) for at, pages in growth))


growths = st.lists(st.tuples(st.integers(1, 2_000), st.integers(0, 100_000)), max_size=8).map(
    lambda pairs: tuple(pairs)
)


@given(
    growth=growths,
    ms=st.integers(1, 2_000),
    dirty=st.integers(0, 100_000),
    before=st.lists(st.tuples(st.integers(1, 100_000), st.integers(0, 200_000)), max_size=3),
)
def test_any_growth_gives_a_set_that_only_grows(
    growth: tuple[tuple[int, int], ...],
    ms: int,
    dirty: int,
    before: list[tuple[int, int]],
) -> None:
    rounds = [*(lasted(*one) for one in before), lasted(ms, dirty, *growth)]
    model = fit_dirty_model(rounds)
    times = sorted({1, *range(MS, 3_000 * MS, 50 * MS), *(at * MS for at, _ in growth), ms * MS})
    pages = [model.dirty_pages(at) for at in times]
    assert all(math.isfinite(one) and one >= 0 for one in pages)
    for (_, less), (_, more) in itertools.pairwise(zip(times, pages, strict=True)):
        assert more >= less * (1 - 1e-9)
    assert model.dirty_pages(ms * MS) == pytest.approx(dirty, rel=1e-6)
    slow = model.slowed(0.25)
    for at, one in zip(times, pages, strict=True):
        assert slow.dirty_pages(4 * at) == pytest.approx(one, rel=1e-6, abs=1e-6)


def test_what_was_seen_is_met_and_what_lies_between_is_in_between() -> None:
    model = fit_dirty_model([lasted(800, 8_000, (100, 2_000), (400, 5_000))])
    assert isinstance(model, SeenGrowth)
    assert model.dirty_pages(100 * MS) == pytest.approx(2_000)
    assert model.dirty_pages(400 * MS) == pytest.approx(5_000)
    assert model.dirty_pages(250 * MS) == pytest.approx(3_500)
    assert 1_000 < model.dirty_pages(50 * MS) < 1_300  # it bends there, as it does behind
    assert model.dirty_pages(1_600 * MS) == pytest.approx(16_000)  # no other round tells


def test_a_saturated_set_has_a_rate_where_its_growth_was_seen() -> None:
    full, again = lasted(30_000, 32_768), lasted(1_800, 32_768)
    blind = fit_dirty_model([full, again])
    assert blind == UniformWrites(math.inf, 32_768)
    assert blind.dirty_pages(MS) == 32_768
    seen = fit_dirty_model(
        [full, replace(again, dirty_growth=((300 * MS, 7_320), (600 * MS, 14_640)))]
    )
    assert seen.first_touch_pps == pytest.approx(24_400, rel=0.01)
    assert seen.working_set_pages == 32_768
    assert seen.dirty_pages(150 * MS) == pytest.approx(3_660, rel=0.01)
    assert seen.dirty_pages(60_000 * MS) == 32_768


@pytest.mark.parametrize(
    "growth",
    [
        ((100, ENOUGH_PAGES - 1),),  # too few
        ((0, 500),),
        ((800, 500), (900, 600)),  # not before the end
        ((100, 8_001),),  # more than there were
    ],
)
def test_what_does_not_tell_is_left_out(growth: tuple[tuple[int, int], ...]) -> None:
    assert fit_dirty_model([lasted(800, 8_000, *growth)]) == fit_dirty_model([lasted(800, 8_000)])


def test_a_look_that_missed_pages_is_left_out() -> None:
    model = fit_dirty_model([lasted(800, 8_000, (100, 2_000), (200, 1_500), (400, 5_000))])
    assert isinstance(model, SeenGrowth)
    assert [pages for _, pages in model.points] == [2_000, 5_000, 8_000]


def test_only_the_newest_round_tells_its_growth() -> None:
    grown, newest = lasted(800, 8_000, (100, 2_000)), lasted(90, 1_700)
    assert isinstance(fit_dirty_model([grown, newest]), UniformWrites)
    assert fit_dirty_model([]).dirty_pages(NS) == 0


def test_a_set_that_is_dirty_at_once_stays_so_however_slow_the_guest() -> None:
    models: list[DirtyModel] = [
        UniformWrites(math.inf, 700),
        fit_dirty_model([lasted(30_000, 700), lasted(500, 700, (50, 700))]),
    ]
    for model in models:
        assert model.slowed(0.01).dirty_pages(MS) == 700


@pytest.mark.parametrize("pages", [4_000, 6_000, 7_900, 8_000])
def test_looks_near_the_end_tell_no_more_than_the_end(pages: int) -> None:
    """As those of a large set are, which is not looked at before all of it is queued."""
    full = lasted(30_000, 8_000)
    seen = fit_dirty_model([full, lasted(1_000, 8_000, (900, pages), (950, pages))])
    assert seen == fit_dirty_model([full, lasted(1_000, 8_000)])


def test_a_rest_between_two_looks_is_not_taken_for_the_end_of_growth() -> None:
    for then in (1_001, 1_030):
        model = fit_dirty_model([lasted(800, 80_000, (10, 1_000), (13, then), (100, 10_000))])
        assert model.first_touch_pps == pytest.approx(100_000, rel=0.02)
    rests_long = fit_dirty_model([lasted(800, 80_000, (10, 1_000), (100, 1_010))])
    assert rests_long.first_touch_pps == pytest.approx(100_000, rel=0.02)


def test_a_guest_that_was_quiet_at_first_is_judged_by_what_it_has_become() -> None:
    model = fit_dirty_model([lasted(3_000, 90_000, (300, 300), (470, 350), (600, 30_000))])
    assert model.most_pps(290 * MS) == pytest.approx(50_000)
    assert model.most_pps(4_000 * MS) == pytest.approx(30_000)
    even = fit_dirty_model([lasted(3_000, 90_000, (300, 9_000), (600, 18_000))])
    assert even.most_pps(290 * MS) == pytest.approx(30_000)


def test_a_set_that_ends_between_two_looks_was_not_written_to_at_random() -> None:
    """Whoever goes over 256 MiB at 150 MB/s has been everywhere after 1.8 s."""
    full = lasted(4_800, 65_536)
    in_turns = fit_dirty_model([full, lasted(2_146, 65_536, (1_482, 54_253), (1_852, 65_536))])
    assert in_turns.most_pps(280 * MS) == pytest.approx(150e6 / PAGE, rel=0.01)
    assert in_turns.dirty_pages(100 * MS) == pytest.approx(15e6 / PAGE, rel=0.01)


@pytest.mark.parametrize("pages", [2_000, 65_536])
@pytest.mark.parametrize("first_ms", [100, 300, 1_000, 2_000, 4_000])
def test_random_writes_are_never_taken_for_writes_in_turns(pages: int, first_ms: int) -> None:
    """With the chance that is in them, and looks that come a quarter later each; a page a second
    is written to each page. A set that is flat at first and grows later is another matter."""
    rng = np.random.default_rng(first_ms)
    rate = float(pages)
    for _ in range(400_000 // pages):
        written = rng.integers(0, pages, 8 * pages)
        _, first = np.unique(written, return_index=True)
        dirtied_at_ms = np.sort(first / rate * 1e3)
        times = [round(first_ms * 1.25**n) for n in range(4)]
        seen = [int(np.searchsorted(dirtied_at_ms, ms)) for ms in times]
        newest = lasted(times[-1], seen[-1], *zip(times[:-1], seen[:-1], strict=True))
        model = fit_dirty_model([lasted(20_000, pages), newest])
        linear = isinstance(model, SeenGrowth) and math.isinf(model.head.working_set_pages)
        if linear and seen[1] > SAME_SET * seen[0]:
            assert seen[1] / seen[0] >= 0.97 * times[1] / times[0], "in turns, for no reason"


# ---- what the policy makes of it -----------------------------------------------------------------


def stuck(on_stall: OnStall, *, looks: bool) -> Outcome:
    """256 MiB at 150 MB/s in turns, which a full link of 117 MB/s takes 2.3 s for."""
    return migrate(
        StandardPolicy(),
        sweep(150e6 / PAGE, 256 * MIB),
        Link(GBIT),
        on_stall=on_stall,
        looks=looks,
    )


def test_what_would_converge_is_known_of_a_set_that_every_round_dirties_whole() -> None:
    blind, seen = (stuck(OnStall.CANCEL, looks=looks) for looks in (False, True))
    assert blind.last.action is seen.last.action is Action.GIVE_UP
    assert len(seen.rounds) == 3
    assert blind.last.needed_bandwidth_bps > 800e6 and "at most" in blind.last.reason
    assert seen.last.needed_bandwidth_bps == pytest.approx(1.25 * 150e6, rel=0.01)
    assert "(now 150MB/s)" in seen.last.reason and "at most" not in seen.last.reason


def test_a_throttle_takes_no_more_than_such_a_guest_must_give() -> None:
    seen = stuck(OnStall.THROTTLE, looks=True)
    assert seen.downtime_ns
    taken = [d.throttle_percent for d in seen.decisions if d.action is Action.THROTTLE]
    assert taken[0] == pytest.approx(100 - 100 * GBIT / 1.25 / 150e6, abs=2)
    assert max(taken) <= taken[0] + 5


@pytest.mark.parametrize("looks", [False, True])
def test_uniform_writes_need_no_more_than_outruns_them(looks: bool) -> None:
    out = migrate(
        StandardPolicy(),
        uniform(150e6 / PAGE, 4096 * MIB),
        Link(GBIT),
        on_stall=OnStall.CANCEL,
        looks=looks,
    )
    assert out.last.action is Action.GIVE_UP
    assert out.last.needed_bandwidth_bps == pytest.approx(1.25 * 150e6, rel=0.05)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_late_looks_make_no_policy_too_hopeful(share: float) -> None:
    """Uniform writes over 768 MiB, that take the link far longer than they take the guest."""

    def run(on_stall: OnStall, looks: float) -> Outcome:
        return migrate(
            StandardPolicy(),
            uniform(400e6 / PAGE, 768 * MIB),
            Link(GBIT),
            on_stall=on_stall,
            looks=looks > 0,
            first_look=looks,
        )

    blind, seen = run(OnStall.CANCEL, 0), run(OnStall.CANCEL, share)
    assert seen.last.needed_bandwidth_bps == pytest.approx(blind.last.needed_bandwidth_bps, rel=0.1)
    blind, seen = run(OnStall.THROTTLE, 0), run(OnStall.THROTTLE, share)
    assert seen.downtime_ns
    assert ended_ns(seen) < 1.1 * ended_ns(blind)


def test_a_burst_after_a_quiet_beginning_does_not_end_a_throttle() -> None:
    """Of 290 ms that the last pages have, the first are quiet."""
    mb = 1_000_000
    full = RoundStats(0, 1 << 18, 1 << 18, 0, 0, 1074 * mb, 9_000 * MS, 124e6, 90_000, 41e6, 0)
    burst = RoundStats(1, 90_000, 90_000, 0, 0, 369 * mb, 3_000 * MS, 124e6, 90_000, 123e6, 0)
    grown = ((300 * MS, 300), (470 * MS, 350), (600 * MS, 30_000))
    percents = []
    for growth in ((), grown):
        rounds = (full, replace(burst, dirty_growth=growth))
        view = replace(view_of(*rounds), throttle_percent=80, can_throttle=True)
        decision = StandardPolicy().decide(replace(view, on_stall=OnStall.THROTTLE))
        percents.append(decision.throttle_percent)
    assert percents[1] >= percents[0] > 80


def test_a_quiet_beginning_does_not_hide_that_rounds_stay_long() -> None:
    mb = 1_000_000
    full = RoundStats(0, 1 << 18, 1 << 18, 0, 0, 1074 * mb, 9_000 * MS, 124e6, 90_000, 41e6, 0)
    first = RoundStats(1, 90_000, 90_000, 0, 0, 369 * mb, 3_000 * MS, 124e6, 100_000, 136e6, 0)
    newest = RoundStats(2, 100_000, 90_000, 0, 0, 369 * mb, 3_000 * MS, 124e6, 90_000, 123e6, 0)
    newest = replace(newest, dirty_growth=((300 * MS, 300), (1_500 * MS, 60_000)))
    decision = StandardPolicy().decide(view_of(full, first, newest))
    assert "the dirty set will not get below" in decision.reason
