# SPDX-License-Identifier: Apache-2.0
"""The same guest through a file (``vmth save`` and ``vmth restore``), and through ``vmth relay`` in
front of QEMUs that are driven by somebody else."""

from __future__ import annotations

import re

import numpy as np
import pytest
from qemu_guest import Walk
from qemu_world import Machine, World, build, modern_build
from waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

IDLE = Walk(chunk_pages=0, ticks_hz=100, beat_every=8)
#: Some 130 MB/s of pages, at most.
BUSY = Walk(chunk_pages=32, ticks_hz=1000, beat_every=32)
RETURN_PATH = [{"capability": name, "state": True} for name in ("events", "return-path")]


@pytest.mark.parametrize("live", [(), ("--live",)], ids=["stopped", "live"])
def test_busy_guest_goes_through_a_file(live: tuple[str, ...]) -> None:
    qemu = modern_build()
    with World(BUSY, [qemu]) as world:
        a = world.boot("a", qemu)
        image = str(world.folder / "image")
        saved = world.vmth(a, "save", "--qmp", str(a.qmp), *live, image, "--json").answer()
        assert saved["exit_code"] == 0, saved
        a.process.wait(60)
        b = world.await_guest("b", qemu, shared=False)
        world.restore(b, image)
        b.wait_beats(3)
        assert world.check(b) >= 1


def test_paused_guest_comes_out_of_the_file_equal_in_another_version() -> None:
    home, away = build("SRC"), build("DST")
    with World(IDLE, (home, away)) as world:
        a = world.boot("a", home)
        a.stop()
        before = a.memory()
        image = str(world.folder / "image")
        saved = world.vmth(a, "save", "--qmp", str(a.qmp), image, "--json").answer()
        assert saved["exit_code"] == 0, saved
        a.process.wait(60)
        b = world.await_guest("b", away)
        world.restore(b, image)
        assert b.status() in ("paused", "prelaunch")
        assert np.array_equal(b.memory(), before)
        b.run()
        b.wait_beats(3)
        world.check(b)


def drive(source: Machine, destination: Machine, uri: str) -> None:
    """What an orchestrator does once both ends know where to connect."""
    source.execute("migrate-set-capabilities", capabilities=RETURN_PATH)
    source.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 34})
    source.execute("migrate", uri=uri)
    assert source.monitor.wait_event(
        lambda event: event.name == "MIGRATION" and event.data["status"] == "completed", 60
    )
    wait_until(lambda: destination.status() in ("paused", "prelaunch"))
    destination.run()


def relay(world: World, at: Machine, listen: str, connect: str, *options: str) -> str:
    """Start one; where it listens."""
    command = world.vmth(at, "relay", "--listen", listen, "--connect", connect, "--json", *options)
    wait_until(lambda: "listening" in command.said() or command.ended)
    found = re.search(r"((?:tcp|unix):\S+)", command.said())
    assert found, f"vmth relay ended at once: {command.said()}"
    return found[1]


@pytest.mark.parametrize("peers", ["one relay", "two relays", "two relays, compressed"])
def test_busy_guest_goes_through_relays(peers: str) -> None:
    qemu = modern_build()
    with World(BUSY, [qemu]) as world:
        a, b = world.boot("a", qemu), world.await_guest("b", qemu)
        end = f"unix:{world.folder}/in"
        b.execute("migrate-incoming", uri=end)
        out = f"unix:{world.folder}/out"
        if peers == "one relay":
            relay(world, a, out, end)
        else:
            link = relay(world, b, "tcp:127.0.0.1:0", end, "--peer", "listen")
            compress = ("--compress",) if "compressed" in peers else ()
            relay(world, a, out, link, "--peer", "connect", *compress)
        drive(a, b, out)
        world.hosts.append(b)
        b.wait_beats(3)
        assert world.check(b) >= 1
        world.same_but_counters(a.memory(), b.memory())
