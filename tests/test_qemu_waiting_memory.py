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
from landing_world import MIB, World
from listener_world import open_files
from waiting import wait_until

from vmth.memory import map_blocks
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


def populated(world: World, nbytes: int = 2 * MIB) -> int:
    """A shared backend of the QEMU whose memory is there."""
    world.backend("pc.ram", nbytes)
    fd = world.memfd(nbytes)
    os.pwrite(fd, bytes(nbytes), 0)
    return fd


def is_mapped(fd: int) -> bool:
    inode = str(os.fstat(fd).st_ino)
    with open("/proc/self/maps") as maps:
        return any(line.split()[4] == inode for line in maps)


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


def test_other_bytes_are_not_found(world: World) -> None:
    fd = populated(world)
    with WaitingMemory(world.qmp) as memory:
        assert memory.find(fd, 0, MIB) is None
        assert memory.find(world.memfd(), 0, 2 * MIB) is None


def test_what_nobody_took_is_let_go_with_it(world: World) -> None:
    fd = populated(world)
    with WaitingMemory(world.qmp):
        assert is_mapped(fd)
    assert not is_mapped(fd)


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
    assert not is_mapped(fd)


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
            assert is_mapped(fd)
            qemu.communicate(b"\n")
            wait_until(lambda: not is_mapped(fd))
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
        assert memory.find(fd, 0, 2 * MIB) is None and not is_mapped(fd)


def test_memory_that_is_not_shared_is_left_alone(world: World) -> None:
    world.backend("pc.ram", share=False)
    fd = world.memfd()
    with WaitingMemory(world.qmp) as memory:
        assert memory.find(fd, 0, 2 * MIB) is None and not is_mapped(fd)


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
        with pytest.raises(RuntimeError, match="start new thread"):
            WaitingMemory(world.qmp)
    assert open_files() == before and not is_mapped(fd)
