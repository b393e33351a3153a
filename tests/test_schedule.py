# SPDX-License-Identifier: Apache-2.0
"""Schedules: layout, bounds, distributions, pacing, and the check of a guest's own counters."""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
import pytest
from walker_replay import replay

from vmth.errors import UsageError
from vmth.guests.check import check, expected_counters
from vmth.guests.machine import CONTROL_FIELDS, SCHEDULE_GPA, Pace
from vmth.guests.memory import PAGE_BYTES
from vmth.guests.pool import pool_bytes
from vmth.guests.schedule import (
    ENTRIES_MAX,
    WORKLOADS,
    Control,
    Program,
    Workload,
    install,
    plan,
    rate_reached_bps,
)

MIB = 1 << 20


def small(kind: str) -> Program:
    return plan(Workload(kind, working_set_bytes=64 * PAGE_BYTES, seed=7), 2 * MIB)


def installed(
    program: Program, nbytes: int = 2 * MIB
) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    memory = np.zeros(nbytes, dtype=np.uint8)
    install(program, memory)
    return memory


@pytest.mark.parametrize("kind", WORKLOADS)
def test_schedule_stays_inside_its_pages_and_no_two_entries_overlap_in_part(kind: str) -> None:
    program = small(kind)
    pages = program.schedule[:, 0] // PAGE_BYTES
    offsets = program.schedule[:, 0] % PAGE_BYTES
    first = program.working_set_gpa // PAGE_BYTES
    assert program.data_gpa >= SCHEDULE_GPA + 16 * program.control.entries
    assert pages.min() >= first and pages.max() < first + program.working_set_pages
    assert offsets.min() >= (4 if kind == "rewrite" else 64)
    assert offsets.max() + 4 * program.control.store_dwords <= PAGE_BYTES
    assert not np.any(program.schedule[:, 0] % 4)
    for page in np.unique(pages):
        assert len(np.unique(offsets[pages == page])) == 1
    counters = program.schedule[:, 2]
    if kind == "silent":
        assert counters.max() < program.data_gpa and len(np.unique(counters)) == 64
    else:
        assert np.array_equal(counters, pages * PAGE_BYTES)


