# SPDX-License-Identifier: Apache-2.0
"""What a holder process hosts: the ``Machine`` protocol, and the layout of its program area.

A machine runs one small program, the *walker*: it goes through a schedule of writes that lies in
the guest's own memory, for ever, and beats its heart every so many writes. The KVM micro-VM runs it
as flat 32-bit code on a vCPU, the process guest as a native thread; memory looks the same in both:

    gpa 0x0000   unused, zero
        0x1000   control block (CONTROL_FIELDS below), one page
        0x2000   machine code of the KVM guest, up to 0x8000
        0x10000  schedule: entries of 16 bytes {u32 write_gpa, u32 value, u32 counter_gpa, u32 0}
        ...      counter table of the ``silent`` workload (u32 a page), page aligned
        ...      pool of the ``rewrite`` workload (pool.py), page aligned
        ...      data pages up to the end of memory

One step of the walker: store ``store_dwords`` dwords at write_gpa; add 1 to the dword at
counter_gpa; next entry (after the last: index 0, loops + 1); countdown - 1, and at 0: countdown =
writes_per_beat, beats + 1, tell the host (KVM: OUT dword ``beats`` to port 0x510), which returns
when the next beat is due: that paces the guest. In memory the control block is current at every
beat; between beats the fields may live in registers.

What is stored: without a pool (``pool_gpa`` 0) each dword is value + (loops & value_mask). With one
they are copied, in ascending order, from pool_gpa + ((value + loops x pool_step) & pool_mask). All
sums and products are modulo 2^32. The KVM guest has its host copy for it, all stores up to the next
beat or the end of the schedule at once (OUT dword number of steps to port 0x514), and counts them
then, which marks their pages dirty: where KVM emulates the guest, string moves take up to 1 ms a
page.

A KVM guest may have more vCPUs than one: those after the first run programs of their own in the
control block's page (bystander.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vmth.guest import DirtySource
from vmth.types import RamBlock

__all__ = [
    "BEAT_PORT",
    "CODE_GPA",
    "CONTROL_FIELDS",
    "CONTROL_GPA",
    "ENTRY_BYTES",
    "HIGH_MEMORY_GPA",
    "LANE_BYTES",
    "LOW_MEMORY_LIMIT",
    "SCHEDULE_GPA",
    "VCPUS_MAX",
    "BeatReport",
    "Machine",
    "Pace",
]

CONTROL_GPA = 0x1000
CODE_GPA = 0x2000
SCHEDULE_GPA = 0x10000
ENTRY_BYTES = 16
BEAT_PORT = 0x510
#: vCPU k sees memory from so many bytes times k on.
LANE_BYTES = 0x40
VCPUS_MAX = 8
#: Flat 32-bit code and the usual PC layout reach below 3 GiB; memory above starts at 4 GiB.
LOW_MEMORY_LIMIT = 3 << 30
HIGH_MEMORY_GPA = 4 << 30

#: u32 fields of the control block, in order, little-endian.
CONTROL_FIELDS = (
    "index",
    "entries",
    "schedule_gpa",
    "loops",
    "beats",
    "writes_per_beat",
    "countdown",
    "store_dwords",
    "value_mask",
    "pool_gpa",
    "pool_mask",
    "pool_step",
)


@dataclass(frozen=True, slots=True)
class Pace:
    """From ``from_ns`` of guest running time on: a beat every ``beat_interval_ns`` (0: unpaced)."""

    from_ns: int
    beat_interval_ns: int


@dataclass(frozen=True, slots=True)
class BeatReport:
    """Heartbeats seen by the host that runs the guest, of the first vCPU. Times are
    CLOCK_REALTIME ns; 0: none yet."""

    beats: int
    first_beat_at_ns: int  #: first seen by this holder
    last_beat_at_ns: int
    max_gap_ns: int
    running_ns: int  #: guest running time, moves with the guest
    out_of_order: int  #: beats that did not follow their predecessor by exactly one; of any vCPU
    other_beats: tuple[int, ...] = ()  #: of the vCPUs after the first


class Machine(Protocol):
    """One guest inside its holder process, made from the holder's ``GuestMemory`` (memory.py),
    which outlives it. Called from the holder's single request thread."""

    @property
    def blocks(self) -> Sequence[RamBlock]: ...
    @property
    def vcpus(self) -> int: ...
    def start_fresh(self, paces: Sequence[Pace]) -> None:
        """Program, schedule and content are in memory: begin to run."""

    def pause(self) -> bool: ...
    def resume(self) -> None: ...
    def pause_at_beat(self, timeout_ns: int) -> bool:
        """Pause at a heartbeat, where the control block in memory is exact. False at the
        timeout."""

    def save_state(self) -> tuple[int, bytes]:
        """(version, bytes): vCPU registers, beat and pace state. Paused only."""

    def load_state(self, version: int, data: bytes) -> None: ...
    def beat_report(self) -> BeatReport: ...
    def throttle(self, percent: int) -> None: ...
    def throttle_vcpus(self, percents: Sequence[int]) -> None:
        """One percentage a vCPU."""

    def vcpu_dirty_pages(self) -> Sequence[int]:
        """How many pages each vCPU was the first to dirty between two fetches, in all; empty where
        the dirty source does not know."""

    def dirty_source(self, name: str) -> DirtySource:
        """ "kvm-log", "kvm-ring", "uffd-wp": UsageError names those that this machine has."""

    def close(self) -> None: ...
