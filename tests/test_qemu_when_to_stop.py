# SPDX-License-Identifier: Apache-2.0
"""When a QEMU may stop its guest, and how it is told to slow it down, on fakes."""

from __future__ import annotations

import pytest
import qemu_streams as s
from stream_pass_world import (
    DEVICES,
    END,
    LATE,
    LIMIT_NS,
    NOTHING,
    ScriptedPolicy,
    World,
    every_page,
)

from vmth.errors import NotConvergedError
from vmth.events import DirtyLimited
from vmth.policy.interface import Action, Decision, Forecast, RoundView
from vmth.qemu.dirty_limit import ThrottleWay

FITS = Decision(Action.SWITCH_OVER, "fits", NOTHING)
TOO_LATE = Decision(Action.SWITCH_OVER, "too late", LATE)
GO_ON = Decision(Action.CONTINUE, "does not fit", NOTHING)


def at_decisions(world: World, policy: ScriptedPolicy) -> list[int]:
    """How often QEMU was allowed to stop before each decision; filled while the pass runs."""
    counts: list[int] = []
    decide = policy.decide

    def decided(view: RoundView) -> Decision:
        counts.append(len(world.helm.allowed))
        return decide(view)

    policy.decide = decided  # type: ignore[method-assign]
    return counts


@pytest.mark.parametrize(
    ("forecast", "allowed"), [(NOTHING, LIMIT_NS), (LATE, 0)], ids=["fits", "too late"]
)
def test_qemu_may_stop_when_the_policy_says_so(forecast: Forecast, allowed: int) -> None:
    policy = ScriptedPolicy(
        Decision(Action.CONTINUE, "scripted", NOTHING),
        Decision(Action.SWITCH_OVER, "scripted", forecast),
    )
    passes = [every_page(), every_page(), every_page()]
    world = World([*passes, END, DEVICES], policy=policy)
    allowed_before = at_decisions(world, policy)
    world.engine.run()
    assert allowed_before[:2] == [0, 0]  # nothing was allowed before the second decision
    assert world.helm.allowed[0] == allowed
    if not allowed:
        assert world.helm.allowed == [0]  # said once
    assert set(world.helm.rooms) == {0}  # nothing is left


