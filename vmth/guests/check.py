# SPDX-License-Identifier: Apache-2.0
"""What guest memory must look like after so many steps of the walker, and whether it does.

The schedule lies in guest memory, so the guest's own counters prove that no write was lost: after
``loops`` whole loops and ``index`` entries of the next, each counter has been raised once for each
time that the walker passed an entry of its page, and each page's last store is known to the byte. A
pool (pool.py) is made again, not read: one that arrived damaged is a problem of its own. Counters
start at zero (``schedule.install``). The control block is current only where the guest stands at a
beat (``pause_at_beat``). Memory is looked at where the walker wrote, not elsewhere: some 0.2 s for
the largest schedule, 0.5 s for each 256 MiB of rewritten pages. What is read may come from another
host: every address is checked first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmth.guests.machine import CONTROL_FIELDS, ENTRY_BYTES
from vmth.guests.memory import PAGE_BYTES
from vmth.guests.pool import POOL_MASK_MAX, POOL_TAIL_BYTES, pool_content
from vmth.guests.schedule import ENTRIES_MAX, REWRITE_STORE_DWORDS, Control, pool_key

__all__ = ["GuestCheck", "check", "expected_counters", "last_stores", "read_schedule"]

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]

WRONG_PAGES_MAX = 16
#: Bytes of stores that are compared at once.
_BATCH_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class GuestCheck:
    """``problems`` empty: every counter and every last store is exactly what the control block
    calls for. ``wrong_pages``: gpas of the first pages that are not, ``wrong_pages_total`` how
    many."""

    writes: int  #: page writes by the control block
    beats: int
    counters: int  #: counters compared
    lost_writes: int  #: sum over counters of what is missing
    repeated_writes: int  #: sum over counters of what is too much
    wrong_pages: tuple[int, ...]
    wrong_pages_total: int
    heartbeats_consistent: bool  #: beats agree with the number of writes
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def read_schedule(memory: U8, control: Control) -> U32:
    """The (entries, 4) schedule in guest memory. ValueError if the control block points outside."""
    if not 0 < control.entries <= ENTRIES_MAX:
        raise ValueError(f"{control.entries} entries: must be 1 to {ENTRIES_MAX}")
    if control.index >= control.entries:
        raise ValueError(f"index {control.index} of {control.entries} entries")
    end = control.schedule_gpa + control.entries * ENTRY_BYTES
    if control.schedule_gpa % 4 or end > len(memory):
        raise ValueError(
            f"schedule at {control.schedule_gpa:#x} to {end:#x}: memory ends at {len(memory):#x}"
        )
    return memory[control.schedule_gpa : end].view("<u4").reshape(-1, 4).copy()


def expected_counters(control: Control, schedule: U32) -> tuple[U32, U32]:
    """(gpas in ascending order, the value each must have)."""
    gpas, which = np.unique(schedule[:, 2], return_inverse=True)
    a_loop = np.bincount(which, minlength=len(gpas))
    this_loop = np.bincount(which[: control.index], minlength=len(gpas))
    values = a_loop.astype(np.uint64) * np.uint64(control.loops) + this_loop.astype(np.uint64)
    return gpas, values.astype(np.uint32)


def last_stores(control: Control, schedule: U32) -> tuple[U32, U32]:
    """(gpas, values): for each place that was stored to, the dword that was stored last; with a
    pool, the byte of it from which was copied last."""
    entries = len(schedule)
    # Newest first: this loop's entries backwards, then the previous loop's rest backwards.
    newest = np.arange(control.index)[::-1]
    if control.loops > 0:
        newest = np.concatenate([newest, np.arange(control.index, entries)[::-1]])
    gpas, first = np.unique(schedule[newest, 0], return_index=True)
    entry = newest[first]
    loops = np.where(entry < control.index, control.loops, control.loops - 1).astype(np.uint32)
    if control.pool_gpa:
        starts = schedule[entry, 1] + loops * np.uint32(control.pool_step)
        return gpas, starts & np.uint32(control.pool_mask)
    return gpas, schedule[entry, 1] + (loops & np.uint32(control.value_mask))


def check(memory: U8) -> GuestCheck:
    """Check the first block (gpa 0 first) of a guest that stands at a beat. Reads only."""
    control = Control.read(memory)
    problems = _control_problems(control, len(memory))
    if problems:
        return GuestCheck(control.writes, control.beats, 0, 0, 0, (), 0, False, problems)
    schedule = read_schedule(memory, control)
    spans = ((schedule[:, 0], control.store_dwords * 4), (schedule[:, 2], 4))
    for gpas, nbytes in spans:
        if np.any(gpas % 4) or int(gpas.max()) + nbytes > len(memory):
            problems = ("the schedule in memory points outside of memory or between dwords",)
            return GuestCheck(control.writes, control.beats, 0, 0, 0, (), 0, False, problems)

    dwords = memory.view("<u4")
    counter_gpas, expected = expected_counters(control, schedule)
    difference = (dwords[counter_gpas // 4] - expected).view(np.int32).astype(np.int64)
    lost = int(-difference[difference < 0].sum())
    repeated = int(difference[difference > 0].sum())
    pool = _expected_pool(control, schedule)
    wrong_pool = _wrong_pool_pages(memory, control, pool)
    wrong = [counter_gpas[difference != 0], _wrong_stores(dwords, control, schedule, pool)]
    pages = np.unique(np.concatenate(wrong) // PAGE_BYTES) * PAGE_BYTES
    consistent = _beats_agree(control)
    found = []
    if lost:
        found.append(f"{lost} writes lost")
    if repeated:
        found.append(f"{repeated} writes too many")
    if len(pages):
        found.append(f"{len(pages)} pages differ from what the guest wrote")
    if len(wrong_pool):
        found.append(f"{len(wrong_pool)} pages of the pool, from {wrong_pool[0]:#x} on, differ")
    if not consistent:
        found.append(f"{control.beats} beats do not agree with {control.writes} writes")
    return GuestCheck(
        writes=control.writes,
        beats=control.beats,
        counters=len(counter_gpas),
        lost_writes=lost,
        repeated_writes=repeated,
        wrong_pages=tuple(int(gpa) for gpa in pages[:WRONG_PAGES_MAX]),
        wrong_pages_total=len(pages),
        heartbeats_consistent=consistent,
        problems=tuple(found),
    )


def _control_problems(control: Control, memory_bytes: int) -> tuple[str, ...]:
    end = control.schedule_gpa + control.entries * ENTRY_BYTES
    bounds = {
        "index": control.index < control.entries,
        "entries": 0 < control.entries <= ENTRIES_MAX,
        "schedule_gpa": control.schedule_gpa % 4 == 0 and end <= memory_bytes,
        "writes_per_beat": control.writes_per_beat > 0,
        "countdown": 0 < control.countdown <= control.writes_per_beat,
        "store_dwords": 0 < control.store_dwords <= REWRITE_STORE_DWORDS,
        "pool_gpa": _pool_end(control) <= memory_bytes,
        "pool_mask": not control.pool_gpa or _is_pool_mask(control.pool_mask),
    }
    return tuple(
        f"control block: {name} is {getattr(control, name)}"
        for name in CONTROL_FIELDS
        if not bounds.get(name, True)
    )


def _beats_agree(control: Control) -> bool:
    since_beat = control.writes_per_beat - control.countdown
    by_beats = control.beats * control.writes_per_beat + since_beat
    return (by_beats - control.writes) % (1 << 32) == 0


def _pool_end(control: Control) -> int:
    """First byte behind the pool and its tail; 0 without one."""
    return control.pool_gpa + control.pool_mask + 4 + POOL_TAIL_BYTES if control.pool_gpa else 0


def _is_pool_mask(mask: int) -> bool:
    nbytes = mask + 4
    return PAGE_BYTES <= nbytes <= POOL_MASK_MAX + 4 and nbytes & (nbytes - 1) == 0


def _expected_pool(control: Control, schedule: U32) -> U8:
    if not control.pool_gpa:
        return np.zeros(0, dtype=np.uint8)
    return pool_content(pool_key(schedule), control.pool_mask + 4)


def _wrong_pool_pages(memory: U8, control: Control, pool: U8) -> U32:
    stands = memory[control.pool_gpa : control.pool_gpa + len(pool)].reshape(-1, PAGE_BYTES)
    differ = (stands != pool.reshape(-1, PAGE_BYTES)).any(axis=1)
    gpas: U32 = (np.flatnonzero(differ) * PAGE_BYTES + control.pool_gpa).astype(np.uint32)
    return gpas


def _wrong_stores(dwords: U32, control: Control, schedule: U32, pool: U8) -> U32:
    gpas, values = last_stores(control, schedule)
    within = np.arange(control.store_dwords, dtype=np.uint32)
    wrong = [np.zeros(0, dtype=np.uint32)]
    step = _BATCH_BYTES // (4 * control.store_dwords)
    for at in range(0, len(gpas), step):
        batch, expected = gpas[at : at + step], values[at : at + step, None]
        if control.pool_gpa:
            expected = pool.view("<u4")[expected // 4 + within]
        stored = dwords[(batch // 4)[:, None] + within]
        bad = (stored != expected).any(axis=1)
        wrong.append(batch[bad])
    return np.concatenate(wrong)
