# SPDX-License-Identifier: Apache-2.0
"""kill -9 of either mover before and after every step of the handover, with guests that outlive
them.

After the restart of whatever died exactly one guest runs, it has lost no write, and migrates again.
A monitor watches all the time that the source never runs once the destination was seen running.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmth
from vmth.errors import GuestError
from vmth.guests.client import HolderGuest, status_of
from vmth.guests.spawn import attach, find, spawn_destination, spawn_source
from vmth.handover_cost import FILE_NAME
from vmth.handshake import Incoming
from vmth.listener import Listener
from vmth.options import MigrateOptions, ReceiveOptions
from vmth.uri import parse_endpoint

MIB = 1 << 20
CHILD = Path(__file__).with_name("mover_child.py")
DEADLINE_S = 30.0

SOURCE_STEPS = [
    "journal MIGRATING",
    "pause the guest",
    "send Seal",
    "hold the guest",
    "journal GRANTED",
    "send Grant",
    "journal RELEASED",
    "release the guest",
    "send Released",
    "forget the record",
]
DESTINATION_STEPS = [
    "journal RECEIVING",
    "send Accept",
    "send Sealed",
    "journal STARTING",
    "resume the guest",
    "journal RUNNING",
    "send Running",
    "forget the record",
    "send ReleasedSeen",
]


def each_boundary(steps: list[str]) -> list[tuple[str, str]]:
    """Before each step and after the last: after one is before the next."""
    return [*((step, "before") for step in steps), (steps[-1], "after")]


def runs(path: str) -> bool:
    try:
        return bool(path) and status_of(path).running
    except GuestError:
        return False


class Monitor:
    """Samples the destination first, then the source: a source that runs after the destination was
    seen running is a second copy."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.destination = ""
        self.double = False
        self._seen = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._seen = self._seen or runs(self.destination)
            if self._seen and runs(self.source):
                self.double = True

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


class Scene:
    """A running source guest, two movers, and what is needed to start them again."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        guest, _ = spawn_source(
            "process", 16 * MIB, content="zero=50,random=50", owned=False, linger_s=60
        )
        self.source = guest.socket_path
        guest.close()  # a mover that vanishes: the guest runs on
        self.monitor = Monitor(self.source)
        self.movers: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        mover = subprocess.Popen(
            [sys.executable, str(CHILD), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.movers.append(mover)
        return mover

    def start_destination(
        self, step: str, when: str, uri: str = "tcp:127.0.0.1:0"
    ) -> tuple[subprocess.Popen[str], str]:
        mover = self.start("destination", uri, str(self.tmp_path / "d"), step, when)
        assert mover.stdout is not None
        endpoint = mover.stdout.readline().strip()
        assert endpoint, mover.stderr.read() if mover.stderr else ""
        threading.Thread(target=self._read_holder, args=(mover,), daemon=True).start()
        return mover, endpoint

    def _read_holder(self, mover: subprocess.Popen[str]) -> None:
        assert mover.stdout is not None
        path = mover.stdout.readline().strip()
        if path:
            self.monitor.destination = path

    def start_source(self, step: str, when: str, uri: str) -> subprocess.Popen[str]:
        return self.start("source", self.source, uri, str(self.tmp_path / "s"), step, when)

    def close(self) -> None:
        self.monitor.stop()
        for mover in self.movers:
            if mover.poll() is None:
                mover.kill()
            mover.wait()
            for pipe in (mover.stdin, mover.stdout, mover.stderr):
                if pipe is not None:
                    pipe.close()
        for path in (self.source, self.monitor.destination):
            try:
                guest = attach(path) if path else None
            except GuestError:
                continue
            if guest is not None:
                guest.shutdown()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.close()


def wait_for_death(mover: subprocess.Popen[str]) -> None:
    mover.wait(DEADLINE_S)
    assert mover.returncode == -signal.SIGKILL, mover.stderr.read() if mover.stderr else ""


def settle(scene: Scene) -> str:
    """Wait until exactly one guest runs, and go on for a moment to see that it stays so."""
    deadline = time.monotonic() + DEADLINE_S
    found = ""
    while time.monotonic() < deadline:
        now = [path for path in (scene.source, scene.monitor.destination) if runs(path)]
        if len(now) == 1:
            if found == now[0]:
                return found
            found = now[0]
        threading.Event().wait(0.1)
    raise AssertionError("nothing runs")


def move_on(scene: Scene, path: str, tmp_path: Path) -> None:
    """Whoever runs moves again, with the audit on: its memory is whole and its record is clean."""
    guest = attach_when_free(path)
    made: list[HolderGuest] = []

    def make_guest(incoming: Incoming) -> HolderGuest:
        made.append(spawn_destination("process", incoming.blocks))
        return made[-1]

    options = ReceiveOptions(state_dir=tmp_path / "again-d")
    endpoint = parse_endpoint("tcp:127.0.0.1:0", listening=True)
    try:
        with Listener(endpoint, make_guest, options) as listener:
            result = vmth.migrate(
                guest,
                listener.endpoint.display,
                MigrateOptions(state_dir=tmp_path / "again-s", audit=True),
            )
            assert result.verified
        assert made[0].pause_at_beat()
        report = made[0].beat_report()
        assert report.out_of_order == 0
        assert report.beats > 0
    finally:
        for one in made:
            one.shutdown()


def attach_when_free(path: str) -> HolderGuest:
    """A holder learns a little later than we that its mover is gone."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            return attach(path)
        except GuestError:
            if time.monotonic() > deadline:
                raise
            threading.Event().wait(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "when"), each_boundary(SOURCE_STEPS))
def test_the_source_mover_dies(scene: Scene, step: str, when: str, tmp_path: Path) -> None:
    _, endpoint = scene.start_destination("none", "")
    source = scene.start_source(step, when, endpoint)
    wait_for_death(source)
    vmth.recover(find, state_dir=tmp_path / "s", timeout_s=10)
    where = settle(scene)
    assert not scene.monitor.double
    granted = SOURCE_STEPS.index(step) >= SOURCE_STEPS.index("send Grant") and not (
        step == "send Grant" and when == "before"
    )
    assert (where == scene.monitor.destination) == granted
    for mover in scene.movers:
        mover.kill()
        mover.wait()
    move_on(scene, where, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "when"), each_boundary(DESTINATION_STEPS))
def test_the_destination_mover_dies(scene: Scene, step: str, when: str, tmp_path: Path) -> None:
    destination, endpoint = scene.start_destination(step, when)
    source = scene.start_source("none", "", endpoint)
    wait_for_death(destination)
    source.wait(DEADLINE_S)
    scene.start_destination("none", "", endpoint)
    vmth.recover(find, state_dir=tmp_path / "s", timeout_s=10)
    where = settle(scene)
    assert not scene.monitor.double
    for mover in scene.movers:
        mover.kill()
        mover.wait()
    move_on(scene, where, tmp_path)
    # Of no session anything; how long handovers took may be kept.
    assert set(os.listdir(tmp_path / "s")) - {FILE_NAME} == {"receiver_id"}
