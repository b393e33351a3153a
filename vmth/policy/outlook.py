# SPDX-License-Identifier: Apache-2.0
"""How a job should go on: its own policy, run on rounds that the models make up.

    decide -> CONTINUE     the next round lasts as long as its pages take, and the guest dirties
           -> THROTTLE     the dirty model's pages meanwhile; then the policy is asked again
           -> SWITCH OVER  what is left is sent while paused: the decision's own forecast, and what
                           is dirtied until the pause
           -> GIVE UP      there is no downtime

So short rounds, throttling and timeouts are in it as the policy handles them. The models are those
of vmth/policy/forecast.py and dirty_model.py, fitted once, to what was measured. What is known to
change is what a page takes: one that was rewritten for the first time in round 1 had no base there,
and has one when it is sent again; others have none yet. Pure: no clock, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from vmth.policy.dirty_model import DirtyModel, SeenGrowth, UniformWrites, fit_dirty_model
from vmth.policy.forecast import (
    ENOUGH_PAGES,
    NS,
    ROUND_NS,
    WIRE_OVERHEAD,
    bandwidth_bps,
    bytes_per_page,
    sending_ns,
)
from vmth.policy.interface import Action, Decision, RoundView
from vmth.policy.throttle import first_touch_pps
from vmth.stats import JobForecast, RoundStats

__all__ = ["foresee"]

#: Beyond so many rounds no end is in sight. Foreseeing one takes some 0.1 ms.
MOST_ROUNDS = 30
#: A page that is built on its base, however few bytes that makes: read, hashed, encoded, applied.
#: Where it was not measured: 2 to 7 us on machines of two cores with both ends and a busy guest on
#: them.
BUILT_PAGE_NS = 5_800
#: Where it was: what reading, hashing and encoding one took here, and as much there.
BUILT_SHARES = 2
#: From the fetch of the dirty set to the pause: what is decided, and vCPUs that are told.
PAUSES_AFTER_NS = 1_500_000
#: Of pages that round 1 sent, the share whose base a cache as large as they are still has.
BASE_FOUND = 0.9
#: Made-up looks at the dirty set of a round: each at half the time of the next one.
FIRST_LOOK_NS, LOOKS_APART, MOST_LOOKS = 10_000_000, 0.5, 4
#: Of round 1's pages: at most such a share is taken to have been the same.
MOST_SAME = 0.95


def foresee(
    decide: Callable[[RoundView], Decision], view: RoundView, decision: Decision
) -> JobForecast:
    """The job's forecast after ``decision`` on ``view``; ``decide`` is called on made-up views
    and must belong to a policy of its own."""
    after = view.rounds[-1].round if view.rounds else 0
    begun_ns = view.started_ns if view.job_started_ns is None else view.job_started_ns
    model = fit_dirty_model(view.rounds)
    for number in range(after + 1, after + 1 + MOST_ROUNDS):
        if decision.action is Action.SWITCH_OVER:
            downtime_ns = decision.forecast.total_ns + _late_ns(view, decision, model)
            total_ns = view.now_ns + downtime_ns - begun_ns
            return JobForecast(after, True, total_ns, downtime_ns, number + 1)
        if decision.action is Action.GIVE_UP:
            return JobForecast(after, False, view.now_ns - begun_ns, 0, number)
        if decision.action is Action.THROTTLE:
            model = _slowed(model, view, decision)
            view = replace(
                view,
                throttle_percent=decision.throttle_percent,
                dirty_limit_bps=decision.dirty_limit_bps,
                limited_at_ns=view.now_ns,
            )
        view = _after_round(view, number, model)
        decision = decide(view)
    return JobForecast(after, False, 0, 0, 0)


def _late_ns(view: RoundView, decision: Decision, model: DirtyModel) -> int:
    """What pages take that are dirtied between the fetch and the pause, at the price of the others:
    those that were not dirty yet."""
    if not view.rounds:
        return 0
    lasted_ns = view.rounds[-1].duration_ns
    dirty = model.dirty_pages(lasted_ns)
    if dirty <= 0:
        return 0
    grows = model.dirty_pages(lasted_ns + PAUSES_AFTER_NS) / dirty - 1
    return round(decision.forecast.pages_ns * grows)


def _slowed(model: DirtyModel, view: RoundView, decision: Decision) -> DirtyModel:
    """vCPUs that run for a share of the time touch that share of pages; those that are held to a
    rate touch no more than that. Of a guest that dirtied all of its working set in every round, the
    least that this takes counts, as where the throttle is chosen."""
    rate_pps = model.first_touch_pps
    if math.isinf(rate_pps) and view.rounds:
        last = view.rounds[-1]
        set_pages = model.working_set_pages
        rate_pps = first_touch_pps(last.dirty_pages, last.duration_ns / NS, set_pages)
        model = UniformWrites(rate_pps, set_pages)
    if decision.dirty_limit_bps:
        limit_pps = decision.dirty_limit_bps / view.page_bytes
        return model.slowed(limit_pps / rate_pps) if rate_pps > limit_pps else model
    return model.slowed((100 - decision.throttle_percent) / max(1, 100 - view.throttle_percent))


def _built_page_ns(view: RoundView) -> float:
    """By round 1, in which pages were read, hashed and encoded as they will be, and some packed
    besides, which is left out: what has a base is short already."""
    newest = view.rounds[-1]
    content = newest.pages - newest.zero_pages - newest.hole_pages - newest.same_pages
    if newest.round != 1 or content < ENOUGH_PAGES or not newest.cpu_ns:
        return BUILT_PAGE_NS
    packing = newest.forms.get("zstd")
    return BUILT_SHARES * (newest.cpu_ns - (packing.cpu_ns if packing else 0)) / content


def _shrinks_to(view: RoundView, page_bytes: float) -> float:
    """Wire bytes of a page of the round after round 1, as a share of ``page_bytes``, those of one
    in round 1. Some of round 1's were the same, as they had been written before they were sent in
    the full pass; what is sent for the first time since it was rewritten is never the same."""
    newest = view.rounds[-1]
    if newest.round != 1 or not newest.delta_pages:
        return 1.0
    changed = 1 - min(newest.same_pages / newest.pages, MOST_SAME)
    first_time = min(1 / changed, view.page_bytes * WIRE_OVERHEAD / page_bytes)
    delta = newest.delta_bytes / newest.delta_pages / page_bytes
    found = BASE_FOUND
    if view.delta_cache_pages:
        found *= min(1.0, view.delta_cache_pages / newest.pages)
    again = min(1.0, changed * (found * delta + (1 - found) * first_time))
    share = 1.0
    if view.resent_pages is not None and view.dirty_pages:
        share = view.resent_pages / view.dirty_pages
    return share * again + (1 - share) * first_time


def _looked_at(model: DirtyModel, duration_ns: int) -> tuple[tuple[int, int], ...]:
    """What would be seen of such a round, where the dirty source can be looked at: fewer looks, as
    every policy fits a model to them, and as soon as a small set's, which is queued at once."""
    if not isinstance(model, SeenGrowth):
        return ()
    times = [round(duration_ns * LOOKS_APART**n) for n in range(MOST_LOOKS, 0, -1)]
    return tuple((ns, round(model.dirty_pages(ns))) for ns in times if ns >= FIRST_LOOK_NS)


