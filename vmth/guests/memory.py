# SPDX-License-Identifier: Apache-2.0
"""Guest memory of a holder process: one sealed memfd a ramblock, mapped shared.

Memory up to 3 GiB is one block, ``ram``; more is cut into ``ram-low`` below the 3 GiB line, where
the walker's flat 32-bit code reaches, and ``ram-high`` from gpa 4 GiB on, which the host fills and
which moves idle. A memfd is handed to movers by SCM_RIGHTS; its size is sealed, so that none of
them can take pages away below the guest. Machines are built on it: ``ProcessMachine(memory)``,
``KvmMachine(memory)``.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmth.errors import UsageError
from vmth.guests.machine import HIGH_MEMORY_GPA, LOW_MEMORY_LIMIT
from vmth.types import Mapping, RamBlock

__all__ = [
    "MEMORY_MAX_BYTES",
    "MEMORY_MIN_BYTES",
    "PAGE_BYTES",
    "BlockPlan",
    "GuestMemory",
    "plan_blocks",
]

PAGE_BYTES = 4096
MEMORY_MIN_BYTES = 1 << 20
MEMORY_MAX_BYTES = 1 << 46

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """One ramblock before it has memory. Lengths in bytes."""

    idstr: str
    gpa: int
    length_bytes: int


def plan_blocks(memory_bytes: int) -> list[BlockPlan]:
    """The block table of a guest of ``memory_bytes``. UsageError outside 1 MiB .. 64 TiB or for a
    part of a page."""
    if not MEMORY_MIN_BYTES <= memory_bytes <= MEMORY_MAX_BYTES:
        raise UsageError(
            f"guest memory of {memory_bytes} bytes:"
            f" must be {MEMORY_MIN_BYTES} to {MEMORY_MAX_BYTES}"
        )
    if memory_bytes % PAGE_BYTES:
        raise UsageError(f"guest memory of {memory_bytes} bytes: not a multiple of {PAGE_BYTES}")
    if memory_bytes <= LOW_MEMORY_LIMIT:
        return [BlockPlan("ram", 0, memory_bytes)]
    return [
        BlockPlan("ram-low", 0, LOW_MEMORY_LIMIT),
        BlockPlan("ram-high", HIGH_MEMORY_GPA, memory_bytes - LOW_MEMORY_LIMIT),
    ]


class GuestMemory:
    """Owns the memfds and their mappings. ``blocks[i].mapping.address`` is where block i is mapped
    in this process, ``views[i]`` the same bytes, ``fds[i]`` its memfd. All stay valid until
    ``close()``.

    Nothing is populated by making it. OSError when a memfd or a mapping cannot be had: what was
    made before is freed.
    """

    def __init__(self, plans: Sequence[BlockPlan]) -> None:
        self.fds: list[int] = []
        self.views: list[U8] = []
        self.blocks: list[RamBlock] = []
        try:
            for plan in plans:
                self._add(plan)
        except BaseException:
            self.close()
            raise

    def _add(self, plan: BlockPlan) -> None:
        fd = os.memfd_create(f"vmth-{plan.idstr}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.fds.append(fd)
        os.ftruncate(fd, plan.length_bytes)
        fcntl.fcntl(
            fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        )
        # The view keeps the mapping alive, so that no address dangles while one is still held.
        view = np.frombuffer(mmap.mmap(fd, plan.length_bytes), dtype=np.uint8)
        self.views.append(view)
        self.blocks.append(
            RamBlock(
                idstr=plan.idstr,
                used_length=plan.length_bytes,
                gpa=plan.gpa,
                mapping=Mapping(address=int(view.ctypes.data)),
            )
        )

    @property
    def total_bytes(self) -> int:
        return sum(block.used_length for block in self.blocks)

    def close(self) -> None:
        """Close the memfds and drop the mappings. Idempotent. Whoever uses an address stops
        first."""
        self.blocks.clear()
        self.views.clear()
        while self.fds:
            os.close(self.fds.pop())
