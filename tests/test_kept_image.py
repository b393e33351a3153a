# SPDX-License-Identifier: Apache-2.0
"""The memory of a guest that has left is in a file, byte for byte; and no trouble with that file
changes what becomes of the guest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_guest import PAGE, MemoryGuest
from test_session import World

from vmth.errors import MigrationError, RefusedError
from vmth.kept_image import KeptImage
from vmth.memory import Memory, map_blocks
from vmth.qemu.guest_memory import Range, ranges_in
from vmth.reuse.warm import WarmFiles
from vmth.types import Gpa, Mapping, RamBlock


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    for listener in world.listeners:
        listener.close()
    for guest in world.guests:
        guest.close()


def stored_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_the_memory_of_a_guest_that_left_is_kept(world: World, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    source, listener = world.guest(idstrs=("ram", "more")), world.listen()
    source.resume()
    at_release: list[bytes] = []
    source.on_call["release"] = lambda: at_release.append(path.read_bytes())
    result = world.migrate(source, listener, keep_image=path)
    world.check_moved(source, listener)
    kept = path.read_bytes()
    assert kept == b"".join(view.tobytes() for view in source.views)
    assert at_release == [kept]  # it was whole before the guest was let go
    told = result.kept_image
    assert told is not None and told.error == "" and told.missing == ()
    assert (told.path, told.memory_bytes) == (str(path), len(kept))
    pages = np.frombuffer(kept, dtype=np.uint8).reshape(-1, PAGE)
    assert told.stored_bytes == int(pages.any(axis=1).sum()) * PAGE < len(kept)
    assert stored_bytes(path) <= told.stored_bytes + (1 << 20)
    assert path.stat().st_mode & 0o777 == 0o600
    assert result.downtime_ns == result.downtime_parts.total_ns
    with WarmFiles([path]) as warm:
        assert warm.files[0].contents == len({page.tobytes() for page in pages if page.any()})


def test_the_newest_memory_takes_the_place_of_the_one_before(world: World, tmp_path: Path) -> None:
    path, listener = tmp_path / "kept", world.listen()
    for seed in (1, 2):
        source = world.guest(seed=seed)
        source.resume()
        world.migrate(source, listener, keep_image=path)
        world.check_moved(source, listener)
        assert path.read_bytes() == source.views[0].tobytes()
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["kept"]


@pytest.mark.parametrize("step", ["extend", "write_at", "sync", "_rename"])
def test_a_disk_that_fails_harms_no_migration(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "kept"
    path.write_bytes(b"of last time")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    source, listener = world.guest(), world.listen()
    source.resume()
    with monkeypatch.context() as patch:
        patch.setattr(f"vmth.atomic.AtomicFile.{step}", full)
        result = world.migrate(source, listener, keep_image=path)
    world.check_moved(source, listener)
    assert result.kept_image is not None
    assert "No space left on device" in result.kept_image.error
    assert any(note.startswith(f"{path}: the memory") for note in result.fallbacks)
    assert path.read_bytes() == b"of last time"
    again = world.guest()
    again.resume()
    assert world.migrate(again, listener, keep_image=path).kept_image.error == ""
    world.check_moved(again, listener)


def test_a_place_where_no_file_can_be_is_refused_before_the_start(
    world: World, tmp_path: Path
) -> None:
    source, listener = world.guest(), world.listen()
    source.resume()
    for path in (tmp_path, tmp_path / "none" / "kept"):
        with pytest.raises(RefusedError, match="directory"):
            world.migrate(source, listener, keep_image=path)
    world.check_stayed(source)
    world.migrate(source, listener, keep_image=tmp_path / "kept")
    world.check_moved(source, listener)


def test_a_guest_that_stays_leaves_no_file(world: World, tmp_path: Path) -> None:
    source, listener = world.guest(), world.listen()
    source.resume()
    source.fail["save_state"] = RuntimeError("no state today")
    with pytest.raises(MigrationError, match="no state today"):
        world.migrate(source, listener, keep_image=tmp_path / "kept")
    world.check_stayed(source)
    with pytest.raises(MigrationError, match="no state today"):
        listener.wait_for_guest(5)
    assert not (tmp_path / "kept").exists()
    result = world.migrate(source, listener, keep_image=tmp_path / "kept")
    assert result.kept_image is not None and result.kept_image.error == ""
    world.check_moved(source, listener)


# -- blocks without memory in this process ---------------------------------------------------------


class Elsewhere(MemoryGuest):
    """Its second block's bytes can be asked for."""

    def read_memory(
        self, blocks: Sequence[int], take: Callable[[int, int, Memory], None]
    ) -> Sequence[str]:
        assert list(blocks) == [1]
        take(1, 3 * PAGE, np.full(2 * PAGE, 7, dtype=np.uint8))
        take(1, 0, np.zeros(PAGE, dtype=np.uint8))
        return ["page 9 of it"]


@pytest.mark.parametrize("can", [True, False])
def test_memory_elsewhere_is_asked_for(tmp_path: Path, can: bool) -> None:
    guest = (Elsewhere if can else MemoryGuest)(npages=8, writing=False)
    try:
        blocks = [
            guest.blocks[0],
            RamBlock("away", 10 * PAGE, Gpa(0), Mapping()),
        ]
        with map_blocks(blocks) as memory, KeptImage(tmp_path / "kept") as kept:
            kept.write(guest, memory)
        assert kept.result is not None and kept.result.error == ""
        assert kept.result.missing == (("page 9 of it",) if can else ("ramblock 'away'",))
        away = (tmp_path / "kept").read_bytes()[8 * PAGE :]
        assert away == bytes(3 * PAGE) + bytes([7 if can else 0]) * 2 * PAGE + bytes(5 * PAGE)
    finally:
        guest.close()


def test_nothing_lands_outside_of_its_block(tmp_path: Path) -> None:
    class Wrong(Elsewhere):
        def read_memory(self, blocks: Sequence[int], take: Any) -> Sequence[str]:
            take(1, 9 * PAGE, np.full(2 * PAGE, 7, dtype=np.uint8))
            return []

    guest = Wrong(npages=8, writing=False)
    try:
        blocks = [guest.blocks[0], RamBlock("away", 10 * PAGE, Gpa(0), Mapping())]
        with map_blocks(blocks) as memory, KeptImage(tmp_path / "kept") as kept:
            kept.write(guest, memory)
        assert kept.result is not None and "outside of block 1" in kept.result.error
        assert os.listdir(tmp_path) == []
    finally:
        guest.close()


MTREE = """\
FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, ram): not.this

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): pc.ram KVM
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000cafff (prio 0, rom): pc.ram @00000000000c0000 KVM
  0000000000100000-00000000bfffffff (prio 0, ram): pc.ram @0000000000100000
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios
  0000000100000000-000000013fffffff (prio 0, ram): pc.ram @00000000c0000000

FlatView #2
 AS "nvme", root: bus master container
 Root memory region: (none)
  No rendered FlatView
"""


def test_where_a_qemu_has_its_memory() -> None:
    assert ranges_in(MTREE) == [
        Range("pc.ram", 0, 0, 0xA0000),
        Range("pc.ram", 0xC0000, 0xC0000, 0xB000),
        Range("pc.ram", 0x100000, 0x100000, 0xC0000000 - 0x100000),
        Range("pc.bios", 0, 0xFFFC0000, 0x40000),
        Range("pc.ram", 0xC0000000, 1 << 32, 1 << 30),
    ]
    assert ranges_in("unknown command") == []
