# SPDX-License-Identifier: Apache-2.0
"""What the next round and the downtime would cost, judged from the rounds so far.

    downtime = pages + queue + state + overhead      each part is a field of ``Forecast``

    pages      dirty pages x bytes a page / bandwidth, but never less than reading them takes, nor
               than what a page took in the rounds so far; a few, which lie apart, take more
    queue      bytes handed to sockets that have not landed yet / bandwidth
    state      CPU and device state / bandwidth
    overhead   the round trips of last pages and seal, one or two, and of the grant, and what pause,
               seal, records and resume cost, as the last handovers tell; less what goes on while
               the last pages are under way

Bandwidth is acknowledged bytes over time, never pages: a burst of zero pages moves millions of
pages a second and says nothing about the link. Bytes a page come from the rounds after the full
pass, because what is dirtied is hot and rarely zero, whatever the rest of memory looks like. Round
1 sends most of that for the first time since it was rewritten, without a base: younger rounds that
have built on what landed alone tell what as many pages as they had will cost.

What is dirtied meanwhile is vmth/policy/dirty_model.py's. Pure: no clock, no I/O.
"""

from __future__ import annotations

from vmth.policy.interface import Forecast, RoundView
from vmth.stats import RoundStats

__all__ = [
    "HANDOVER_NS",
    "HURRIED_HANDOVER_NS",
    "bandwidth_bps",
    "bytes_per_page",
    "first_handover_ns",
    "forecast_downtime",
    "known_downtime_ns",
    "page_ns",
    "sending_ns",
]

NS = 1_000_000_000
#: A round's fixed cost beside one round trip: handing over the bitmap, the barrier, its wake-ups.
ROUND_NS = 1_000_000
#: Where no handover was measured yet. Pause, last fetch and barrier, state, seal and resume, beside
#: the round trips and the journals' records: 4 to 9 ms on machines of two cores with both ends on
#: them, and up to twice that where the guest, as soon as it runs, takes one of them for itself.
HANDOVER_NS = 7_000_000
#: The same where the threads that the paused guest waits for run before all others: 2 to 4 ms.
HURRIED_HANDOVER_NS = 3_000_000
#: GRANTED at the source, STARTING and RUNNING at the destination: each durable, one after another.
JOURNAL_RECORDS = 3
#: Where the seal goes out behind the last pages (two round trips in all): state is saved and said
#: meanwhile, and of the pages' time so much is no downtime of their own.
MEANWHILE_NS = 500_000
#: Header and descriptors: a packet of some 64 pages has 64 bytes + at most 16 a page.
WIRE_OVERHEAD = 1.005
#: Telling that a page is zero costs a pass over it: 0.30 to 0.34 us from DRAM on one core.
PAGE_READ_NS = 350
#: So many pages lie apart, and are too few to be read, hashed and looked up by several at a time...
FEW_PAGES = 1_000
#: ...at such a price each, whatever is sent of them.
SCATTERED_PAGE_NS = 2_000
#: So many pages, not zero, tell what one costs...
ENOUGH_PAGES = 256
#: ...with a base, if of so many the delta was sent.
BUILT_SHARE = 0.3
#: A round that took so long tells the bandwidth half as well as one without end.
LONG_NS = 200_000_000
#: A round counts half as much as the one after it.
DECAY = 0.5
#: Without a single acknowledged byte the link is unknown: as slow as the slowest that is in use.
UNKNOWN_BPS = 1_000_000.0


def bandwidth_bps(view: RoundView) -> float:
    """Bytes/s that land, smoothed over rounds, at most the cap.

    A round weighs by its age and by how much of it was transfer: one that took little more than a
    round trip, or that handled mostly zero pages, only says that the link is at least that fast.
    Several short ones in a row do not outweigh the last long one.
    """
    fixed_ns = view.rtt_ns + ROUND_NS + LONG_NS
    weighted = total = 0.0
    weight_of_age = 1.0
    for round_ in reversed(view.rounds):
        if round_.bytes > 0 and round_.bandwidth_bps > 0:
            sending_for_ns = round_.duration_ns - round_.idle_ns
            long_enough = sending_for_ns / (sending_for_ns + fixed_ns)
            payload = round_.normal_pages / max(round_.pages, 1)
            weight = weight_of_age * max(long_enough * payload, 1e-6)
            weighted += weight * round_.bandwidth_bps
            total += weight
        weight_of_age *= DECAY
    measured = weighted / total if total else UNKNOWN_BPS
    return min(measured, view.bandwidth_limit_bps) if view.bandwidth_limit_bps else measured