def _after_round(view: RoundView, number: int, model: DirtyModel) -> RoundView:
    """As it should look when the dirty pages of ``view`` have been sent as round ``number``."""
    pages = view.dirty_pages
    page_bytes = bytes_per_page(view)
    shrinks = _shrinks_to(view, page_bytes)
    as_now_ns = sending_ns(view, pages)
    if shrinks <= 1:
        pages_ns = max(as_now_ns * shrinks, min(as_now_ns, pages * _built_page_ns(view)))
    else:  # more bytes take the link longer, not whoever reads and hashes pages
        pages_ns = max(as_now_ns, pages * page_bytes * shrinks / bandwidth_bps(view) * NS)
    idle_ns = view.rounds[-1].idle_ns
    sending_for_ns = round(pages_ns) + view.rtt_ns + ROUND_NS
    duration_ns = sending_for_ns + idle_ns
    nbytes = round(pages * page_bytes * shrinks)
    dirty = round(model.dirty_pages(duration_ns))
    stats = RoundStats(
        round=number,
        pages=pages,
        normal_pages=pages,
        zero_pages=0,
        hole_pages=0,
        bytes=nbytes,
        duration_ns=duration_ns,
        bandwidth_bps=nbytes * NS / sending_for_ns,
        dirty_pages=dirty,
        dirty_rate_bps=dirty * view.page_bytes * NS / duration_ns,
        expected_downtime_ns=0,
        delta_pages=pages if view.rounds[-1].delta_pages else 0,
        idle_ns=idle_ns,
        dirty_growth=_looked_at(model, duration_ns),
    )
    return replace(
        view,
        now_ns=view.now_ns + duration_ns,
        rounds=(*view.rounds, stats),
        dirty_pages=dirty,
        queued_bytes=0,
        resent_pages=None,
    )
