# SPDX-License-Identifier: Apache-2.0
"""The memory of a QEMU's guest that has left is kept: from its shared memory, and from one that
nobody else can map."""

from __future__ import annotations

import json

import numpy as np
import pytest
from qemu_guest import Walk
from qemu_world import HOLE, MEMORY_BYTES, World, build

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

IDLE = Walk(chunk_pages=0, ticks_hz=100, beat_every=8)


@pytest.mark.parametrize("shared", [True, False])
def test_a_qemu_leaves_its_memory_behind(shared: bool) -> None:
    home, away = build("SRC"), build("DST")
    with World(IDLE, (home, away)) as world:
        a = world.boot("a", home, shared=shared)
        b = world.await_guest("b", away)
        path = world.folder / "kept"
        moved = world.move(a, b, "memory", ("--on-success", "keep", "--keep-image", str(path)))
        kept = moved.source["kept_image"]
        assert kept["error"] == "" and kept["path"] == str(path), json.dumps(kept)
        held = np.fromfile(path, dtype=np.uint8)
        assert len(held) == kept["memory_bytes"] == moved.source["memory_bytes"]
        # Its RAM is the first block of the table, and begins at address 0.
        wanted = a.memory()
        for stretch in (slice(0, HOLE.start), slice(HOLE.stop, MEMORY_BYTES)):
            assert np.array_equal(held[:MEMORY_BYTES][stretch], wanted[stretch])
        pages = held.reshape(-1, 4096).any(axis=1)
        assert kept["stored_bytes"] == int(pages.sum()) * 4096 > MEMORY_BYTES // 2
        assert path.stat().st_blocks * 512 < kept["stored_bytes"] + (1 << 20) < len(held)
        b.wait_beats(3)
        world.check(b)


@pytest.mark.parametrize("land", ["memory", "stream"])
def test_a_guest_that_comes_back_brings_what_changed(land: str) -> None:
    home, away = build("SRC"), build("DST")
    with World(IDLE, (home, away)) as world:
        a, b = world.boot("a", home), world.await_guest("b", away)
        path = str(world.folder / "kept")
        first = world.move(a, b, "memory", ("--on-success", "quit", "--keep-image", path))
        b.wait_beats(3)
        back = world.await_guest("back", home, shared=land == "memory")
        again = world.move(b, back, land, ("--fixed-forms",), ("--reuse", path))
        (given,) = again.destination["reused"]
        assert given["path"] == path and given["nbytes"] == 4096 * given["pages"]
        assert given["nbytes"] > first.source["kept_image"]["stored_bytes"] * 9 // 10
        assert again.source["wire_bytes"] < first.source["wire_bytes"] // 10
        assert again.source["verified_scope"] == land
        back.wait_beats(3)
        world.check(back)


def test_a_file_that_cannot_be_written_harms_nothing() -> None:
    home, away = build("SRC"), build("DST")
    with World(IDLE, (home, away)) as world:
        a = world.boot("a", home)
        b = world.await_guest("b", away)
        uri, receiver = world.receive(b, "memory")
        refused = world.migrate(a, uri, "--keep-image", str(world.folder / "no" / "kept"))
        assert refused.wait() == 3 and "is no directory" in refused.said()
        assert a.status() == "running"
        receiver.kill()
        again = world.await_guest("again", away)
        world.move(a, again, "memory", ("--keep-image", str(world.folder / "kept")))
        again.wait_beats(3)
        world.check(again)
