# SPDX-License-Identifier: Apache-2.0
"""Where pages may land: found among the open files of a QEMU, for which this process stands."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_qmp import FakeError
from landing_world import MIB, World
from listener_world import open_files

from vmth.errors import RefusedError
from vmth.memory import address_of, map_blocks
from vmth.qemu.landing import MAX_BESIDE_BYTES, Land, Landing, listed_blocks
from vmth.types import Gpa, Mapping, RamBlock


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    before = open_files()
    world = World(tmp_path)
    with world.resources:
        yield world
    assert open_files() == before


def lands_in(landing: Landing, fd: int) -> bool:
    """Does what is written to the first block arrive in the file?"""
    with map_blocks(landing.blocks[:1], writable=True) as (mapped,):
        assert address_of(mapped.view)
        mapped.view[:5] = list(b"pages")
    return os.pread(fd, 5, 0) == b"pages"


def test_a_file_backend_is_written_in_place(world: World, tmp_path: Path) -> None:
    world.backend("pc.ram")
    fd = world.file(tmp_path / "ram")
    world.properties["pc.ram", "mem-path"] = str(tmp_path / "ram")
    landing = world.choose()
    assert landing.kind is Land.MEMORY and landing.verified_scope == "memory"
    assert landing.notes == ()
    assert lands_in(landing, fd)


def test_a_memfd_backend_is_found_among_qemus_files(world: World) -> None:
    world.backend("/objects/pc.ram")
    world.backends[0]["id"] = "pc.ram"
    fd = world.memfd()
    assert lands_in(world.choose(Land.MEMORY), fd)


def test_a_backend_in_a_directory_whose_file_has_no_name(world: World, tmp_path: Path) -> None:
    world.backend("pc.ram")
    world.properties["pc.ram", "mem-path"] = str(tmp_path)
    fd = world.file(tmp_path / "gone")
    (tmp_path / "gone").unlink()
    assert lands_in(world.choose(Land.MEMORY), fd)


def test_a_path_that_names_another_file_now_is_not_written(world: World, tmp_path: Path) -> None:
    world.backend("pc.ram")
    world.properties["pc.ram", "mem-path"] = str(tmp_path / "ram")
    world.file(tmp_path / "ram")
    (tmp_path / "ram").unlink()
    (tmp_path / "ram").write_bytes(bytes(2 * MIB))
    with pytest.raises(RefusedError, match=r"0 files that process .* has open could be it"):
        world.choose(Land.MEMORY)


def test_two_candidates_are_not_guessed_between(world: World) -> None:
    world.backend("pc.ram")
    world.memfd()
    world.memfd()
    world.memfd(4 * MIB)  # no candidate: another size
    landing = world.choose(Land.AUTO)
    assert landing.kind is Land.STREAM and "2 files" in landing.reason
    assert [landing.reason in note for note in landing.notes] == [True]


@pytest.mark.parametrize("share", [True, False])
def test_before_qemu_6_1_the_backend_says_whether_it_is_shared(world: World, share: bool) -> None:
    fd = world.memfd()
    world.backend("pc.ram")
    del world.backends[0]["share"]
    world.properties["pc.ram", "share"] = share
    if share:
        assert lands_in(world.choose(Land.MEMORY), fd)
    else:
        with pytest.raises(RefusedError, match=r"'pc\.ram' is not shared"):
            world.choose(Land.MEMORY)


def test_addresses_decide_between_candidates(world: World) -> None:
    world.memfd()
    fd = world.memfd()
    world.backends.append({"id": "pc.ram", "size": 2 * MIB, "share": True})
    world.block("pc.ram", 2 * MIB, fd)
    assert lands_in(world.choose(Land.MEMORY), fd)


def test_an_address_that_is_mapped_private_is_not_written(world: World) -> None:
    fd = world.memfd()
    world.backend("pc.ram")
    private = mmap.mmap(fd, 2 * MIB, mmap.MAP_PRIVATE)
    world.resources.callback(private.close)
    with open("/proc/self/maps") as maps:
        inode = str(os.fstat(fd).st_ino)
        start = next(line for line in maps if line.split()[4] == inode).split("-")[0]
    world.rows = [f"{world.rows[0]} 0x{int(start, 16):016x}  rw"]
    with pytest.raises(RefusedError, match="QEMU's memory is private"):
        world.choose(Land.MEMORY)


def test_private_memory_is_refused_with_the_way_out(world: World) -> None:
    world.backend("pc.ram", share=False)
    with pytest.raises(RefusedError, match=r"memory-backend-memfd,id=pc\.ram,.*share=on"):
        world.choose(Land.MEMORY)
    assert world.choose(Land.AUTO).kind is Land.STREAM


def test_blocks_beside_the_memory_are_bounded_and_named(world: World) -> None:
    world.backend("pc.ram")
    world.memfd()
    world.block("0000:00:01.0/vga.vram", MAX_BESIDE_BYTES)
    landing = world.choose(Land.MEMORY)
    assert [block.mapping.fd is None for block in landing.blocks] == [False, True]
    assert ["vga.vram" in note and "not in place" in note for note in landing.notes] == [True]
    world.block("pc.rom", 4096)
    with pytest.raises(RefusedError, match=r"128MiB are outside .*vga\.vram, pc\.rom.* 128MiB"):
        world.choose(Land.MEMORY)


def test_a_guest_without_backends_lands_in_the_stream(world: World) -> None:
    world.block("pc.ram", MIB)
    assert "has a memory backend" in world.choose(Land.AUTO).reason
    with pytest.raises(RefusedError, match="no block of the guest has a memory backend"):
        world.choose(Land.MEMORY)


def test_a_stream_that_is_asked_for_looks_at_no_memory(world: World) -> None:
    world.backend("pc.ram")
    landing = world.choose(Land.STREAM)
    assert landing.verified_scope == "stream" and landing.notes == ()
    assert all(block.mapping == Mapping() for block in landing.blocks)
    assert "query-memdev" not in world.fake.commands()


def test_other_memory_is_refused_before_anything_moves(world: World) -> None:
    world.block("pc.ram", MIB)
    world.offered.append(RamBlock("vga.vram", MIB, Gpa(0), Mapping()))
    with pytest.raises(RefusedError, match=r"'vga\.vram' of the source is not in .*'pc\.ram'"):
        world.choose()
    world.offered = [RamBlock("pc.ram", 2 * MIB, Gpa(0), Mapping())]
    with pytest.raises(RefusedError, match=f"source has {2 * MIB} bytes.*room for {MIB}"):
        world.choose()


def test_the_monitors_table_is_read(world: World) -> None:
    world.rows = [
        "  pc.ram    4 KiB  0x0000000000000000 0x0000000000100000 0x0000000000200000",
        " a b  1 GiB  0x0000000000000000 0x0000000000100000 0x0000000000100000 0x00007f04afe0  ro",
        "nonsense",
    ]
    found = listed_blocks(world.qmp)
    assert found is not None and sorted(found) == ["a b", "pc.ram"]
    ram, named = found["pc.ram"], found["a b"]
    assert (ram.used_length, ram.max_length, ram.hva) == (MIB, 2 * MIB, None)
    assert named.hva == 0x7F04AFE0
    world.fake.answers["human-monitor-command"] = FakeError("CommandNotFound", "no")
    assert listed_blocks(world.qmp) is None
