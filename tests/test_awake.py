# SPDX-License-Identifier: Apache-2.0
"""While a guest is paused no core of this host goes to sleep, where that may be asked for."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from listener_world import World, one_world
from test_realtime import USUAL, policy

import vmth
from vmth.errors import MigrationError
from vmth.host import host_lines, host_report
from vmth.journal import Journal, Side
from vmth.realtime import LONGEST_NS, Realtime, permitted
from vmth.wire.messages import Mode


@pytest.fixture
def latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the device: what was asked is in it, who asks has it open."""
    path = tmp_path / "cpu_dma_latency"
    path.touch()
    monkeypatch.setattr("vmth.realtime.LATENCY_PATH", str(path))
    return path


def asks(path: Path) -> int:
    """How many in this process have that file open?"""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # another thread closes one
            found += os.readlink(f"/proc/self/fd/{number}") == str(path)
    return found


def nobody_asks(path: Path) -> bool:
    """Soon: an end may be told that it is over before the other is done."""
    until = time.monotonic() + 5
    while asks(path) and time.monotonic() < until:
        time.sleep(0.001)
    return not asks(path)


def test_cores_are_kept_awake_while_the_guest_is_paused(latency: Path) -> None:
    realtime = Realtime()
    realtime.begin(None, paused=False)
    assert not asks(latency)
    for _ in range(2):
        realtime.begin(None)
        assert asks(latency) == 1 and latency.read_bytes() == bytes(4)
    for _ in range(2):
        realtime.end()
        assert not asks(latency)
    realtime.begin(None)
    assert asks(latency)
    realtime.end()


def test_time_counts_from_the_pause(latency: Path) -> None:
    now_ns = 0
    realtime = Realtime(clock=lambda: now_ns)
    realtime.begin(None, paused=False)
    now_ns = LONGEST_NS
    realtime.begin(None, paused=False)
    realtime.begin(None)
    now_ns = 2 * LONGEST_NS
    realtime.check_time()
    assert asks(latency)
    now_ns += 1
    realtime.check_time()
    assert not asks(latency) and policy() == USUAL
    # That was long enough to wait for a pause; when it comes all begins anew.
    realtime.begin(None, paused=False)
    assert (realtime.held, policy()) == (False, USUAL)
    realtime.begin(None)
    assert (realtime.held, asks(latency)) == (True, 1)
    realtime.end()


@pytest.mark.parametrize("path", ["missing", "."], ids=["missing", "not-to-be-written"])
def test_cores_that_cannot_be_kept_awake_are_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr("vmth.realtime.LATENCY_PATH", str(tmp_path / path))
    realtime = Realtime()
    realtime.begin(None)
    assert realtime.refused == (not permitted())
    realtime.end()
    assert policy() == USUAL


def test_cores_are_kept_awake_where_priority_is_refused(latency: Path) -> None:
    realtime = Realtime(refused=True)
    realtime.begin(None)
    assert asks(latency) and policy() == USUAL
    now_ns = realtime.clock() + 2 * LONGEST_NS
    realtime.clock = lambda: now_ns
    realtime.check_time()
    assert not asks(latency)


def test_cores_may_sleep_where_nothing_is_wanted(latency: Path) -> None:
    realtime = Realtime(wanted=False)
    realtime.begin(None)
    assert not asks(latency)


# -- sessions ------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with one_world(tmp_path) as made:
        yield made


@pytest.mark.parametrize(
    ("options", "asking"),
    [
        ({}, {"pause": 1, "load_state": 2, "resume": 2}),
        ({"realtime": False}, {"pause": 0, "load_state": 1, "resume": 1}),
        # All of memory comes, or is hashed, while the guest is paused: no matter of moments.
        ({"mode": Mode.COLD}, {"pause": 0, "load_state": 0, "resume": 0}),
        ({"audit": True}, {"pause": 0, "load_state": 0, "resume": 0}),
    ],
)
def test_both_ends_keep_cores_awake_until_the_guest_runs(
    world: World, latency: Path, options: dict[str, Any], asking: dict[str, int]
) -> None:
    seen: dict[str, int] = {}

    def note(name: str) -> Callable[[], None]:
        return lambda: seen.__setitem__(name, asks(latency))

    source, listener = world.guest(), world.listen()
    source.resume()
    source.on_call["pause"] = note("pause")
    world.prepare = lambda guest: guest.on_call.update(
        {name: note(name) for name in ("load_state", "resume")}
    )
    vmth.migrate(source, listener.endpoint.display, world.options(**options))
    assert listener.wait_for_guest(5).guest is world.made[-1]
    assert seen == asking
    assert nobody_asks(latency)


@pytest.mark.parametrize("where", ["save_state", "load_state", "resume"])
def test_a_failure_while_paused_lets_cores_sleep(world: World, latency: Path, where: str) -> None:
    source, listener = world.guest(), world.listen()
    source.resume()
    if where == "save_state":
        source.fail[where] = RuntimeError("broken")
    else:
        world.prepare = lambda guest: guest.fail.update({where: RuntimeError("broken")})
    with pytest.raises(MigrationError, match="broken"):
        vmth.migrate(source, listener.endpoint.display, world.options())
    assert isinstance(listener.outcomes.get(timeout=5), MigrationError)
    assert nobody_asks(latency)
    world.prepare = lambda guest: None
    world.moves(listener)


@pytest.mark.parametrize("realtime", [True, False])
def test_both_ends_wake_their_disk_while_the_guest_runs(
    world: World, monkeypatch: pytest.MonkeyPatch, realtime: bool
) -> None:
    woken: list[tuple[Side, bool]] = []
    source, listener = world.guest(), world.listen(realtime=realtime)

    def note(journal: Journal) -> None:
        woken.append((journal.side, source.running))

    monkeypatch.setattr(Journal, "wake_disk", note)
    source.resume()
    vmth.migrate(source, listener.endpoint.display, world.options(realtime=realtime))
    assert listener.wait_for_guest(5).guest is world.made[-1]
    if realtime:
        assert woken.count((Side.SOURCE, True)) == 1 and (Side.SOURCE, False) not in woken
        assert Side.DESTINATION in [side for side, _ in woken]
    else:
        assert not woken


def test_a_probe_tells_whether_cores_can_be_kept_awake(
    latency: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, told in ((latency, True), (latency / "missing", False)):
        monkeypatch.setattr("vmth.realtime.LATENCY_PATH", str(path))
        report = host_report()
        assert report["keeps_awake"] is told
        (line,) = [line for line in host_lines(report) if line.startswith("cores kept awake")]
        assert ("not permitted" in line) is not told
