"""Cython over csrc/guest (the micro VM) and csrc/sys (KVM dirty log and ring).

Calls come from one thread at a time (those named dirty_ may come from a second one), in the process
that created the VM, and release the GIL. Failures of the kernel raise OSError; EIO after the vCPU
crashed (``crash()`` says why).
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

def walker_code() -> bytes:
    """Machine code of the walker, for gpa 0x2000."""

class MicroVm:
    def __init__(self, slots: Sequence[tuple[int, int, int]], tracker: str) -> None:
        """``slots``: (gpa, npages, address) each, mapped until close(); ``tracker``: "log" or
        "ring"."""

    def start_fresh(self, entry_gpa: int, paces: Sequence[tuple[int, int]]) -> None: ...
    def pause(self) -> bool: ...
    def resume(self) -> None: ...
    def pause_at_beat(self, timeout_ns: int) -> bool: ...
    def throttle(self, percent: int) -> None: ...
    def report(self) -> tuple[int, int, int, int, int, int]:
        """beats, first_beat_at_ns, last_beat_at_ns, max_gap_ns, running_ns, out_of_order."""

    def crash(self) -> str | None: ...
    def get_state(self) -> VcpuState: ...
    def set_state(self, state: VcpuState) -> None: ...
    @property
    def log_mode(self) -> str:
        """ "manual-all-set", "manual", "fetch-clears"; "ring" for a ring."""

    @property
    def ring_overflows(self) -> int: ...
    def dirty_start(self) -> None: ...
    def dirty_fetch(self, bitmaps: Sequence[U64]) -> None:
        """One bitmap a slot, at least (npages + 63) // 64 words."""

    def dirty_rearm(self, slot: int, page: int, npages: int) -> None: ...
    def dirty_stop(self) -> None: ...
    def close(self) -> None:
        """Stop and join the vCPU, free everything but the memory. Idempotent; other calls then
        raise."""
