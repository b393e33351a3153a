# SPDX-License-Identifier: Apache-2.0
"""Which vCPU gives up how much: as much in all as if all gave up the same, and none that dirties
little."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_precopy import Loop, LoopGuest, ScriptedPolicy, answer

from vmth.errors import GuestError
from vmth.events import Throttled
from vmth.guest import CanThrottleVcpus
from vmth.guest_throttle import GuestThrottle
from vmth.policy.interface import Action
from vmth.policy.throttle import THROTTLE_MAX_PERCENT, vcpu_percents


@pytest.mark.parametrize(
    ("percent", "dirtied", "now", "expected"),
    [
        (40, [1000, 0], [0, 0], (40, 0)),
        (50, [1000, 10], [0, 0], (51, 0)),  # 505 in all
        (50, [100, 100], [0, 0], (50, 50)),
        (50, [300, 100], [0, 0], (67, 0)),  # 200 in all, cut at 100
        (60, [300, 100], [0, 0], (74, 20)),  # cut at 80
        (40, [500, 10], [50, 0], (41, 0)),  # the first would dirty 1000
        (0, [1000, 1], [50, 0], (0, 0)),
        (99, [1000, 1000], [0, 0], (99, 99)),
        (50, [0, 0], [0, 0], ()),
    ],
)
def test_shares(
    percent: int, dirtied: list[int], now: list[int], expected: tuple[int, ...]
) -> None:
    assert vcpu_percents(percent, dirtied, now) == expected


@given(
    st.integers(0, THROTTLE_MAX_PERCENT),
    st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, THROTTLE_MAX_PERCENT)),
        min_size=1,
        max_size=8,
    ),
)
def test_shares_take_as_much_in_all(percent: int, vcpus: list[tuple[int, int]]) -> None:
    dirtied, now = [row[0] for row in vcpus], [row[1] for row in vcpus]
    shares = vcpu_percents(percent, dirtied, now)
    if not any(dirtied):
        assert shares == () or percent == 0
        return
    assert len(shares) == len(vcpus)
    assert all(0 <= share <= THROTTLE_MAX_PERCENT for share in shares)
    free = [pages * 100 / (100 - taken) for pages, taken in zip(dirtied, now, strict=True)]
    kept = [rate * (100 - share) / 100 for rate, share in zip(free, shares, strict=True)]
    wanted = sum(free) * (100 - percent) / 100
    # Whole percents: each gives up at most one more than it should, and 99 at most.
    assert sum(kept) <= wanted + 0.01 * sum(free) + 1e-6
    assert sum(kept) >= wanted - 0.01 * sum(free) - 1e-6
    level = max(kept)
    cut = [rate for rate, share in zip(kept, shares, strict=True) if share]
    for rate, share in zip(free, shares, strict=True):
        if share == 0:
            assert rate <= level + 1e-6
        else:  # nobody who dirties less than those that are cut gives anything up
            assert rate >= min(cut)
    order = sorted(range(len(free)), key=lambda index: free[index])
    assert [shares[index] for index in order] == sorted(shares)


class VcpuGuest(LoopGuest):
    """Two vCPUs; ``rates``: pages that each dirties between two questions, unthrottled."""

    def __init__(self, rates: Sequence[int], known: bool = True) -> None:
        super().__init__([64])
        self.rates = rates
        self.known = known
        self.percents = [0] * len(rates)
        self.pages = [0.0] * len(rates)

    def throttle(self, percent: int) -> None:
        super().throttle(percent)
        self.percents = [percent] * len(self.rates)

    def vcpu_dirty_pages(self) -> Sequence[int]:
        for vcpu, rate in enumerate(self.rates):
            self.pages[vcpu] += rate * (100 - self.percents[vcpu]) / 100
        return [int(pages) for pages in self.pages] if self.known else ()

    def throttle_vcpus(self, percents: Sequence[int]) -> None:
        self.log.append(f"throttle {list(percents)}")
        self.percents = list(percents)


THROTTLES = [
    answer(Action.THROTTLE, throttle_percent=20),
    answer(Action.THROTTLE, throttle_percent=60),
    answer(Action.THROTTLE, throttle_percent=10),
    answer(Action.SWITCH_OVER),
]


def run(guest: LoopGuest) -> tuple[list[str], Loop]:
    loop = Loop(guest, ScriptedPolicy(THROTTLES))
    loop.precopy.run()
    loop.check_equal()
    loop.precopy.close()
    return [line for line in guest.log if "throttle" in line], loop


def test_a_vcpu_that_dirties_little_is_not_slowed_down() -> None:
    guest = VcpuGuest([10_000, 10])
    assert isinstance(guest, CanThrottleVcpus)
    said, loop = run(guest)
    # What was dirtied while throttled counts for what it would be without.
    assert said == ["throttle [21, 0]", "throttle [61, 0]", "throttle [11, 0]", "throttle 0"]
    events = [event for event in loop.events if isinstance(event, Throttled)]
    assert [event.percent for event in events] == [20, 60, 10, 0]
    assert [event.vcpu_percents for event in events] == [(21, 0), (61, 0), (11, 0), ()]
    assert guest.percents == [0, 0]


def test_all_give_up_the_same_where_nobody_knows() -> None:
    guest = VcpuGuest([10_000, 10], known=False)
    said, loop = run(guest)
    assert said == ["throttle 20", "throttle 60", "throttle 10", "throttle 0"]
    assert all(event.vcpu_percents == () for event in loop.events if isinstance(event, Throttled))


def test_a_guest_that_learns_it_later_and_one_that_dirties_nothing() -> None:
    guest = VcpuGuest([100, 0], known=False)
    throttle = GuestThrottle(guest)
    throttle.begin()
    guest.known = True

    def shares(percent: int) -> tuple[int, ...]:
        assert throttle.set(percent) and throttle.percent == percent
        return throttle.vcpu_percents

    assert shares(50) == ()  # nothing to compare with
    assert shares(60) == (60, 0)
    guest.rates = [0, 0]
    assert shares(70) == ()
    assert guest.percents == [70, 70]


def test_after_a_throttle_was_given_back_nothing_is_known() -> None:
    """What was dirtied meanwhile was dirtied partly under another throttle."""
    throttle = GuestThrottle(VcpuGuest([1000, 0]))
    throttle.begin()
    found = []
    for percent in (60, 0, 40, 50):
        throttle.set(percent)
        found.append(throttle.vcpu_percents)
    assert found == [(60, 0), (), (), (50, 0)]


def test_a_throttle_that_failed_midway_is_let_go() -> None:
    class Failing(VcpuGuest):
        def throttle_vcpus(self, percents: Sequence[int]) -> None:
            self.percents[0] = percents[0]
            raise GuestError("the second vCPU is gone")

    guest = Failing([1000, 0])
    loop = Loop(guest, ScriptedPolicy(THROTTLES))
    with pytest.raises(GuestError, match="the second"):
        loop.precopy.run()
    loop.precopy.let_go()
    assert guest.percents == [0, 0] and loop.precopy.throttle_percent == 0


def test_a_guest_that_cannot_be_throttled() -> None:
    throttle = GuestThrottle(LoopGuestWithout([64]))
    throttle.begin()
    assert not throttle.possible
    assert not throttle.set(50) and throttle.percent == 0


class LoopGuestWithout(LoopGuest):
    throttle = None  # type: ignore[assignment]
