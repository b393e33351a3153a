# SPDX-License-Identifier: Apache-2.0
"""How much a guest is slowed down so that it dirties memory just below what the link carries.

    dirty rate          |----- held -----|
    0                  0.75             1.05  x wanted,  wanted = link / margin
       give back  <---  |                |  ---> take more

A throttle of p percent lets a guest run for (100 - p) % of the time. What that does to its dirty
rate is not known: a guest that idles anyway hardly notices. So the share that it may run is scaled
by wanted rate / measured rate, after every round anew, until the measured rate is where it should
be; inside the band nothing is changed, so that noise does not make it swing.

Where it is known which vCPU dirties how much, the share is taken from those that dirty most: all
are cut down to one level, as far as the same total asks for; one below it is not slowed down.

    rate of vCPU   0 |#########|xxxxxx      x: taken
                   1 |####     |
                   2 |#########|x

A hypervisor that holds a guest to a dirty rate is told what is wanted, and less only when the guest
still dirties more (devices write memory too), after the seconds that it takes to get there.

The rate is that of first touches, which decides whether rounds get shorter: a round that dirtied
much of the working set has seen fewer distinct pages than writes (vmth/policy/dirty_model.py).
Where its course was seen, what is dirtied in the time that the last pages have counts. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = [
    "LEAST_LIMIT_BPS",
    "SETTLES_NS",
    "THROTTLE_MAX_PERCENT",
    "first_touch_pps",
    "next_limit",
    "next_percent",
    "vcpu_percents",
]

THROTTLE_MAX_PERCENT = 99
#: Shares of the wanted rate between which the throttle stays as it is.
HELD_FROM, HELD_TO = 0.75, 1.05
#: A round that dirtied nearly all of the working set tells a lower bound only: that of this share.
SATURATED = 0.98
#: Until a limit holds: QEMU looks once a second and comes nearer step by step.
SETTLES_NS = 5_000_000_000
LEAST_LIMIT_BPS = 1 << 20
#: A limit is left alone if the next one would differ by less.
SAME = 0.05


def first_touch_pps(dirty_pages: float, duration_s: float, working_set_pages: float) -> float:
    """Pages/s while nothing is dirty yet, of a round that left ``dirty_pages`` distinct ones;
    ``working_set_pages`` may be infinite."""
    if math.isinf(working_set_pages) or working_set_pages <= 0:
        return dirty_pages / duration_s
    share = min(dirty_pages / working_set_pages, SATURATED)
    return -math.log1p(-share) * working_set_pages / duration_s


def next_percent(percent: int, measured_pps: float, wanted_pps: float) -> int:
    """The throttle of the next round, 0 to THROTTLE_MAX_PERCENT, after one at ``percent``. Rates
    are first touches a second; both positive."""
    if HELD_FROM * wanted_pps <= measured_pps <= HELD_TO * wanted_pps:
        return percent
    run = (100 - percent) * wanted_pps / measured_pps
    return min(max(0, 100 - math.floor(run)), THROTTLE_MAX_PERCENT)


def next_limit(limit_bps: float, measured_bps: float, wanted_bps: float) -> float:
    """The dirty limit after rounds at ``limit_bps`` (0: none), never above what is wanted. Rates
    are bytes/s of distinct pages; both positive."""
    following = wanted_bps
    if limit_bps:
        held = HELD_FROM * wanted_bps <= measured_bps <= HELD_TO * wanted_bps
        following = min(wanted_bps, limit_bps if held else limit_bps * wanted_bps / measured_bps)
        if abs(following - limit_bps) < SAME * limit_bps:
            return limit_bps
    return max(following, LEAST_LIMIT_BPS)


def vcpu_percents(percent: int, dirtied: Sequence[float], now: Sequence[int]) -> tuple[int, ...]:
    """What each vCPU gives up so that all together dirty as much as if each gave up ``percent``,
    as far as they write to pages of their own.

    ``dirtied``: what each dirtied meanwhile, in any unit, while it gave up ``now``. Empty where
    nothing is known of any: they are then best treated alike."""
    if percent == 0:
        return tuple(0 for _ in now)
    free = [pages * 100 / (100 - taken) for pages, taken in zip(dirtied, now, strict=True)]
    wanted = sum(free) * (100 - percent) / 100
    if wanted <= 0:
        return ()
    left = level = wanted
    for index, rate in enumerate(sorted(free)):
        level = left / (len(free) - index)
        if rate > level:  # true of the last, since less is wanted than all dirty together
            break
        left -= rate
    return tuple(
        0 if rate <= level else min(100 - math.floor(100 * level / rate), THROTTLE_MAX_PERCENT)
        for rate in free
    )