def _telling(view: RoundView, pages: float) -> list[RoundStats]:
    """The rounds by which the cost of each of so many pages is judged, oldest first. A larger set
    than the younger rounds had is not all as hot as theirs."""
    later = [round_ for round_ in view.rounds if round_.round > 0 and round_.pages > 0]
    younger = [round_ for round_ in later if round_.round > 1]
    content = sum(round_.pages - round_.zero_pages - round_.hole_pages for round_ in younger)
    built = sum(round_.delta_pages for round_ in younger) >= BUILT_SHARE * content
    return younger if built and content >= max(ENOUGH_PAGES, pages) else later


def bytes_per_page(view: RoundView, pages: float | None = None) -> float:
    """Wire bytes that each of so many dirty pages costs (None: of the view's): the larger of the
    smoothed and the newest mix of the rounds after the full pass; a whole page while there is
    none. Of pages that are the same no more are expected than in either of the last two: many are
    in a round after one that went over memory just behind the guest, and none in the next."""
    whole = view.page_bytes * WIRE_OVERHEAD
    later = _telling(view, view.dirty_pages if pages is None else pages)
    if not later:
        return whole
    nbytes = nchanged = 0.0
    weight = 1.0
    for round_ in reversed(later):
        nbytes += weight * round_.bytes
        nchanged += weight * max(1, round_.pages - round_.same_pages)
        weight *= DECAY
    newest = later[-1].bytes / max(1, later[-1].pages - later[-1].same_pages)
    same = min(round_.same_pages / round_.pages for round_ in later[-2:])
    changed = max(nbytes / nchanged, newest) * (1 - same)
    return min(max(changed, later[-1].bytes / later[-1].pages), whole)


def page_ns(view: RoundView, pages: float | None = None) -> float:
    """Wall time that each of so many dirty pages (None: of the view's) took in the rounds after the
    full pass, beyond what every round costs; 0 while there is none. Where pages take a short form
    the link does not set the pace. The share of zeros in a round's time is left out: what they cost
    is known."""
    fixed_ns = view.rtt_ns + ROUND_NS
    spent = npages = 0.0
    weight = 1.0
    for round_ in reversed(_telling(view, view.dirty_pages if pages is None else pages)):
        content = 1 - (round_.zero_pages + round_.hole_pages) / round_.pages
        spent += weight * content * max(round_.duration_ns - round_.idle_ns - fixed_ns, 0)
        npages += weight * round_.pages
        weight *= DECAY
    return spent / npages if npages else 0.0


def sending_ns(view: RoundView, pages: float) -> float:
    """Until so many dirty pages have landed, without what is queued before them."""
    wire_ns = bytes_per_page(view, pages) / bandwidth_bps(view) * NS
    return pages * max(wire_ns, page_ns(view, pages), PAGE_READ_NS)


def forecast_downtime(view: RoundView, dirty_pages: float | None = None) -> Forecast:
    """The downtime by part if the guest were paused now, with ``dirty_pages`` instead of the view's
    where another set is asked about."""
    pages = view.dirty_pages if dirty_pages is None else dirty_pages
    rate = bandwidth_bps(view)
    scattered_ns = 0 if view.streamed else min(pages, FEW_PAGES) * SCATTERED_PAGE_NS
    pages_ns = round(max(sending_ns(view, pages), scattered_ns))
    meanwhile_ns = 0 if view.streamed or view.handover_trips > 2 else min(pages_ns, MEANWHILE_NS)
    return Forecast(
        pages_ns=pages_ns,
        queue_ns=round(view.queued_bytes / rate * NS),
        state_ns=round(view.state_bytes / rate * NS),
        # By then the queue has drained: it is a part of its own.
        overhead_ns=view.handover_trips * (view.base_rtt_ns or view.rtt_ns)
        + max(0, _handover_ns(view) - meanwhile_ns),
    )


def known_downtime_ns(view: RoundView) -> int:
    """The same without what a handover costs in any case, which only handovers tell."""
    return forecast_downtime(view).total_ns - _handover_ns(view)


def first_handover_ns(usual_ns: int, journal_ns: int) -> int:
    """What to expect of a handover before one was measured, on a disk on which a durable record
    takes ``journal_ns``."""
    return usual_ns + JOURNAL_RECORDS * journal_ns


def _handover_ns(view: RoundView) -> int:
    return view.handover_ns or first_handover_ns(HANDOVER_NS, view.journal_ns)
