# SPDX-License-Identifier: Apache-2.0
"""A KVM guest with a small seeded schedule, and the replay that says what its memory must hold."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from vmth.guests.kvm_machine import KvmMachine
from vmth.guests.machine import CONTROL_FIELDS, CONTROL_GPA, ENTRY_BYTES, SCHEDULE_GPA, Pace
from vmth.guests.memory import GuestMemory, plan_blocks

U32 = npt.NDArray[np.uint32]

MEMORY_BYTES = 4 << 20
DATA_GPA = 1 << 20
PAGE_BYTES = 4096
PAGE_DWORDS = PAGE_BYTES // 4
#: In each data page: dword 0 counts, dwords from 16 on are stored to.
STORE_DWORD = 16
#: What the controls of a walk with a pool name; random bytes stand there in every memory.
POOL_GPA = 0x40000
POOL_BYTES = 0x20000
POOL = {"pool_gpa": POOL_GPA, "pool_mask": POOL_BYTES // 2 - 4, "pool_step": 0x9E3779B4}
BEAT_TIMEOUT_NS = 60 * 10**9
#: A beat that is due in an hour: the guest stands in its first beat until it is told otherwise.
STANDING = [Pace(0, 3600 * 10**9)]
UNPACED = [Pace(0, 0)]

_CONTROL = struct.Struct(f"<{len(CONTROL_FIELDS)}I")


def write_control(memory: GuestMemory, **fields: int) -> None:
    values = {"schedule_gpa": SCHEDULE_GPA, "store_dwords": 1, "value_mask": 2**32 - 1} | fields
    values.setdefault("countdown", values["writes_per_beat"])
    packed = _CONTROL.pack(*(values.get(name, 0) for name in CONTROL_FIELDS))
    view = memory.views[0]
    view[CONTROL_GPA : CONTROL_GPA + len(packed)] = np.frombuffer(packed, np.uint8)


def read_control(memory: GuestMemory) -> dict[str, int]:
    data = memory.views[0][CONTROL_GPA : CONTROL_GPA + _CONTROL.size].tobytes()
    return dict(zip(CONTROL_FIELDS, _CONTROL.unpack(data), strict=True))


def make_memory(
    seed: int, *, entries: int = 500, writes_per_beat: int = 70, **control: int
) -> GuestMemory:
    """Memory with a uniform schedule over all data pages; random bytes stand in every page."""
    dice = np.random.default_rng(seed)
    memory = GuestMemory(plan_blocks(MEMORY_BYTES))
    view = memory.views[0]
    pages = (MEMORY_BYTES - DATA_GPA) // PAGE_BYTES
    view[DATA_GPA:] = dice.integers(0, 256, MEMORY_BYTES - DATA_GPA, dtype=np.uint8)
    view[POOL_GPA:][:POOL_BYTES] = np.random.default_rng([seed, 1]).integers(
        0, 256, POOL_BYTES, dtype=np.uint8
    )
    view[DATA_GPA:].view(np.uint32)[::PAGE_DWORDS] = 0
    schedule = np.zeros((entries, ENTRY_BYTES // 4), np.uint32)
    page_gpas = DATA_GPA + dice.integers(0, pages, entries, dtype=np.uint32) * PAGE_BYTES
    schedule[:, 0] = page_gpas + 4 * STORE_DWORD
    schedule[:, 1] = dice.integers(0, 2**32, entries, dtype=np.uint32)
    schedule[:, 2] = page_gpas
    view[SCHEDULE_GPA : SCHEDULE_GPA + entries * ENTRY_BYTES] = schedule.view(np.uint8).ravel()
    write_control(memory, entries=entries, writes_per_beat=writes_per_beat, **control)
    return memory


def replay(initial: npt.NDArray[np.uint8], memory: GuestMemory) -> U32:
    """What the data pages must hold at the heartbeat in the control block, step by step from
    ``initial`` (all of memory before the start)."""
    control = read_control(memory)
    words = initial.copy().view(np.uint32)
    first = SCHEDULE_GPA // 4
    schedule = words[first : first + 4 * control["entries"]].reshape(-1, 4).copy()
    for step in range(control["beats"] * control["writes_per_beat"]):
        loops, index = divmod(step, control["entries"])
        write_gpa, value, counter_gpa, _ = (int(field) for field in schedule[index])
        stores = words[write_gpa // 4 : write_gpa // 4 + control["store_dwords"]]
        if control["pool_gpa"]:
            offset = (value + loops * control["pool_step"]) & control["pool_mask"]
            stores[:] = words[(control["pool_gpa"] + offset) // 4 :][: len(stores)]
        else:
            stores[:] = (value + (loops & control["value_mask"])) % 2**32
        words[counter_gpa // 4] += 1
    return words[DATA_GPA // 4 :]


def data_words(memory: GuestMemory) -> U32:
    return memory.views[0].view(np.uint32)[DATA_GPA // 4 :]


@contextmanager
def machine(memory: GuestMemory, dirty: str = "kvm-log") -> Iterator[KvmMachine]:
    made = KvmMachine(memory, dirty=dirty)
    try:
        yield made
    finally:
        made.close()
