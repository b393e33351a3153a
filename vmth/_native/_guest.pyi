"""The native walker thread of the process guest (csrc/guest/walker.h).

One caller at a time, except ``report``. OSError carries the C core's errno: EBUSY for a walker that
runs, EINVAL for values outside their bounds or a walker that was neither reset nor loaded, EFAULT
once the walker has crashed. ValueError after ``close``.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

PACES_MAX: int

#: index, entries, schedule_gpa, loops, beats, writes_per_beat, countdown, store_dwords, value_mask
Registers = tuple[int, int, int, int, int, int, int, int, int]
#: (from_ns, beat_interval_ns)
Paces = Sequence[tuple[int, int]]

class Walker:
    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        """A stopped walker over ``memory`` (gpa 0 is its first byte); keeps the array alive."""

    def close(self) -> None:
        """Stop and join the thread. Idempotent."""

    def reset(self, paces: Paces) -> None:
        """Registers from the control block in memory, running time 0."""

    def resume(self) -> None: ...
    def pause(self) -> bool: ...
    def pause_at_beat(self, timeout_ns: int) -> bool: ...
    def throttle(self, percent: int) -> None: ...
    def save(self) -> tuple[Registers, list[tuple[int, int]], int, int]:
        """Registers, paces, running_ns, next_due_ns."""

    def load(
        self, registers: Sequence[int], paces: Paces, running_ns: int, next_due_ns: int
    ) -> None: ...
    def report(self) -> dict[str, int]:
        """The fields of BeatReport, ``seen`` (beats seen by this walker) and ``fault`` (-errno or
        0)."""
