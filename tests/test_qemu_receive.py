# SPDX-License-Identifier: Apache-2.0
"""``vmth receive`` with real QEMUs: every landing, and the ways in which a guest does not arrive.

The source is a captured stream that the core moves; tests/test_qemu_migrate.py has whole moves.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from captured_source import CapturedSource, cold
from qemu_guest import Walk
from qemu_process import accept_all
from qemu_world import Command, Machine, World, build
from waiting import wait_until

from vmth.errors import MigrationError, RefusedError
from vmth.options import ReceiveOptions
from vmth.qemu.facts import Facts, gather
from vmth.qemu.landing import Land, choose_landing, shared_blocks
from vmth.qemu.launch import wait_for_exit
from vmth.qemu.qmp import Qmp
from vmth.qemu.receive import QemuReceiver, QemuTarget, receive_qemu
from vmth.qemu.waiting_memory import WaitingMemory
from vmth.stats import MigrationResult

pytestmark = pytest.mark.slow


class Arrivals(World):
    """A guest that was captured while it ran, and QEMUs for it to arrive in."""

    def __init__(self) -> None:
        super().__init__(Walk(), [build("SRC"), build("DST")])
        self.memfd = self.prealloc = False
        self.facts: Facts | None = None
        self.entries: dict[str, str] = {}

    def backend(self, name: str, shared: bool) -> str:
        kind = "memory-backend-memfd,share=on" if self.memfd else super().backend(name, shared)
        return f"{kind},prealloc=on" if self.prealloc else kind

    def capture(self) -> bytes:
        source = self.boot("source", build("SRC"))
        self.facts = gather(source.monitor)
        source.stop()  # an older QEMU under TCG does not tell of every write
        data = self.migrated(source)
        source.kill()
        return data

    def migrated(self, machine: Machine) -> bytes:
        """The stream in which a QEMU migrates its guest to the test."""
        path = str(self.folder / f"{machine.name}.capture")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(1)
            machine.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 34})
            machine.execute("migrate", uri=f"unix:{path}")
            (data,) = accept_all(listener, 1)
        wait_until(lambda: machine.status() == "postmigrate")
        return bytes(data)

    def departs(self, source: CapturedSource, uri: str) -> MigrationResult:
        assert self.facts is not None
        told = source.entries() | self.facts.entries() | self.entries
        return source.move(uri, cold(state_dir=self.folder / "source.state", guest_info=told))

    def receive_command(
        self, name: str, *options: str, more: Sequence[str] = ()
    ) -> tuple[str, Command]:
        """A receiver that starts QEMU itself."""
        uri = f"unix:{self.folder}/{name}.link"
        command = self.vmth(
            self.machines[0],
            *("receive", uri, "--json", *options, "--"),
            *(build("DST").program, *self.arguments(name, shared=True), *more),
            *("-serial", f"file:{self.folder}/{name}.serial"),
        )
        wait_until(lambda: "listening at " in command.said() or command.ended)
        return uri, command


@pytest.fixture
def world() -> Iterator[Arrivals]:
    with Arrivals() as world:
        yield world


@pytest.fixture
def source(world: Arrivals) -> Iterator[CapturedSource]:
    with CapturedSource(world.capture()) as source:
        yield source


def arrives(world: Arrivals, source: CapturedSource, land: str, shared: bool) -> dict[str, Any]:
    there = world.await_guest("there", build("DST"), shared=shared)
    uri, receiver = world.receive(there, land)
    result = world.departs(source, uri)
    told = receiver.answer()
    assert told["verified"] and result.verified
    assert told["verified_scope"] == result.verified_scope == told["landing"]
    assert told["digest_destination"] == result.digest_source
    assert told["status"] == there.status()
    world.hosts.append(there)
    return told


@pytest.mark.parametrize(
    ("land", "shared", "memfd", "landing"),
    [
        ("memory", True, False, "memory"),
        ("memory", True, True, "memory"),
        ("stream", True, False, "stream"),
        ("auto", True, False, "memory"),
        ("auto", False, False, "stream"),
    ],
)
def test_a_guest_arrives_and_runs_on(
    world: Arrivals, source: CapturedSource, land: str, shared: bool, memfd: bool, landing: str
) -> None:
    world.memfd = memfd
    told = arrives(world, source, land, shared)
    assert told["landing"] == landing and told["status"] == "running"
    there = world.machines[-1]
    there.wait_beats(2)
    assert world.check(there) > 0
    states = there.execute("query-migrate-capabilities")
    assert not [
        row for row in states if row["capability"] == "late-block-activate" and row["state"]
    ]


def test_memory_that_is_there_is_mapped_before_a_source_comes(
    world: Arrivals, source: CapturedSource
) -> None:
    world.memfd = world.prealloc = True
    there = world.await_guest("there", build("DST"), shared=True)
    with WaitingMemory(there.monitor) as memory, contextlib.ExitStack() as opened:
        offered = shared_blocks(there.monitor, opened)
        landing = choose_landing(there.monitor, offered, Land.MEMORY, memory.find)
        opened.callback(landing.close)
        assert landing.blocks and all(block.mapping.made for block in landing.blocks)
    uri, receiver = world.receive(there, "memory")
    pid = receiver.process.pid
    wait_until(lambda: mapped_bytes(pid, "memory-backend-memfd") >= world.memory_bytes)
    with seen(lambda: mapped_bytes(pid, "memory-backend-memfd")) as page_tables:
        world.departs(source, uri)
        told = receiver.answer()
    # A mapping that is made anew has few of them at first; none is left in the end.
    assert page_tables - {0} == {world.memory_bytes}
    assert told["verified_scope"] == "memory" and told["status"] == "running"
    world.hosts.append(there)
    there.wait_beats(2)
    assert world.check(there) > 0


@contextlib.contextmanager
def seen(look: Callable[[], int]) -> Iterator[set[int]]:
    """All that a thread sees meanwhile, looking again and again."""
    found, over = {look()}, threading.Event()

    def watch() -> None:
        with contextlib.suppress(OSError):  # the process has ended
            while not over.wait(0.005):
                found.add(look())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def mapped_bytes(pid: int, name: str) -> int:
    """Of shared files of that name, by the page tables of a process."""
    total, named = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):
            named = any(name in word for word in rest)
        elif key == "Rss:" and named:
            total += int(rest[0]) << 10
    return total


def test_a_paused_guest_arrives_paused_and_can_move_on(
    world: Arrivals, source: CapturedSource
) -> None:
    source.was_running = False
    told = arrives(world, source, "auto", shared=True)
    assert told["status"] == "paused" and not told["was_running"]
    there = world.machines[-1]
    assert len(world.migrated(there)) > 1 << 20
    assert there.status() == "postmigrate"
    there.run()
    there.wait_beats(2)
    world.check(there)


def test_state_that_qemu_does_not_load_leaves_the_source(
    world: Arrivals, source: CapturedSource
) -> None:
    source.devices = source.devices[:3000]
    there = world.await_guest("there", build("DST"))
    uri, receiver = world.receive(there, "auto")
    with pytest.raises(MigrationError, match=r"could not load|ended while it loaded"):
        world.departs(source, uri)
    told = receiver.answer()
    assert told["exit_code"] == 1 and told["source_runs"] and told["error"]
    assert source.running and not source.released
    assert there.process.wait(10) in (0, 1)


def test_another_machine_is_refused_and_the_waiting_qemu_stays(
    world: Arrivals, source: CapturedSource
) -> None:
    there = world.await_guest("there", build("DST"))
    uri, receiver = world.receive(there, "auto")
    assert world.facts is not None
    facts, world.facts = world.facts, replace_facts(world.facts, memory_bytes=1 << 30)
    with pytest.raises(RefusedError, match="memory"):
        world.departs(source, uri)
    assert receiver.answer()["exit_code"] == 3
    assert there.status() == "inmigrate"
    world.facts = facts
    uri, receiver = world.receive(there, "auto")
    world.departs(source, uri)
    assert receiver.answer()["status"] == "running"


def test_a_guest_arrives_in_a_call_from_python(world: Arrivals, source: CapturedSource) -> None:
    there = world.await_guest("there", build("DST"))
    options = ReceiveOptions(state_dir=there.state_dir)
    with ThreadPoolExecutor() as pool:
        listening: Future[QemuReceiver] = Future()
        arrival = pool.submit(
            receive_qemu,
            f"unix:{world.folder}/call",
            QemuTarget(qmp=str(there.qmp)),
            options,
            land=Land.STREAM,
            on_listening=listening.set_result,
        )
        result = world.departs(source, listening.result(30).display)
        arrived = arrival.result(30)
    assert arrived.verified and arrived.digest == result.digest_source
    assert arrived.landing == "stream" and not arrived.started
    assert arrived.pid == there.process.pid and arrived.status == there.status() == "running"
    world.hosts.append(there)
    there.wait_beats(2)
    world.check(there)


def test_a_qemu_that_vmth_starts_lives_on(world: Arrivals, source: CapturedSource) -> None:
    uri, receiver = world.receive_command("there")
    world.departs(source, uri)
    told = receiver.answer()
    assert told["started"] and told["status"] == "running" and told["landing"] == "memory"
    with Qmp(told["qmp"]) as qmp:
        assert qmp.status() == "running"
        qmp.execute("quit")
    assert wait_for_exit(told["pid"], 10)


def test_a_qemu_that_vmth_starts_ends_with_a_failure(
    world: Arrivals, source: CapturedSource
) -> None:
    source.devices = source.devices[:3000]
    uri, receiver = world.receive_command("there")
    with pytest.raises(MigrationError, match="load of migration failed"):  # of QEMU's own log
        world.departs(source, uri)
    assert receiver.answer()["exit_code"] == 1
    assert not list(world.machines[0].state_dir.glob("qemu-*"))
    assert source.running


def test_a_command_line_that_qemu_refuses_is_told_to_the_source(
    world: Arrivals, source: CapturedSource
) -> None:
    uri, receiver = world.receive_command("there", "--land", "stream", more=("-device", "nonsense"))
    with pytest.raises(RefusedError, match="nonsense"):
        world.departs(source, uri)
    assert receiver.answer()["exit_code"] == 3
    assert not list(world.machines[0].state_dir.glob("qemu-*"))


def test_a_killed_receiver_leaves_nothing_that_the_next_does_not_end(
    world: Arrivals, source: CapturedSource
) -> None:
    """It is killed when all pages have landed and the state is about to come."""
    uri, receiver = world.receive_command("there")
    source.before_state = receiver.kill
    with pytest.raises(MigrationError):
        world.departs(source, uri)
    assert source.running
    source.before_state = lambda: None
    uri, receiver = world.receive_command("there")
    world.departs(source, uri)
    told = receiver.answer()
    assert told["status"] == "running"
    (folder,) = world.machines[0].state_dir.glob("qemu-*")
    assert str(folder / "qmp") == told["qmp"]
    with Qmp(told["qmp"]) as qmp:
        qmp.execute("quit")
    assert wait_for_exit(told["pid"], 10)


def test_sigterm_ends_it_and_the_qemu_that_was_loading(
    world: Arrivals, source: CapturedSource
) -> None:
    there = world.await_guest("there", build("DST"))
    uri, receiver = world.receive(there, "auto")

    def terminate() -> None:
        receiver.process.send_signal(signal.SIGTERM)
        assert receiver.answer()["exit_code"] == 4

    source.before_state = terminate
    with pytest.raises(MigrationError):
        world.departs(source, uri)
    assert source.running
    assert there.process.wait(10) in (0, 1)


def test_it_keeps_listening_when_told_to(world: Arrivals, source: CapturedSource) -> None:
    uri, receiver = world.receive_command("there", "--keep-listening")
    source.devices, whole = source.devices[:3000], source.devices
    with pytest.raises(MigrationError):
        world.departs(source, uri)
    source.devices = whole
    world.departs(source, uri)
    wait_until(lambda: " is here: " in receiver.said())
    receiver.process.send_signal(signal.SIGINT)
    assert receiver.wait() == 130
    failed, arrived, cancelled = receiver.answers()
    assert (failed["exit_code"], arrived["exit_code"], cancelled["exit_code"]) == (1, 0, 4)
    with Qmp(arrived["qmp"]) as qmp:
        assert qmp.status() == "running"
        qmp.execute("quit")
    assert wait_for_exit(arrived["pid"], 10)


def test_a_qemu_that_does_not_wait_is_refused_at_once(world: Arrivals) -> None:
    running = world.boot("running", build("SRC"))
    command = world.vmth(running, "receive", "--qmp", str(running.qmp), "tcp:127.0.0.1:0", "--json")
    told = command.answer()
    assert told["exit_code"] == 3 and "start it with -incoming defer" in told["error"]
    assert running.status() == "running"


def replace_facts(facts: Facts, **changes: Any) -> Facts:
    values = {name: getattr(facts, name) for name in facts.__struct_fields__}
    return Facts(**{**values, **changes})
