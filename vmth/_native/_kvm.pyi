"""Cython over csrc/guest (the micro VM) and csrc/sys (KVM dirty log and ring).

Calls come from one thread at a time (those named dirty_ may come from a second one), in the process
that created the VM, and release the GIL. Failures of the kernel raise OSError; EIO after a vCPU
crashed (``crash()`` says which and why). A ``vcpu`` that the VM has not raises IndexError.
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

class VcpuState(TypedDict):
    regs: bytes  # the kernel's structs, native layout
    sregs: bytes
    fpu: bytes
    mp_state: bytes
    events: bytes
    xcrs: bytes
    msrs: list[tuple[int, int]]  # index, value
    beats: int
    out_of_order: int
    running_ns: int
    due_ns: int
    at_beat: bool
    paces: list[tuple[int, int]]  # from_ns, beat_interval_ns

STATE_SIZES: dict[str, int]
MAX_MSRS: int
MAX_PACES: int
MAX_XCRS: int
MAX_VCPUS: int
LANE_BYTES: int
"""The data segments of vCPU k begin at k x LANE_BYTES: its control block lies at gpa 0x1000 + that,
and addresses in it and in its schedule are gpa - that."""

def walker_code() -> bytes:
    """Machine code of the walker, for gpa 0x2000."""

class MicroVm:
    def __init__(self, slots: Sequence[tuple[int, int, int]], tracker: str, vcpus: int = 1) -> None:
        """``slots``: (gpa, npages, address) each, mapped until close(); ``tracker``: "log" or
        "ring"; ``vcpus``: 1 to MAX_VCPUS, else ValueError."""

    @property
    def vcpus(self) -> int: ...
    def start_fresh(
        self,
        entry_gpa: int,
        paces: Sequence[tuple[int, int]],
        other_paces: Sequence[tuple[int, int]] = (),
    ) -> None:
        """All vCPUs begin at ``entry_gpa``: the first with ``paces``, each other one with
        ``other_paces`` (none: unpaced)."""

    def pause(self) -> bool:
        """Park every vCPU. Was the VM running?"""

    def resume(self) -> None: ...
    def pause_at_beat(self, timeout_ns: int) -> bool:
        """Park every vCPU at its own next beat; those that are there first wait for the others.
        False at the timeout: all run on. A parked VM is not run: True if all stand at a beat."""

    def throttle(self, percent: int, vcpu: int | None = None) -> None:
        """Take 0 to 99 percent of that vCPU's time, of each one's where it is None."""

    def report(self, vcpu: int = 0) -> tuple[int, int, int, int, int, int]:
        """beats, first_beat_at_ns, last_beat_at_ns, max_gap_ns, running_ns, out_of_order."""

    def crash(self) -> str | None:
        """Why the first vCPU that crashed did so; begins with its name where there are several."""

    def get_state(self, vcpu: int = 0) -> VcpuState: ...
    def set_state(self, state: VcpuState, vcpu: int = 0) -> None: ...
    @property
    def log_mode(self) -> str:
        """ "manual-all-set", "manual", "fetch-clears"; "ring" for a ring."""

    @property
    def ring_overflows(self) -> int: ...
    def dirtied(self) -> list[int]:
        """With a ring: how many pages each vCPU was the first to dirty since a fetch took them
        last, summed up since creation. A page that several wrote between two fetches counts for
        one of them; those that only an overflow made dirty for none. [] where the tracker is the
        log. May come from the thread of the dirty_ calls."""

    def dirty_start(self) -> None: ...
    def dirty_fetch(self, bitmaps: Sequence[U64]) -> None:
        """One bitmap a slot, at least (npages + 63) // 64 words."""

    def dirty_peek(self, bitmaps: Sequence[U64]) -> bool:
        """OR in what a fetch would, as far as it is known without one, and change nothing. False:
        not known."""

    def dirty_rearm(self, slot: int, page: int, npages: int) -> None: ...
    def dirty_stop(self) -> None: ...
    def close(self) -> None:
        """Stop and join the vCPUs, free everything but the memory. Idempotent; other calls then
        raise."""
