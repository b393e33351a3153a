# SPDX-License-Identifier: Apache-2.0
"""kill -9 of either vmth and of either QEMU: before the stream, in the middle of RAM and at the
steps of the handover.

Afterwards exactly one guest runs, or none where the one that held it was killed; where vmth died,
``vmth recover`` says so and settles it. The guest has lost nothing, and the next attempt succeeds.
A monitor watches all the time that the source never runs once the destination was seen running.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from qemu_guest import Walk
from qemu_world import Command, Machine, World, build
from waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CHILD = str(Path(__file__).with_name("qemu_mover_child.py"))
IDLE = Walk(chunk_pages=0, ticks_hz=100, beat_every=8)
#: So that the first pass over 104 MiB takes seconds.
SLOWLY = ("--bandwidth", "40MB/s")

#: Before the stream; the state is out; SHUT goes to the source; nothing is decided; granted, and
#: not said; said. Every other step is taken in tests/test_mover_death.py.
SOURCE_STEPS = [
    "journal MIGRATING",
    "send Seal",
    "hold the guest",
    "journal GRANTED",
    "send Grant",
    "journal RELEASED",
]
DESTINATION_STEPS = [
    "send Accept",
    "send Sealed",
    "journal STARTING",
    "resume the guest",
    "send Running",
]


class Watch:
    """Samples the destination first, then the source: a source that runs after the destination was
    seen running is a second copy."""

    def __init__(self, source: Machine, destination: Machine) -> None:
        self.double = False
        self._machines = source, destination
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        source, destination = self._machines
        seen = False
        while not self._stop.wait(0.005):
            seen = seen or runs(destination)
            if seen and runs(source):
                self.double = True

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def runs(machine: Machine) -> bool:
    return machine.status() == "running"


class Scene:
    """A guest at A, a QEMU that waits for it at B, and what moves it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.a = world.boot("a", build("SRC"))
        self.b = world.await_guest("b", build("DST"))
        self.watch = Watch(self.a, self.b)

    def receive(self, *child: str) -> tuple[str, Command]:
        return self.world.receive(self.b, "auto", "--keep-listening", child=child or ("-m", "vmth"))

    def migrate(self, uri: str, *child: str, options: tuple[str, ...] = ()) -> Command:
        return self.world.migrate(self.a, uri, *options, child=child or ("-m", "vmth"))

    def recover(self) -> int:
        """Settle what is on record at A, as often as its answer asks for it."""
        command = self.world.vmth(self.a, "recover", "--json")
        code = command.wait()
        assert code in (0, 7), command.said()
        return code

    def settle(self) -> Machine:
        """Wait until one of the two runs; it alone."""
        wait_until(lambda: runs(self.a) or runs(self.b))
        self.watch.stop()
        assert not self.watch.double
        running = [machine for machine in (self.a, self.b) if runs(machine)]
        assert len(running) == 1
        return running[0]

    def move_on(self, holder: Machine) -> None:
        """The guest where it runs has lost nothing, and moves on to a new QEMU."""
        if holder is self.b:
            self.world.hosts.append(holder)
        holder.wait_beats(2)
        self.world.check(holder)
        holder.run()
        for command in self.world.commands:
            command.kill()
        # A QEMU that was given up, and that nobody ended, holds no image lock, but is of no use.
        for machine in (self.a, self.b):
            if machine is not holder:
                machine.kill()
        following = self.world.await_guest("c", build("SRC"))
        self.world.move(holder, following, "auto")
        following.wait_beats(2)
        self.world.check(following)


@pytest.fixture
def scene() -> Iterator[Scene]:
    with World(IDLE, [build("SRC"), build("DST")]) as world:
        scene = Scene(world)
        yield scene
        scene.watch.stop()


def killed(command: Command) -> None:
    assert command.wait() == -9, command.said()


def middle_of_ram(machine: Machine) -> bool:
    """A third of the guest's memory has left QEMU, and not all of it."""
    told = machine.execute("query-migrate")
    return bool(told.get("status") == "active" and told["ram"]["transferred"] > 35 << 20)


@pytest.mark.parametrize("step", SOURCE_STEPS)
def test_the_source_vmth_dies(scene: Scene, step: str) -> None:
    uri, _ = scene.receive()
    killed(scene.migrate(uri, CHILD, "source", step, "before", "0"))
    assert scene.recover() == 0
    holder = scene.settle()
    granted = SOURCE_STEPS.index(step) > SOURCE_STEPS.index("send Grant")
    assert (holder is scene.b) == granted
    scene.move_on(holder)


