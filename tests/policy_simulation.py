# SPDX-License-Identifier: Apache-2.0
"""A migration without a clock: workloads and a link in, a policy's rounds and downtime out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from vmth.policy import Action, CanForesee, Decision, OnStall, Policy, RoundView
from vmth.stats import JobForecast, RoundStats

NS = 1_000_000_000
PAGE = 4096
SIMULATED_HANDOVER_NS = 2_000_000  #: beside round trips

#: Distinct pages dirtied in [start, end) seconds, with the vCPUs slowed down by so many percent.
Workload = Callable[[float, float, int], float]


def idle(start_s: float, end_s: float, throttle: int) -> float:
    return 0.0


def uniform(writes_per_s: float, working_set_bytes: float) -> Workload:
    pages = working_set_bytes / PAGE

    def dirtied(start_s: float, end_s: float, throttle: int) -> float:
        writes = writes_per_s * (1 - throttle / 100) * (end_s - start_s)
        return -pages * math.expm1(-writes / pages)

    return dirtied


def sweep(writes_per_s: float, working_set_bytes: float) -> Workload:
    """Goes over it in turns."""
    pages = working_set_bytes / PAGE

    def dirtied(start_s: float, end_s: float, throttle: int) -> float:
        return min(pages, writes_per_s * (1 - throttle / 100) * (end_s - start_s))

    return dirtied


def zipf(writes_per_s: float, working_set_bytes: int, skew: float = 0.99) -> Workload:
    ranks = np.arange(1, working_set_bytes // PAGE + 1, dtype=np.float64)
    share = ranks**-skew
    # Ranks of nearly the same probability are taken together: 400 classes instead of a million.
    edges = np.unique(np.geomspace(1, len(ranks), 400).astype(np.int64)) - 1
    counts = np.diff(np.append(edges, len(ranks)))
    probability = np.add.reduceat(share, edges) / counts / share.sum()

    def dirtied(start_s: float, end_s: float, throttle: int) -> float:
        writes = writes_per_s * (1 - throttle / 100) * (end_s - start_s)
        return float(-(counts * np.expm1(-probability * writes)).sum())

    return dirtied


def phases(*parts: tuple[float, Workload]) -> Workload:
    """Each part starts at its second; overlaps of one interval with several parts add up."""
    starts = [start for start, _ in parts]
    ends = [*starts[1:], math.inf]

    def dirtied(start_s: float, end_s: float, throttle: int) -> float:
        total = 0.0
        for (begin, workload), finish in zip(parts, ends, strict=True):
            low, high = max(start_s, begin), min(end_s, finish)
            if high > low:
                total += workload(low, high, throttle)
        return total

    return dirtied


@dataclass
class Link:
    """Bytes/s, a round trip, bytes buffered on the way, and what a zero page costs the source."""

    bandwidth_bps: float
    rtt_ns: int = 200_000
    queued_bytes: int = 0
    zero_page_ns: int = 200


@dataclass
class Outcome:
    decisions: list[Decision] = field(default_factory=list)
    rounds: list[RoundStats] = field(default_factory=list)
    forecasts: list[JobForecast] = field(default_factory=list)  #: one a decision
    rechecks: list[Decision] = field(default_factory=list)
    total_ns: int = 0
    downtime_ns: int = 0  #: 0: gave up or ran out of rounds
    last_pages: int = 0
    throttle_percent: int = 0
    dirty_limit_bps: float = 0.0
    limited_at_ns: int = 0

    @property
    def last(self) -> Decision:
        return self.decisions[-1]


def _look_times(duration_ns: int, first_share: float) -> list[int]:
    times, share = [], first_share
    while share < 1:
        times.append(round(duration_ns * share))
        share *= 1.25
    return times


def migrate(
    policy: Policy,
    workload: Workload,
    link: Link,
    *,
    memory_bytes: int = 8 << 30,
    zero_share: float = 0.0,
    cap_bps: int = 0,
    downtime_limit_ns: int = 300_000_000,
    timeout_ns: int = 0,
    on_stall: OnStall = OnStall.PAUSE,
    can_throttle: bool = True,
    takes_rate: bool = False,
    unlimited_pps: float = 0.0,
    max_rounds: int = 60,
    ask_after_round: int = -1,
    foresee: bool = False,
    looks: bool = False,
    first_look: float = 0.5,
    burst_at_pause: Callable[[int], int] = lambda attempt: 0,
) -> Outcome:
    """Run the round loop. ``zero_share`` is of round 0; ``burst_at_pause(n)`` pages are dirtied
    between the n-th decision to switch over and its pause. ``takes_rate``: the guest is held to a
    dirty rate, two seconds after its first limit, but for ``unlimited_pps``: of its devices.
    ``looks``: its dirty source can be looked at from ``first_look`` of each round on."""
    rate = min(link.bandwidth_bps, cap_bps) if cap_bps else link.bandwidth_bps
    out = Outcome()
    pages, now_ns, attempts, first_limited_ns = memory_bytes // PAGE, 0, 0, 0
    for number in range(max_rounds):
        zero = round(pages * zero_share) if number == 0 else 0
        nbytes = round((pages - zero) * PAGE * 1.003 + zero * 0.1) + 64
        duration = round(nbytes / rate * NS) + zero * link.zero_page_ns + link.rtt_ns
        dirty = round(workload(now_ns / NS, (now_ns + duration) / NS, out.throttle_percent))
        if out.dirty_limit_bps and now_ns - first_limited_ns > 2 * NS:
            held_pps = out.dirty_limit_bps / PAGE + unlimited_pps
            dirty = min(dirty, round(held_pps * duration / NS))
        started_s = now_ns / NS
        now_ns += duration
        out.rounds.append(
            RoundStats(
                round=number,
                pages=pages,
                normal_pages=pages - zero,
                zero_pages=zero,
                hole_pages=0,
                bytes=nbytes,
                duration_ns=duration,
                bandwidth_bps=nbytes / duration * NS,
                dirty_pages=dirty,
                dirty_rate_bps=dirty * PAGE / duration * NS,
                expected_downtime_ns=0,
                dirty_growth=tuple(
                    (ns, round(workload(started_s, started_s + ns / NS, out.throttle_percent)))
                    for ns in _look_times(duration, first_look if looks else 1.0)
                ),
            )
        )
        view = RoundView(
            now_ns=now_ns,
            started_ns=0,
            rounds=tuple(out.rounds),
            dirty_pages=dirty,
            page_bytes=PAGE,
            memory_bytes=memory_bytes,
            queued_bytes=link.queued_bytes,
            rtt_ns=link.rtt_ns,
            state_bytes=1 << 20,
            bandwidth_limit_bps=cap_bps,
            downtime_limit_ns=downtime_limit_ns,
            timeout_ns=timeout_ns,
            on_stall=on_stall,
            throttle_percent=out.throttle_percent,
            can_throttle=can_throttle,
            failed_rechecks=sum(1 for d in out.rechecks if d.action is Action.CONTINUE),
            switchover_requested=number == ask_after_round,
            takes_rate=takes_rate,
            dirty_limit_bps=out.dirty_limit_bps,
            limited_at_ns=out.limited_at_ns,
        )
        decision = policy.decide(view)
        out.decisions.append(decision)
        if foresee and isinstance(policy, CanForesee):
            out.forecasts.append(policy.foresee(view, decision))
        out.total_ns = now_ns
        pages = dirty
        if decision.action is Action.GIVE_UP:
            return out
        if decision.action is Action.THROTTLE:
            out.throttle_percent = decision.throttle_percent
            if takes_rate:
                first_limited_ns = first_limited_ns or now_ns
                out.dirty_limit_bps, out.limited_at_ns = decision.dirty_limit_bps, now_ns
        if decision.action is Action.SWITCH_OVER:
            attempts += 1
            pages = dirty + burst_at_pause(attempts)
            again = policy.recheck(replace(view, dirty_pages=pages), decision.forecast)
            out.rechecks.append(again)
            if again.action is Action.SWITCH_OVER:
                out.last_pages = pages
                last_bytes = pages * PAGE * 1.003 + link.queued_bytes + (1 << 20)
                out.downtime_ns = (
                    round(last_bytes / rate * NS) + 3 * link.rtt_ns + SIMULATED_HANDOVER_NS
                )
                return out
    return out
