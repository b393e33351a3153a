# SPDX-License-Identifier: Apache-2.0
"""``vmth migrate`` and ``vmth receive`` between all versions of QEMU that scripts/get-qemu knows.

Each test moves an idle guest to the second version and back in both landings, its memory and the
stream: what a version lacks must be neither asked for nor missed. The guest is idle since QEMU
under TCG before 9.0 loses dirty pages by itself.
"""

from __future__ import annotations

import functools
import itertools
import subprocess
from pathlib import Path

import pytest
from qemu_guest import Walk
from qemu_world import Build, Machine, World, build_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

GET_QEMU = Path(__file__).parents[1] / "scripts" / "get-qemu"
VERSIONS = ("5.2", "7.2", "10.0", "11.1")
IDLE = Walk(chunk_pages=0, ticks_hz=100, beat_every=8)


@functools.cache
def version(number: str) -> Build:
    got = subprocess.run(["sh", str(GET_QEMU), number], capture_output=True, text=True, check=False)
    if got.returncode != 0:
        pytest.skip(f"no QEMU {number} here: {got.stderr.strip().splitlines()[-1:]}")
    return build_of(got.stdout.strip())


def goes_on(world: World, there: Machine, here: Machine, land: str, *options: str) -> None:
    moved = world.move(there, here, land, ("--on-success", "keep", *options))
    assert moved.source["verified"] and moved.destination["verified"]
    assert moved.source["verified_scope"] == moved.destination["verified_scope"] == land
    assert there.status() == "postmigrate" and here.status() == "running"
    here.wait_beats(3)
    world.check(here)
    world.same_but_counters(there.memory(), here.memory())
    here.run()


#: QEMU 11.1 itself refuses the virtio-rng of a 10.0 (docs/qemu.md).
REFUSED_BY_QEMU = {("10.0", "11.1")}
PAIRS = [
    pytest.param(
        *pair,
        marks=pytest.mark.xfail(
            pair in REFUSED_BY_QEMU, reason="QEMU 11.1 refuses that guest", strict=True
        ),
    )
    for pair in itertools.product(VERSIONS, repeat=2)
]


@pytest.mark.parametrize(("home", "away"), PAIRS)
def test_a_guest_goes_there_and_back(home: str, away: str) -> None:
    first, second = version(home), version(away)
    with World(IDLE, (first, second)) as world:
        a = world.boot("a", first)
        b = world.await_guest("b", second)
        goes_on(world, a, b, "memory")
        a.kill()
        c = world.await_guest("c", first, shared=False)
        goes_on(world, b, c, "stream", "--parallel", "--parallel-connections", "2")
        b.kill()
        d = world.await_guest("d", second, shared=False)
        goes_on(world, c, d, "stream")
        c.kill()
        back = world.await_guest("back", first)
        goes_on(world, d, back, "memory")
