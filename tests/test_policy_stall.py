# SPDX-License-Identifier: Apache-2.0
"""When a dirty set that does not shrink ends a job that is to be cancelled then."""

from __future__ import annotations

from dataclasses import replace

import pytest
from policy_simulation import PAGE
from test_policy import MS, view_of

from vmth.policy import Action, OnStall, RoundView, StandardPolicy
from vmth.stats import RoundStats

FULL = RoundStats(0, 262_144, 200_000, 62_144, 0, 440 << 20, 4_000 * MS, 115e6, 16_000, 16e6, 0)


def after(later: int, page_bytes: int) -> RoundView:
    """So many rounds behind the full pass, each of 16,000 pages that leave as many: of
    ``page_bytes`` each, and 25 us."""
    nbytes, lasted_ns = 16_000 * page_bytes, 400 * MS
    again = [
        RoundStats(number, 16_000, 16_000, 0, 0, nbytes, lasted_ns, nbytes * 2.5, 16_000, 160e6, 0)
        for number in range(1, later + 1)
    ]
    view = view_of(FULL, *again)
    return replace(view, timeout_ns=60_000 * MS, on_stall=OnStall.CANCEL)


def ends_after(page_bytes: int) -> int:
    """The number of rounds behind the full pass after which it gives up."""
    for later in range(1, 10):
        decision = StandardPolicy().decide(after(later, page_bytes))
        if decision.action is Action.GIVE_UP:
            return later
        assert decision.action is Action.CONTINUE
    raise AssertionError("it never gave up")


@pytest.mark.parametrize("page_bytes", [PAGE, 3000])
def test_what_the_link_cannot_carry_ends_after_two_rounds(page_bytes: int) -> None:
    assert ends_after(page_bytes) == 2


def test_a_link_that_should_do_is_given_twice_as_many() -> None:
    """The pages wait for something else, as for processors that others have for a while."""
    assert ends_after(1) == 4
