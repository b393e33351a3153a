# SPDX-License-Identifier: Apache-2.0
"""A QEMU's guest through vmth, against QEMU's own plain migration over TCP.

    python bench/qemu_table.py [--mib 2048] [--rounds 5] [--random 100] [--connections 0]
        [--settle 4]

An idle guest of incompressible memory goes round on this machine, over loopback; every way once,
then every way again, in the other order. Destinations have their memory populated already
(prealloc). All four times come from the QEMUs' own events, for every way alike:

    copy      from the source's "setup" to the guest running at the destination
    downtime  from the source's STOP to the destination's RESUME

CPU seconds are of the move alone, by GiB of guest memory: what an idle vmth takes to start is left
out. Memory is the private resident set of each vmth at its highest, above an idle import.
Every way goes over TCP. The system's congestion control is shown: QEMU's connection has it, vmth's
has one without pacing (docs/adr/0026). VMTH_QEMU_SRC names another QEMU.

Before each move a destination waits some seconds, as it does elsewhere until a source comes. A
machine that is virtual itself may give freed memory back to its host after two of them, and every
page fault takes longer from then on: ways can be compared only on one side of that.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from qemu_guest import Walk
from qemu_world import Machine, World, build
from waiting import wait_until

MIB = 1 << 20
GIB = 1 << 30
IDLE = Walk(chunk_pages=0, ticks_hz=100, beat_every=8)
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGESIZE")
IMPORT = "import vmth.cli, vmth.qemu.migrate, vmth.qemu.receive, sys; sys.stdin.read()"


def cpu_s(pid: int) -> float:
    """User and system time so far."""
    return cpu_in(Path(f"/proc/{pid}/stat").read_bytes())


def cpu_in(stat: bytes) -> float:
    fields = stat.rsplit(b")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def private_bytes(pid: int) -> int:
    """Resident, without the pages of files and shared memory: guest memory is a memfd."""
    return private_in(Path(f"/proc/{pid}/statm").read_bytes())


def private_in(statm: bytes) -> int:
    _, resident, shared, *_ = statm.split()
    return (int(resident) - int(shared)) * PAGE


class Meter:
    """Looks at a process every 25 ms until it ends: its last CPU time, its highest memory. Seldom,
    from files that stay open: who looks uses the cores that are measured."""

    def __init__(self, pid: int) -> None:
        self.cpu_s = 0.0
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._stat, self._statm = (
            os.open(f"/proc/{pid}/{name}", os.O_RDONLY) for name in ("stat", "statm")
        )
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.025):
            try:
                self.cpu_s = cpu_in(os.pread(self._stat, 1024, 0))
                statm = os.pread(self._statm, 256, 0)
                self.peak_bytes = max(self.peak_bytes, private_in(statm))
            except (OSError, ValueError):  # it has ended
                return

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        os.close(self._stat)
        os.close(self._statm)


@dataclass(frozen=True)
class Idle:
    """A vmth that has imported everything and does nothing."""

    cpu_s: float
    private_bytes: int


def idle() -> Idle:
    process = subprocess.Popen([sys.executable, "-P", "-c", IMPORT], stdin=subprocess.PIPE)
    before = -1.0
    while cpu_s(process.pid) != before:  # until it waits for its input
        before = cpu_s(process.pid)
        threading.Event().wait(0.2)
    found = Idle(cpu_s(process.pid), private_bytes(process.pid))
    process.communicate()
    return found


@dataclass
class Run:
    copy_s: float
    downtime_ms: float
    cpu_s: dict[str, float] = field(default_factory=dict)
    memory_bytes: dict[str, int] = field(default_factory=dict)
    told_downtime_ms: float = float("nan")


class BenchWorld(World):
    options: tuple[str, ...] = ()  #: of vmth migrate
    settle_s = 0.0
    populated = True  #: memory of destinations

    def backend(self, name: str, shared: bool) -> str:
        populated = "on" if self.populated or name == "first" else "off"
        return f"memory-backend-memfd,share=on,prealloc={populated}"

    def fill(self, machine: Machine, random_percent: int) -> None:
        """Random pages behind the guest's own, written from outside."""
        folder = Path(f"/proc/{machine.process.pid}/fd")
        (memory,) = (fd for fd in folder.iterdir() if "memfd:memory-backend" in os.readlink(fd))
        chance = np.random.default_rng(1)
        with memory.open("r+b", buffering=0) as file:
            file.seek(self.walk.end)
            while file.tell() < self.memory_bytes - MIB:
                piece = np.frombuffer(chance.bytes(MIB), dtype=np.uint8).reshape(-1, 4096).copy()
                piece[chance.integers(0, 100, len(piece)) >= random_percent] = 0
                file.write(piece.tobytes())

    def waiting(self, name: str, *, stopped: bool) -> Machine:
        """``stopped``: as vmth wants it; else QEMU starts the guest by itself, which is faster."""
        arguments = self.arguments(name, shared=True)
        start = ["-S"] if stopped else []
        machine = self._start(name, build("SRC"), [*arguments, *start, "-incoming", "defer"])
        time.sleep(self.settle_s)
        return machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