@pytest.mark.parametrize("kind", WORKLOADS)
@pytest.mark.parametrize("steps", [0, 1, 63, 64, 1000])
def test_check_accepts_exactly_what_the_replay_wrote(kind: str, steps: int) -> None:
    program = small(kind)
    memory = installed(program)
    registers = replay(memory, steps)
    registers.write(memory)
    found = check(memory)
    assert found.ok, found
    assert (found.writes, found.beats) == (steps, steps // registers.writes_per_beat)

    gpas, expected = expected_counters(registers, program.schedule)
    assert np.array_equal(memory.view("<u4")[gpas // 4], expected)
    assert expected.sum() == steps


def test_a_silent_loop_changes_nothing_but_counters_and_control() -> None:
    program = small("silent")
    memory = installed(program)
    before = memory.copy()
    replay(memory, 200)
    changed = np.unique(np.flatnonzero(memory != before) // PAGE_BYTES) * PAGE_BYTES
    assert set(changed.tolist()) == {0x1000, int(program.schedule[0, 2]) // PAGE_BYTES * PAGE_BYTES}


DAMAGE = [
    # (name, what to do to memory, lost, repeated)
    ("lost", lambda m, p: _add(m, int(p.schedule[0, 2]), -1), 1, 0),
    ("repeated", lambda m, p: _add(m, int(p.schedule[0, 2]), 2), 0, 2),
    ("last store", lambda m, p: _add(m, int(p.schedule[0, 0]) + 4, 1), 0, 0),
]


def _add(memory: np.ndarray[tuple[int], np.dtype[np.uint8]], gpa: int, value: int) -> None:
    dwords = memory.view("<u4")
    dwords[gpa // 4] = (int(dwords[gpa // 4]) + value) % (1 << 32)


@pytest.mark.parametrize(("name", "damage", "lost", "repeated"), DAMAGE)
def test_check_finds(name: str, damage: object, lost: int, repeated: int) -> None:
    program = small("sequential")
    memory = installed(program)
    replay(memory, 150).write(memory)
    assert callable(damage)
    damage(memory, program)
    found = check(memory)
    page = int(program.schedule[0, 0]) // PAGE_BYTES * PAGE_BYTES
    assert not found.ok
    assert (found.lost_writes, found.repeated_writes) == (lost, repeated)
    assert found.wrong_pages == (page,) and found.wrong_pages_total == 1


def test_check_finds_a_beat_that_does_not_agree() -> None:
    memory = installed(small("idle"))
    registers = replay(memory, 10)
    assert check(memory).heartbeats_consistent
    fields = [getattr(registers, name) for name in Control.__slots__]
    fields[4] += 1
    Control(*fields).write(memory)
    found = check(memory)
    assert not found.heartbeats_consistent and "beats" in found.problems[0]


@pytest.mark.parametrize("kind", ["uniform", "rewrite"])
@pytest.mark.parametrize("field", range(len(CONTROL_FIELDS)))
def test_check_survives_any_control_block(kind: str, field: int) -> None:
    memory = installed(small(kind))
    for value in (0, 1, 4, 0x7FFFFFFF, 0xFFFFFFFC, 0xFFFFFFFF):
        fields = list(memory[0x1000:0x1030].view("<u4"))
        fields[field] = value
        hostile = memory.copy()
        hostile[0x1000:0x1030].view("<u4")[:] = fields
        check(hostile)


#: sha256 of schedule and control block, by what planned them before ``rewrite`` was there.
PINNED_PROGRAMS = {
    "idle": "542485c7574d005b",
    "sequential": "990108ccb8139b5c",
    "uniform": "54eb98c2312bf949",
    "zipf": "cff639a6c7d870f4",
    "silent": "56f86550f4488d6a",
    "sparse": "a59e1cf2cae03f2b",
    "always": "d47f386b7d303e17",
}


@pytest.mark.parametrize("kind", sorted(PINNED_PROGRAMS))
def test_programs_of_before_are_what_they_were(kind: str) -> None:
    memory = installed(small(kind))
    planned = memory[0x1000:0x1024].tobytes() + small(kind).schedule.tobytes()
    assert hashlib.sha256(planned).hexdigest()[:16] == PINNED_PROGRAMS[kind]
    assert not memory[0x1024:0x2000].any()


def rewritten(steps: int) -> tuple[np.ndarray[tuple[int], np.dtype[np.uint8]], Program]:
    program = small("rewrite")
    memory = installed(program)
    replay(memory, steps).write(memory)
    return memory, program


def test_a_rewritten_page_is_like_nothing_that_stood_anywhere_before() -> None:
    program = small("rewrite")
    memory = installed(program)
    working_set = slice(
        program.working_set_gpa, program.working_set_gpa + program.working_set_pages * PAGE_BYTES
    )
    seen: set[bytes] = set()
    before = memory[working_set].view("<u4").reshape(-1, 1024).copy()
    for loop in range(8):
        replay(memory, program.control.entries).write(memory)
        pages = memory[working_set].view("<u4").reshape(-1, 1024).copy()
        # delta: at its place hardly a dword of a page is what it was; equal ones are chance.
        assert (pages == before).sum() < 10
        assert len(zlib.compress(pages[:, 1:].tobytes()[: 64 << 10], 9)) > 65_500
        now = {page.tobytes() for page in pages[:, 1:]}
        assert len(now) == program.working_set_pages and not seen & now, f"loop {loop}"
        seen |= now
        before = pages


def test_a_torn_page_and_a_stale_page_are_found() -> None:
    half, _ = rewritten(130)
    older, program = rewritten(66)
    page = program.working_set_gpa
    half[page + 2048 : page + PAGE_BYTES] = older[page + 2048 : page + PAGE_BYTES]
    found = check(half)
    assert found.wrong_pages == (page,) and found.lost_writes == 0
    half[page : page + PAGE_BYTES] = older[page : page + PAGE_BYTES]
    found = check(half)
    assert found.wrong_pages == (page,) and found.lost_writes == 1


def test_a_pool_that_arrived_damaged_is_found_though_the_guest_copies_from_it() -> None:
    memory = installed(program := small("rewrite"))
    at = program.control.pool_gpa + PAGE_BYTES + 8
    memory[at] ^= 1
    replay(memory, 64 * 2).write(memory)
    found = check(memory)
    assert f"1 pages of the pool, from {at - 8:#x} on" in found.problems[-1]


@pytest.mark.parametrize(
    ("low_bytes", "pool"),
    [(MIB, 64 << 10), (64 * MIB, 2 * MIB), (1 << 30, 32 * MIB), (3 << 30, 64 * MIB)],
)
def test_windows_of_different_pages_and_near_loops_are_never_the_same(
    low_bytes: int, pool: int
) -> None:
    program = plan(Workload("rewrite", working_set_bytes=low_bytes // 2, seed=4), low_bytes)
    control = program.control
    assert control.pool_mask + 4 == pool == pool_bytes(low_bytes)
    assert control.pool_gpa + pool + PAGE_BYTES == program.data_gpa
    windows = [
        (program.schedule[:, 1] + np.uint32(loops * control.pool_step % (1 << 32)))
        & np.uint32(control.pool_mask)
        for loops in range(8 if low_bytes <= 64 * MIB else 2)
    ]
    every = np.sort(np.concatenate(windows))
    assert np.diff(every).min() > 0
    assert not np.any(every % 4)


def test_check_survives_a_schedule_that_points_outside() -> None:
    memory = installed(small("uniform"))
    memory[SCHEDULE_GPA : SCHEDULE_GPA + 4] = 0xFF
    assert "points outside" in check(memory).problems[0]


def test_zipf_is_skewed_and_scattered_where_uniform_is_neither() -> None:
    def share_of_hottest_tenth(kind: str) -> float:
        program = plan(Workload(kind, working_set_bytes=4 * MIB, seed=3), 64 * MIB)
        counts = np.sort(np.unique(program.schedule[:, 0], return_counts=True)[1])[::-1]
        return float(counts[:102].sum() / counts.sum())

    assert share_of_hottest_tenth("zipf") > 0.5
    assert share_of_hottest_tenth("uniform") < 0.2


def test_the_same_seed_gives_the_same_schedule_and_another_one_does_not() -> None:
    workload = Workload("zipf", working_set_bytes=MIB, seed=11)
    first, again = plan(workload, 8 * MIB), plan(workload, 8 * MIB)
    other = plan(Workload("zipf", working_set_bytes=MIB, seed=12), 8 * MIB)
    assert np.array_equal(first.schedule, again.schedule)
    assert not np.array_equal(first.schedule, other.schedule)


@pytest.mark.parametrize(
    ("rate", "jump", "writes", "paces"),
    [
        (40_960_000, None, 10, (Pace(0, 1_000_000),)),
        (4096, None, 1, (Pace(0, 1_000_000_000),)),
        (0, None, 256, (Pace(0, 0),)),
        (4_096_000, (5, 409_600_000), 50, (Pace(0, 50_000_000), Pace(5, 500_000))),
        (4_096_000, (5, 0), 1, (Pace(0, 1_000_000), Pace(5, 0))),
    ],
)
def test_pace_gives_the_rate_asked_for(
    rate: int, jump: tuple[int, int] | None, writes: int, paces: tuple[Pace, ...]
) -> None:
    program = plan(Workload("uniform", rate_bps=rate, jump=jump, seed=1), 8 * MIB)
    assert (program.control.writes_per_beat, program.paces) == (writes, paces)
    if rate:
        interval_ns = paces[0].beat_interval_ns
        assert rate_reached_bps(1, writes, interval_ns) == pytest.approx(rate)


def test_always_covers_all_that_the_walker_reaches() -> None:
    program = plan(Workload("always", rate_bps=0), 8 * MIB)
    assert program.working_set_gpa == program.data_gpa
    assert program.data_gpa + program.working_set_pages * PAGE_BYTES == 8 * MIB
    assert len(np.unique(program.schedule[:, 0])) == program.working_set_pages


def test_entries_are_bounded_for_the_largest_guest() -> None:
    program = plan(Workload("sequential", working_set_bytes=2 << 30), 3 << 30)
    assert len(program.schedule) <= ENTRIES_MAX
    assert program.data_gpa <= SCHEDULE_GPA + 16 * ENTRIES_MAX


@pytest.mark.parametrize(
    "make",
    [
        lambda: Workload("busy"),
        lambda: Workload(rate_bps=1),
        lambda: Workload(rate_bps=1 << 41),
        lambda: Workload(working_set_bytes=-1),
        lambda: Workload(seed=-1),
        lambda: Workload(jump=(0, 4096)),
        lambda: Workload(jump=(1, 5)),
        lambda: plan(Workload(working_set_bytes=8 * MIB), 8 * MIB),
        lambda: plan(Workload(), 4096),
        lambda: plan(Workload(), 4 << 30),
    ],
)
def test_bad_values_are_usage_errors(make: object) -> None:
    assert callable(make)
    with pytest.raises(UsageError):
        make()
