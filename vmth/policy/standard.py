# SPDX-License-Identifier: Apache-2.0
"""The policy that runs by default.

    asked for                            -> switch over
    no page dirty                        -> switch over
    forecast fits the downtime limit     -> switch over, after at most three short rounds
    timeout passed                       -> on_stall: pause switches over, the others give up
    throttled, and too much or too little -> throttle anew
    two rounds without shrinking         -> say what would converge, then on_stall
    the model says they never will do    -> say so; on_stall=throttle acts
    otherwise                            -> another round

A stall with ``on_stall=pause`` and no timeout goes on for ever, and says so in every reason. After
three pauses that were taken back (the last set had grown), a forecast is believed only if the
largest set of the last rounds fits as well. Pure: no clock, no I/O.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vmth.policy.dirty_model import SeenGrowth, fit_dirty_model
from vmth.policy.forecast import (
    NS,
    ROUND_NS,
    bandwidth_bps,
    bytes_per_page,
    forecast_downtime,
)
from vmth.policy.interface import Action, Decision, Forecast, OnStall, RoundView
from vmth.policy.outlook import foresee
from vmth.policy.throttle import (
    LEAST_LIMIT_BPS,
    SETTLES_NS,
    THROTTLE_MAX_PERCENT,
    first_touch_pps,
    next_limit,
    next_percent,
)
from vmth.stats import JobForecast
from vmth.units import format_duration, format_rate, format_size

__all__ = ["StandardPolicy"]

#: A set that is not below this share of the one before did not shrink.
SHRINKS_BELOW = 0.95
#: What the next round leaves is judged from so many: older ones may tell of another workload.
RECENT_ROUNDS = 4
#: Short rounds made although the limit already holds.
MAX_EXTRA_ROUNDS = 3
#: Such a round must promise a set of at most this share of the present one...
EXTRA_SHRINKS_TO = 0.5
#: ...and the pages it saves must be worth so much downtime, and so much of the round's own time.
EXTRA_SAVES_NS = ROUND_NS // 2
EXTRA_SAVES_SHARE = 0.1
#: Margin on bandwidth over dirty rate: at 1.0 rounds never get shorter.
CONVERGE_MARGIN = 1.25
#: The full pass, and two that resend: what forms pages take is known only then.
ROUNDS_FOR_A_MODEL = 3
#: A model is believed where it leads so many times beyond the limit.
SURELY_BEYOND = 1.5
#: Share of an unknown working set that the largest dirty set is taken for.
UNKNOWN_SHARE = 0.86
#: A last set this many times larger than forecast is another workload.
RECHECK_FACTOR = 2
MAX_FAILED_RECHECKS = 3
#: Rounds that are shorter are taken together to tell a dirty rate that is held to a limit.
LEAST_COUNTED_NS = 100_000_000
#: Of the handover's own time: a limit that leaves room for some pages.
LIMIT_MARGIN = 1.2
MS = 1_000_000
#: Share of its limit to which a guest is held when its sets do not shrink all the same.
STALLED_LIMIT = 0.8


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What would let the rounds converge."""

    needed_bandwidth_bps: float
    needed_dirty_rate_bps: float
    text: str


