# SPDX-License-Identifier: Apache-2.0
"""A QEMU that runs the demo guest's program over the demo guest's content, to compare with.

Memory is filled by the modules that fill vmth's own guest; only what lies below 1 MiB differs,
where a PC has its firmware: the schedule is moved up, and a ROM of our own (versus_rom.S) starts
the walker and paces it by the timer interrupt. QEMU's RAM is private memory, written from outside
before the guest runs.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vmth._native import _kvm
from vmth.guests.content import ContentSpec, fill
from vmth.guests.machine import CODE_GPA, SCHEDULE_GPA
from vmth.guests.memory import GuestMemory, plan_blocks
from vmth.guests.schedule import Program, Workload, install, plan
from vmth.qemu.qmp import Qmp

ROM_SOURCE = Path(__file__).with_name("versus_rom.S")
LOW_BYTES = 1 << 20
DIVISOR_GPA = 0x9004
PACE_ADDRESS = 0xF0100
PIT_HZ = 1_193_182
#: The walker's last three instructions, which tell KVM's host of a beat.
TELL = bytes.fromhex("ba10050000efe9")
#: Two more, which ask it to copy from the pool.
ASK = bytes.fromhex("ba14050000ef")
COPY_ADDRESS = 0xF0400
RETURN_GPA = 0x9010
RAM = "pc.ram"
WRITE_BYTES = 64 << 20


def firmware(folder: Path) -> Path:
    """Assemble the ROM; needs binutils."""
    raw, rom = folder / "rom.o", folder / "rom.bin"
    subprocess.run(["as", "--32", "-o", raw, ROM_SOURCE], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", raw, rom], check=True)
    return rom


def _moved_up(program: Program) -> Program:
    """The same program with its schedule, pool and data 1 MiB higher."""
    shift = LOW_BYTES - SCHEDULE_GPA
    pool_gpa = program.control.pool_gpa
    schedule = program.schedule.copy()
    schedule[:, [0, 2]] += np.uint32(shift)
    return replace(
        program,
        schedule=schedule,
        control=replace(
            program.control,
            schedule_gpa=LOW_BYTES,
            pool_gpa=pool_gpa + shift if pool_gpa else 0,
        ),
        data_gpa=program.data_gpa + shift,
        working_set_gpa=program.working_set_gpa + shift,
    )


def make_memory(nbytes: int, content: str, workload: Workload, seed: int) -> GuestMemory:
    """The guest's whole memory, ready to be copied into a QEMU that was started with -S."""
    memory = GuestMemory(plan_blocks(nbytes))
    program = _moved_up(plan(workload, nbytes - (LOW_BYTES - SCHEDULE_GPA)))
    npages = memory.blocks[0].npages
    fill(
        memory,
        ContentSpec.parse(content),
        seed,
        first_byte=program.data_gpa,
        counter_pages=program.counter_pages(npages),
    )
    view = memory.views[0]
    install(program, view)
    code = bytearray(_kvm.walker_code())
    at = code.index(TELL)
    code[at : at + 5] = _jump(CODE_GPA + at, PACE_ADDRESS)
    at = code.index(ASK)
    code[at : at + 5] = _jump(CODE_GPA + at, COPY_ADDRESS)
    _put(view, RETURN_GPA, CODE_GPA + at + len(ASK))
    view[CODE_GPA : CODE_GPA + len(code)] = np.frombuffer(bytes(code), np.uint8)
    beat_ns = program.paces[0].beat_interval_ns
    divisor = min(0xFFFF, beat_ns * PIT_HZ // 1_000_000_000) if beat_ns else 0
    _put(view, DIVISOR_GPA, divisor)
    return memory


def _jump(from_gpa: int, to_gpa: int) -> bytes:
    """jmp, 5 bytes."""
    return b"\xe9" + ((to_gpa - (from_gpa + 5)) % (1 << 32)).to_bytes(4, "little")


def _put(view: np.ndarray[tuple[int], np.dtype[np.uint8]], gpa: int, dword: int) -> None:
    view[gpa : gpa + 4] = np.frombuffer(dword.to_bytes(4, "little"), np.uint8)


class VersusQemu:
    """One QEMU in a network namespace, or none. ``incoming``: waits for a migration."""

    def __init__(
        self,
        binary: Sequence[str],
        memory_bytes: int,
        rom: Path,
        *,
        inside: Sequence[str] = (),
        incoming: bool = False,
        shared: bool = False,
    ) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="versus-")
        self.qmp_path = Path(self.folder.name) / "qmp.sock"
        self.vmth_path = Path(self.folder.name) / "vmth.sock"  # a monitor for vmth
        self.memory_bytes = memory_bytes
        backend = "memory-backend-memfd,share=on" if shared else "memory-backend-ram"
        self.process = subprocess.Popen(
            [
                *(*inside, *binary, "-S", "-nodefaults", "-display", "none", "-accel", "tcg"),
                *("-cpu", "qemu64,apic=off"),  # the timer interrupt comes straight from the PIC
                *("-machine", f"pc,memory-backend={RAM}", "-bios", rom),
                *("-object", f"{backend},id={RAM},size={memory_bytes}"),
                *("-m", f"{memory_bytes >> 20}M"),
                *("-qmp", f"unix:{self.vmth_path},server=on,wait=off"),
                *("-qmp", f"unix:{self.qmp_path},server=on,wait=off"),
                *(("-incoming", "defer") if incoming else ()),
            ],
            stdout=subprocess.DEVNULL,
        )
        while not self.qmp_path.exists():
            if self.process.poll() is not None:
                raise RuntimeError(f"QEMU ended with {self.process.returncode}")
            os.sched_yield()
        self.qmp = Qmp(str(self.qmp_path))

    @property
    def pid(self) -> int:
        """Of QEMU itself, whatever wraps it."""
        pid: int = self.qmp.pid
        return pid

    def write(self, memory: GuestMemory) -> None:
        """Copy the prepared memory in, but for the 640 KiB hole of a PC. Needs ptrace rights."""
        base = _ram_address(self.pid, self.memory_bytes)
        view = memory.views[0]
        for start, end in ((0, 0xA0000), (LOW_BYTES, self.memory_bytes)):
            for at in range(start, end, WRITE_BYTES):
                _poke_pages(self.pid, base + at, view[at : min(at + WRITE_BYTES, end)])

    def jump(self) -> None:
        """From now on the guest writes as fast as it can."""
        _poke(
            self.pid, _ram_address(self.pid, self.memory_bytes) + DIVISOR_GPA, np.zeros(4, np.uint8)
        )

    def thread_seconds(self) -> float:
        """CPU seconds of all threads so far, ended ones too, but the vCPUs'."""
        process = Path(f"/proc/{self.pid}")
        total = _cpu_seconds(process / "stat")
        for task in (process / "task").iterdir():
            try:
                if (task / "comm").read_text().startswith("CPU "):
                    total -= _cpu_seconds(task / "stat")
            except OSError:  # a thread that has ended
                continue
        return total

    def close(self) -> None:
        self.qmp.close()
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


def _cpu_seconds(stat: Path) -> float:
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _ram_address(pid: int, nbytes: int) -> int:
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            if last - first >= nbytes and "rw" in line.split()[1]:
                return first
    raise RuntimeError(f"process {pid} has no mapping of {nbytes} bytes")


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _poke(pid: int, address: int, data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
    """process_vm_writev."""
    libc = ctypes.CDLL(None, use_errno=True)
    local = _IoVec(data.ctypes.data, data.nbytes)
    remote = _IoVec(address, data.nbytes)
    done = libc.process_vm_writev(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if done != data.nbytes:
        raise OSError(ctypes.get_errno(), f"writing guest memory: {done} of {data.nbytes}")


def _poke_pages(pid: int, address: int, data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
    """Without the pages that are zero: they stay unpopulated as in vmth's."""
    pages = data.reshape(-1, 4096)
    used = np.flatnonzero(pages.view(np.uint64).any(axis=1))
    if not len(used):
        return
    cuts = np.flatnonzero(np.diff(used) != 1) + 1
    for run in np.split(used, cuts):
        piece = np.ascontiguousarray(pages[run[0] : run[-1] + 1]).reshape(-1)
        _poke(pid, address + int(run[0]) * 4096, piece)