Way = Callable[[BenchWorld, Machine, str, Idle], tuple[Machine, Run]]


def event_s(machine: Machine, name: str, status: str = "") -> float:
    """When the next such event happened, in seconds of the clock that all QEMUs here share."""
    event = machine.monitor.wait_event(
        lambda event: event.name == name and (not status or event.data["status"] == status), 120
    )
    if event is None:
        raise RuntimeError(f"no {name} {status} of QEMU in 120 s")
    return event.time_ns / 1e9


def timed(source: Machine, destination: Machine) -> Run:
    began, stopped = event_s(source, "MIGRATION", "setup"), event_s(source, "STOP")
    resumed = event_s(destination, "RESUME")
    return Run(resumed - began, (resumed - stopped) * 1e3)


def set_events(machine: Machine, *more: str) -> None:
    machine.monitor.forget_events()
    wanted = [{"capability": name, "state": True} for name in ("events", *more)]
    machine.execute("migrate-set-capabilities", capabilities=wanted)


def by_qemu(limit_ms: int, multifd_channels: int = 0) -> Way:
    """``multifd_channels``: of all moves of that guest, or of none."""
    multifd = ("multifd",) if multifd_channels else ()

    def move(world: BenchWorld, source: Machine, name: str, idle: Idle) -> tuple[Machine, Run]:
        destination = world.waiting(name, stopped=False)
        set_events(source, "return-path", *multifd)
        set_events(destination, *multifd)
        for machine in (source, destination):
            machine.execute(
                "migrate-set-parameters", **{"multifd-channels": max(1, multifd_channels)}
            )
        uri = f"tcp:127.0.0.1:{free_port()}"
        destination.execute("migrate-incoming", uri=uri)
        source.execute(
            "migrate-set-parameters", **{"max-bandwidth": 16 << 30, "downtime-limit": limit_ms}
        )
        before = cpu_s(source.process.pid), cpu_s(destination.process.pid)
        source.execute("migrate", uri=uri)
        run = timed(source, destination)
        wait_until(lambda: source.status() == "postmigrate")
        run.cpu_s = {
            "source QEMU": cpu_s(source.process.pid) - before[0],
            "destination QEMU": cpu_s(destination.process.pid) - before[1],
        }
        return destination, run

    return move


