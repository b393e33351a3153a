# SPDX-License-Identifier: Apache-2.0
"""Real VMs are saved to files and restored, byte for byte; whatever fails leaves what there was.

``VMTH_QEMU_SRC`` saves and ``VMTH_QEMU_DST`` restores. A busy guest proves nothing under TCG before
QEMU 9.0.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qemu_guest import Walk
from qemu_world import Build, Command, Machine, World, build, modern_build
from waiting import wait_until

from vmth.qemu.image import Image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

IDLE = Walk(chunk_pages=0, ticks_hz=100, beat_every=8)
BUSY = Walk(chunk_pages=32, ticks_hz=1000, beat_every=32)
CHILD = str(Path(__file__).parent / "qemu_save_child.py")


def save(world: World, machine: Machine, *options: str, **child: Any) -> Command:
    arguments = ("save", "--qmp", str(machine.qmp), str(image_of(world)), "--json", *options)
    return world.vmth(machine, *arguments, **child)


def restore(world: World, machine: Machine, *options: str, **child: Any) -> Command:
    arguments = ("restore", str(image_of(world)), "--qmp", str(machine.qmp), "--json", *options)
    return world.vmth(machine, *arguments, **child)


def image_of(world: World) -> Path:
    folder = world.folder / "images"
    folder.mkdir(exist_ok=True)
    return folder / "vm.vmth"


def no_file(world: World) -> bool:
    return os.listdir(image_of(world).parent) == []


def answered(command: Command, code: int = 0) -> dict[str, Any]:
    told = command.answer()
    assert told["exit_code"] == code, (told, command.said())
    return told


def runs_on(world: World, machine: Machine) -> None:
    """The guest runs here and is whole."""
    wait_until(lambda: machine.status() == "running")
    machine.wait_beats(2)
    world.check(machine)
    machine.run()


@pytest.fixture
def builds() -> tuple[Build, Build]:
    return build("SRC"), build("DST")


@pytest.mark.parametrize("shared", [True, False])
def test_a_running_guest_is_saved_and_runs_on_elsewhere(
    builds: tuple[Build, Build], shared: bool
) -> None:
    with World(IDLE, builds) as world:
        a = world.boot("a", builds[0], shared=shared)
        told = answered(save(world, a, "--on-success", "keep"))
        assert a.status() == "postmigrate"
        assert told["verified"] and told["ran"] and not told["live"]
        assert told["superseded_pages"] == 0 and told["file_bytes"] < 8 << 20
        assert told["file_bytes"] == image_of(world).stat().st_size
        before = a.memory()
        a.kill()
        b = world.await_guest("b", builds[1])
        back = answered(restore(world, b, "--paused"))
        assert b.status() == "paused" and back["digest"] == told["digest"]
        assert np.array_equal(b.memory(), before)
        world.hosts.append(b)
        b.run()
        b.wait_beats(3)
        world.check(b)


def test_a_guest_that_ran_runs_and_its_qemu_has_quit(builds: tuple[Build, Build]) -> None:
    with World(IDLE, builds) as world:
        a = world.boot("a", builds[0])
        answered(save(world, a))
        assert a.process.wait(60) == 0
        b = world.await_guest("b", builds[1])
        assert answered(restore(world, b))["running"]
        assert b.status() == "running"
        world.hosts.append(b)
        runs_on(world, b)


def test_a_paused_guest_stays_paused_and_one_file_serves_twice(
    builds: tuple[Build, Build],
) -> None:
    with World(IDLE, builds) as world:
        a = world.boot("a", builds[0])
        a.stop()
        before = a.memory()
        assert not answered(save(world, a, "--level", "0"))["ran"]
        for name in ("b", "c"):
            machine = world.await_guest(name, builds[1])
            assert not answered(restore(world, machine))["running"]
            assert machine.status() in ("paused", "prelaunch")
            assert np.array_equal(machine.memory(), before)
            machine.close()


def test_what_is_saved_again_is_the_same(builds: tuple[Build, Build]) -> None:
    """File, QEMU, file: the digest of memory is that of the first."""
    with World(IDLE, builds) as world:
        a = world.boot("a", builds[0])
        a.stop()
        first = answered(save(world, a))
        b = world.await_guest("b", builds[1])
        answered(restore(world, b))
        os.rename(image_of(world), world.folder / "first")
        second = answered(save(world, b))
        assert second["digest"] == first["digest"] and second["passes"] >= 1


def test_a_snapshot_and_the_guest_runs_on(builds: tuple[Build, Build]) -> None:
    with World(IDLE, builds) as world:
        a = world.boot("a", builds[0])
        told = answered(save(world, a, "--on-success", "resume"))
        assert told["stopped_ms"] > 0 and told["source_runs"]
        runs_on(world, a)
        # Again: what the first one set was put back, and the file is in the way.
        before = image_of(world).read_bytes()
        refused = answered(save(world, a), 3)
        assert "exists; --force replaces it" in refused["error"]
        assert image_of(world).read_bytes() == before
        answered(save(world, a, "--force", "--live", "--on-success", "resume"))
        assert image_of(world).read_bytes() != before
        runs_on(world, a)


def test_a_busy_guest_is_saved_live() -> None:
    qemu = modern_build()
    with World(BUSY, [qemu]) as world:
        a = world.boot("a", qemu)
        told = answered(save(world, a, "--live", "--on-success", "keep"))
        assert told["live"] and told["superseded_pages"] > 0 and told["passes"] > 1
        before = a.memory()
        a.kill()
        b = world.await_guest("b", qemu)
        back = answered(restore(world, b, "--paused"))
        assert back["digest"] == told["digest"]
        assert np.array_equal(b.memory(), before)
        world.hosts.append(b)
        b.run()
        b.wait_beats(3)
        assert world.check(b) > 0
        inspected = answered(world.vmth(b, "inspect", str(image_of(world)), "--json"))
        assert inspected["faults"] == [] and inspected["image"]["live"]


def test_a_busy_guest_is_saved_cold() -> None:
    qemu = modern_build()
    with World(BUSY, [qemu]) as world:
        a = world.boot("a", qemu)
        told = answered(save(world, a, "--on-success", "keep"))
        assert told["superseded_pages"] == 0
        before = a.memory()
        a.kill()
        b = world.await_guest("b", qemu)
        answered(restore(world, b))
        world.hosts.append(b)
        b.wait_beats(3)
        world.check(b)
        world.same_but_counters(before, b.memory())


# ---- whatever fails ----------------------------------------------------------------------------


#: Where the save dies: before the stream, amid the pages, before the file is checked, before QEMU
#: is told SHUT, when QEMU holds the guest paused for good, and when the file has its name.
STEPS = ["settings", "pages", "checked", "shut", "completed", "published"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mode", ["--live", "--level=1"], ids=["live", "cold"])
def test_a_save_that_is_killed(builds: tuple[Build, Build], step: str, mode: str) -> None:
    """The guest runs on as if nothing had been, or the file holds it and it is paused."""
    with World(IDLE, builds) as world:
        a = world.boot("a", builds[0])
        command = save(world, a, mode, child=(CHILD, step))
        assert command.wait() == -signal.SIGKILL
        if step == "published":
            wait_until(lambda: "was killed" in command.said())
            assert "the file is whole, and the guest is 'postmigrate'" in command.said()
            with Image.open(image_of(world)) as image:
                image.verify()
            assert a.status() == "postmigrate"
            return
        wait_until(lambda: "was killed" in command.said())
        runs_on(world, a)
        assert no_file(world)
        assert "there is no file, and the guest is 'running'" in command.said()
        told = answered(save(world, a))
        assert told["verified"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_save_that_is_cancelled(builds: tuple[Build, Build], number: signal.Signals) -> None:
    with World(IDLE, builds) as world:
        a = world.boot("a", builds[0])
        command = save(world, a, "--bandwidth", "1MB/s")
        wait_until(lambda: a.execute("query-migrate").get("status") == "active")
        command.process.send_signal(number)
        told = answered(command, 130 if number == signal.SIGINT else 4)
        assert told["source_runs"] and "cancelled" in told["error"]
        runs_on(world, a)
        assert no_file(world)


def test_a_paused_guest_stays_paused_when_its_save_fails(builds: tuple[Build, Build]) -> None:
    with World(IDLE, builds) as world:
        a = world.boot("a", builds[0])
        a.stop()
        command = save(world, a, child=(CHILD, "shut"))
        assert command.wait() == -signal.SIGKILL
        wait_until(lambda: "was killed" in command.said())
        # QEMU calls it so when it gives up this late; it lets it move again only after cont.
        assert a.status() == "postmigrate" and no_file(world)
        told = answered(save(world, a), 3)
        assert "'postmigrate', allowed: running, paused, prelaunch" in told["error"]
        a.run()
        runs_on(world, a)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of that size at ``folder``."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk(builds: tuple[Build, Build]) -> None:
    with World(IDLE, builds) as world:
        a = world.boot("a", builds[0])
        folder = image_of(world).parent
        with small_disk(folder, "256k"):
            told = answered(save(world, a), 1)
            assert "No space left on device" in told["error"] and told["source_runs"]
            runs_on(world, a)
            assert no_file(world)
        answered(save(world, a))


def test_a_limit_on_file_sizes(builds: tuple[Build, Build]) -> None:
    with World(IDLE, builds) as world:
        a = world.boot("a", builds[0])
        command = subprocess.run(
            [sys.executable, "-m", "vmth", "save", "--qmp", a.qmp, image_of(world), "--level=0"],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
            capture_output=True,
            text=True,
            check=False,
        )
        assert command.returncode == 1
        assert "File too large; there is no file, and the VM is as it was" in command.stderr
        runs_on(world, a)
        assert no_file(world)


def test_a_qemu_that_ends_amid_its_save(builds: tuple[Build, Build]) -> None:
    with World(IDLE, builds) as world:
        a = world.boot("a", builds[0])
        command = save(world, a, "--bandwidth", "1MB/s")
        wait_until(lambda: a.execute("query-migrate").get("status") == "active")
        a.kill()
        told = answered(command, 1)
        assert "was not saved" in told["error"] and told["source_runs"] is False
        assert no_file(world)


@pytest.mark.parametrize("step", ["checked", "pages", "state", "loaded"])
def test_a_restore_that_is_killed(builds: tuple[Build, Build], step: str) -> None:
    """Nothing runs; the next attempt succeeds."""
    with World(IDLE, builds) as world:
        a = world.boot("a", builds[0])
        answered(save(world, a))
        b = world.await_guest("b", builds[1])
        command = restore(world, b, child=(CHILD, step))
        assert command.wait() == -signal.SIGKILL
        if step == "checked":
            assert b.status() == "inmigrate"
        elif step == "loaded":
            assert b.status() == "paused"
        else:
            wait_until(lambda: b.status() in ("gone", "inmigrate"))
        assert b.written() == b""
        b.close()
        c = world.await_guest("c", builds[1])
        assert answered(restore(world, c))["running"]
        world.hosts.append(c)
        runs_on(world, c)


def test_a_damaged_file_is_found_before_qemu_is_touched(builds: tuple[Build, Build]) -> None:
    with World(IDLE, builds) as world:
        a = world.boot("a", builds[0])
        answered(save(world, a))
        path = image_of(world)
        good = path.read_bytes()
        b = world.await_guest("b", builds[1])
        for at in (5, 100, len(good) // 2, len(good) - 300, len(good) - 3):
            damaged = bytearray(good)
            damaged[at] ^= 0x10
            path.write_bytes(damaged)
            told = answered(restore(world, b), 6)
            assert "nothing was restored" in told["error"]
            assert b.status() == "inmigrate"
        path.write_bytes(good[:-1])
        answered(restore(world, b), 6)
        assert b.execute("query-migrate") == {}
        path.write_bytes(good)
        answered(restore(world, b))
        world.hosts.append(b)
        runs_on(world, b)


def test_a_qemu_that_cannot_take_it(builds: tuple[Build, Build]) -> None:
    """Another machine type, other memory, or one that waits for nothing."""
    with World(IDLE, builds) as world:
        a = world.boot("a", builds[0])
        answered(save(world, a, "--on-success", "resume"))
        told = answered(restore(world, a), 3)
        assert "'running', allowed 'inmigrate'" in told["error"] or told["error"]
        runs_on(world, a)
        world.machine_type = next(
            name for name in sorted(builds[1].machines) if name.startswith("pc-q35-")
        )
        other = world.await_guest("other", builds[1])
        told = answered(restore(world, other), 3)
        assert "machine" in told["error"] and other.status() == "inmigrate"


def test_a_monitor_that_is_none_or_busy(builds: tuple[Build, Build], tmp_path: Path) -> None:
    with World(IDLE, builds) as world:
        a = world.boot("a", builds[0])
        for arguments in (
            ["save", "--qmp", str(tmp_path / "none"), str(tmp_path / "file")],
            ["save", "--qmp", str(a.log), str(tmp_path / "file")],
        ):
            told = answered(world.vmth(a, *arguments, "--json"), 2)
            assert told["error"]
        assert os.listdir(tmp_path) == []
        runs_on(world, a)