class StandardPolicy:
    """See the module. One object a job: it counts the extra rounds it asked for, and remembers the
    working set that it saw before it slowed the guest down."""

    def __init__(self) -> None:
        self._extra_rounds = 0
        self._working_set_pages = math.inf

    def decide(self, view: RoundView) -> Decision:
        expected = forecast_downtime(view)
        if view.switchover_requested:
            return Decision(Action.SWITCH_OVER, f"asked for; {_shown(view, expected)}", expected)
        # With nothing dirty no round can improve on now, however low the limit is.
        fits = view.dirty_pages == 0 or expected.total_ns <= view.downtime_limit_ns
        if fits and self._believable(view):
            return self._aim_low(view, expected)
        if _timed_out(view):
            return self._at_timeout(view, expected)
        if fits:
            return self._on_stall(view, expected, f"{view.failed_rechecks} pauses were taken back")
        if view.throttle_percent and (percent := self._throttle(view)) != view.throttle_percent:
            why = "the guest dirties " + ("too much" if percent > view.throttle_percent else "less")
            return _throttling(view, expected, _verdict(view), percent, why)
        if view.dirty_limit_bps and (limit := self._limit(view)) != view.dirty_limit_bps:
            why = "the guest may dirty " + ("less" if limit < view.dirty_limit_bps else "more")
            return _limiting(view, expected, _verdict(view), limit, why)
        if _stalled(view):
            return self._on_stall(view, expected, "the dirty set does not shrink")
        settles_at = _settles_at(view)
        if forecast_downtime(view, settles_at).total_ns > SURELY_BEYOND * view.downtime_limit_ns:
            why = (
                f"the dirty set will not get below {format_size(settles_at * view.page_bytes)}"
                if settles_at
                else "the limit is too low for any dirty set"
            )
            if view.on_stall is OnStall.THROTTLE and view.can_throttle and not view.throttled:
                return self._on_stall(view, expected, why)
            verdict = _verdict(view)
            text = f"{why}; {_shown(view, expected)}; {verdict.text}"
            return _decision(Action.CONTINUE, text, expected, verdict)
        return Decision(Action.CONTINUE, _shown(view, expected), expected)

    def foresee(self, view: RoundView, decision: Decision) -> JobForecast:
        """See ``CanForesee``: this policy asked about made-up rounds."""
        return foresee(copy.copy(self).decide, view, decision)

    def recheck(self, view: RoundView, forecast: Forecast) -> Decision:
        """SWITCH_OVER, or CONTINUE when the last set is not the one that was forecast, still
        exceeds the limit, and there were fewer than three such pauses already."""
        expected = forecast_downtime(view)
        grown = expected.pages_ns > RECHECK_FACTOR * forecast.pages_ns
        within = expected.total_ns <= view.downtime_limit_ns
        forced = view.switchover_requested or _timed_out(view)
        if not grown or within or forced or view.failed_rechecks >= MAX_FAILED_RECHECKS:
            return Decision(Action.SWITCH_OVER, _shown(view, expected), expected)
        return Decision(
            Action.CONTINUE,
            f"the last set needs {format_duration(expected.pages_ns)} instead of "
            f"{format_duration(forecast.pages_ns)}; {_shown(view, expected)}",
            expected,
        )

    def _believable(self, view: RoundView) -> bool:
        if view.failed_rechecks < MAX_FAILED_RECHECKS:
            return True
        later = [round_ for round_ in view.rounds[-RECENT_ROUNDS:] if round_.round > 0]
        largest = max((max(round_.pages, round_.dirty_pages) for round_ in later), default=0)
        return forecast_downtime(view, largest).total_ns <= view.downtime_limit_ns

    def _aim_low(self, view: RoundView, expected: Forecast) -> Decision:
        """The limit holds. Another round is made when it is short and leaves clearly less."""
        round_ns = expected.pages_ns + expected.queue_ns + view.rtt_ns + ROUND_NS
        left = fit_dirty_model(view.rounds[-RECENT_ROUNDS:]).dirty_pages(round_ns)
        saved_ns = expected.total_ns - forecast_downtime(view, left).total_ns
        cheap = round_ns < max(view.downtime_limit_ns, 2 * (view.rtt_ns + ROUND_NS))
        shrinks = left <= EXTRA_SHRINKS_TO * view.dirty_pages
        shrinks = shrinks and saved_ns > max(EXTRA_SAVES_NS, EXTRA_SAVES_SHARE * round_ns)
        if cheap and shrinks and self._extra_rounds < MAX_EXTRA_ROUNDS and not _timed_out(view):
            self._extra_rounds += 1
            return Decision(
                Action.CONTINUE,
                f"{_shown(view, expected)}; a short round should leave {math.ceil(left)} pages",
                expected,
            )
        return Decision(Action.SWITCH_OVER, _shown(view, expected), expected)

    def _at_timeout(self, view: RoundView, expected: Forecast) -> Decision:
        verdict = _verdict(view)
        action = Action.SWITCH_OVER if view.on_stall is OnStall.PAUSE else Action.GIVE_UP
        what = "pausing all the same" if action is Action.SWITCH_OVER else "giving up"
        return _decision(
            action,
            f"timeout of {format_duration(view.timeout_ns)} passed, {what}; "
            f"{_shown(view, expected)}; {verdict.text}",
            expected,
            verdict,
        )

    def _on_stall(self, view: RoundView, expected: Forecast, why: str) -> Decision:
        verdict = _verdict(view)
        text = f"{why}; {_shown(view, expected)}; {verdict.text}"
        if view.on_stall is OnStall.PAUSE:
            until = (
                f"going on until {format_duration(view.timeout_ns)} have passed"
                if view.timeout_ns
                else "going on without end, as no timeout is set"
            )
            return _decision(Action.CONTINUE, f"{text}; {until}", expected, verdict)
        if view.on_stall is OnStall.CANCEL:
            return _decision(Action.GIVE_UP, text, expected, verdict)
        if not view.can_throttle:
            return _decision(
                Action.GIVE_UP, f"{text}; this guest cannot be throttled", expected, verdict
            )
        if not view.throttled:
            self._working_set_pages = _working_set(view)
        if view.takes_rate:
            return self._on_stall_with_limit(view, expected, verdict, why)
        if view.throttle_percent >= THROTTLE_MAX_PERCENT:
            return _decision(
                Action.GIVE_UP,
                f"{text}; throttled by {view.throttle_percent} % already",
                expected,
                verdict,
            )
        # A stall says that the present throttle is not enough, whatever the rate seems to be.
        percent = max(self._throttle(view), view.throttle_percent + 1)
        return _throttling(view, expected, verdict, percent, why)

    def _on_stall_with_limit(
        self, view: RoundView, expected: Forecast, verdict: _Verdict, why: str
    ) -> Decision:
        text = f"{why}; {_shown(view, expected)}; {verdict.text}"
        if not view.dirty_limit_bps:
            return _limiting(view, expected, verdict, self._limit(view), why)
        held = f"held to {format_rate(view.dirty_limit_bps)}"
        if not _settled(view):
            return _decision(Action.CONTINUE, f"{text}; {held} just now", expected, verdict)
        if view.dirty_limit_bps <= LEAST_LIMIT_BPS:
            return _decision(Action.GIVE_UP, f"{text}; {held} already", expected, verdict)
        limit = min(self._limit(view), STALLED_LIMIT * view.dirty_limit_bps)
        return _limiting(view, expected, verdict, max(limit, LEAST_LIMIT_BPS), why)

    def _throttle(self, view: RoundView) -> int:
        """What holds the guest just below the link, judged by the last round."""
        return next_percent(view.throttle_percent, *self._rates(view))

    def _limit(self, view: RoundView) -> float:
        """The same as a dirty rate."""
        if view.dirty_limit_bps and not _settled(view):
            return view.dirty_limit_bps
        # What a limit holds is the rate of distinct pages, however small the working set.
        measured_bps = max(1, view.dirty_pages) * view.page_bytes / _counted_for_ns(view) * NS
        _, wanted_pps = self._rates(view)
        return next_limit(view.dirty_limit_bps, measured_bps, wanted_pps * view.page_bytes)

    def _rates(self, view: RoundView) -> tuple[float, float]:
        """Pages/s: (first touches in the last round, what converges). Where that was seen while it
        went on, what is dirtied in the time that the last pages have counts."""
        last = view.rounds[-1]
        seen = fit_dirty_model([last])
        if isinstance(seen, SeenGrowth):
            measured_pps = max(1.0, seen.most_pps(_room_ns(view)))
        else:
            measured_pps = first_touch_pps(
                max(1, last.dirty_pages), last.duration_ns / NS, self._working_set_pages
            )
        return measured_pps, bandwidth_bps(view) / bytes_per_page(view) / CONVERGE_MARGIN


