# SPDX-License-Identifier: Apache-2.0
"""The memory of a QEMU that waits, mapped ahead: found by the landing, let go with that QEMU."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from landing_world import MIB, World, mappings_of
from listener_world import open_files
from waiting import wait_until

from vmth.memory import map_blocks
from vmth.qemu import waiting_memory
from vmth.qemu.landing import Land, choose_landing
from vmth.qemu.waiting_memory import WaitingMemory
from vmth.types import Gpa, Mapping, RamBlock


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    files, threads = open_files(), threading.active_count()
    world = World(tmp_path)
    with world.resources:
        yield world
    gc.collect()  # QEMU's refusals hold the frames through which they came
    assert (open_files(), threading.active_count()) == (files, threads)


def populated(world: World, name: str = "pc.ram", nbytes: int = 2 * MIB) -> int:
    """A shared backend of the QEMU whose memory is there, and mapped by it."""
    fd = world.memfd(nbytes)
    os.pwrite(fd, bytes(nbytes), 0)
    world.backends.append({"id": name, "size": nbytes, "share": True})
    world.block(name, nbytes, fd)
    return fd


def mapped_ahead(fd: int) -> bool:
    """Beside QEMU's own mapping, for which this process stands."""
    return mappings_of(fd) == 2


def test_the_landing_takes_what_is_mapped(world: World) -> None:
    fd = populated(world)
    with WaitingMemory(world.qmp) as memory:
        made = memory.find(fd, 0, 2 * MIB)
        assert made is not None
        landing = choose_landing(world.qmp, world.offered, Land.MEMORY, memory.find)
        world.resources.callback(landing.close)
        assert landing.blocks[0].mapping.made is made
        with map_blocks(landing.blocks, writable=True) as (mapped,):
            mapped.view[:5] = list(b"pages")
            assert made.take() is None
            assert os.pread(fd, 5, 0) == b"pages"


def test_a_thread_makes_the_page_tables(world: World) -> None:
    fd = populated(world)
    with WaitingMemory(world.qmp) as memory:
        made = memory.find(fd, 0, 2 * MIB)
        assert made is not None
        wait_until(lambda: made._complete)
        block = RamBlock("pc.ram", 2 * MIB, Gpa(0), Mapping(fd=fd, made=made))
        with map_blocks([block], writable=True) as (mapped,):
            assert not mapped.anew


def test_a_block_within_a_file_is_found_by_its_address(world: World) -> None:
    """A file that has grown, for example: the block does not begin where the file does."""
    fd = world.memfd(3 * MIB)
    world.backends.append({"id": "pc.ram", "size": 2 * MIB, "share": True})
    world.block("pc.ram", 2 * MIB, fd, offset=MIB)
    with WaitingMemory(world.qmp) as memory:
        assert memory.find(fd, 0, 2 * MIB) is None
        landing = choose_landing(world.qmp, world.offered, Land.MEMORY, memory.find)
        world.resources.callback(landing.close)
        made = landing.blocks[0].mapping.made
        assert made is not None and landing.blocks[0].mapping.offset == MIB
        with map_blocks(landing.blocks, writable=True) as (mapped,):
            mapped.view[:5] = list(b"pages")
            assert made.take() is None and os.pread(fd, 5, MIB) == b"pages"


def test_what_the_landing_does_not_need_is_let_go(world: World) -> None:
    needed, other = populated(world), populated(world, "dimm", MIB)
    with WaitingMemory(world.qmp) as memory:
        assert mapped_ahead(needed) and mapped_ahead(other)
        made = memory.find(needed, 0, 2 * MIB)
        memory.close_rest()
        assert not mapped_ahead(other)
        assert made is not None and made.take() is not None


def test_other_bytes_are_not_found(world: World) -> None:
    fd = populated(world)
    with WaitingMemory(world.qmp) as memory:
        assert memory.find(fd, 0, MIB) is None
        assert memory.find(world.memfd(), 0, 2 * MIB) is None


def test_what_nobody_took_is_let_go_with_it(world: World) -> None:
    fd = populated(world)
    with WaitingMemory(world.qmp):
        assert mapped_ahead(fd)
    assert not mapped_ahead(fd)


def test_what_was_taken_stays(world: World) -> None:
    fd = populated(world)
    with WaitingMemory(world.qmp) as memory:
        made = memory.find(fd, 0, 2 * MIB)
        block = RamBlock("pc.ram", 2 * MIB, Gpa(0), Mapping(fd=fd, made=made))
        views = map_blocks([block], writable=True)
        (mapped,) = views.__enter__()
    mapped.view[0] = 9
    assert os.pread(fd, 1, 0) == b"\x09"
    del mapped
    views.__exit__(None, None, None)
    assert not mapped_ahead(fd)


def test_a_qemu_that_ends_takes_its_memory_with_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would stay as long as it is mapped here, and that may be for days."""
    qemu = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    open_process = os.pidfd_open
    monkeypatch.setattr(os, "pidfd_open", lambda _: open_process(qemu.pid))
    fd = populated(world)
    try:
        with WaitingMemory(world.qmp) as memory:
            assert mapped_ahead(fd)
            qemu.communicate(b"\n")
            wait_until(lambda: not mapped_ahead(fd))
            made = memory.find(fd, 0, 2 * MIB)
            assert made is not None and made.take() is None
    finally:
        qemu.kill()
        qemu.wait()


def test_a_process_that_cannot_be_watched_is_left_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> int:
        raise OSError("pidfd_open")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    fd = populated(world)
    with WaitingMemory(world.qmp) as memory:
        assert memory.find(fd, 0, 2 * MIB) is None and not mapped_ahead(fd)


def test_memory_that_is_not_shared_is_left_alone(world: World) -> None:
    world.backend("pc.ram", share=False)
    fd = world.memfd()
    with WaitingMemory(world.qmp) as memory:
        assert memory.find(fd, 0, 2 * MIB) is None and not mapped_ahead(fd)


def test_a_file_on_a_disk_is_left_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be read; and huge pages of a file system would be reserved."""
    monkeypatch.setattr(waiting_memory, "holes_are_exact", lambda _: False)
    fd = populated(world)
    before = open_files(), threading.active_count()
    with WaitingMemory(world.qmp) as memory:
        assert memory.find(fd, 0, 2 * MIB) is None and not mapped_ahead(fd)
        assert (open_files(), threading.active_count()) == before


def test_a_monitor_that_does_not_know_backends_is_left_alone(world: World) -> None:
    del world.fake.answers["query-memdev"]
    with WaitingMemory(world.qmp) as memory:
        assert memory.find(world.memfd(), 0, 2 * MIB) is None


def test_a_thread_that_does_not_start_leaves_nothing_open(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    fd = populated(world)
    before = open_files()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        memory = WaitingMemory(world.qmp)
    made = memory.find(fd, 0, 2 * MIB)
    assert made is None or made.take() is None
    assert open_files() == before and not mapped_ahead(fd)
