# SPDX-License-Identifier: Apache-2.0
"""Real QEMUs on one machine, and the vmth commands that move a guest between them.

    world = World(walk)                      a folder, a shared disk, the heartbeats of all hosts
    a = world.boot("a", build("SRC"))        a running guest
    b = world.await_guest("b", build("DST")) a QEMU that waits for one
    moved = world.move(a, b, "memory")       vmth receive and vmth migrate, as their users run them
    world.check(b)                           stops the guest there and proves what it holds

Every QEMU has two monitors: one for vmth and one for the tests. ``VMTH_QEMU_SRC`` and
``VMTH_QEMU_DST`` name other programs than the installed one; ``scripts/get-qemu`` makes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pytest
from qemu_guest import Walk, disk_beat, firmware, make_disk, read_beats
from qemu_process import qemu_binary
from waiting import wait_until

from vmth.errors import ChannelError
from vmth.qemu.qmp import Qmp

__all__ = ["MEMORY_BYTES", "Build", "Command", "Machine", "Moved", "World", "build", "modern_build"]

MIB = 1 << 20
MEMORY_BYTES = 128 * MIB
TIMEOUT_S = 60
SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
#: What a PC shows between its RAM below 640 KiB and above 1 MiB is not all RAM.
HOLE = slice(0xA0000, 0x100000)
#: The guest's stack and the sector that it writes, below 1 MiB.
SCRATCH = slice(0x7000, 0x8200)

Memory = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Build:
    """One QEMU program."""

    program: str
    version: tuple[int, int]
    machines: frozenset[str] = field(repr=False)

    @property
    def tracks_writes_under_tcg(self) -> bool:
        """Before 9.0 a busy guest under TCG loses dirty pages, in any migration."""
        return self.version >= (9, 0)


@cache
def build_of(program: str) -> Build:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = said.split("version ")[1].split(".")[:2]
    listed = subprocess.run(
        [program, "-machine", "help"], capture_output=True, text=True, check=True
    ).stdout
    machines = frozenset(line.split()[0] for line in listed.splitlines()[1:] if line)
    return Build(program, (int(major), int(minor)), machines)


def build(side: str) -> Build:
    """Of ``SRC`` or ``DST``; the test fails where there is none."""
    return build_of(qemu_binary(side))


@cache
def modern_build() -> Build:
    """One whose TCG tells of every write: ``SRC`` if it is new enough, else 10.0, fetched."""
    source = build("SRC")
    if source.tracks_writes_under_tcg:
        return source
    fetched = subprocess.run(
        ["sh", str(SCRIPTS / "get-qemu"), "10.0"], stdout=subprocess.PIPE, text=True, check=False
    )
    if fetched.returncode:
        pytest.fail("scripts/get-qemu 10.0 failed; its reason is on stderr")
    return build_of(fetched.stdout.strip())


def common_machine(builds: Sequence[Build]) -> str:
    """The newest PC that all of them have."""
    common = frozenset.intersection(*(one.machines for one in builds))
    numbered = [name for name in common if name.startswith("pc-i440fx-") and name[-1].isdigit()]
    return max(numbered, key=lambda name: [int(part) for part in name.split("-")[-1].split(".")])


class Machine:
    """One QEMU. ``shared``: its RAM is a file that vmth can write to; else it is QEMU's own."""

    def __init__(
        self,
        name: str,
        folder: Path,
        build: Build,
        arguments: Sequence[str],
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.name = name
        self.memory_bytes = memory_bytes
        self.build = build
        self.qmp = folder / f"{name}.qmp"
        self.state_dir = folder / f"{name}.state"
        self.serial = folder / f"{name}.serial"
        self.log = folder / f"{name}.log"
        self._save = folder / f"{name}.saved"
        self.command = [build.program, *arguments]
        monitor = folder / f"{name}.test"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *self.command,
                    *("-qmp", f"unix:{self.qmp},server=on,wait=off"),
                    *("-qmp", f"unix:{monitor},server=on,wait=off"),
                    *("-serial", f"file:{self.serial}"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self.monitor = Qmp(monitor, timeout_s=TIMEOUT_S, appears_within_s=TIMEOUT_S)
        except BaseException:
            self.kill()
            raise

    def status(self) -> str:
        """QEMU's run state; "gone" once its process has ended."""
        try:
            return self.monitor.status()
        except ChannelError:
            self.process.wait(TIMEOUT_S)
            return "gone"

    def execute(self, command: str, **arguments: Any) -> Any:
        return self.monitor.execute(command, arguments)

    def stop(self) -> None:
        self.execute("stop")

    def run(self) -> None:
        self.execute("cont")
        wait_until(lambda: self.status() == "running")

    def written(self) -> bytes:
        """All that the guest wrote to its serial port at this host."""
        return self.serial.read_bytes() if self.serial.exists() else b""

    def wait_beats(self, count: int) -> None:
        """Until so many heartbeats more have been written here."""
        wanted = self.written().count(b"\n") + count
        wait_until(lambda: self.written().count(b"\n") >= wanted)

    def memory(self) -> Memory:
        """All guest memory as QEMU sees it; the guest must be stopped."""
        memory = np.zeros(self.memory_bytes, dtype=np.uint8)
        for begin, end in ((0, HOLE.start), (HOLE.stop, self.memory_bytes)):
            self.execute("pmemsave", val=begin, size=end - begin, filename=str(self._save))
            memory[begin:end] = np.fromfile(self._save, dtype=np.uint8)
        self._save.unlink()
        return memory

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(TIMEOUT_S)

    def close(self) -> None:
        self.monitor.close()
        self.kill()


class Command:
    """One ``vmth`` in a process of its own; ``child``: another program that takes its place."""

    def __init__(
        self,
        folder: Path,
        name: str,
        arguments: Sequence[str],
        state_dir: Path,
        child: Sequence[str] = ("-m", "vmth"),
    ) -> None:
        self.arguments = list(arguments)
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *child, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, "VMTH_STATE_DIR": str(state_dir)},
            )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def said(self) -> str:
        return self._err.read_text(errors="replace")

    def wait(self) -> int:
        try:
            return self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.arguments} does not end: {self.said()}") from None

    def answer(self) -> dict[str, Any]:
        """The object of ``--json``, once it has ended."""
        code = self.wait()
        text = self._out.read_text()
        assert text, f"{self.arguments} ended with {code} and no answer: {self.said()}"
        told: dict[str, Any] = json.loads(text)
        assert told["exit_code"] == code
        return told

    def answers(self) -> list[dict[str, Any]]:
        """Of a command that answers several times, once it has ended."""
        self.wait()
        return [json.loads(line) for line in self._out.read_text().splitlines()]

    def kill(self) -> None:
        if not self.ended:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(TIMEOUT_S)


