# SPDX-License-Identifier: Apache-2.0
"""The seeded access schedules: what the walker writes, in which order and how fast.

``plan()`` turns a ``Workload`` into a ``Program`` (schedule entries, control block, paces) for the
layout that machine.py draws, ``install()`` puts it into guest memory, and check.py computes from it
what must stand there later. Everything is vectorised; the entries are bounded (``ENTRIES_MAX``, and
1/32 of guest memory), so that a schedule takes at most 16 MiB in the guest and some 100 MiB while
it is made.

    workload    pages of one loop                             stores                 counter
    idle        one page, a write a millisecond               64 dwords              in the page
    sequential  the working set, in order                     64 dwords              in the page
    uniform     random draws from the working set             64 dwords              in the page
    zipf        draws with frequency 1/rank^0.99              64 dwords              in the page
    silent      the working set, shuffled                     64 dwords, the same    counter table
    sparse      the working set, shuffled                     2 dwords               in the page
    always      all pages that the walker reaches, in order   64 dwords, no pacing   in the page
    rewrite     the working set, in order                     1023 dwords, random    in the page

A page's stores lie at one seeded offset of it, its counter at offset 0: no two entries overlap in
part. All store equal dwords but ``rewrite``, which copies all of the page behind its counter from a
pool of random bytes, from another place at each rewrite (pool.py): no page form makes such pages
smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmth.errors import UsageError
from vmth.guests.machine import (
    CONTROL_FIELDS,
    CONTROL_GPA,
    ENTRY_BYTES,
    LANE_BYTES,
    LOW_MEMORY_LIMIT,
    SCHEDULE_GPA,
    Pace,
)
from vmth.guests.memory import MEMORY_MIN_BYTES, PAGE_BYTES
from vmth.guests.pool import (
    POOL_TAIL_BYTES,
    pool_bytes,
    pool_content,
    pool_step,
    window_offsets,
)

__all__ = [
    "BEAT_NS",
    "ENTRIES_MAX",
    "WORKLOADS",
    "Control",
    "Program",
    "Workload",
    "install",
    "plan",
    "pool_key",
    "rate_reached_bps",
]

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]

#: A schedule is seeded with its workload's place in here.
WORKLOADS = ("idle", "sequential", "uniform", "zipf", "silent", "sparse", "always", "rewrite")
#: Entries of one schedule, 16 bytes each.
ENTRIES_MAX = 1 << 20
#: Draws that uniform and zipf make where the working set needs no more.
DRAWS_MAX = 1 << 18
DRAWS_MIN = 1 << 10
ZIPF_EXPONENT = 0.99

STORE_DWORDS = 64
SPARSE_STORE_DWORDS = 2
#: All of a page but its counter.
REWRITE_STORE_DWORDS = PAGE_BYTES // 4 - 1
_STORE_DWORDS = {"sparse": SPARSE_STORE_DWORDS, "rewrite": REWRITE_STORE_DWORDS}
#: Offsets below this in a page are the counter's.
STORE_OFFSET_MIN = 64

BEAT_NS = 1_000_000
BEAT_INTERVAL_MAX_NS = 50_000_000
UNPACED_WRITES_PER_BEAT = 256
#: Entries handled at once, at most 32 MiB.
BATCH_ENTRIES = 1 << 16
RATE_MIN_BPS = PAGE_BYTES
RATE_MAX_BPS = 1 << 40
DEFAULT_WORKING_SET_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Workload:
    """What the guest does. ``rate_bps``: bytes/s of dirtied pages, that is page writes/s x 4096 (0:
    as fast as it can; idle ignores it). ``working_set_bytes`` 0: 256 MiB or a quarter of what there
    is, whichever is less. ``jump``: from that guest running time (ns) on, another rate."""

    kind: str = "uniform"
    rate_bps: int = 50_000_000
    working_set_bytes: int = 0
    seed: int = 0
    jump: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in WORKLOADS:
            raise UsageError(f"workload {self.kind!r}: one of {', '.join(WORKLOADS)}")
        _check_rate(self.rate_bps)
        if not 0 <= self.working_set_bytes <= LOW_MEMORY_LIMIT:
            raise UsageError(
                f"working set of {self.working_set_bytes} bytes: must be 0 to {LOW_MEMORY_LIMIT}"
            )
        if not 0 <= self.seed < 1 << 64:
            raise UsageError(f"seed {self.seed}: must be 0 to 2^64 - 1")
        if self.jump is not None:
            if not 0 < self.jump[0] < 1 << 62:
                raise UsageError(f"rate jump at {self.jump[0]} ns: must be later than 0")
            _check_rate(self.jump[1])


def _check_rate(rate_bps: int) -> None:
    if rate_bps != 0 and not RATE_MIN_BPS <= rate_bps <= RATE_MAX_BPS:
        raise UsageError(
            f"dirty rate of {rate_bps} bytes/s: must be 0 (unpaced) or"
            f" {RATE_MIN_BPS} to {RATE_MAX_BPS}"
        )


@dataclass(frozen=True, slots=True)
class Control:
    """The control block: u32 each, in the order of ``CONTROL_FIELDS``."""

    index: int
    entries: int
    schedule_gpa: int
    loops: int
    beats: int
    writes_per_beat: int
    countdown: int
    store_dwords: int
    value_mask: int
    pool_gpa: int = 0  #: 0: no pool
    pool_mask: int = 0  #: bytes of the pool - 4
    pool_step: int = 0

    @classmethod
    def read(cls, memory: U8, vcpu: int = 0) -> Control:
        """From guest memory (gpa 0 first). Current only where the guest was paused at a beat."""
        return cls(*(int(dword) for dword in _control_dwords(memory, vcpu)))

    def write(self, memory: U8, vcpu: int = 0) -> None:
        dwords = _control_dwords(memory, vcpu)
        dwords[:] = [getattr(self, name) for name in CONTROL_FIELDS]

    @property
    def writes(self) -> int:
        """Page writes so far, as long as ``loops`` did not wrap."""
        return self.loops * self.entries + self.index


def _control_dwords(memory: U8, vcpu: int) -> U32:
    return memory[CONTROL_GPA + LANE_BYTES * vcpu :][: 4 * len(CONTROL_FIELDS)].view("<u4")


@dataclass(frozen=True, slots=True)
class Program:
    """A planned workload. ``schedule``: (entries, 4) u32 {write_gpa, value, counter_gpa, 0}."""

    workload: Workload
    schedule: U32
    control: Control
    paces: tuple[Pace, ...]
    data_gpa: int  #: first byte behind schedule, counter table and pool
    working_set_gpa: int
    working_set_pages: int

    def counter_pages(self, npages: int) -> npt.NDArray[np.bool_]:
        """One bool for each of the first ``npages``: its first dword is a counter."""
        pages = np.zeros(npages, dtype=np.bool_)
        if self.workload.kind != "silent":
            first = self.working_set_gpa // PAGE_BYTES
            pages[first : first + self.working_set_pages] = True
        return pages

    @property
    def rate_asked_bps(self) -> int:
        """Bytes/s of dirtied pages before a jump; 0: unpaced or idle."""
        return 0 if self.workload.kind == "idle" else self.workload.rate_bps


def rate_reached_bps(beats: int, writes_per_beat: int, running_ns: int) -> float:
    """Bytes/s of dirtied pages: page writes per second of guest running time, times 4096. Writes
    that hit one page twice between two fetches count twice, as they do in the rate asked for."""
    return 0.0 if running_ns <= 0 else beats * writes_per_beat * PAGE_BYTES * 1e9 / running_ns


def _align(value: int) -> int:
    return -(-value // PAGE_BYTES) * PAGE_BYTES


def _entries_wanted(kind: str, pages: int, low_bytes: int) -> int:
    most = min(ENTRIES_MAX, low_bytes // 32 // ENTRY_BYTES)
    if kind == "idle":
        return 1
    if kind in ("uniform", "zipf"):
        return min(most, max(pages, min(4 * pages, DRAWS_MAX), DRAWS_MIN))
    return min(most, pages)


def _page_order(kind: str, pages: int, entries: int, rng: np.random.Generator) -> U32:
    """Page of the working set for each entry."""
    if kind in ("sequential", "always", "idle", "rewrite"):
        return np.arange(entries, dtype=np.uint32)
    if kind in ("silent", "sparse"):
        return rng.permutation(pages)[:entries].astype(np.uint32)
    if kind == "uniform":
        return rng.integers(0, pages, entries, dtype=np.uint32)
    cumulative = np.cumsum(np.arange(1, pages + 1, dtype=np.float64) ** -ZIPF_EXPONENT)
    ranks = np.searchsorted(cumulative, rng.random(entries) * cumulative[-1], side="right")
    # Hot pages lie scattered over the working set, not at its head.
    page_of_rank: U32 = rng.permutation(pages).astype(np.uint32)
    order: U32 = page_of_rank[np.minimum(ranks, pages - 1)]
    return order


def _beats(workload: Workload) -> tuple[int, tuple[Pace, ...]]:
    """(writes_per_beat, paces): beats near a millisecond apart at the highest rate, and where that
    allows it at most 50 ms apart at the lowest."""
    if workload.kind == "idle":
        return 1, (Pace(0, BEAT_NS),)
    phases = [(0, workload.rate_bps)]
    if workload.jump is not None:
        phases.append(workload.jump)
    paced = [rate for _, rate in phases if rate > 0]
    if not paced:
        return UNPACED_WRITES_PER_BEAT, (Pace(0, 0),)
    at_highest = max(paced) * BEAT_NS // (PAGE_BYTES * 1_000_000_000)
    at_lowest = min(paced) * BEAT_INTERVAL_MAX_NS // (PAGE_BYTES * 1_000_000_000)
    writes = max(1, min(at_highest, at_lowest))
    return writes, tuple(
        Pace(at_ns, 0 if rate == 0 else writes * PAGE_BYTES * 1_000_000_000 // rate)
        for at_ns, rate in phases
    )


def plan(workload: Workload, low_bytes: int) -> Program:
    """The program for a guest with ``low_bytes`` of memory in reach of the walker.

    Deterministic for one workload, memory size and NumPy version. UsageError when the working set
    does not fit beside the schedule."""
    if not MEMORY_MIN_BYTES <= low_bytes <= LOW_MEMORY_LIMIT:
        raise UsageError(
            f"{low_bytes} bytes of low memory: must be {MEMORY_MIN_BYTES} to {LOW_MEMORY_LIMIT}"
        )
    kind = workload.kind
    all_pages = (low_bytes - SCHEDULE_GPA) // PAGE_BYTES
    if kind == "idle":
        pages = 1
    elif workload.working_set_bytes:
        pages = max(1, workload.working_set_bytes // PAGE_BYTES)
    elif kind == "always":
        pages = all_pages
    else:
        pages = max(1, min(DEFAULT_WORKING_SET_BYTES // PAGE_BYTES, all_pages // 4))
    entries = _entries_wanted(kind, pages, low_bytes)
    counter_gpa = _align(SCHEDULE_GPA + entries * ENTRY_BYTES)
    pool_gpa = counter_gpa + (_align(4 * pages) if kind == "silent" else 0)
    pool_nbytes = pool_bytes(low_bytes) if kind == "rewrite" else 0
    data_gpa = pool_gpa + (pool_nbytes + POOL_TAIL_BYTES if pool_nbytes else 0)
    room = (low_bytes - data_gpa) // PAGE_BYTES
    if kind == "always" and not workload.working_set_bytes:
        pages = min(pages, room)
        entries = min(entries, pages)
    if pages > room:
        raise UsageError(
            f"working set of {pages * PAGE_BYTES} bytes: this guest has room for"
            f" {max(0, room) * PAGE_BYTES}"
        )

    rng = np.random.default_rng([workload.seed, WORKLOADS.index(kind)])
    first_gpa = data_gpa + int(rng.integers(0, room - pages + 1)) * PAGE_BYTES
    store_dwords = _STORE_DWORDS.get(kind, STORE_DWORDS)
    offset_max = PAGE_BYTES - 4 * store_dwords
    offset_min = min(STORE_OFFSET_MIN, offset_max)
    offsets = rng.integers(
        offset_min // 4, offset_max // 4 + 1, pages, dtype=np.uint32
    ) * np.uint32(4)
    order = _page_order(kind, pages, entries, rng)
    schedule = np.zeros((entries, 4), dtype=np.uint32)
    page_gpas = np.uint32(first_gpa) + order * np.uint32(PAGE_BYTES)
    schedule[:, 0] = page_gpas + offsets[order]
    schedule[:, 1] = rng.integers(0, 1 << 32, entries, dtype=np.uint32)
    if pool_nbytes:
        base = schedule[0, 1] & np.uint32(0xFFFFFFFC)
        schedule[:, 1] = base + window_offsets(order, pool_nbytes)
    schedule[:, 2] = (
        np.uint32(counter_gpa) + order * np.uint32(4) if kind == "silent" else page_gpas
    )
    writes_per_beat, paces = _beats(workload)
    return Program(
        workload=workload,
        schedule=schedule,
        control=Control(
            index=0,
            entries=entries,
            schedule_gpa=SCHEDULE_GPA,
            loops=0,
            beats=0,
            writes_per_beat=writes_per_beat,
            countdown=writes_per_beat,
            store_dwords=store_dwords,
            value_mask=0 if kind == "silent" else 0xFFFFFFFF,
            pool_gpa=pool_gpa if pool_nbytes else 0,
            pool_mask=pool_nbytes - 4 if pool_nbytes else 0,
            pool_step=pool_step(pool_nbytes) if pool_nbytes else 0,
        ),
        paces=paces,
        data_gpa=data_gpa,
        working_set_gpa=first_gpa,
        working_set_pages=pages,
    )


def pool_key(schedule: U32) -> int:
    """What the pool's content follows from: the seeded value of the first entry."""
    return int(schedule[0, 1])


def install(program: Program, memory: U8) -> None:
    """Write the program into guest memory (gpa 0 first), after its content: control block,
    schedule, pool, and for silent the bytes that will be stored again and again. Counters must be
    zero already: fresh memory is, and ``content.fill`` leaves out the pages of
    ``counter_pages()``. Touching each of them here would fault in the whole working set."""
    program.control.write(memory)
    schedule_bytes = program.schedule.astype("<u4", copy=False).view(np.uint8).reshape(-1)
    start = program.control.schedule_gpa
    memory[start : start + len(schedule_bytes)] = schedule_bytes
    pool_gpa = program.control.pool_gpa
    if pool_gpa:
        content = pool_content(pool_key(program.schedule), program.control.pool_mask + 4)
        memory[pool_gpa : pool_gpa + len(content)] = content
    if program.control.value_mask != 0:
        return
    dwords = memory.view("<u4")
    within = np.arange(program.control.store_dwords, dtype=np.uint32)
    for at in range(0, len(program.schedule), BATCH_ENTRIES):
        batch = program.schedule[at : at + BATCH_ENTRIES]
        dwords[(batch[:, 0] // 4)[:, None] + within] = batch[:, 1, None]
