# SPDX-License-Identifier: Apache-2.0
"""kill -9 of a relay: in the middle of RAM, and with everything delivered but the last word.

The guest runs on at the source, never at both, has lost nothing, and the next attempt succeeds.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from qemu_guest import Walk
from qemu_world import Command, Machine, World, build
from waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

IDLE = Walk(chunk_pages=0, ticks_hz=100, beat_every=8)
RETURN_PATH = [{"capability": name, "state": True} for name in ("events", "return-path")]


class Mute:
    """Carries one connection on to the relay and gives nothing back, so that SHUT is still on its
    way when the relay dies; ``end()`` then, which is what the source sees of that."""

    def __init__(self, path: Path, onward: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._onward = str(onward)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def _carry(self) -> None:
        source, _ = self._listener.accept()
        with source, socket.socket(socket.AF_UNIX) as relay:
            relay.connect(self._onward)
            forth = threading.Thread(target=self._forth, args=(source, relay), daemon=True)
            forth.start()
            self._over.wait()
            with contextlib.suppress(OSError):
                source.shutdown(socket.SHUT_RDWR)
            forth.join()

    @staticmethod
    def _forth(source: socket.socket, relay: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                relay.sendall(data)

    def end(self) -> None:
        self._over.set()
        self._thread.join()
        self._listener.close()


@pytest.fixture
def world() -> Iterator[World]:
    with World(IDLE, [build("SRC"), build("DST")]) as world:
        yield world


def start_relay(world: World, at: Machine, number: int) -> tuple[Path, Path, Command]:
    """Where it listens, where it goes on to, and itself."""
    out, end = world.folder / f"out{number}", world.folder / f"in{number}"
    command = world.vmth(at, "relay", "--listen", f"unix:{out}", "--connect", f"unix:{end}")
    wait_until(lambda: out.exists() or command.ended)
    assert not command.ended, command.said()
    return out, end, command


def await_at(machine: Machine, end: Path) -> None:
    # Else it takes the image locks as soon as it has loaded, and a source that resumes has none.
    late = [{"capability": "late-block-activate", "state": True}]
    machine.execute("migrate-set-capabilities", capabilities=late)
    machine.execute("migrate-incoming", uri=f"unix:{end}")


def migrate(source: Machine, path: Path, max_bandwidth: int = 1 << 34) -> None:
    source.monitor.forget_events()
    source.execute("migrate-set-capabilities", capabilities=RETURN_PATH)
    source.execute("migrate-set-parameters", **{"max-bandwidth": max_bandwidth})
    source.execute("migrate", uri=f"unix:{path}")


def ended(source: Machine) -> str:
    event = source.monitor.wait_event(
        lambda event: event.name == "MIGRATION" and event.data["status"] in ("failed", "completed"),
        60,
    )
    assert event is not None, "the migration does not end"
    return str(event.data["status"])


def goes_on_and_moves(world: World, a: Machine) -> None:
    """The guest runs at A, has lost nothing, and a new relay takes it to a new QEMU."""
    wait_until(lambda: a.status() == "running")
    a.wait_beats(2)
    world.check(a)
    a.run()
    following = world.await_guest("c", build("DST"))
    out, end, _ = start_relay(world, a, 2)
    await_at(following, end)
    migrate(a, out)
    assert ended(a) == "completed"
    wait_until(lambda: following.status() in ("paused", "prelaunch"))
    world.hosts.append(following)
    following.run()
    following.wait_beats(2)
    world.check(following)


def test_relay_dies_in_the_middle_of_ram(world: World) -> None:
    a, b = world.boot("a", build("SRC")), world.await_guest("b", build("DST"))
    out, end, relay = start_relay(world, a, 1)
    await_at(b, end)
    migrate(a, out, 40_000_000)
    wait_until(lambda: a.execute("query-migrate").get("ram", {}).get("transferred", 0) > 35 << 20)
    relay.kill()
    assert ended(a) == "failed"
    assert b.status() != "running"
    goes_on_and_moves(world, a)


def test_relay_dies_with_the_last_word(world: World) -> None:
    """The destination has loaded everything and said so; the source never hears it."""
    a, b = world.boot("a", build("SRC")), world.await_guest("b", build("DST"))
    out, end, relay = start_relay(world, a, 1)
    await_at(b, end)
    mute = Mute(world.folder / "mute", out)
    migrate(a, world.folder / "mute")
    wait_until(lambda: b.status() in ("paused", "prelaunch"))
    assert a.status() != "running"
    relay.kill()
    mute.end()
    assert ended(a) == "failed"
    # Paused, because whoever drives it started it with -S, and to be ended before anything else.
    assert b.status() in ("paused", "prelaunch")
    b.kill()
    goes_on_and_moves(world, a)
