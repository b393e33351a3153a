# SPDX-License-Identifier: Apache-2.0
"""Which forms pages take: a pure decision from measured costs.

A page costs the workers time and the link bytes; both work at once, so that what goes through is

    pages/s = min( workers / seconds of CPU a page,  link bytes/s / bytes a page )

and the ladder below is climbed as far as that grows. Each rung is dearer in CPU and cheaper in
bytes than the one before:

    zero                     bytes as they are
    + same, dedup, reuse     a hash and a look into a table
    + delta                  a copy of what was sent is kept, and compared
    + zstd -3, 1, 3, 6, 9    compression

Cores are those that idle and those that the workers have, or had lately when they wanted more: who
else runs gives some up then, and idleness alone would call a busy machine slower than it is. Where
none idle, those that the scheduler gives the workers when they want one can be taken from others,
among them the guest: that must promise a quarter more, and is undone where they are not had.

Costs are those measured in this migration; what was not tried yet is taken from priors that say how
a rung compares with the one that was. The link is what acknowledged bytes and the cap tell: while
the workers wait for it, it is what they reach; while they do not, it carries more than that, and
a cheaper rung is tried from time to time to see how much. Slow links leave time to look for
something better: there compression stays on as long as it costs nothing, and its level rises while
cores would idle and bytes are saved. Under a cap the first packets are chosen by the priors. With a
warm destination a look costs thousands of bytes less than it saves: after a glance at the link, of
some hundredths of a second, pages are looked for, and a faster link more seldom the more bytes that
would cost.

Workers also wait where the destination takes no more pages. TCP tells it from a slow link: the link
idles, or the other end has no room. Then what lands says nothing of the link, and what the
destination takes on this rung is an upper bound for it and for dearer ones.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

__all__ = ["LADDER", "FormChoice", "FormChooser", "FormCost", "FormsView", "Rung"]


@dataclass(frozen=True, slots=True)
class Rung:
    """One set of forms. ``level`` is zstd's, 0: none. The priors are per non-zero page against the
    rung below: ``cpu`` adds nanoseconds, ``shrink`` multiplies the bytes."""

    name: str
    forms: frozenset[str]
    level: int
    cpu_ns: float
    shrink: float


_RAW = frozenset({"zero"})
_CHEAP = frozenset({"zero", "same", "dedup", "reuse"})
_DELTA = _CHEAP | {"delta"}
_ALL = _DELTA | {"zstd"}

LADDER: tuple[Rung, ...] = (
    Rung("raw", _RAW, 0, 900.0, 1.0),
    Rung("same, dedup", _CHEAP, 0, 250.0, 1.0),
    Rung("delta", _DELTA, 0, 700.0, 1.0),
    Rung("zstd -3", _ALL, -3, 9_000.0, 0.6),
    Rung("zstd 1", _ALL, 1, 3_000.0, 0.83),
    Rung("zstd 3", _ALL, 3, 8_000.0, 0.94),
    Rung("zstd 6", _ALL, 6, 30_000.0, 0.96),
    Rung("zstd 9", _ALL, 9, 45_000.0, 0.98),
)

#: Another rung must promise so much more pages a second: measurements are noisy.
WORTH_A_CHANGE = 1.05
#: Workers that spend less of their time on pages than this wait for the link.
BUSY_SHARE = 0.85
#: Workers that could do so many times what the link takes have time to look for something better.
HEADROOM = 1.25
#: On links this slow, time that nobody else wants is spent on higher levels for as little as this.
#: On faster ones a level that costs nothing here may be too dear for the content that comes next.
SLOWEST_LINK_BPS = 4e7
WORTH_IDLE_TIME = 1.02
#: On faster links a look at a page costs about as long as sending it: it must have shown its worth.
SLOW_LINK_BPS = 3e8
#: A link that was not seen is worth a look where the destination finds less than this: 1 Gbit/s.
COMMON_LINK_BPS = 1.25e8
#: What is taken from others must promise so many times more pages a second than what idles.
WORTH_TAKING = 1.25
#: Intervals between two such takings.
TAKE_EVERY = 60
#: Intervals that compression lasts at least: its first have pages of before and show little of the
#: cores that are had.
COMPRESS_FOR = 4
#: A share of a core is always had.
LEAST_CORES = 0.1
#: Share by which what was measured on other rungs gives way to what the present one suggests.
FADE = 0.01
#: Share of a new measurement in the running cost.
LEARN = 0.5
#: Acknowledgements come in bursts: what landed is looked at over so many intervals, and fewer than
#: the least say nothing that would replace what is known.
LINK_INTERVALS = 4
LEAST_INTERVALS = 3
#: A link that carries something for less than this share of the time is not what workers wait for:
#: that is the destination, unless it has the least to do already.
LEAST_CARRYING = 0.75
#: Nor, with a warm destination, one that carries less than this share of what was seen of it.
SEEN_SHARE = 1 / 4
#: So much more the destination may take, for each interval since it was seen what it takes: it may
#: have been busy with something else.
FORGIVE = 0.05
#: Workers that had nothing to send for more than this share of the time waited for that.
MOST_STARVED = 0.1
#: A connection begins slowly: a link is known once the workers have waited for it so often.
LEAST_WAITS = 2
#: A link that may have grown is asked again after so many intervals of busy workers for each in
#: which they waited for it, but not more than MOST_WAITS count.
STALE_AFTER = 4
MOST_WAITS = 10
#: So many times later, as asking takes pages that are not compressed; and so many where what lands
#: is not less than the known link divided by MOST_BELOW.
LEAST_PATIENCE = 3.0
PATIENCE = 8
MOST_BELOW = 1.4
#: Intervals with fewer non-zero pages than this teach nothing.
MIN_PAGES = 64
#: Every so many intervals another rung is tried: a cheaper one to see what the link carries, while
#: that is not known, else a dearer one that does not compress, to see what it saves.
PROBE_EVERY = 16
#: Pages that take less than this share of their bytes would make such a try dear: then so much
#: more seldom.
SHORT_SHARE = 1 / 8
SHORT_PROBE_FACTOR = 4
#: A glance sees a part of a fast link. It is repeated where this part is all but enough.
WORTH_A_TRY = 1.33
#: With a warm destination, pages go as they are for so many short intervals at most, to see the
#: link: one, where that is enough to see that it is slow, or what it carries.
GLANCES = 3
#: After what makes all that is known of the link void, so many intervals are to be short.
BRIEF_INTERVALS = 4


@dataclass(frozen=True, slots=True)
class FormCost:
    """What one interval's non-zero pages cost: CPU time of the workers, bytes on the wire."""

    pages: int
    cpu_ns: int
    wire_bytes: int