def test_qemu_is_told_what_the_limit_leaves_room_for() -> None:
    """40 pages in 10 ms; 4 ms of the limit are for the rest."""
    expected = Forecast(10_000_000, 1_000_000, 1_000_000, 2_000_000)

    def before(piece: int) -> None:
        if piece == 2:
            world.helm.passes, world.helm.remaining_bytes = 2, 40 * s.PAGE

    parts = [s.part(s.normal(page, "pc.ram") + s.eos()) for page in (10, 11, 12)]
    policy = ScriptedPolicy(Decision(Action.SWITCH_OVER, "fits", expected))
    world = World([*parts, END, DEVICES], before=before, policy=policy)
    world.engine.run()
    assert world.helm.allowed[0] == LIMIT_NS
    assert world.helm.rooms[0] == 4 * s.PAGE * (LIMIT_NS // 1_000_000 - 4)


@pytest.mark.parametrize(
    ("answers", "orders"),
    [
        ((FITS, FITS, GO_ON, GO_ON, FITS), ["allowed", "allowed", "not allowed", "allowed"]),
        ((GO_ON, FITS), ["allowed"]),
        ((TOO_LATE, GO_ON), ["allowed"]),
        ((TOO_LATE, FITS, GO_ON), ["allowed"]),
    ],
    ids=["fits no more", "nothing to take back", "an order to stop stands", "also if it fits"],
)
def test_qemu_may_not_stop_any_more(answers: tuple[Decision, ...], orders: list[str]) -> None:
    passes = [every_page()] * (len(answers) + 1)
    world = World([*passes, END, DEVICES], policy=ScriptedPolicy(*answers))
    world.engine.run()
    assert len(world.policy.views) >= len(answers)
    assert world.helm.orders[: len(orders)] == orders
    assert "not allowed" not in world.helm.orders[len(orders) :]
    if answers[0] is TOO_LATE:
        assert world.helm.allowed == [0]


@pytest.mark.parametrize(("limit_bps", "left"), [(0, 40), (5_000_000, 20)])
def test_under_a_dirty_limit_qemu_may_stop_when_another_ringful_fits(
    limit_bps: int, left: int
) -> None:
    """40 of the 60 pages that fit are dirty, and each look at what is dirty may bring 40."""
    expected = Forecast(LIMIT_NS * 40 // 60, 0, 0, 0)
    first, npages = 2, 40
    allowed_before: list[int] = []

    def before(piece: int) -> None:
        if piece == first:
            world.now_ns += 10_000_000_000  # so slow that 30 ms are no page
            world.helm.passes, world.helm.remaining_bytes = 2, npages * s.PAGE
        elif piece > first:
            allowed_before.append(len(world.helm.allowed))

    pages = [s.part(s.normal(page, "pc.ram") + s.eos()) for page in range(npages)]
    policy = ScriptedPolicy(Decision(Action.SWITCH_OVER, "fits", expected))
    world = World([every_page(), *pages, END, DEVICES], before=before, policy=policy)
    world.engine.dirty_limit_bps = limit_bps
    world.engine.run()
    sent = allowed_before.index(1) + 1
    assert sent == max(1, npages - left)
    assert world.helm.rooms[0] == 60 * s.PAGE


def test_what_is_left_of_qemus_next_pass_allows_nothing() -> None:
    """Its size is known while pages of this one still come."""
    expected = Forecast(LIMIT_NS * 40 // 60, 0, 0, 0)

    def before(piece: int) -> None:
        if piece == 2:
            world.now_ns += 10_000_000_000
            world.helm.passes, world.helm.remaining_bytes = 2, 40 * s.PAGE
        elif piece == 3:
            world.helm.passes, world.helm.remaining_bytes = 3, 30 * s.PAGE

    pages = [s.part(s.normal(page, "pc.ram") + s.eos()) for page in range(40)]
    policy = ScriptedPolicy(Decision(Action.SWITCH_OVER, "fits", expected))
    pieces = [every_page(), pages[0], b"".join(pages[1:30]), *pages[30:]]
    world = World([*pieces, END, DEVICES], before=before, policy=policy)
    world.engine.dirty_limit_bps = 5_000_000
    allowed_before = at_decisions(world, policy)
    world.engine.run()
    assert allowed_before[:2] == [0, 0]


def test_what_was_to_be_allowed_is_not_when_it_fits_no_more() -> None:
    expected = Forecast(LIMIT_NS * 40 // 60, 0, 0, 0)

    def before(piece: int) -> None:
        if piece in (2, 3):
            world.now_ns += 10_000_000_000
            world.helm.passes, world.helm.remaining_bytes = piece, (70 - 10 * piece) * s.PAGE

    pages = [s.part(s.normal(page, "pc.ram") + s.eos()) for page in range(40)]
    policy = ScriptedPolicy(Decision(Action.SWITCH_OVER, "fits", expected), GO_ON)
    world = World([every_page(), *pages, END, DEVICES], before=before, policy=policy)
    world.engine.dirty_limit_bps = 5_000_000
    world.engine.run()
    assert [view.dirty_pages for view in policy.views[:2]] == [50, 40]
    assert all(view.streamed and view.delta_cache_pages == 77 for view in policy.views)
    assert world.helm.allowed == []


def test_a_limit_does_not_keep_the_leave_to_stop_waiting() -> None:
    """QEMU takes up to a second to set one."""
    limiting = Decision(Action.THROTTLE, "scripted", NOTHING, dirty_limit_bps=5e6)
    world = World([every_page()] * 3 + [END, DEVICES], policy=ScriptedPolicy(FITS, limiting))
    world.engine.throttle = ThrottleWay.DIRTY_LIMIT
    world.engine.run()
    assert world.helm.orders[:3] == ["allowed", "not allowed", "held"]


def test_a_dirty_limit_is_set_as_decided_and_let_go() -> None:
    limiting = Decision(Action.THROTTLE, "scripted", NOTHING, dirty_limit_bps=5e6)
    more = Decision(Action.CONTINUE, "scripted", NOTHING)
    world = World([every_page()] * 3 + [END, DEVICES], policy=ScriptedPolicy(limiting, more))
    world.engine.throttle = ThrottleWay.DIRTY_LIMIT
    world.engine.run()
    first, second = world.policy.views[:2]
    assert first.takes_rate and first.can_throttle and not first.throttled
    assert second.dirty_limit_bps == 5e6 and 0 < second.limited_at_ns < second.now_ns
    assert world.helm.held == [5_000_000]
    world.engine.let_go()
    assert world.helm.held == [5_000_000]  # a stopped guest is not kept waiting for that
    for _ in range(2):
        world.engine.close()
    assert world.helm.held == [5_000_000, 0]
    told = [event.rate_bps for event in world.events if isinstance(event, DirtyLimited)]
    assert told == [5_000_000, 0]


def test_a_guest_that_was_given_up_is_let_go_at_once() -> None:
    answers = [
        Decision(Action.THROTTLE, "scripted", NOTHING, dirty_limit_bps=5e6),
        Decision(Action.GIVE_UP, "hopeless", NOTHING),
    ]
    world = World([every_page()] * 4 + [END, DEVICES], policy=ScriptedPolicy(*answers))
    world.engine.throttle = ThrottleWay.DIRTY_LIMIT
    with pytest.raises(NotConvergedError, match="hopeless"):
        world.engine.run()
    world.engine.let_go()
    assert world.helm.held == [5_000_000, 0]
    world.engine.close()
    assert world.helm.held == [5_000_000, 0]


def test_auto_converge_is_left_to_qemu() -> None:
    throttling = Decision(Action.THROTTLE, "scripted", NOTHING, throttle_percent=40)
    world = World([every_page()] * 2 + [END, DEVICES], policy=ScriptedPolicy(throttling))
    world.engine.throttle = ThrottleWay.AUTO_CONVERGE
    world.engine.run()
    world.engine.close()
    assert world.policy.views[0].can_throttle and not world.policy.views[0].takes_rate
    assert world.helm.held == []