def _settles_at(view: RoundView) -> int:
    """Pages that rounds get down to and no further, by the dirty model: as many as are dirtied
    while they are sent. 0 where they shrink to nothing, and where the rounds so far do not tell."""
    if len(view.rounds) < ROUNDS_FOR_A_MODEL:
        return 0
    model = fit_dirty_model(view.rounds[-RECENT_ROUNDS:] if view.throttled else view.rounds)
    page_ns = bytes_per_page(view) / bandwidth_bps(view) * NS
    pages = model.working_set_pages
    if not (math.isfinite(model.first_touch_pps) and math.isfinite(pages)):
        return 0
    if not isinstance(model, SeenGrowth) and model.first_touch_pps * page_ns <= NS:
        return 0
    for _ in range(100):
        pages = model.dirty_pages(pages * page_ns)
    return round(pages)


def _counted_for_ns(view: RoundView) -> int:
    """In which time the guest has dirtied the present set, at least. A source that counts it less
    often than rounds end makes rounds of a few pages that show the set of the one before."""
    lasted_ns = 0
    for round_ in reversed(view.rounds):
        lasted_ns += round_.duration_ns
        if lasted_ns >= LEAST_COUNTED_NS:
            break
    return lasted_ns


def _settled(view: RoundView) -> bool:
    """Was the limit held for all of the last round?"""
    begun_ns = view.now_ns - view.rounds[-1].duration_ns
    return begun_ns - view.limited_at_ns >= SETTLES_NS


def _working_set(view: RoundView) -> float:
    """Of a guest whose sets do not shrink. Where rounds are too much alike to tell, the sets may be
    all that it writes to, or one that grows with time: in between lies a factor of two."""
    fitted = fit_dirty_model(view.rounds).working_set_pages
    largest = max(round_.dirty_pages for round_ in view.rounds)
    return fitted if math.isfinite(fitted) else largest / UNKNOWN_SHARE


def _throttling(
    view: RoundView, expected: Forecast, verdict: _Verdict, percent: int, why: str
) -> Decision:
    return _decision(
        Action.THROTTLE,
        f"{why}; {_shown(view, expected)}; {verdict.text}; throttling by {percent} % to hold the "
        f"dirty rate below {format_rate(verdict.needed_dirty_rate_bps)}",
        expected,
        verdict,
        percent,
    )