@dataclass(frozen=True, slots=True)
class FormsView:
    """One interval. ``acked_bps`` are bytes/s that landed in it; ``limit_bps`` 0: no cap."""

    interval_ns: int
    cost: FormCost
    acked_bps: float
    limit_bps: int
    workers: int  #: page channels
    cores: float  #: that they used or could have used: their own time, and what idled
    given_cores: float = 0.0  #: that the scheduler gave them when they wanted one; 0: not known
    opening: bool = False  #: the channels' own windows held them, or may have: not the link
    carrying: float = 1.0  #: share of the time in which bytes were on the way, and had room there
    starved: float = 0.0  #: share of the time in which no page was there to be sent


@dataclass(frozen=True, slots=True)
class FormChoice:
    """``reason`` is one sentence with numbers and units."""

    rung: Rung
    reason: str
    brief: bool = False  #: the next interval is to be short: the link is being learned
    glance: bool = False  #: it is to be shorter still: pages go out that might not have to

    @property
    def forms(self) -> frozenset[str]:
        return self.rung.forms

    @property
    def level(self) -> int:
        return self.rung.level


@dataclass(slots=True)
class _Known:
    """Running cost of a non-zero page on one rung."""

    cpu_ns: float
    wire_bytes: float


@dataclass(slots=True)
class FormChooser:
    """One object a job, one thread. ``allowed``: the forms that both ends speak and the user
    permits; rungs that need others are left out."""

    allowed: frozenset[str]
    page_bytes: int = 4096
    rungs: tuple[Rung, ...] = field(init=False)  #: of the ladder, those of allowed forms
    _known: dict[int, _Known] = field(default_factory=dict)
    _at: int = 0
    _link_bps: float = 0.0
    _link_is_known: bool = False
    _landed_bps: deque[float] = field(default_factory=lambda: deque(maxlen=LINK_INTERVALS))
    #: Intervals on this rung in which the workers waited, but not for a cap.
    _recent: deque[FormsView] = field(default_factory=lambda: deque(maxlen=LINK_INTERVALS))
    #: By rung: pages/s that the destination takes, where the workers waited for it.
    _taken_pps: dict[int, float] = field(default_factory=dict)
    _waits: int = 0  #: intervals in which the workers waited for the link
    _busy_intervals: int = 0  #: since the last of them
    _had_cores: float = 0.0  #: that the workers had of late when they wanted them
    _intervals: int = 0
    _taken_at: int = -TAKE_EVERY  #: the interval in which cores were taken from others last
    _compressing_since: int = -COMPRESS_FOR  #: the interval in which that was begun last
    _settled: bool = True
    _limit_bps: int = 0  #: the cap of the interval before
    _brief: int = 0  #: intervals that are still to be short
    _tried_at: int = -PROBE_EVERY  #: the interval in which a glance was last repeated
    _seen_full: bool = False  #: a glance saw all that the link carries
    _glances: int = 0  #: such intervals that may still follow

    def __post_init__(self) -> None:
        self.rungs = _rungs(self.allowed)

    def first(self, limit_bps: int, workers: int) -> FormChoice:
        """Before anything is measured: under a cap what the priors make of it, else the cheapest.
        ``workers`` are taken to have a core each at most half the time: the other end needs one."""
        self._limit_bps = limit_bps
        if limit_bps:
            view = FormsView(1, FormCost(0, 0, 0), 0.0, limit_bps, workers, workers / 2)
            rates = self.rates(view)
            self._at = self._best(rates, view)
            rung = self.rungs[self._at]
            return FormChoice(rung, f"{rung.name}: begun under a cap of {limit_bps / 1e6:.1f} MB/s")
        rung = self.rungs[self._at]
        if self._warm:
            self._glances = GLANCES
            return FormChoice(rung, f"{rung.name}: a glance at the link", glance=True)
        return FormChoice(rung, f"{rung.name}: begun without a cap, 0 pages measured")

    def choose(self, view: FormsView) -> FormChoice:
        """At the end of every interval, a fraction of a second long."""
        self._intervals += 1
        self._brief = max(0, self._brief - 1)
        rose = self._limit_rose(view.limit_bps)
        if not self._settled:  # this interval still had packets of the choice before
            self._settled = True
            return self._stay("just begun")
        if not rose:  # else it had some of the old cap
            self._learn(view)
        self._had_cores = max(
            view.cost.cpu_ns / max(1, view.interval_ns), (1 - FADE) * self._had_cores
        )
        view = replace(view, cores=max(view.cores, self._had_cores))
        if self._glances:
            return self._glanced(view)
        rates = self.rates(view)
        at = self._best(rates, view)
        if at == self._at > 0 and self._may_carry_more(rates):
            self._tried_at = self._intervals
            return self._move(0, "tried, to see whether the link carries more")
        if at == self._at and self._intervals % self._probe_every() == 0:
            if self._at > 0 and not self._link_is_known:
                return self._move(self._at - 1, "tried, to see what the link carries")
            up = self._at + 1
            uncompressed = self.rungs[self._at].level == 0 and up < len(rates)
            if uncompressed and self._link_is_known and self._by_cpu(up, view) > rates[at]:
                return self._move(up, "tried, to see what it saves")
        taken = self._worth_taking(at, rates, view)
        if taken > at:
            self._taken_at = self._intervals
            had = f"{view.given_cores:.1f} cores are had when wanted, {view.cores:.1f} are free"
            return self._move(taken, had)
        if self.rungs[at].level == 0 and self._intervals - self._compressing_since < COMPRESS_FOR:
            at = max(at, self._at)
        if at != self._at:
            return self._move(at, self._reason(at, rates, view))
        return self._stay(self._reason(at, rates, view))

    def _glanced(self, view: FormsView) -> FormChoice:
        """What lands while windows grow is not the link, but it carries that at least."""
        self._link_bps = max(self._link_bps, view.acked_bps)
        self._seen_full = not view.opening and view.carrying >= LEAST_CARRYING
        self._glances -= 1
        begun = view.cost.pages >= 2 * MIN_PAGES
        more = not begun or view.acked_bps > 2 * COMMON_LINK_BPS
        if self._glances and view.opening and more and not view.limit_bps:
            return replace(self._stay("a glance at the link"), glance=True)
        self._glances = 0
        seen = f"the link carries at least {self._link_bps / 1e6:.0f} MB/s"
        return self._move(self._first_with("reuse"), f"begun with what the destination has; {seen}")

    def _may_carry_more(self, rates: Sequence[float]) -> bool:
        """Of a link of which a glance saw a part: pages as they are would be little worse, and may
        be better than what the destination takes."""
        if self._link_is_known or self._seen_full or self._at not in self._taken_pps:
            return False
        if self._intervals - self._tried_at < PROBE_EVERY:
            return False
        return rates[0] * WORTH_A_TRY >= rates[self._at]

    def _limit_rose(self, limit_bps: int) -> bool:
        """What was seen of a link below a cap says little of what it carries above."""
        before, self._limit_bps = self._limit_bps, limit_bps
        rose = before > 0 and (limit_bps == 0 or limit_bps > before)
        if rose:
            self._link_is_known, self._link_bps = False, 0.0
            self._waits = self._busy_intervals = 0
            self._landed_bps.clear()
            self._brief = BRIEF_INTERVALS
        return rose

    @property
    def _warm(self) -> bool:
        """The destination told of content that it has."""
        return "reuse" in self.allowed

    def _first_with(self, form: str) -> int:
        return next(at for at, rung in enumerate(self.rungs) if form in rung.forms)

    def _probe_every(self) -> int:
        mine = self._known.get(self._at)
        short = mine is not None and mine.wire_bytes < SHORT_SHARE * self.page_bytes
        return PROBE_EVERY * (SHORT_PROBE_FACTOR if short else 1)

    def _move(self, at: int, reason: str) -> FormChoice:
        if self.rungs[self._at].level == 0 and self.rungs[at].level != 0:
            self._compressing_since = self._intervals
        # A look at the link, which may cost bytes, or at what the destination takes by now.
        if (at == 0 and not self._link_is_known) or at in self._taken_pps:
            self._brief = max(self._brief, LEAST_INTERVALS + 1)
        self._at = at
        self._settled = False  # the next interval still has packets of the old choice
        self._landed_bps.clear()
        self._recent.clear()
        return self._stay(reason)

    def _stay(self, reason: str) -> FormChoice:
        rung = self.rungs[self._at]
        return FormChoice(rung, f"{rung.name}: {reason}", self._brief > 0)

    def _best(self, rates: Sequence[float], view: FormsView) -> int:
        """The rung that lets most through. Among equals the cheapest, since what it saves is the
        guest's; but where the link is the limit and the workers wait for it, up to zstd 1: content
        differs from place to place, and looking costs nothing then."""
        best = max(range(len(rates)), key=lambda at: rates[at])
        while best > 0 and rates[best - 1] * WORTH_A_CHANGE >= rates[best]:
            best -= 1
        if self._warm:  # where it makes no difference, the next pages may be ones that are there
            looking = self._first_with("reuse")
            if best < looking and rates[looking] * WORTH_A_CHANGE >= rates[best]:
                best = looking
        free = best
        if self._link_is_known and self._link_bps < SLOW_LINK_BPS:
            while free + 1 < len(rates) and self._is_free(free + 1, rates, view):
                free += 1
        if free > best:
            return free
        if best > self._at and rates[best] <= rates[self._at] * WORTH_A_CHANGE:
            return self._at
        return best

    def _worth_taking(self, at: int, rates: Sequence[float], view: FormsView) -> int:
        """A rung that begins to compress, for the cores that others would have to give up, if that
        is worth it. A higher level is not."""
        if self._intervals - self._taken_at < TAKE_EVERY:
            return at
        if not self._link_is_known or view.given_cores <= view.cores:
            return at
        promised = self.rates(replace(view, cores=view.given_cores))
        light = [up for up, rung in enumerate(self.rungs) if rung.level != 0 and rung.level <= 1]
        best = max((promised[up] for up in light), default=0.0)
        if best < WORTH_TAKING * rates[at]:
            return at
        return next(up for up in light if promised[up] * WORTH_A_CHANGE >= best)

    def _is_free(self, up: int, rates: Sequence[float], view: FormsView) -> bool:
        """Whether the workers have the time for that rung, and something may come of it."""
        if self.rungs[up].level > 1 and (
            self._link_bps > SLOWEST_LINK_BPS or rates[up] < WORTH_IDLE_TIME * rates[up - 1]
        ):
            return False
        return self._by_cpu(up, view) >= HEADROOM * rates[up - 1]

    def _by_cpu(self, at: int, view: FormsView) -> float:
        """Pages a second that the workers could do on that rung, and the destination takes."""
        return min(_workers(view) * 1e9 / self._costs()[at][0], self._taken(at))

    def rates(self, view: FormsView) -> list[float]:
        """Non-zero pages a second that each rung promises."""
        workers = _workers(view)
        link_bps = self._link_bps
        if view.limit_bps:
            link_bps = min(link_bps, view.limit_bps) if self._link_is_known else view.limit_bps
        elif not self._link_is_known:
            # Who gave a file has no fast link, until it is seen to be one.
            hoped_bps = COMMON_LINK_BPS if self._taken_pps else SLOW_LINK_BPS
            unseen = max(link_bps, 0.0 if self._waits else hoped_bps)
            link_bps = unseen if self._warm and self._waits < LEAST_WAITS else 0.0
        found = []
        for at, (cpu_ns, wire_bytes) in enumerate(self._costs()):
            by_cpu = workers * 1e9 / cpu_ns
            by_link = link_bps / wire_bytes if link_bps else by_cpu
            found.append(min(by_cpu, by_link, self._taken(at)))
        return found

    def _learn(self, view: FormsView) -> None:
        cost = view.cost
        if cost.pages < MIN_PAGES or not cost.cpu_ns or not cost.wire_bytes:
            return  # pages are counted before what they cost is known
        fresh = _Known(cost.cpu_ns / cost.pages, cost.wire_bytes / cost.pages)
        mine = self._known.get(self._at)
        if mine is None:
            self._known[self._at] = fresh
        else:
            mine.cpu_ns += LEARN * (fresh.cpu_ns - mine.cpu_ns)
            mine.wire_bytes += LEARN * (fresh.wire_bytes - mine.wire_bytes)
        for at, other in self._known.items():
            if at != self._at:
                cpu_ns, wire_bytes = self._cost(at, self._at)
                other.cpu_ns += FADE * (cpu_ns - other.cpu_ns)
                other.wire_bytes += FADE * (wire_bytes - other.wire_bytes)
        if not view.opening:
            self._learn_link(view)

    def _learn_link(self, view: FormsView) -> None:
        self._landed_bps.append(view.acked_bps)
        landed_bps = sum(self._landed_bps) / len(self._landed_bps)
        busy = view.cost.cpu_ns / max(1, view.interval_ns * _workers(view))
        capped = 0 < view.limit_bps <= landed_bps * WORTH_A_CHANGE
        if self._waits_for_destination(view, busy < BUSY_SHARE and not capped):
            return
        if busy < BUSY_SHARE or capped:
            self._busy_intervals = 0
            if landed_bps > 0:
                self._waits = min(self._waits + 1, MOST_WAITS)
                enough = len(self._landed_bps) >= LEAST_INTERVALS
                # What a glance saw stands until more was seen.
                first = not self._link_is_known and not self._warm
                if enough or first or landed_bps > self._link_bps:
                    self._link_bps = landed_bps
                self._link_is_known = self._waits >= LEAST_WAITS or capped
            return
        # It carries at least what lands; how much more cannot be seen from here.
        self._busy_intervals += 1
        self._link_bps = max(self._link_bps, landed_bps)
        near = landed_bps * MOST_BELOW > self._link_bps  # both may be the limit: no hint at more
        # A link that would have to be many times faster to matter is asked again as much later.
        rates = self.rates(view)
        patience = max(PATIENCE if near else LEAST_PATIENCE, rates[self._at] / max(1.0, rates[0]))
        if self._busy_intervals > STALE_AFTER * self._waits * patience:
            self._link_is_known = False
            self._busy_intervals = 0

    def _waits_for_destination(self, view: FormsView, waits: bool) -> bool:
        """Learns what it takes, where it is what the workers wait for."""
        for at in self._taken_pps:
            self._taken_pps[at] *= 1 + FORGIVE
        if waits:
            self._recent.append(view)
        seen = self._recent
        # TCP counts the wait for a late acknowledgement as carrying: of few bytes it says little.
        full = LEAST_CARRYING * len(seen)
        idles = sum(of.carrying for of in seen) < full
        if self._warm:
            idles |= sum(of.acked_bps for of in seen) < self._link_bps * SEEN_SHARE * len(seen)
        fed = sum(of.starved for of in seen) < MOST_STARVED * len(seen)
        if self._at == 0 or not (waits and idles and fed):
            self._taken_pps.pop(self._at, None)
            return False
        if len(seen) >= LEAST_INTERVALS:  # the first ones have what beginning costs
            pages = sum(of.cost.pages for of in seen)
            took_ns = sum(of.interval_ns for of in seen)
            self._taken_pps[self._at] = pages * 1e9 / max(1, took_ns)
        return True

    def _costs(self) -> list[tuple[float, float]]:
        """(CPU ns, wire bytes) a non-zero page of each rung: as measured, or from the nearest rung
        that was, by the priors between them."""
        rungs = self.rungs
        if not self._known:
            cpu, size, costs = 0.0, float(self.page_bytes), []
            for rung in rungs:
                cpu, size = cpu + rung.cpu_ns, size * rung.shrink
                costs.append((cpu, size))
            return costs
        return [self._cost(at) for at in range(len(rungs))]

    def _cost(self, at: int, nearest: int | None = None) -> tuple[float, float]:
        if nearest is None:
            nearest = min(self._known, key=lambda known: (abs(known - at), known))
        known, rungs = self._known[nearest], self.rungs
        cpu, size = known.cpu_ns, known.wire_bytes
        for step in range(nearest + 1, at + 1):
            cpu, size = cpu + rungs[step].cpu_ns, size * rungs[step].shrink
        if at < nearest:  # by shares: a machine is slower or faster at all of them
            prior = [sum(rung.cpu_ns for rung in rungs[: up + 1]) for up in (at, nearest)]
            cpu = max(rungs[0].cpu_ns, cpu * prior[0] / prior[1])
        for step in range(at + 1, nearest + 1):
            size = min(float(self.page_bytes), size / rungs[step].shrink)
        if rungs[at].forms == _RAW:
            size = float(self.page_bytes)  # whatever the others save
        return cpu, size

    def _reason(self, at: int, rates: Sequence[float], view: FormsView) -> str:
        cpu_ns, wire_bytes = self._costs()[at]
        link = f"link {self._link_bps / 1e6:.0f} MB/s" if self._link_is_known else ""
        if view.limit_bps and (not link or self._link_bps * WORTH_A_CHANGE >= view.limit_bps):
            link = f"capped at {view.limit_bps / 1e6:.0f} MB/s"
        if rates[at] >= self._taken(at):
            link = "the destination takes no more"
        return (
            f"{rates[at]:.0f} pages/s expected at {cpu_ns / 1e3:.1f} us of CPU and "
            f"{wire_bytes:.0f} bytes a page; {link or 'link not the limit'}"
        )

    def _taken(self, at: int) -> float:
        """Pages/s that the destination takes at most: what is dearer does not make it faster."""
        return min((pps for down, pps in self._taken_pps.items() if down <= at), default=math.inf)


def _workers(view: FormsView) -> float:
    """As many as can work at the same time."""
    return max(LEAST_CORES, min(view.workers, view.cores))


def _rungs(allowed: frozenset[str]) -> tuple[Rung, ...]:
    """The ladder without the forms that may not be used; a rung that adds none is left out."""
    found: list[Rung] = []
    seen: set[tuple[frozenset[str], int]] = set()
    for rung in LADDER:
        forms = rung.forms & allowed | {"zero"}
        level = rung.level if "zstd" in forms else 0
        if (forms, level) not in seen:
            seen.add((forms, level))
            found.append(Rung(rung.name, forms, level, rung.cpu_ns, rung.shrink))
    return tuple(found)
