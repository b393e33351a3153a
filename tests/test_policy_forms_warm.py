# SPDX-License-Identifier: Apache-2.0
"""The choice of forms where the destination has content already, or is waited for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from forms_world import ALL, NOISE, RETURNED, STANDARD, SlowDestination, World, reached, run_from

from vmth.policy.forms import FormChooser, FormCost, FormsView


def test_with_a_warm_destination_looking_comes_after_a_glance_at_the_link() -> None:
    warm = FormChooser(ALL | {"reuse"})
    assert warm.first(0, 2).glance and warm.first(0, 2).forms == {"zero"}
    begun = warm.choose(World(RETURNED, 125e6).interval(0))
    assert "reuse" in begun.forms and begun.level == 0 and not begun.glance
    assert begun.reason.endswith("the link carries at least 125 MB/s")


@pytest.mark.parametrize("opens_after", [1, 2, 60])
def test_a_glance_lasts_while_windows_grow_but_not_for_long(opens_after: int) -> None:
    warm, world = FormChooser(ALL | {"reuse"}), World(RETURNED, 125e7)
    glances = [warm.first(0, 2).glance]
    for interval in range(1, 20):
        opening = interval < opens_after
        glances.append(warm.choose(replace(world.interval(0), opening=opening)).glance)
    assert sum(glances) == min(opens_after, 3) and not any(glances[3:])


def test_a_glance_at_a_slow_link_is_short_although_windows_grow() -> None:
    warm = FormChooser(ALL | {"reuse"})
    warm.first(0, 2)
    begun = replace(World(RETURNED, 125e6).interval(0), opening=True)
    late = replace(begun, cost=FormCost(64, 64 * 900, 64 * 4160), acked_bps=1e6)
    assert warm.choose(late).glance
    assert "reuse" in warm.choose(begun).forms


def test_a_cap_ends_the_glance() -> None:
    warm, world = FormChooser(ALL | {"reuse"}), World(RETURNED, 125e7, cap_bps=12_500_000)
    assert warm.first(0, 2).glance
    assert "reuse" in warm.choose(replace(world.interval(0), opening=True)).forms
    assert not FormChooser(ALL | {"reuse"}).first(12_500_000, 2).glance


def after_glance(link_bps: float, allowed: frozenset[str] = ALL | {"reuse"}) -> FormChooser:
    """It has seen the link, and looks for pages."""
    return after_seeing(World(RETURNED, link_bps).interval(0), allowed)


def after_seeing(view: FormsView, allowed: frozenset[str] = ALL | {"reuse"}) -> FormChooser:
    """A glance saw this, and pages are looked for."""
    chooser = FormChooser(allowed)
    chooser.first(0, 2)
    choice = chooser.choose(view)
    assert "reuse" in choice.forms and choice.level == 0
    return chooser


def warm_run(world: World, intervals: int) -> list[int]:
    chooser = FormChooser(ALL | {"reuse"})
    names = [rung.name for rung in chooser.rungs]
    at, used = names.index(chooser.first(world.cap_bps, world.workers).rung.name), []
    for _ in range(intervals):
        used.append(at)
        at = names.index(chooser.choose(world.interval(at)).rung.name)
    return used


@pytest.mark.parametrize("mbit", [100, 1000])
def test_what_is_there_is_not_sent_to_find_out_how_fast_the_link_is(mbit: int) -> None:
    used = warm_run(World(RETURNED, mbit * 1e6 / 8), 40)
    assert used[0] == 0 and 0 not in used[1:], used  # but for the glance


def test_a_file_that_holds_nothing_costs_little_at_memory_speed() -> None:
    used = warm_run(World(NOISE, 1e12), 40)
    assert set(used) <= {0, 1}
    assert set(used[20:]) == {0}, used  # a look at the link, after a second and a half, tells


def test_a_stretch_that_is_not_there_does_not_end_the_looking() -> None:
    chooser = FormChooser(ALL | {"reuse"})
    names = [rung.name for rung in chooser.rungs]
    at = names.index(chooser.first(0, 2).rung.name)
    for interval in range(60):
        away = interval % 10 in (4, 5, 6)
        at = names.index(
            chooser.choose(World(NOISE if away else RETURNED, 125e6).interval(at)).rung.name
        )
        assert at > 0, interval


@pytest.mark.parametrize("mbit", [1000, 10_000, 100_000])
def test_what_the_destination_takes_is_not_taken_for_the_link(mbit: int) -> None:
    world = SlowDestination(RETURNED, mbit * 1e6 / 8)
    used = warm_run(world, 60)
    assert set(used) <= {0, 1}, used
    assert used[0] == 0 and reached(world, used[1:]) > 0.8, used
    if mbit == 1000:
        assert set(used[1:]) == {1}, used


def test_a_destination_that_finds_slowly_gets_pages_as_they_are_where_the_link_is_faster() -> None:
    slow_disk = (500e3, 20e3, 20e3, 20e3)
    used = warm_run(SlowDestination(RETURNED, 125e7, takes=slow_disk), 100)
    assert set(used) == {0, 1} and sum(at == 1 for at in used) <= 20, used
    used = warm_run(SlowDestination(RETURNED, 12.5e6, takes=slow_disk), 300)
    assert sum(at == 0 for at in used) <= 15, used
    assert set(used[-20:]) == {1}, used


def test_an_unseen_link_is_not_asked_because_a_destination_was_busy_for_a_while() -> None:
    busy = SlowDestination(RETURNED, 125e6, takes=(500e3, 40e3, 40e3))
    chooser = after_glance(125e6)
    assert run_from(1, busy, 40, chooser) == [1] * 40


def test_a_destination_that_was_slow_for_a_while_is_asked_again_soon() -> None:
    slow = SlowDestination(RETURNED, 125e6, takes=(500e3, 20e3, 20e3))
    quick = SlowDestination(RETURNED, 125e6)
    chooser = after_glance(125e6)
    used = run_from(1, slow, 6, chooser)
    assert used[-1] == 0
    used = run_from(0, quick, 60, chooser)
    assert sum(at == 0 for at in used) <= 12, used
    assert set(used[-30:]) == {1}


def test_the_first_interval_has_what_beginning_costs() -> None:
    chooser = after_glance(125e6)
    slow_start = SlowDestination(RETURNED, 125e6, takes=(500e3, 5e3, 5e3))
    assert run_from(1, slow_start, 1, chooser) == [1]
    assert run_from(1, SlowDestination(RETURNED, 125e6), 30, chooser) == [1] * 30


def test_a_link_that_pages_filled_is_not_seen_again_where_the_destination_is_waited_for() -> None:
    chooser = after_glance(125e6)
    slow = SlowDestination(RETURNED, 125e6, takes=(500e3, 20e3, 20e3))
    assert run_from(1, slow, 6, chooser)[-1] == 0
    names, at, links = [rung.name for rung in chooser.rungs], 0, set()
    for _ in range(60):
        choice = chooser.choose(SlowDestination(RETURNED, 125e6).interval(at))
        at = names.index(choice.rung.name)
        links |= {choice.reason.rpartition("; ")[2]} if "; link" in choice.reason else set()
        if choice.reason.endswith("the destination takes no more"):  # as before, or as now
            pages = int(choice.reason.split()[2])
            assert pages < 45_000 or pages == 120_000, choice.reason
    assert at == 1 and links == {"link 125 MB/s"}


def test_a_look_is_short() -> None:
    chooser = after_glance(125e6)
    world, at, briefs = SlowDestination(RETURNED, 125e6), 1, []
    names = [rung.name for rung in chooser.rungs]
    for _ in range(80):
        choice = chooser.choose(world.interval(at))
        at = names.index(choice.rung.name)
        briefs.append((at, choice.brief))
    looks = [(at, brief) for at, brief in briefs if at == 0 or brief]
    assert 1 <= sum(at == 0 for at, _ in looks) <= 4, looks
    assert len(looks) <= 8 and all(brief for _, brief in looks), looks


def test_a_glance_at_a_fast_link_finds_that_it_takes_more_than_the_destination_finds() -> None:
    used = warm_run(SlowDestination(RETURNED, 125e8), 300)
    assert set(used) <= {0, 1}, used
    assert sum(at == 0 for at in used[:20]) >= 10, used
    assert sum(at == 0 for at in used) > 220, used


def test_a_glance_that_saw_a_part_of_a_fast_link_is_repeated() -> None:
    """Windows had just opened: a third of what the link carries, and as much as is found."""
    world = SlowDestination(RETURNED, 125e8)
    chooser = after_seeing(replace(world.interval(0), acked_bps=500e6, carrying=0.3))
    used = run_from(1, world, 100, chooser)
    assert sum(at == 0 for at in used[:12]) >= 4 and sum(at == 0 for at in used) > 70, used


def test_a_glance_is_not_repeated_where_pages_are_found_much_faster_than_it_saw() -> None:
    world = SlowDestination(RETURNED, 125e8)
    chooser = after_seeing(replace(world.interval(0), acked_bps=300e6, carrying=0.3))
    assert run_from(1, world, 40, chooser) == [1] * 40


def test_a_glance_is_seldom_repeated_where_pages_are_found_as_fast() -> None:
    world = SlowDestination(RETURNED, 480e6, takes=(500e3, 120e3))
    chooser = after_seeing(replace(world.interval(0), acked_bps=470e6, carrying=0.3))
    used = run_from(1, world, 200, chooser)
    assert sum(at == 0 for at in used) <= 12, used


def test_a_glance_is_seldom_repeated_where_the_workers_are_what_is_slow() -> None:
    costs = ((8000, 4160), *RETURNED[1:])
    world = SlowDestination(costs, 125e8, takes=(500e3, 280e3, 280e3))
    chooser = after_seeing(replace(world.interval(0), carrying=0.3))
    used = run_from(1, world, 200, chooser)
    assert 1 <= sum(at == 0 for at in used) <= 40, used


def test_late_acknowledgements_do_not_make_a_link_slow_that_was_seen_to_be_fast() -> None:
    chooser = after_glance(2e9)
    world = SlowDestination(RETURNED, 2e9)
    for _ in range(5):
        choice = chooser.choose(replace(world.interval(1), carrying=0.9))
    assert choice.forms == {"zero"}, choice.reason


def test_what_waits_at_the_destination_is_not_the_link_that_a_glance_saw() -> None:
    """Pages as they are land behind thousands that are looked for."""
    chooser = after_glance(2e9)
    world = SlowDestination(RETURNED, 2e9)
    while "reuse" in chooser.choose(world.interval(1)).forms:
        pass
    for landed_bps in (1e6, 200e6, 1.9e9, 2e9, 2e9, 2e9):
        choice = chooser.choose(replace(world.interval(0), acked_bps=landed_bps))
        assert choice.forms == {"zero"}, (landed_bps, choice.reason)


def test_a_link_that_became_fast_is_seen_later() -> None:
    """The glance found a slow one, and now the destination is what is waited for."""
    chooser = after_glance(125e6)
    used = run_from(1, SlowDestination(RETURNED, 125e8), 300, chooser)
    assert set(used[:60]) == {1} and set(used[70:]) <= {0, 1}, used
    assert sum(at == 0 for at in used[70:]) > 150, used


def test_under_a_cap_the_link_idles_and_the_destination_is_not_blamed() -> None:
    world = World(STANDARD, 125e7, cap_bps=12_500_000)
    chooser = FormChooser(ALL)
    names = [rung.name for rung in chooser.rungs]
    at = names.index(chooser.first(world.cap_bps, world.workers).rung.name)
    for _ in range(60):
        choice = chooser.choose(replace(world.interval(at), carrying=0.01))
        at = names.index(choice.rung.name)
        assert choice.level > 0 and "destination" not in choice.reason
    assert choice.reason.endswith("capped at 12 MB/s")


def test_workers_that_have_nothing_to_send_do_not_wait_for_the_destination() -> None:
    world, chooser = SlowDestination(RETURNED, 125e8, takes=(1e3, 1e3)), FormChooser(ALL)
    chooser.first(0, 2)
    for _ in range(40):
        choice = chooser.choose(replace(world.interval(1), starved=0.5))
        assert "destination" not in choice.reason


def test_a_link_that_idled_below_a_cap_is_not_taken_to_idle_above_it() -> None:
    capped, open_ = World(STANDARD, 12.5e6, cap_bps=2_500_000), World(STANDARD, 12.5e6)
    chooser = FormChooser(ALL)
    names = [rung.name for rung in chooser.rungs]
    at = names.index(chooser.first(capped.cap_bps, 2).rung.name)
    for interval in range(60):
        world = capped if interval < 30 else open_
        carrying = 0.2 if world is capped else 1.0
        choice = chooser.choose(replace(world.interval(at), carrying=carrying))
        at = names.index(choice.rung.name)
        assert "destination" not in choice.reason, interval


def test_a_reason_names_the_destination() -> None:
    chooser = after_glance(125e6)
    for _ in range(10):
        choice = chooser.choose(SlowDestination(RETURNED, 125e6).interval(1))
    assert choice.reason.endswith("the destination takes no more")
    assert "120000 pages/s expected" in choice.reason


def test_a_raw_page_is_a_page_whatever_is_known_of_the_other_forms() -> None:
    chooser = after_glance(125e6)
    view = World(RETURNED, 125e6).interval(1)
    for _ in range(5):
        chooser.choose(view)
    rates = chooser.rates(view)
    assert rates[1] > 3 * rates[0]


def test_a_warm_destination_is_asked_where_it_makes_no_difference() -> None:
    """As fast raw as with a look: the link is the limit, and nothing of this stretch is there."""
    chooser = after_glance(125e6, frozenset({"zero", "reuse"}))
    used = [chooser.choose(World(NOISE, 125e6).interval(1)).rung.name for _ in range(15)]
    assert chooser.rungs[0].name not in used