def _limiting(
    view: RoundView, expected: Forecast, verdict: _Verdict, limit_bps: float, why: str
) -> Decision:
    text = f"{why}; {_shown(view, expected)}; {verdict.text}"
    text += f"; holding its dirty rate below {format_rate(limit_bps)}"
    return replace(_decision(Action.THROTTLE, text, expected, verdict), dirty_limit_bps=limit_bps)


def _decision(
    action: Action, reason: str, expected: Forecast, verdict: _Verdict, throttle_percent: int = 0
) -> Decision:
    return Decision(
        action,
        reason,
        expected,
        throttle_percent=throttle_percent,
        needed_bandwidth_bps=verdict.needed_bandwidth_bps,
        needed_dirty_rate_bps=verdict.needed_dirty_rate_bps,
    )


def _timed_out(view: RoundView) -> bool:
    return view.timeout_ns > 0 and view.now_ns - view.started_ns >= view.timeout_ns


def _stalled(view: RoundView) -> bool:
    """Two rounds in a row did not shrink the set, or two pairs of alternating ones did not; twice
    as many where the bandwidth that is there should do: then pages wait for something else, as for
    processors that others have for a while."""
    sets = [*(round_.dirty_pages for round_ in view.rounds[:-1]), view.dirty_pages]
    needed_bps = _verdict(view).needed_bandwidth_bps
    rounds = 4 if 0 < needed_bps <= bandwidth_bps(view) else 2
    return _flat(sets, 1, rounds) or _flat(sets, 2, rounds)


def _flat(sets: Sequence[int], lag: int, rounds: int) -> bool:
    if len(sets) < (rounds + 1) * lag:
        return False
    return all(sets[-i] >= SHRINKS_BELOW * sets[-i - lag] for i in range(1, rounds * lag + 1))


def _room_ns(view: RoundView) -> int:
    """What the downtime limit leaves for the last pages."""
    return max(ROUND_NS, view.downtime_limit_ns - forecast_downtime(view, 0).total_ns)


def _verdict(view: RoundView) -> _Verdict:
    """Either of two bandwidths converges: one that outruns what is dirtied in the time that the
    last pages have, or one that sends the whole working set in it. All rounds are looked at, as the
    first are those whose length differs, unless a throttle made another workload of the older
    ones."""
    page_cost = bytes_per_page(view)
    rate = bandwidth_bps(view)
    needed_dirty = rate / CONVERGE_MARGIN * view.page_bytes / page_cost
    nothing_ns = forecast_downtime(view, 0).total_ns
    if nothing_ns >= view.downtime_limit_ns:
        return _Verdict(0.0, needed_dirty, _needed_limit(view, nothing_ns))
    room_ns = _room_ns(view)
    model = fit_dirty_model(view.rounds[-RECENT_ROUNDS:] if view.throttled else view.rounds)
    dirty_pps = model.most_pps(room_ns)
    outrun = CONVERGE_MARGIN * dirty_pps * page_cost
    at_once = model.working_set_pages * page_cost / room_ns * NS
    needed_bandwidth = min(outrun, at_once)
    if math.isinf(model.first_touch_pps):
        dirty_rate = f"above {format_rate(view.rounds[-1].dirty_rate_bps)}"
    else:
        dirty_rate = format_rate(dirty_pps * view.page_bytes)
    # Where every round dirtied all of the working set, less may do; nobody has seen how much less.
    most = "at most " if math.isinf(model.first_touch_pps) else ""
    with_bandwidth = (
        f"{most}{format_rate(needed_bandwidth)} of bandwidth (now {format_rate(rate)}) or "
        if math.isfinite(needed_bandwidth)
        else ""
    )
    return _Verdict(
        needed_bandwidth if math.isfinite(needed_bandwidth) else 0.0,
        needed_dirty,
        f"would converge with {with_bandwidth}a dirty rate below {format_rate(needed_dirty)} "
        f"(now {dirty_rate})",
    )


def _needed_limit(view: RoundView, nothing_ns: int) -> str:
    """The handover itself takes longer than the limit, most often on a far link: no bandwidth
    helps, and of a guest that writes less only one that writes nothing."""
    rtt_ns = view.base_rtt_ns or view.rtt_ns
    return (
        f"the handover alone takes {format_duration(nothing_ns)}, of it {view.handover_trips} "
        f"round trips of {format_duration(rtt_ns)}: would converge with a downtime limit of "
        f"{format_duration(math.ceil(LIMIT_MARGIN * nothing_ns / MS) * MS)}"
    )


def _shown(view: RoundView, expected: Forecast) -> str:
    sign = "<=" if expected.total_ns <= view.downtime_limit_ns else ">"
    return (
        f"{format_size(view.dirty_pages * view.page_bytes)} dirty, expected downtime "
        f"{format_duration(expected.total_ns)} {sign} limit "
        f"{format_duration(view.downtime_limit_ns)}"
    )
