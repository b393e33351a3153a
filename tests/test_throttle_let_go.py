# SPDX-License-Identifier: Apache-2.0
"""A guest that was throttled runs at full speed again, whatever became of its migration: from the
moment that it runs here on, and at the destination from the start. Then it migrates again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from memory_guest import MemoryGuest
from test_session import World

import vmth
from vmth.channel.pages import NativeSender
from vmth.errors import (
    CancelledError,
    GuestError,
    MigrationError,
    NotConvergedError,
    VerificationError,
)
from vmth.guests.client import HolderGuest
from vmth.guests.schedule import Workload
from vmth.guests.spawn import spawn_destination, spawn_source
from vmth.handshake import Incoming
from vmth.listener import Listener
from vmth.options import MigrateOptions, ReceiveOptions
from vmth.policy.interface import Action, Decision, Forecast, RoundView
from vmth.uri import parse_endpoint

PERCENT = 40
NOTHING = Forecast(0, 0, 0, 0)


class ThrottledGuest(MemoryGuest):
    """``throttled``: the present percentage; ``given``: all, in order. ``on_resume``: what it was
    when the guest was told to run."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.throttled = 0
        self.given: list[int] = []
        self.on_resume: list[int] = []

    def throttle(self, percent: int) -> None:
        self._called("throttle")
        self.throttled = percent
        self.given.append(percent)

    def resume(self) -> None:
        self.on_resume.append(self.throttled)
        super().resume()


class ThrottleAt:
    """Throttles after the first round; after the next it calls ``then`` and decides by it."""

    def __init__(self, then: Callable[[], Action] = lambda: Action.SWITCH_OVER) -> None:
        self._then = then

    def decide(self, view: RoundView) -> Decision:
        if not view.throttle_percent:
            return Decision(Action.THROTTLE, "too much", NOTHING, throttle_percent=PERCENT)
        return Decision(self._then(), "throttled, and so", NOTHING)

    def recheck(self, view: RoundView, forecast: Forecast) -> Decision:
        return Decision(Action.SWITCH_OVER, "now", NOTHING)


class ThrottleWorld(World):
    def guest(self, **options: Any) -> ThrottledGuest:
        guest = ThrottledGuest(**options)
        self.guests.append(guest)
        return guest

    def check_let_go(self, source: ThrottledGuest) -> None:
        """It ran on here at full speed from the first moment on, and can be moved."""
        assert source.given == [PERCENT, 0] and source.throttled == 0
        assert source.on_resume[1:] in ([], [0])
        self.check_stayed(source)
        source.given.clear()
        result = self.migrate(source, self.listeners[-1], policy=ThrottleAt())
        assert result.verified
        self.check_moved(source, self.listeners[-1])
        assert source.given == [PERCENT, 0]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[ThrottleWorld]:
    world = ThrottleWorld(tmp_path)
    yield world
    for listener in world.listeners:
        listener.close()
    for guest in world.guests:
        guest.close()


def running(world: ThrottleWorld) -> tuple[ThrottledGuest, Listener]:
    source, listener = world.guest(), world.listen()
    source.resume()
    return source, listener


def test_after_a_success_neither_end_is_throttled(world: ThrottleWorld) -> None:
    source, listener = running(world)
    freed: list[int] = []
    source.on_call["release"] = lambda: freed.append(source.throttled)
    world.migrate(source, listener, policy=ThrottleAt())
    world.check_moved(source, listener)
    there = world.made[-1]
    assert isinstance(there, ThrottledGuest)
    assert source.given == [PERCENT, 0] and freed == [0]
    assert there.given == [] and there.on_resume == [0]


def test_after_a_cancel(world: ThrottleWorld) -> None:
    source, listener = running(world)
    jobs: list[vmth.MigrationJob] = []

    def cancel() -> Action:
        assert source.throttled == PERCENT
        jobs[0].cancel()
        return Action.CONTINUE

    options = world.options(policy=ThrottleAt(cancel))
    jobs.append(vmth.start_migration(source, listener.endpoint.display, options))
    with pytest.raises(CancelledError):
        jobs[0].wait(10)
    assert isinstance(listener.outcomes.get(timeout=5), MigrationError)
    world.check_let_go(source)