def by_vmth(land: str) -> Way:
    def move(world: BenchWorld, source: Machine, name: str, idle: Idle) -> tuple[Machine, Run]:
        destination = world.waiting(name, stopped=True)
        set_events(source)
        set_events(destination)
        uri, receiver = world.receive(destination, land, uri="tcp:127.0.0.1:0")
        before = cpu_s(source.process.pid), cpu_s(destination.process.pid)
        there = Meter(receiver.process.pid)
        migration = world.migrate(source, uri, "--on-success", "keep", *world.options)
        here = Meter(migration.process.pid)
        told = migration.answer()
        received = receiver.answer()
        here.stop()
        there.stop()
        assert told["verified"] and received["verified"], (told, received)
        run = timed(source, destination)
        run.told_downtime_ms = told["downtime_ms"]
        run.cpu_s = {
            "source QEMU": cpu_s(source.process.pid) - before[0],
            "destination QEMU": cpu_s(destination.process.pid) - before[1],
            "vmth migrate": here.cpu_s - idle.cpu_s,
            "vmth receive": there.cpu_s - idle.cpu_s,
        }
        run.memory_bytes = {
            "vmth migrate": here.peak_bytes - idle.private_bytes,
            "vmth receive": there.peak_bytes - idle.private_bytes,
        }
        return destination, run

    return move


WAYS: dict[str, Way] = {
    "QEMU alone": by_qemu(300),
    "QEMU, limit 1 ms": by_qemu(1),
    "vmth, land memory": by_vmth("memory"),
    "vmth, land stream": by_vmth("stream"),
}


def congestion_control() -> str:
    """That a connection gets which asks for none."""
    with socket.socket() as unconnected:
        name = unconnected.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.rstrip(b"\0").decode()


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):7.2f} ({min(values):.2f} to {max(values):.2f})"


def tell(runs: dict[str, list[Run]], nbytes: int) -> None:
    base_s = statistics.median(run.copy_s for run in runs["QEMU alone"])
    low_ms = statistics.median(run.downtime_ms for run in runs["QEMU, limit 1 ms"])
    for name, rows in runs.items():
        copy_s = statistics.median(run.copy_s for run in rows)
        downtime_ms = statistics.median(run.downtime_ms for run in rows)
        print(
            f"  {name:<18} copy s {spread([run.copy_s for run in rows])}  "
            f"{nbytes / copy_s / 1e9:5.2f} GB/s  ratio {base_s / copy_s:4.2f}"
        )
        print(
            f"  {'':<18} downtime ms {spread([run.downtime_ms for run in rows])}  "
            f"above QEMU with a limit of 1 ms {downtime_ms - low_ms:+.2f}"
        )
        cpu = ", ".join(
            f"{who} {statistics.median(run.cpu_s[who] for run in rows) * GIB / nbytes:.2f}"
            for who in rows[0].cpu_s
        )
        print(f"  {'':<18} CPU s/GiB: {cpu}")
        for who in rows[0].memory_bytes:
            most = max(run.memory_bytes[who] for run in rows)
            print(f"  {'':<18} memory of {who}: {most / MIB:.1f} MiB above an idle import, at most")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--random", type=int, default=100, help="percent of pages; others are zero")
    parser.add_argument(
        "--connections", type=int, default=0, help="of multifd, in vmth's moves; 0: none"
    )
    parser.add_argument("--settle", type=float, default=4.0, help="seconds before each move")
    arguments = parser.parse_args()
    nothing = idle()
    runs: dict[str, list[Run]] = {name: [] for name in WAYS}
    with BenchWorld(IDLE, [build("SRC")]) as world:
        world.memory_bytes, world.settle_s = arguments.mib * MIB, arguments.settle
        if arguments.connections:
            world.options = ("--parallel-connections", str(arguments.connections))
        guest = world.boot("first", build("SRC"))
        world.fill(guest, arguments.random)
        for number in range(arguments.rounds):
            for name in list(WAYS) if number % 2 == 0 else reversed(WAYS):
                previous = guest
                at = list(WAYS).index(name)
                guest, run = WAYS[name](world, previous, f"r{number}w{at}", nothing)
                runs[name].append(run)
                previous.close()
        version = ".".join(str(part) for part in build("SRC").version)
    print(
        f"QEMU {version}, {arguments.mib} MiB, {arguments.random} % incompressible, loopback TCP "
        f"({congestion_control()}), {arguments.rounds} rounds, Linux {platform.release()}, "
        f"{os.cpu_count()} CPUs"
    )
    tell(runs, arguments.mib * MIB)


if __name__ == "__main__":
    main()
