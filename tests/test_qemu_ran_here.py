# SPDX-License-Identifier: Apache-2.0
"""Whether a guest has run at a destination QEMU, by whatever it says afterwards: on that answer the
source may take its own copy back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_qmp import FakeError, FakeQmp, HangUp
from qmp_qemu import QmpQemu

from vmth.errors import ChannelError, GuestError
from vmth.qemu import destination as module
from vmth.qemu.destination import HeldQemu
from vmth.qemu.qmp import Qmp


class World:
    """A QEMU that has loaded a guest; ``after_cont`` is its state as soon as it was told to run."""

    def __init__(self, fake: FakeQmp) -> None:
        self.fake = fake
        self.status = "paused"
        self.after_cont = "running"
        self.tells_resume = False
        fake.answers["query-status"] = lambda _: {"status": self.status}
        fake.answers["cont"] = self._cont

    def _cont(self, _: Any) -> dict[str, Any]:
        self.status = self.after_cont
        if self.tells_resume:
            self.fake.emit("RESUME")
        return {}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with FakeQmp(tmp_path / "qmp") as fake:
        yield World(fake)


@pytest.fixture
def held(world: World) -> Iterator[HeldQemu]:
    with Qmp(world.fake.path) as qmp:
        yield HeldQemu(qmp)


@pytest.mark.parametrize(
    "status",
    [
        "running",
        "suspended",
        "shutdown",
        "io-error",
        "guest-panicked",
        "internal-error",
        "watchdog",
    ],
)
def test_a_guest_that_stops_by_itself_at_once_has_run(
    world: World, held: HeldQemu, status: str
) -> None:
    world.after_cont = status
    assert not held.is_running()
    held.resume()
    assert held.is_running()


def test_a_guest_that_is_stopped_by_order_at_once_has_run(world: World, held: HeldQemu) -> None:
    world.after_cont, world.tells_resume = "paused", True
    held.resume()
    assert held.is_running()


def test_an_event_from_before_the_load_is_no_proof(world: World, held: HeldQemu) -> None:
    world.fake.emit("RESUME")
    held.qmp.status()  # its answer comes behind the event
    world.fake.answers["cont"] = FakeError("GenericError", 'Failed to get "write" lock')
    with pytest.raises(GuestError, match="write"):
        held.resume()
    assert not held.is_running()


def test_a_guest_that_does_not_start_is_said_not_to_run(
    world: World, held: HeldQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RUNS_S", 0.02)
    world.after_cont = "paused"
    with pytest.raises(GuestError, match="no vCPU run"):
        held.resume()
    assert not held.is_running()


def test_a_qemu_that_ends_with_its_guest_at_once_is_known_to_have_run(
    world: World, held: HeldQemu
) -> None:
    world.tells_resume = True
    held.resume()
    world.fake.answers["query-status"] = HangUp
    assert held.is_running(), "the source would be told to take its copy back"


def test_a_qemu_that_is_lost_while_it_is_told_is_not_known(world: World, held: HeldQemu) -> None:
    world.fake.answers["cont"] = HangUp
    with pytest.raises(ChannelError):
        held.resume()
    with pytest.raises(ChannelError):
        held.is_running()


@pytest.mark.slow
@pytest.mark.parametrize("side", ["SRC", "DST"])
def test_a_real_qemu_tells_by_its_event_that_a_stopped_guest_has_run(
    tmp_path: Path, side: str
) -> None:
    with QmpQemu(tmp_path, side) as qemu, Qmp(qemu.path) as qmp:
        held = HeldQemu(qmp)
        assert not held.is_running()
        held.resume()
        qmp.execute("stop")
        assert qmp.status() == "paused" and held.is_running()


def test_one_that_may_have_run_before_is_not_known_by_a_cont_that_was_not_read(
    world: World, held: HeldQemu
) -> None:
    world.fake.deaf = True
    with pytest.raises(ChannelError):
        held.resume()
    with pytest.raises(ChannelError):
        held.is_running()