def test_after_a_cancel_while_paused(world: ThrottleWorld) -> None:
    source, listener = running(world)
    jobs: list[vmth.MigrationJob] = []
    source.on_call["save_state"] = lambda: jobs[0].cancel()
    options = world.options(policy=ThrottleAt())
    jobs.append(vmth.start_migration(source, listener.endpoint.display, options))
    with pytest.raises(CancelledError):
        jobs[0].wait(10)
    source.on_call.clear()
    assert isinstance(listener.outcomes.get(timeout=5), MigrationError)
    world.check_let_go(source)


def test_after_a_seal_that_failed(world: ThrottleWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digests differ, and no page tells where: nothing can be sent again."""
    source, listener = running(world)
    digest = NativeSender.digest

    def wrong(self: NativeSender) -> tuple[int, int, int]:
        low, high, pages = digest(self)
        return low ^ 1, high, pages

    monkeypatch.setattr(NativeSender, "digest", wrong)
    with pytest.raises(VerificationError, match="digests differ"):
        world.migrate(source, listener, policy=ThrottleAt())
    monkeypatch.undo()
    assert isinstance(listener.outcomes.get(timeout=5), MigrationError)
    world.check_let_go(source)


def test_after_giving_up(world: ThrottleWorld) -> None:
    source, listener = running(world)
    with pytest.raises(NotConvergedError, match="throttled, and so"):
        world.migrate(source, listener, policy=ThrottleAt(lambda: Action.GIVE_UP))
    assert isinstance(listener.outcomes.get(timeout=5), MigrationError)
    world.check_let_go(source)


def test_after_a_lost_connection(world: ThrottleWorld) -> None:
    source, listener = running(world)

    def lose() -> Action:
        assert source.throttled == PERCENT
        listener.close()
        return Action.CONTINUE

    with pytest.raises(MigrationError):
        world.migrate(source, listener, policy=ThrottleAt(lose))
    world.listen()
    world.check_let_go(source)


def test_a_throttle_that_cannot_be_let_go_at_once_is_tried_again(world: ThrottleWorld) -> None:
    source, listener = running(world)

    def give_up() -> Action:
        source.fail["throttle"] = GuestError("busy")
        return Action.GIVE_UP

    with pytest.raises(NotConvergedError):
        world.migrate(source, listener, policy=ThrottleAt(give_up))
    assert isinstance(listener.outcomes.get(timeout=5), MigrationError)
    assert source.throttled == 0
    world.check_let_go(source)


# -- a guest in a process of its own ---------------------------------------------------------------

MIB = 1 << 20
WORKLOAD = Workload("uniform", 40_960_000, MIB, seed=3)


def test_a_guest_in_a_holder_is_let_go_and_arrives_unthrottled(tmp_path: Path) -> None:
    source, _ = spawn_source("process", 4 * MIB, content="zero=50,random=50", workload=WORKLOAD)
    told: list[int] = []
    arrived: list[HolderGuest] = []
    throttle = HolderGuest.throttle

    def make(incoming: Incoming) -> HolderGuest:
        arrived.append(spawn_destination("process", incoming.blocks))
        stack.callback(arrived[-1].shutdown)
        return arrived[-1]

    def note(self: HolderGuest, percent: int) -> None:
        throttle(self, percent)  # the holder has answered
        told.append(percent)
        assert self is source

    listener = Listener(
        parse_endpoint(f"unix:{tmp_path / 'link'}", listening=True),
        make,
        ReceiveOptions(state_dir=tmp_path / "there"),
    )
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(HolderGuest, "throttle", note)
        stack.callback(source.shutdown)
        stack.callback(listener.close)
        for then in (Action.GIVE_UP, Action.SWITCH_OVER):
            policy = ThrottleAt(lambda then=then: then)  # type: ignore[misc]
            options = MigrateOptions(state_dir=tmp_path / "here", policy=policy)
            job = vmth.start_migration(source, listener.endpoint.display, options)
            if then is Action.GIVE_UP:
                with pytest.raises(NotConvergedError):
                    job.wait(30)
                assert source.is_running()
            else:
                assert job.wait(30).verified
            assert told == [PERCENT, 0]
            told.clear()
        listener.outcomes.get(timeout=5)
        assert arrived[-1].is_running()
