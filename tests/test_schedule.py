# SPDX-License-Identifier: Apache-2.0
"""Schedules: layout, bounds, distributions, pacing, and the check of a guest's own counters."""

from __future__ import annotations

import numpy as np
import pytest
from walker_replay import replay

from vmth.errors import UsageError
from vmth.guests.check import check, expected_counters
from vmth.guests.machine import SCHEDULE_GPA, Pace
from vmth.guests.memory import PAGE_BYTES
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
    assert offsets.min() >= 64
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


@pytest.mark.parametrize("field", range(9))
def test_check_survives_any_control_block(field: int) -> None:
    memory = installed(small("uniform"))
    for value in (0, 1, 0x7FFFFFFF, 0xFFFFFFFF):
        fields = list(memory[0x1000:0x1024].view("<u4"))
        fields[field] = value
        hostile = memory.copy()
        hostile[0x1000:0x1024].view("<u4")[:] = fields
        check(hostile)


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
