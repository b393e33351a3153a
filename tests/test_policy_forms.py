# SPDX-License-Identifier: Apache-2.0
"""The choice of forms against simulated machines and links: no clock, no socket."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from forms_world import (
    ALL,
    FILES,
    INTERVAL_NS,
    LIGHTEST,
    MIXED,
    NOISE,
    STANDARD,
    ZSTD_1,
    World,
    reached,
    run,
    run_from,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vmth.policy.forms import LADDER, FormChoice, FormChooser, FormCost, FormsView


@pytest.mark.parametrize("mbit", [100, 1000, 10_000, 100_000])
@pytest.mark.parametrize("costs", [MIXED, NOISE])
def test_settles_near_the_best_rung(mbit: int, costs: tuple[tuple[int, int], ...]) -> None:
    world = World(costs, mbit * 1e6 / 8)
    used = run(world)
    assert reached(world, used[20:]) > 0.93, used


@pytest.mark.parametrize(("workers", "cores"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 4)])
@pytest.mark.parametrize("mbit", [100, 1000])
@pytest.mark.parametrize("costs", [STANDARD, FILES, NOISE])
def test_is_within_a_twentieth_of_the_best_fixed_set(
    costs: tuple[tuple[int, int], ...], mbit: int, workers: int, cores: int
) -> None:
    world = World(costs, mbit * 1e6 / 8, workers=workers, cores=cores)
    used = run(world, 200)
    assert reached(world, used) > 0.95, used


def test_a_choice_at_the_edge_of_the_link_does_not_swing() -> None:
    """The workers are nearly as slow as the link: what is acknowledged says nothing new of it."""
    used = run(World(FILES, 125e6))
    assert len(set(used[10:])) == 1, used


def test_under_a_cap_the_first_packets_compress() -> None:
    assert FormChooser(ALL).first(12_500_000, 1).level > 0
    assert FormChooser(ALL).first(0, 1).forms == {"zero"}


def test_at_memory_speed_pages_go_as_they_are() -> None:
    used = run(World(MIXED, 1e12))
    assert set(used[5:]) == {0}


def test_at_100_mbit_cpu_is_spent() -> None:
    used = run(World(MIXED, 12.5e6))
    assert used[-1] >= 3


def test_a_new_cap_changes_the_choice_within_a_second() -> None:
    world, chooser = World(MIXED, 1e12), FormChooser(ALL)
    assert run(world, 20, chooser)[-1] == 0
    world.cap_bps = 12_500_000
    assert run(world, 10, chooser)[-1] >= 3
    world.cap_bps = 0
    assert run(world, 40, chooser)[-1] == 0


@pytest.mark.parametrize("mbit", [100, 1000])
def test_content_that_differs_from_place_to_place_keeps_being_tried(mbit: int) -> None:
    chooser = FormChooser(ALL)
    names = [rung.name for rung in chooser.rungs]
    mixed, noise = (World(costs, mbit * 1e6 / 8) for costs in (MIXED, NOISE))
    at, sent, could = 0, 0.0, 0.0
    for interval in range(400):
        world = noise if interval // 20 % 2 else mixed
        sent += world.rate(at)
        could += max(world.rate(rung) for rung in range(len(LADDER)))
        at = names.index(chooser.choose(world.interval(at)).rung.name)
    assert sent > 0.9 * could


def test_forms_that_are_not_allowed_are_never_chosen() -> None:
    chooser = FormChooser(frozenset({"zero", "same"}))
    for mbit in (10, 1000):
        world = World(MIXED, mbit * 1e6 / 8)
        choices: list[FormChoice] = [chooser.choose(world.interval(0)) for _ in range(20)]
        assert all(choice.forms <= {"zero", "same"} and choice.level == 0 for choice in choices)


def test_pages_whose_cost_is_not_counted_yet_teach_nothing() -> None:
    chooser = FormChooser(ALL)
    for _ in range(4):
        view = FormsView(INTERVAL_NS, FormCost(3968, 0, 0), 0.0, 0, 1, 2)
        assert chooser.choose(view).rung in chooser.rungs


def test_an_interval_without_pages_teaches_nothing() -> None:
    chooser = FormChooser(ALL)
    world = World(MIXED, 12.5e6)
    run(world, 30, chooser)
    before = chooser.rates(world.interval(3))
    chooser.choose(FormsView(INTERVAL_NS, FormCost(0, 0, 0), 0.0, 0, 2, 2))
    assert chooser.rates(world.interval(3)) == before


@settings(deadline=None)  # nothing here is timed
@given(
    link=st.floats(1e6, 1e11),
    cap=st.sampled_from([0, 1_000_000, 100_000_000]),
    workers=st.integers(1, 64),
    cores=st.integers(1, 64),
    pages=st.lists(st.integers(0, 1 << 20), min_size=1, max_size=30),
    carrying=st.floats(0.0, 1.0),
)
def test_any_numbers_give_an_allowed_choice_with_a_reason(
    link: float, cap: int, workers: int, cores: int, pages: list[int], carrying: float
) -> None:
    chooser = FormChooser(ALL)
    for count in pages:
        cost = FormCost(count, count * 1000, count * 100)
        view = FormsView(INTERVAL_NS, cost, link, cap, workers, cores, carrying=carrying)
        choice = chooser.choose(view)
        assert choice.rung in chooser.rungs and choice.reason


@pytest.mark.parametrize("higher_bps", [0, 2_000_000_000])
@pytest.mark.parametrize("lower_bps", [10_000_000, 50_000_000])
def test_a_cap_that_is_lifted_is_no_measure_of_the_link(lower_bps: int, higher_bps: int) -> None:
    """At memory speed pages go as they are again, within few intervals, which are short."""
    world, chooser = World(FILES, 4e9, cap_bps=lower_bps), FormChooser(ALL)
    assert run(world, 40, chooser)[-1] >= LIGHTEST
    names = [rung.name for rung in chooser.rungs]
    at, choices = chooser._at, []
    world.cap_bps = higher_bps
    for _ in range(30):
        choices.append(chooser.choose(world.interval(at)))
        at = names.index(choices[-1].rung.name)
    used = [names.index(choice.rung.name) for choice in choices]
    assert max(used) <= 1 and used.count(0) > 20, used  # the next one is tried at times
    assert choices[0].brief and not choices[-1].brief
    world.cap_bps = lower_bps
    assert run_from(at, world, 10, chooser)[-1] >= LIGHTEST


def test_a_slow_link_is_soon_known_again_after_its_cap_is_lifted() -> None:
    world, chooser = World(FILES, 12.5e6, cap_bps=10_000_000), FormChooser(ALL)
    at = run(world, 40, chooser)[-1]
    world.cap_bps = 0
    used = run_from(at, world, 30, chooser)
    assert used.count(0) <= 4 and min(used[6:]) >= LIGHTEST, used
    world.cap_bps = 11_000_000  # that is no more than is known
    assert min(run_from(used[-1], world, 30, chooser)) >= LIGHTEST
    world.cap_bps = 12_000_000
    assert min(run_from(used[-1], world, 30, chooser)) >= LIGHTEST


def test_an_interval_that_began_below_the_old_cap_says_nothing_of_the_link() -> None:
    world, chooser = World(FILES, 4e9, cap_bps=100_000_000), FormChooser(ALL)
    at = run(world, 40, chooser)[-1]
    mixed = replace(world.interval(at), limit_bps=115_000_000)
    world.cap_bps = 115_000_000
    assert chooser.choose(mixed).rung is chooser.rungs[at]
    assert chooser.choose(world.interval(at)).reason.endswith("capped at 115 MB/s")
    assert chooser.choose(world.interval(at)).reason.endswith("capped at 115 MB/s")


def test_a_reason_names_the_cap_that_counts() -> None:
    def told(world: World) -> str:
        chooser = FormChooser(ALL)
        run(world, 10, chooser)
        return chooser.choose(world.interval(chooser._at)).reason

    assert told(World(FILES, 4e9, cap_bps=125_000_000)).endswith("capped at 125 MB/s")
    assert told(World(FILES, 12.5e6, cap_bps=125_000_000)).endswith("link 12 MB/s")
    assert told(World(FILES, 12.5e6)).endswith("link 12 MB/s")
    assert told(World(FILES, 4e11)).endswith("link not the limit")
    assert told(World(FILES, 4e11)).startswith("raw: ")


def test_a_tunnel_in_which_the_near_end_takes_all_is_still_a_slow_link() -> None:
    """Its near end takes bytes at once: the link looks idle, whatever is sent."""
    world = World(STANDARD, 12.5e6)
    chooser = FormChooser(ALL)
    names = [rung.name for rung in chooser.rungs]
    at, used = 0, []
    for _ in range(200):
        used.append(at)
        choice = chooser.choose(replace(world.interval(at), carrying=0.1))
        at = names.index(choice.rung.name)
    assert reached(world, used) > 0.9, used


@dataclass
class Crowded(World):
    """Others want ``load`` cores, and give up what is more than their share."""

    load: float = 1.2
    had: float = 1.2
    given: float = 0.0  #: what the scheduler gave the workers when they wanted one

    def rate(self, at: int) -> float:
        cpu_ns, wire = self.costs[min(at, len(self.costs) - 1)]
        return min(self.had * 1e9 / cpu_ns, self.link_bps / wire)

    def interval(self, at: int) -> FormsView:
        view = super().interval(at)
        own = view.cost.cpu_ns / view.interval_ns
        idle = max(0.0, self.cores - self.load - own)
        return replace(view, cores=own + idle, given_cores=self.given)


def test_cores_are_taken_from_others_where_that_lets_much_more_through() -> None:
    busy = Crowded(MIXED, 117e6, load=2.0, had=1.2, given=1.6)
    assert busy.rate(ZSTD_1) > 1.4 * busy.rate(2)
    used = run(busy, 100)
    assert reached(busy, used) > 0.95, used
    assert (
        max(run(replace(busy, given=0.0), 100)) < LIGHTEST
    )  # it is not known that they would be had


@pytest.mark.parametrize(
    "world",
    [
        Crowded(MIXED, 117e6, load=2.0, had=0.2, given=1.6),  # they are not had after all
        Crowded(NOISE, 117e6, load=2.0, had=1.2, given=1.6),
        Crowded(MIXED, 1e12, load=2.0, had=1.2, given=1.6),
    ],
)
def test_what_does_not_pay_is_not_taken_again_soon(world: Crowded) -> None:
    used = run(world, 400)
    assert sum(at >= LIGHTEST for at in used) <= 7 * 5, used
    assert reached(world, used) > 0.93


@pytest.mark.parametrize(("load", "given"), [(2.0, 1.6), (1.4, 0.0)])
def test_compression_is_not_judged_by_its_first_intervals(load: float, given: float) -> None:
    chooser = FormChooser(ALL)
    names = [rung.name for rung in chooser.rungs]
    world = Crowded(MIXED, 117e6, load=load, had=1.2, given=given)
    at = 0
    used: list[int] = []
    for _ in range(30):
        begun = [at >= LIGHTEST for at in used]
        new = len(used) - begun.index(True) if any(begun) else 9
        seen = replace(world, had=0.15) if new < 3 else world
        used.append(at)
        at = names.index(chooser.choose(seen.interval(at)).rung.name)
    first = [at >= LIGHTEST for at in used].index(True)
    assert min(used[first:]) >= LIGHTEST, used


def test_no_core_is_taken_for_a_higher_level() -> None:
    """What is free pays for zstd 1; with what others have, 3 would promise a quarter more."""
    light = ((900, 4160), (1200, 4100), (1900, 4100), (11_000, 2000), (14_000, 1700))
    costs = (*light, (20_000, 1650))
    used = run(Crowded(costs, 117e6, load=1.5, had=1.2, given=1.9), 100)
    assert LIGHTEST <= max(used) <= ZSTD_1, used


def test_busy_workers_do_not_ask_the_link_again_soon() -> None:
    world = Crowded(MIXED, 117e6, load=2.0, had=0.5, given=1.6)
    used = run(world, 100)
    assert min(used[used.index(ZSTD_1) :][:22]) >= LIGHTEST, used


def test_a_little_is_not_worth_taking() -> None:
    """The scheduler would give enough for a tenth more pages a second."""
    world = Crowded(MIXED, 117e6, load=2.0, had=0.5, given=0.33)
    assert 1.0 < 0.33e9 / 10_850 / world.rate(0) < 1.25
    assert max(run(world, 200)) < LIGHTEST


def test_cores_that_others_give_up_count_once_they_were_had() -> None:
    world = Crowded(MIXED, 117e6)
    assert world.rate(ZSTD_1) > 1.4 * world.rate(2)
    used = run(world, 100)
    assert reached(world, used) > 0.95, used


def test_cores_that_were_had_are_counted_after_a_stretch_of_noise() -> None:
    """Too few idle to come back to zstd by what is seen from the rung below."""
    chooser = FormChooser(ALL)
    names = [rung.name for rung in chooser.rungs]
    at = names.index(chooser.first(100_000_000, 2).rung.name)
    used = []
    for interval in range(80):
        costs = NOISE if 20 <= interval < 30 else MIXED
        world = Crowded(costs, 117e6, cap_bps=100_000_000, load=1.95)
        used.append(at)
        at = names.index(chooser.choose(world.interval(at)).rung.name)
    assert used[60:].count(ZSTD_1) > 15, used


def test_what_lands_while_windows_grow_is_not_the_link() -> None:
    """A far, fast link: at first little lands, and the workers wait all the same."""
    chooser = FormChooser(ALL)
    for _ in range(8):
        cost = FormCost(300, 300 * 900, 300 * 4160)
        chosen = chooser.choose(FormsView(25_000_000, cost, 50e6, 0, 2, 2.0, opening=True))
        assert chosen.rung.name == "raw"
    for _ in range(3):
        chosen = chooser.choose(FormsView(25_000_000, cost, 12e6, 0, 2, 2.0))
    assert "zstd" in chosen.forms
