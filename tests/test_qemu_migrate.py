# SPDX-License-Identifier: Apache-2.0
"""A guest is moved from A to B, on to C and back, and holds at every stop what it must."""

from __future__ import annotations

import pytest
from qemu_guest import Walk
from qemu_world import World, modern_build

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

IDLE = Walk(chunk_pages=0, ticks_hz=100, beat_every=8)
#: Some 130 MB/s of pages, at most: a pass takes 0.8 s.
BUSY = Walk(chunk_pages=32, ticks_hz=1000, beat_every=32)


def test_plain_qemu_migration_holds_the_invariant() -> None:
    """The checks themselves, on QEMU's own migration of a busy guest."""
    qemu = modern_build()
    with World(BUSY, [qemu]) as world:
        a, b = world.boot("a", qemu), world.await_guest("b", qemu)
        world.qemu_moves(a, b)
        b.wait_beats(3)
        assert world.check(b) > 1
        world.same_but_counters(a.memory(), b.memory())
        # And they can fail.
        memory = b.memory()
        page = world.walk.start + 4096
        memory[page : page + 4096] = memory[page + 4096 : page + 8192]
        with pytest.raises(AssertionError, match="without their address"):
            world.walk.check(memory)
