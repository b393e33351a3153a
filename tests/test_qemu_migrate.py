# SPDX-License-Identifier: Apache-2.0
"""A guest is moved from A to B, on to C and back, and holds at every stop what it must.

``VMTH_QEMU_SRC`` runs at A and C, ``VMTH_QEMU_DST`` at B: with two versions, a guest crosses both
ways. A busy guest proves nothing under TCG before QEMU 9.0, which loses dirty pages by itself:
older versions run it under KVM.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from qemu_guest import Walk
from qemu_process import fill
from qemu_world import MIB, Build, Command, Machine, World, build, modern_build
from waiting import wait_until

from vmth.job_socket import JobRequest, ask_job
from vmth.qemu.stream.multifd import PACKET_BYTES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

IDLE = Walk(chunk_pages=0, ticks_hz=100, beat_every=8)
FILLED_BYTES = 96 * MIB
#: Some 130 MB/s of pages, at most: a pass takes 0.8 s.
BUSY = Walk(chunk_pages=32, ticks_hz=1000, beat_every=32)


@dataclass(frozen=True)
class Source:
    """How QEMU sends: options of vmth, and what is set in QEMU beforehand."""

    options: tuple[str, ...] = ()
    compression: str = "none"

    def prepare(self, machine: Machine) -> None:
        machine.execute("migrate-set-parameters", **{"multifd-compression": self.compression})


PARALLEL = ("--parallel", "--parallel-connections", "2")
PLAIN, MULTIFD, ZSTD = Source(), Source(PARALLEL), Source(PARALLEL, "zstd")
#: How the QEMUs at A, B and C send; with the landings of ``round_trip``, every way meets each.
ROUNDS = {
    "plain-multifd-zstd": (PLAIN, MULTIFD, ZSTD),
    "zstd-plain-multifd": (ZSTD, PLAIN, MULTIFD),
    "multifd-zstd-plain": (MULTIFD, ZSTD, PLAIN),
}
each_round = pytest.mark.parametrize("ways", ROUNDS.values(), ids=ROUNDS)


def hop(world: World, there: Machine, here: Machine, land: str, scope: str, how: Source) -> None:
    """Move a running guest, see that it goes on, and prove at the stop all that it holds."""
    how.prepare(there)
    moved = world.move(there, here, land, ("--on-success", "keep", *how.options))
    assert moved.source["verified_scope"] == moved.destination["verified_scope"] == scope
    assert there.status() == "postmigrate" and here.status() == "running"
    here.wait_beats(3)
    world.check(here)
    world.same_but_counters(there.memory(), here.memory())
    here.run()


def round_trip(world: World, builds: Sequence[Build], ways: Sequence[Source]) -> None:
    """A, B, C and A again; a new QEMU is a new host."""
    home, away = builds
    a = world.boot("a", home)
    b = world.await_guest("b", away)
    hop(world, a, b, "memory", "memory", ways[0])
    c = world.await_guest("c", home, shared=False)
    hop(world, b, c, "stream", "stream", ways[1])
    back = world.await_guest("back", home)
    hop(world, c, back, "auto", "memory", ways[2])
    back.wait_beats(3)
    world.check(back)


@each_round
def test_busy_guest_goes_round(ways: Sequence[Source]) -> None:
    qemu = modern_build()
    with World(BUSY, [qemu]) as world:
        round_trip(world, (qemu, qemu), ways)


def test_idle_guest_goes_round() -> None:
    builds = build("SRC"), build("DST")
    with World(IDLE, builds) as world:
        round_trip(world, builds, (PLAIN, ZSTD, MULTIFD))


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm")
def test_busy_guest_on_kvm_goes_round() -> None:
    builds = build("SRC"), build("DST")
    with World(BUSY, builds, accel="kvm") as world:
        round_trip(world, builds, (ZSTD, PLAIN, MULTIFD))


def test_paused_guest_arrives_paused_and_equal() -> None:
    """Every byte of guest memory, as both QEMUs see it, and it runs on afterwards."""
    home, away = build("SRC"), build("DST")
    hops = [("b", away, "memory", PLAIN), ("c", home, "stream", ZSTD), ("d", away, "auto", MULTIFD)]
    with World(IDLE, (home, away)) as world:
        machine = world.boot("a", home)
        machine.stop()
        before = machine.memory()
        for name, qemu, land, how in hops:
            following = world.await_guest(name, qemu, shared=land != "stream")
            how.prepare(machine)
            world.move(machine, following, land, ("--on-success", "quit", *how.options))
            assert following.status() in ("paused", "prelaunch")
            assert np.array_equal(following.memory(), before)
            machine.process.wait(60)
            machine = following
        machine.run()
        machine.wait_beats(3)
        world.check(machine)


def test_pages_that_multifd_sends_twice_cost_no_rounds() -> None:
    """QEMU before 8.0 does, where most of memory is not zeros: up to one page a packet."""
    builds = build("SRC"), build("DST")
    with World(IDLE, builds) as world:
        world.memory_bytes += FILLED_BYTES
        a = world.boot("a", builds[0])
        beside = np.random.default_rng(1).bytes(FILLED_BYTES - MIB)
        fill(world.folder / "a.ram", [(world.memory_bytes - len(beside), beside)])
        b = world.await_guest("b", builds[1])
        moved = world.move(a, b, "memory", ("--on-success", "keep", *MULTIFD.options))
        b.wait_beats(3)
        packets = FILLED_BYTES // PACKET_BYTES
        assert len(moved.source["rounds"]) < packets // 16


def test_a_move_is_steered_while_it_goes_on() -> None:
    """Cancelled from outside, begun anew under the same cap, and then without one."""
    qemu = build("SRC")
    with World(IDLE, [qemu]) as world:
        world.memory_bytes += FILLED_BYTES
        a = world.boot("a", qemu)
        beside = np.random.default_rng(1).bytes(FILLED_BYTES - MIB)
        fill(world.folder / "a.ram", [(world.memory_bytes - len(beside), beside)])
        path = world.folder / "job"

        def begin(name: str) -> tuple[Machine, Command, Command]:
            there = world.await_guest(name, qemu)
            uri, receiver = world.receive(there, "auto")
            slowly = ("--bandwidth", "2MB/s", "--job-socket", str(path), "--on-success", "keep")
            mover = world.migrate(a, uri, *slowly)
            wait_until(lambda: mover.ended or (path.exists() and acked_bytes() > MIB))
            assert not mover.ended, mover.said()
            return there, receiver, mover

        def acked_bytes() -> int:
            stats = ask_job(path, JobRequest()).stats
            return stats.transfer.acked_bytes if stats is not None else 0

        _, _, mover = begin("b")
        ask_job(path, JobRequest(cancel=True))
        told = mover.answer()
        assert told["exit_code"] == 4 and told["source_runs"], told
        assert a.status() == "running" and not path.exists()

        there, receiver, mover = begin("c")
        reply = ask_job(path, JobRequest(bandwidth_bps=0, downtime_limit_ns=200_000_000))
        assert reply.stats is not None and reply.stats.bandwidth_limit_bps == 0
        assert reply.stats.downtime_limit_ns == 200_000_000
        told = mover.answer()
        assert told["exit_code"] == 0 and told["verified"], told
        assert told["rounds"][0]["bandwidth_bps"] > 3_000_000, "the cap was kept"
        assert receiver.answer()["exit_code"] == 0
        world.hosts.append(there)
        there.wait_beats(3)
        world.check(there)


def test_checks_are_tried_on_a_migration_without_vmth() -> None:
    qemu = modern_build()
    with World(BUSY, [qemu]) as world:
        a, b = world.boot("a", qemu), world.await_guest("b", qemu)
        world.qemu_moves(a, b)
        b.wait_beats(3)
        passes = world.check(b)
        for _ in range(60):
            if passes > 1:
                break
            b.execute("cont")  # on a busy machine it has begun one pass in that time
            b.wait_beats(1)
            passes = world.check(b)
        assert passes > 1
        world.same_but_counters(a.memory(), b.memory())
        # And they can fail.
        good = b.memory()
        page = world.walk.start + 4096
        misplaced = good.copy()
        misplaced[page : page + 4096] = good[page + 4096 : page + 8192]
        with pytest.raises(AssertionError, match="without their address"):
            world.walk.check(misplaced)
        old = good.copy()
        old[page] -= 1
        with pytest.raises(AssertionError, match="changes of the counter"):
            world.walk.check(old)
        with pytest.raises(AssertionError, match="bytes differ, the first at"):
            world.same_but_counters(good, misplaced)
