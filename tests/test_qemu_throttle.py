# SPDX-License-Identifier: Apache-2.0
"""A real QEMU's guest that dirties more than the link carries is throttled, and let go whatever
becomes of the migration: by the dirty limit under KVM with its dirty ring, by auto-converge under
TCG. It then moves, and runs unthrottled where it has arrived."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from qemu_guest import Walk
from qemu_world import Command, Machine, World, modern_build
from waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

#: More than the link carries. A KVM that emulates looks only between two chunks whether its dirty
#: ring is nearly full, with 64 entries to spare, and a page of the walk takes two. Beyond that it
#: writes over what QEMU has not read, and QEMU loses pages in any migration.
BUSY = {
    "auto-converge": Walk(chunk_pages=32, ticks_hz=1000, beat_every=32),
    "dirty-limit": Walk(chunk_pages=16, ticks_hz=1000, beat_every=64),
}
#: Where KVM is emulated the guest may stand for a second or two: it is not to look idle for a pass.
LINKS = {"auto-converge": "60MB/s", "dirty-limit": "40MB/s"}
#: Pages go as they are: this guest's would shrink to next to nothing.
SLOWLY = ("--forms", "zero", "--on-stall", "throttle")

needs_kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm"
)


class Throttling:
    """A guest at A that is being moved to B, where the move begins to throttle it."""

    def __init__(self, world: World, way: str) -> None:
        self.world = world
        self.way = way
        self.build = modern_build()
        self.a = world.boot("a", self.build)
        self.tries = 0

    def begin(self, *options: str) -> tuple[Machine, Command, Command]:
        """(destination, receiver, mover), with the guest throttled."""
        self.tries += 1
        there = self.world.await_guest(f"b{self.tries}", self.build)
        uri, receiver = self.world.receive(there, "auto")
        mover = self.world.migrate(self.a, uri, "--bandwidth", LINKS[self.way], *SLOWLY, *options)
        wait_until(lambda: self.throttled(self.a) or mover.ended)
        assert not mover.ended, mover.said()
        return there, receiver, mover

    def throttled(self, machine: Machine) -> bool:
        if self.way == "dirty-limit":
            return bool(machine.execute("query-vcpu-dirty-limit"))
        return bool(machine.execute("query-migrate").get("cpu-throttle-percentage"))

    def check_let_go(self, mover: Command, exit_code: int, status: str) -> None:
        told = mover.answer()
        assert told["exit_code"] == exit_code and told["source_runs"], told
        assert told["throttle"] == self.way
        assert self.a.status() == "running" and not self.throttled(self.a)
        ended = self.a.execute("query-migrate")
        assert ended["status"] == status, ended
        self.a.wait_beats(2)

    def check_moves(self) -> None:
        """To a new QEMU, without a cap; what it holds there is whole."""
        there = self.world.await_guest("last", self.build)
        moved = self.world.move(self.a, there, "auto", ("--on-success", "keep"))
        assert moved.source["throttle"] == "none"
        assert not self.throttled(there)
        there.wait_beats(2)
        self.world.check(there)


@pytest.fixture(params=[pytest.param("dirty-limit", marks=needs_kvm), "auto-converge"])
def throttling(request: pytest.FixtureRequest) -> Iterator[Throttling]:
    accel = {"dirty-limit": "kvm,dirty-ring-size=4096", "auto-converge": "tcg"}[request.param]
    with World(BUSY[request.param], [modern_build()], accel=accel) as world:
        yield Throttling(world, request.param)
        world.tell()  # shown with a failure


def test_after_a_cancel(throttling: Throttling) -> None:
    _, _, mover = throttling.begin()
    mover.process.send_signal(signal.SIGINT)
    throttling.check_let_go(mover, 130, "cancelled")
    throttling.check_moves()


def test_after_giving_up(throttling: Throttling) -> None:
    _, _, mover = throttling.begin("--timeout", "20s", "--downtime-limit", "1ms")
    throttling.check_let_go(mover, 5, "failed")
    throttling.check_moves()


def test_after_a_lost_connection(throttling: Throttling) -> None:
    _, receiver, mover = throttling.begin()
    receiver.kill()
    throttling.check_let_go(mover, 1, "failed")
    throttling.check_moves()


def test_after_the_mover_was_killed(throttling: Throttling) -> None:
    """The watchdog lets it go."""
    _, _, mover = throttling.begin()
    mover.kill()
    wait_until(lambda: not throttling.throttled(throttling.a))
    wait_until(lambda: throttling.a.execute("query-migrate")["status"] == "failed")
    assert throttling.a.status() == "running"
    assert throttling.world.vmth(throttling.a, "recover", "--json").wait() == 0
    throttling.check_moves()


def test_a_guest_that_is_held_back_moves(throttling: Throttling) -> None:
    """Slower than the link from then on, and without a limit as soon as it runs there."""
    there, receiver, mover = throttling.begin("--on-success", "keep")
    told = mover.answer()
    assert told["exit_code"] == 0 and told["verified"], told
    assert told["throttle"] == throttling.way
    assert any("no dirty limit" in what for what in told["fallbacks"]) == (
        throttling.way == "auto-converge"
    )
    assert receiver.answer()["exit_code"] == 0
    throttling.world.hosts.append(there)
    assert not throttling.throttled(throttling.a) and not throttling.throttled(there)
    there.wait_beats(2)
    throttling.world.check(there)
