# SPDX-License-Identifier: Apache-2.0
"""The micro-VM guest: a ``Machine`` on /dev/kvm, whose first vCPU runs the walker and whose others,
if it has any, are bystanders.

The code is flat, unpaged 32-bit code, so that it also runs where KVM only emulates. Only this
process can run it and fetch its dirty pages: KVM's file descriptors do not work in another one."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TypeVar

import numpy as np

from vmth._native import _kvm
from vmth.dirty.kvm import KvmDirtyLog, KvmDirtyRing
from vmth.errors import GuestError, StreamError, UsageError
from vmth.guest import DirtySource
from vmth.guests.bystander import BYSTANDER_PACES
from vmth.guests.kvm_state import decode_states, encode_states
from vmth.guests.machine import CODE_GPA, SCHEDULE_GPA, VCPUS_MAX, BeatReport, Pace
from vmth.guests.memory import GuestMemory
from vmth.types import RamBlock

__all__ = ["DIRTY_SOURCES", "KvmMachine", "probe"]

#: Name of a dirty source -> the tracker that the VM must be created with.
DIRTY_SOURCES = {"kvm-log": "log", "kvm-ring": "ring"}

_T = TypeVar("_T")


class KvmMachine:
    """``vcpus`` vCPUs over ``memory``, which outlives them (its blocks are mapped in this process).

    A VM has either the dirty log or the dirty ring, from its creation on: ``dirty`` chooses.
    Methods come from one thread at a time. A vCPU that stops for a reason that this guest does not
    have (triple fault, internal error of KVM) raises GuestError from every later call except
    ``close``. Raises UsageError for an unknown ``dirty`` or a number of vCPUs that is not 1 to 8,
    GuestError where KVM cannot make the VM.
    """

    def __init__(self, memory: GuestMemory, *, dirty: str = "kvm-log", vcpus: int = 1) -> None:
        if not 1 <= vcpus <= VCPUS_MAX:
            raise UsageError(f"{vcpus} vCPUs: 1 to {VCPUS_MAX} allowed")
        if dirty not in DIRTY_SOURCES:
            raise UsageError(f"dirty source {dirty!r}: {' or '.join(DIRTY_SOURCES)} allowed")
        self._memory = memory
        self._blocks = tuple(memory.blocks)
        self._dirty = dirty
        self.vcpus = vcpus
        self._source: KvmDirtyLog | KvmDirtyRing | None = None
        slots = [(block.gpa, block.npages, _address(block)) for block in self._blocks]
        try:
            self._vm: _kvm.MicroVm = _kvm.MicroVm(slots, DIRTY_SOURCES[dirty], vcpus)
        except OSError as error:
            raise GuestError(f"no KVM guest can be made here: {error}") from error

    @property
    def blocks(self) -> Sequence[RamBlock]:
        return self._blocks

    def start_fresh(self, paces: Sequence[Pace]) -> None:
        """Put the walker's code in its place and run it; schedule, control block and content are in
        memory. UsageError for a pace table that is too long or not ascending, or if it runs."""
        code = _kvm.walker_code()
        if CODE_GPA + len(code) > min(SCHEDULE_GPA, self._blocks[0].used_length):
            raise UsageError(f"block {self._blocks[0].idstr} is too small for the walker's code")
        self._memory.views[0][CODE_GPA : CODE_GPA + len(code)] = np.frombuffer(code, np.uint8)
        table = [(pace.from_ns, pace.beat_interval_ns) for pace in paces]
        if len(table) > _kvm.MAX_PACES:
            raise UsageError(f"{len(table)} paces given, at most {_kvm.MAX_PACES} allowed")
        if any(after[0] <= before[0] for before, after in pairwise(table)):
            raise UsageError("paces must be in ascending order of their start")
        others = [(pace.from_ns, pace.beat_interval_ns) for pace in BYSTANDER_PACES]
        self._call("start", lambda: self._vm.start_fresh(CODE_GPA, table, others))

    def pause(self) -> bool:
        """Park all vCPUs within microseconds, also one that waits for the next beat. Was it
        running?"""
        return self._call("pause", self._vm.pause)

    def resume(self) -> None:
        self._call("resume", self._vm.resume)

    def pause_at_beat(self, timeout_ns: int) -> bool:
        """Park each vCPU at its next heartbeat (or the one it waits in). False at the timeout: they
        run on. A guest that is paused already is not run: True if all stand at a heartbeat."""
        if timeout_ns < 0:
            raise UsageError(f"timeout of {timeout_ns} ns: must not be negative")
        return self._call("pause at a heartbeat", lambda: self._vm.pause_at_beat(timeout_ns))

    def save_state(self) -> tuple[int, bytes]:
        """(version, bytes). GuestError if it is not paused."""
        return encode_states(
            [
                self._call("save state", partial(self._vm.get_state, vcpu))
                for vcpu in range(self.vcpus)
            ]
        )

    def load_state(self, version: int, data: bytes) -> None:
        """Into a paused machine; ``resume()`` then continues the walk. StreamError for bytes that
        are no state, of another number of vCPUs, or that KVM refuses: the machine must then not be
        resumed."""
        states = decode_states(version, data, self.vcpus)
        try:
            for vcpu, state in enumerate(states):
                self._vm.set_state(state, vcpu)
        except OSError as error:
            self._raise_if_crashed("load state")
            raise StreamError(f"vCPU state: KVM does not accept the registers: {error}") from error

    def beat_report(self) -> BeatReport:
        reports = [
            BeatReport(*self._call("report heartbeats", partial(self._vm.report, vcpu)))
            for vcpu in range(self.vcpus)
        ]
        self._raise_if_crashed("report heartbeats")
        return replace(
            reports[0],
            out_of_order=sum(report.out_of_order for report in reports),
            other_beats=tuple(report.beats for report in reports[1:]),
        )

    def throttle(self, percent: int) -> None:
        """Take 0 to 99 percent of each vCPU's time, in slices of 10 ms. UsageError outside of
        that."""
        self.throttle_vcpus([percent] * self.vcpus)

    def throttle_vcpus(self, percents: Sequence[int]) -> None:
        """The same, of each vCPU another share."""
        if len(percents) != self.vcpus:
            raise UsageError(f"throttle of {len(percents)} vCPUs: this guest has {self.vcpus}")
        for percent in percents:
            if not 0 <= percent <= 99:
                raise UsageError(f"throttle of {percent} percent: 0 to 99 allowed")
        for vcpu, percent in enumerate(percents):
            self._call("throttle", partial(self._vm.throttle, percent, vcpu))

    def vcpu_dirty_pages(self) -> Sequence[int]:
        """By the dirty ring, which each vCPU has one of; the dirty log does not know."""
        return self._call("tell who dirtied", self._vm.dirtied)

    def dirty_source(self, name: str) -> DirtySource:
        """The one tracker of this VM; the same object each time. UsageError for any other name."""
        if name != self._dirty:
            other = " (a KVM guest has the one it was made for)" if name in DIRTY_SOURCES else ""
            raise UsageError(f"dirty source {name!r}: this guest has {self._dirty!r}{other}")
        if self._source is None:
            kind = KvmDirtyLog if name == "kvm-log" else KvmDirtyRing
            self._source = kind(self._vm, self._blocks)
        return self._source

    def close(self) -> None:
        """Stop and join the vCPU, free every descriptor. Idempotent. The memory stays."""
        self._vm.close()

    def _call(self, what: str, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except (OSError, ValueError) as error:
            self._raise_if_crashed(what)
            raise GuestError(f"KVM guest: {what} failed: {error}") from error

    def _raise_if_crashed(self, what: str) -> None:
        try:
            reason = self._vm.crash()
        except ValueError:  # closed: the first error says so
            return
        if reason is not None:
            raise GuestError(f"KVM guest: {what} failed: the vCPU crashed: {reason}")


def _address(block: RamBlock) -> int:
    if block.mapping.address is None:
        raise UsageError(f"block {block.idstr} is not mapped in this process")
    return block.mapping.address


#: Adds the numbers 10 to 1 in flat 32-bit code, stores the sum, and beats with it.
_PROBE_CODE = bytes.fromhex(
    "31c0"  #               xor eax, eax
    "b90a000000"  #         mov ecx, 10
    "01c8"  #           1:  add eax, ecx
    "e2fc"  #               loop 1b
    "bf00200000"  #         mov edi, 0x2000
    "8907"  #               mov [edi], eax
    "ff07"  #               inc dword ptr [edi]
    "ba10050000"  #         mov edx, 0x510
    "ef"  #                 out dx, eax
    "ebfd"  #               jmp to the out
)
_PROBE_ENTRY = 0x1000
_PROBE_RESULT = 0x2000


def probe() -> tuple[bool, str]:
    """Can this machine run the KVM guest? (answer, reason). Runs ten instructions and looks at what
    they left in memory and sent to the port: some /dev/kvm can be opened and run nothing."""
    memory = np.frombuffer(mmap.mmap(-1, 4 * 4096), dtype=np.uint8)
    memory[_PROBE_ENTRY : _PROBE_ENTRY + len(_PROBE_CODE)] = np.frombuffer(_PROBE_CODE, np.uint8)
    try:
        vm = _kvm.MicroVm([(0, 4, int(memory.ctypes.data))], "log")
    except OSError as error:
        return False, f"no VM can be made: {error}"
    try:
        vm.start_fresh(_PROBE_ENTRY, [])
        if not vm.pause_at_beat(2_000_000_000):
            return False, "a guest of ten instructions did not come back within 2 s"
        vm.pause()
        stored = int(memory[_PROBE_RESULT : _PROBE_RESULT + 4].view(np.uint32)[0])
        sent, mode = vm.report()[0], vm.log_mode
    except OSError as error:
        return False, f"a guest of ten instructions failed: {vm.crash() or error}"
    finally:
        vm.close()
    if (stored, sent) != (56, 55):
        return False, f"a guest computed {stored} and {sent} instead of 56 and 55"
    return True, f"KVM runs flat 32-bit code, dirty tracking mode {mode}"