def test_the_source_vmth_dies_in_the_middle_of_ram(scene: Scene) -> None:
    uri, _ = scene.receive()
    command = scene.migrate(uri, options=SLOWLY)
    wait_until(lambda: middle_of_ram(scene.a) or command.ended)
    command.kill()
    assert scene.recover() == 0
    holder = scene.settle()
    assert holder is scene.a
    scene.move_on(holder)


@pytest.mark.parametrize("step", DESTINATION_STEPS)
def test_the_destination_vmth_dies(scene: Scene, step: str) -> None:
    uri, receiver = scene.receive(CHILD, "destination", step, "before", "0")
    migration = scene.migrate(uri)
    killed(receiver)
    assert migration.wait() in (1, 7), migration.said()
    # Whatever became of B, its host answers again for what it decided.
    following = scene.world.await_guest("b2", build("DST"))
    following.state_dir = scene.b.state_dir
    scene.world.receive(following, "auto", "--keep-listening", uri=uri)
    wait_until(lambda: scene.recover() == 0)
    scene.move_on(scene.settle())


def test_the_destination_vmth_dies_in_the_middle_of_ram(scene: Scene) -> None:
    uri, receiver = scene.receive()
    migration = scene.migrate(uri, options=SLOWLY)
    wait_until(lambda: middle_of_ram(scene.a) or migration.ended)
    receiver.kill()
    told = migration.answer()
    assert told["exit_code"] == 1 and told["source_runs"] is True
    holder = scene.settle()
    assert holder is scene.a
    scene.move_on(holder)


@pytest.mark.parametrize("step", ["send Seal", "journal RELEASED"])
def test_the_source_qemu_dies(scene: Scene, step: str) -> None:
    """Before the grant nobody else may run what nobody finished; after it the other side does."""
    uri, _ = scene.receive()
    migration = scene.migrate(uri, CHILD, "source", step, "before", str(scene.a.process.pid))
    told = migration.answer()
    if step == "send Seal":
        assert told["exit_code"] != 0 and told["error"]
        assert not runs(scene.b)
        return
    holder = scene.settle()
    assert holder is scene.b
    scene.move_on(holder)


def test_the_source_qemu_dies_in_the_middle_of_ram(scene: Scene) -> None:
    uri, _ = scene.receive()
    migration = scene.migrate(uri, options=SLOWLY)
    wait_until(lambda: middle_of_ram(scene.a) or migration.ended)
    scene.a.kill()
    told = migration.answer()
    assert told["exit_code"] != 0 and told["source_runs"] is not True and told["error"]
    assert not runs(scene.b)


@pytest.mark.parametrize("step", ["send Sealed", "resume the guest"])
def test_the_destination_qemu_dies(scene: Scene, step: str) -> None:
    """It held nothing yet that the source has not: even with the right to run, it never read that
    it should."""
    pid = str(scene.b.process.pid)
    uri, _ = scene.receive(CHILD, "destination", step, "before", pid)
    told = scene.migrate(uri).answer()
    assert told["exit_code"] == 1 and told["source_runs"] is True, told
    holder = scene.settle()
    assert holder is scene.a
    scene.move_on(holder)


def test_the_destination_qemu_dies_where_it_may_have_run(scene: Scene) -> None:
    """It had the right to run: whether it did, nobody can know, so nobody runs, and that is said
    with the command that asks again."""
    pid = str(scene.b.process.pid)
    uri, _ = scene.receive(CHILD, "destination", "cont", "within", pid)
    migration = scene.migrate(uri)
    told = migration.answer()
    assert told["exit_code"] == 7 and told["source_runs"] is not True, told
    assert "vmth recover" in migration.said()
    assert scene.recover() == 7
    assert scene.a.status() == "postmigrate" and scene.b.status() == "gone"


def test_the_destination_qemu_dies_in_the_middle_of_ram(scene: Scene) -> None:
    uri, _ = scene.receive()
    migration = scene.migrate(uri, options=SLOWLY)
    wait_until(lambda: middle_of_ram(scene.a) or migration.ended)
    scene.b.kill()
    told = migration.answer()
    assert told["exit_code"] == 1 and told["source_runs"] is True
    holder = scene.settle()
    assert holder is scene.a
    scene.move_on(holder)
