# SPDX-License-Identifier: Apache-2.0
"""What a mover costs: CPU seconds and memory of its own process, guest mappings left out.

Guest memory is a memfd that the mover maps shared; the kernel counts its pages as shared resident
pages. What is left of the resident set is private: that is the mover's own memory. The kernel
keeps no high-water mark of it, so a thread looks twenty times a second: more often would itself be
what a mover costs, and it wakes while a paused guest waits for this process.
"""

from __future__ import annotations

import mmap
import os
import threading
import time

import msgspec

__all__ = ["MoverCost", "MoverMeter", "private_memory_bytes"]

_INTERVAL_S = 0.05
_STATM_BYTES = 256


class MoverCost(msgspec.Struct, frozen=True):
    """From ``start()`` to ``stop()``. ``start_memory_bytes`` is what an idle process holds."""

    cpu_seconds: float
    peak_memory_bytes: int
    start_memory_bytes: int


def private_memory_bytes() -> int:
    """Private resident memory of this process, now."""
    with open("/proc/self/statm", "rb") as file:
        return _private_bytes(file.fileno())


def _private_bytes(statm: int) -> int:
    _, resident, shared, *_ = os.pread(statm, _STATM_BYTES, 0).split()
    return (int(resident) - int(shared)) * mmap.PAGESIZE


class MoverMeter:
    """Measures this process from ``with`` to its end; ``cost`` is set then."""

    def __init__(self) -> None:
        self.cost = MoverCost(0.0, 0, 0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="vmth-meter", daemon=True)

    def __enter__(self) -> MoverMeter:
        self._start_bytes = self._peak_bytes = private_memory_bytes()
        self._start_cpu_ns = time.process_time_ns()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        cpu_ns = time.process_time_ns() - self._start_cpu_ns
        peak_bytes = max(self._peak_bytes, private_memory_bytes())
        self.cost = MoverCost(cpu_ns / 1e9, peak_bytes, self._start_bytes)

    def _sample(self) -> None:
        with open("/proc/self/statm", "rb") as file:
            while not self._ended.wait(_INTERVAL_S):
                self._peak_bytes = max(self._peak_bytes, _private_bytes(file.fileno()))