@dataclass(frozen=True)
class Moved:
    """What both commands answered."""

    source: dict[str, Any]
    destination: dict[str, Any]


class World:
    """The machines and commands of one test; leaving the context ends them all."""

    memory_bytes = MEMORY_BYTES

    def __init__(self, walk: Walk, builds: Sequence[Build], *, accel: str = "tcg") -> None:
        self.walk = walk
        self.accel = accel
        self.folder = Path(tempfile.mkdtemp(prefix="vmth-qemu-"))  # short: sockets are in it
        self.machine_type = common_machine(builds)
        self.disk = self.folder / "disk"
        make_disk(self.disk, walk)
        self._firmware = self.folder / "firmware"
        self._firmware.write_bytes(firmware(walk))
        self.machines: list[Machine] = []
        self.commands: list[Command] = []
        self.hosts: list[Machine] = []  #: where the guest ran, in that order
        self._count = 0

    def arguments(self, name: str, *, shared: bool) -> list[str]:
        """QEMU's, but for monitors and what a waiting one adds."""
        return [
            *("-nodefaults", "-display", "none", "-no-reboot", "-accel", self.accel),
            *("-machine", f"{self.machine_type},memory-backend=pc.ram"),
            *("-m", f"{self.memory_bytes // MIB}M"),
            *("-object", f"{self.backend(name, shared)},id=pc.ram,size={self.memory_bytes}"),
            *("-drive", f"file={self.disk},if=ide,format=raw"),
            *("-device", "VGA", "-device", "virtio-rng-pci"),
            # A BIOS takes minutes where KVM is emulated.
            *(("-bios", str(self._firmware)) if self.accel.startswith("kvm") else ()),
        ]

    def backend(self, name: str, shared: bool) -> str:
        if shared:
            return f"memory-backend-file,share=on,mem-path={self.folder / name}.ram"
        return "memory-backend-ram"

    def boot(self, name: str, build: Build, *, shared: bool = True) -> Machine:
        """A running guest that has written its first heartbeats."""
        machine = self._start(name, build, self.arguments(name, shared=shared))
        self.hosts.append(machine)
        machine.wait_beats(2)
        return machine

    def await_guest(self, name: str, build: Build, *, shared: bool = True) -> Machine:
        arguments = self.arguments(name, shared=shared)
        return self._start(name, build, [*arguments, "-S", "-incoming", "defer"])

    def _start(self, name: str, build: Build, arguments: Sequence[str]) -> Machine:
        machine = Machine(name, self.folder, build, arguments, self.memory_bytes)
        self.machines.append(machine)
        return machine

    def vmth(
        self, machine: Machine, *arguments: str, child: Sequence[str] = ("-m", "vmth")
    ) -> Command:
        """Start a command on the host of that machine."""
        self._count += 1
        name = f"{machine.name}.vmth{self._count}"
        command = Command(self.folder, name, arguments, machine.state_dir, child)
        self.commands.append(command)
        return command

    def receive(
        self, machine: Machine, land: str, *options: str, uri: str = "", **child: Any
    ) -> tuple[str, Command]:
        """A receiver that listens; where."""
        self._count += 1
        command = self.vmth(
            machine,
            *("receive", "--qmp", str(machine.qmp), uri or f"unix:{self.folder}/link{self._count}"),
            *("--land", land, "--json", *options),
            **child,
        )
        wait_until(lambda: "listening at " in command.said() or command.ended)
        found = re.search(r"^listening at (\S+)", command.said(), re.MULTILINE)
        assert found, f"vmth receive ended at once: {command.said()}"
        return found[1], command

    def migrate(self, machine: Machine, uri: str, *options: str, **child: Any) -> Command:
        return self.vmth(
            machine,
            *("migrate", "--qmp", str(machine.qmp), uri, "--json", *options),
            **child,
        )

    def move(
        self,
        source: Machine,
        destination: Machine,
        land: str,
        options: Sequence[str] = (),
        receive_options: Sequence[str] = (),
    ) -> Moved:
        """Move the guest; both commands must succeed and say that all was verified."""
        uri, receiver = self.receive(destination, land, *receive_options)
        told = self.migrate(source, uri, *options).answer()
        assert told["exit_code"] == 0, told
        received = receiver.answer()
        assert received["exit_code"] == 0, received
        assert told["verified"] and received["verified"]
        self.hosts.append(destination)
        return Moved(told, received)

    def restore(self, machine: Machine, image: str) -> None:
        """Load the file that ``vmth save`` wrote."""
        told = self.vmth(machine, "restore", image, "--qmp", str(machine.qmp), "--json").answer()
        assert told["exit_code"] == 0, told
        self.hosts.append(machine)

    def qemu_moves(self, source: Machine, destination: Machine) -> None:
        """QEMU's own migration, without vmth: the checks are tried on it."""
        uri = f"unix:{self.folder}/direct"
        destination.execute("migrate-incoming", uri=uri)
        wanted = [{"capability": name, "state": True} for name in ("events", "return-path")]
        source.execute("migrate-set-capabilities", capabilities=wanted)
        source.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 34})
        source.execute("migrate", uri=uri)
        assert source.monitor.wait_event(
            lambda event: event.name == "MIGRATION" and event.data["status"] == "completed",
            TIMEOUT_S,
        )
        self.hosts.append(destination)
        destination.run()

    def check(self, machine: Machine) -> int:
        """Stop the guest and prove all that is known of it there; the passes that it began."""
        machine.stop()
        memory = machine.memory()
        passes = self.walk.check(memory)
        beats = read_beats([host.written() for host in self.hosts])
        on_disk = disk_beat(self.disk)
        assert beats - 1 <= on_disk <= beats + 1, f"{beats} were told, the disk has {on_disk}"
        return passes

    def same_but_counters(self, before: Memory, after: Memory) -> None:
        """Whatever the guest does not write while it walks is equal."""
        for memory in (before, after):
            words = memory[self.walk.start : self.walk.end].view("<u4").reshape(-1, 1024)
            words[:, [0, 512]] = 0
            memory[SCRATCH] = 0
        wrong = np.flatnonzero(before != after)
        assert not wrong.size, f"{wrong.size} bytes differ, the first at {wrong[0]:#x}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for command in self.commands:
            command.kill()
        for machine in self.machines:
            machine.close()
        if kind is not None:
            self.tell()
        with contextlib.suppress(OSError):
            shutil.rmtree(self.folder)

    def tell(self) -> None:
        """For pytest to show with the failure."""
        for machine in self.machines:
            print(f"{machine.name}: {machine.build} {machine.log.read_text(errors='replace')}")
            print(f"{machine.name} wrote {machine.written()[-200:]!r}")
        for command in self.commands:
            print(f"vmth {' '.join(command.arguments)}: {command.process.returncode}")
            print(command.said())
