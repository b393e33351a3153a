# SPDX-License-Identifier: Apache-2.0
"""The micro-VM on the real /dev/kvm: it runs, beats, pauses, moves and fails as it says."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kvm_walker import (
    BEAT_TIMEOUT_NS,
    DATA_GPA,
    MEMORY_BYTES,
    POOL,
    STANDING,
    UNPACED,
    data_words,
    machine,
    make_memory,
    read_control,
    replay,
    write_control,
)

from vmth._native import _kvm
from vmth.errors import GuestError, StreamError, UsageError
from vmth.guests.kvm_machine import DIRTY_SOURCES, KvmMachine, probe
from vmth.guests.kvm_state import decode_state, encode_state
from vmth.guests.machine import Pace
from vmth.guests.memory import GuestMemory, plan_blocks

RUNS_KVM, REASON = probe()
pytestmark = pytest.mark.skipif(not RUNS_KVM, reason=f"no KVM guest here: {REASON}")

WALKS: list[tuple[str, dict[str, int]]] = [
    ("plain", {}),
    ("schedule shorter than a beat", {"entries": 33, "writes_per_beat": 70}),
    ("one entry", {"entries": 1, "writes_per_beat": 3}),
    ("beat every write", {"entries": 7, "writes_per_beat": 1}),
    ("two dwords", {"store_dwords": 2}),
    ("most of a page", {"store_dwords": 900, "entries": 20, "writes_per_beat": 9}),
    ("counters only", {"store_dwords": 0}),
    ("silent", {"value_mask": 0, "entries": 50}),
    ("values alternate", {"value_mask": 1, "entries": 50}),
    ("copies", {**POOL, "store_dwords": 900, "entries": 50}),
    ("copies, beat every write", {**POOL, "store_dwords": 3, "entries": 7, "writes_per_beat": 1}),
    ("the same copies", {**POOL, "pool_step": 0, "store_dwords": 1}),
]


def run_to_beat(kvm: KvmMachine, at_least: int = 1) -> None:
    """Let it run until it stands at a heartbeat from ``at_least`` on."""
    assert kvm.pause_at_beat(BEAT_TIMEOUT_NS)
    while kvm.beat_report().beats < at_least:
        kvm.resume()
        assert kvm.pause_at_beat(BEAT_TIMEOUT_NS)


@pytest.mark.parametrize("control", [row[1] for row in WALKS], ids=[row[0] for row in WALKS])
def test_memory_is_exactly_the_replay_at_a_beat(control: dict[str, int]) -> None:
    memory = make_memory(1, **control)
    initial = memory.views[0].copy()
    with machine(memory) as kvm:
        kvm.start_fresh(UNPACED)
        run_to_beat(kvm, at_least=3)
        report, now = kvm.beat_report(), read_control(memory)
        assert now["beats"] == report.beats >= 3
        assert now["countdown"] == now["writes_per_beat"]
        steps = now["beats"] * now["writes_per_beat"]
        assert (now["loops"], now["index"]) == divmod(steps, now["entries"])
        assert np.array_equal(data_words(memory), replay(initial, memory))


def test_beats_follow_each_other_and_are_dated() -> None:
    with machine(make_memory(2)) as kvm:
        assert kvm.beat_report().beats == 0 and kvm.beat_report().first_beat_at_ns == 0
        kvm.start_fresh(UNPACED)
        run_to_beat(kvm, at_least=5)
        report = kvm.beat_report()
        assert report.out_of_order == 0
        assert 0 < report.first_beat_at_ns < report.last_beat_at_ns
        assert 0 < report.max_gap_ns <= report.last_beat_at_ns - report.first_beat_at_ns


def test_a_beat_out_of_order_is_counted() -> None:
    memory = make_memory(2)
    with machine(memory) as kvm:
        kvm.start_fresh(UNPACED)
        run_to_beat(kvm)
        now = read_control(memory)
        write_control(memory, **{**now, "beats": now["beats"] + 7})
        kvm.resume()
        run_to_beat(kvm, at_least=now["beats"] + 8)
        assert kvm.beat_report().out_of_order == 1


def test_pause_while_waiting_for_a_beat_and_resume_wait_on() -> None:
    with machine(make_memory(3)) as kvm:
        kvm.start_fresh(STANDING)
        assert kvm.pause_at_beat(BEAT_TIMEOUT_NS)
        kvm.resume()
        assert kvm.pause() is True
        assert kvm.pause() is False
        assert kvm.beat_report().beats == 1
        kvm.resume()
        assert kvm.pause_at_beat(BEAT_TIMEOUT_NS)
        assert kvm.beat_report().beats == 1


def test_pause_at_beat_of_a_paused_guest_does_not_run_it() -> None:
    with machine(make_memory(3)) as kvm:
        assert kvm.pause_at_beat(0) is False
        kvm.start_fresh(STANDING)
        assert kvm.pause_at_beat(BEAT_TIMEOUT_NS)
        assert kvm.pause_at_beat(0) is True
        assert kvm.beat_report().beats == 1


def test_pause_at_beat_that_times_out_leaves_it_running() -> None:
    memory = make_memory(3, writes_per_beat=2**32 - 1)
    with machine(memory) as kvm:
        kvm.start_fresh(UNPACED)
        assert kvm.pause_at_beat(0) is False
        assert kvm.pause() is True


def test_running_time_stands_while_paused() -> None:
    with machine(make_memory(3)) as kvm:
        assert kvm.beat_report().running_ns == 0
        kvm.start_fresh(UNPACED)
        run_to_beat(kvm, at_least=2)
        stood = kvm.beat_report().running_ns
        assert stood > 0
        assert kvm.beat_report().running_ns == stood
        kvm.resume()
        run_to_beat(kvm, at_least=4)
        assert kvm.beat_report().running_ns > stood


def without_tsc(version: int, data: bytes) -> _kvm.VcpuState:
    """The time stamp counter goes on counting while the vCPU stands."""
    state = decode_state(version, data)
    state["msrs"] = [(index, value) for index, value in state["msrs"] if index != 0x10]
    return state


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dirty", DIRTY_SOURCES)
def test_a_walk_goes_on_exactly_in_another_machine(dirty: str, seed: int) -> None:
    """Paused anywhere, not only at beats; several moves; each over a copy of memory."""
    dice = random.Random(seed)
    pool = POOL if seed == 2 else {}
    dwords = dice.choice((1, 3))
    memory = make_memory(seed, entries=90, writes_per_beat=40, store_dwords=dwords, **pool)
    initial = memory.views[0].copy()
    kvm = KvmMachine(memory, dirty=dirty)
    try:
        kvm.start_fresh([Pace(0, 0), Pace(10**15, 5)])
        for _ in range(6):
            if dice.random() < 0.3:
                run_to_beat(kvm)
            kvm.pause()
            version, data = kvm.save_state()
            before = kvm.beat_report()
            copy = GuestMemory(plan_blocks(MEMORY_BYTES))
            copy.views[0][:] = memory.views[0]
            kvm.close()
            memory = copy
            kvm = KvmMachine(memory, dirty=dirty)
            kvm.load_state(version, data)
            assert without_tsc(*kvm.save_state()) == without_tsc(version, data)
            after = kvm.beat_report()
            assert (after.beats, after.running_ns) == (before.beats, before.running_ns)
            assert after.first_beat_at_ns == 0
            kvm.resume()
        run_to_beat(kvm, at_least=6)
        assert kvm.beat_report().out_of_order == 0
        assert np.array_equal(data_words(memory), replay(initial, memory))
    finally:
        kvm.close()


def test_saved_state_carries_the_wait_for_the_beat() -> None:
    memory = make_memory(4)
    with machine(memory) as first, machine(memory) as second:
        first.start_fresh(STANDING)
        assert first.pause_at_beat(BEAT_TIMEOUT_NS)
        version, data = first.save_state()
        state = decode_state(version, data)
        assert state["at_beat"] is True and state["paces"] == [(0, 3600 * 10**9)]
        second.load_state(version, data)
        second.resume()
        assert second.pause_at_beat(BEAT_TIMEOUT_NS)
        assert second.beat_report().beats == 1  # stands in the same beat: no beat was repeated


def test_state_is_neither_saved_nor_loaded_while_it_runs() -> None:
    with machine(make_memory(4)) as kvm:
        kvm.start_fresh(UNPACED)
        kvm.pause()
        version, data = kvm.save_state()
        kvm.resume()
        with pytest.raises(GuestError, match="save state failed"):
            kvm.save_state()
        with pytest.raises(StreamError):
            kvm.load_state(version, data)
        with pytest.raises(GuestError, match="start failed"):
            kvm.start_fresh(UNPACED)


def test_registers_that_no_vcpu_can_have_are_refused() -> None:
    with machine(make_memory(4)) as kvm:
        version, data = kvm.save_state()
        state = decode_state(version, data)
        state["mp_state"] = b"\xff\xff\xff\xff"
        with pytest.raises(StreamError, match="does not accept the registers"):
            kvm.load_state(version, encode_state(state))
        state = decode_state(version, data)
        state["msrs"] = [(0xC0000080, 0)]
        with pytest.raises(StreamError, match="does not accept the registers"):
            kvm.load_state(version, encode_state(state))


def test_an_access_outside_of_memory_crashes_by_name() -> None:
    memory = make_memory(5, entries=10)
    memory.views[0][0x10000 : 0x10000 + 160].view(np.uint32)[0::4] = 2 * MEMORY_BYTES
    with machine(memory) as kvm:
        source = kvm.dirty_source("kvm-log")
        source.start()
        kvm.start_fresh(UNPACED)
        with pytest.raises(GuestError, match="the vCPU crashed: access outside of memory"):
            kvm.pause_at_beat(BEAT_TIMEOUT_NS)
        calls: list[Callable[[], object]] = [
            kvm.pause,
            kvm.resume,
            kvm.save_state,
            kvm.beat_report,
            lambda: kvm.throttle(1),
        ]
        for call in calls:
            with pytest.raises(GuestError, match="crashed"):
                call()
        source.stop()


@pytest.mark.parametrize(
    ("control", "reason"),
    [
        ({"pool_gpa": MEMORY_BYTES}, "bad control block at a copy"),
        ({"pool_mask": 0xFFFFFFFC}, "bad control block at a copy"),
        ({"pool_mask": 2}, "bad control block at a copy"),
        ({"schedule_gpa": 0xFFFFFFF0}, "bad control block at a copy"),
        ({"schedule_gpa": DATA_GPA}, "copy outside of memory"),  # its random bytes are a schedule
    ],
)
def test_a_copy_that_would_leave_memory_crashes_the_guest_only(
    control: dict[str, int], reason: str
) -> None:
    with machine(make_memory(5, **{**POOL, **control})) as kvm:
        kvm.start_fresh(UNPACED)
        with pytest.raises(GuestError, match=reason):
            kvm.pause_at_beat(BEAT_TIMEOUT_NS)


def test_a_guest_with_a_pool_is_paused_only_where_its_copies_are_counted() -> None:
    memory = make_memory(6, **POOL, store_dwords=100)
    initial = memory.views[0].copy()
    with machine(memory) as kvm:
        kvm.start_fresh(UNPACED)
        for _ in range(10):
            assert kvm.pause()
            assert np.array_equal(data_words(memory), replay(initial, memory))
            kvm.resume()


@pytest.mark.parametrize("control", [{}, POOL], ids=["plain", "copies"])
def test_throttle_keeps_the_walk_exact(control: dict[str, int]) -> None:
    memory = make_memory(6, **control)
    initial = memory.views[0].copy()
    with machine(memory) as kvm:
        kvm.throttle(99)
        kvm.start_fresh(UNPACED)
        run_to_beat(kvm, at_least=2)
        kvm.resume()
        kvm.throttle(0)
        run_to_beat(kvm, at_least=8)
        assert kvm.beat_report().out_of_order == 0
        assert np.array_equal(data_words(memory), replay(initial, memory))


@pytest.mark.parametrize("percent", [-1, 100])
def test_throttle_has_bounds(percent: int) -> None:
    with machine(make_memory(6)) as kvm:
        with pytest.raises(UsageError, match=f"{percent} percent: 0 to 99 allowed"):
            kvm.throttle(percent)


def test_pace_tables_are_checked() -> None:
    with machine(make_memory(6)) as kvm:
        with pytest.raises(UsageError, match="17 paces given, at most 16 allowed"):
            kvm.start_fresh([Pace(i, 1) for i in range(17)])
        with pytest.raises(UsageError, match="ascending"):
            kvm.start_fresh([Pace(5, 1), Pace(5, 2)])


def test_memory_above_3_gib_is_a_second_block_that_stands_still() -> None:
    memory = GuestMemory(plan_blocks((3 << 30) + (1 << 20)))
    small = make_memory(7)
    memory.views[0][:MEMORY_BYTES] = small.views[0]
    with machine(memory) as kvm:
        assert [block.idstr for block in kvm.blocks] == ["ram-low", "ram-high"]
        kvm.start_fresh(UNPACED)
        run_to_beat(kvm, at_least=2)
        assert not memory.views[1].any()
    memory.close()


def test_unknown_and_unavailable_dirty_sources_are_named() -> None:
    memory = make_memory(8)
    with pytest.raises(UsageError, match="'uffd-wp': kvm-log or kvm-ring allowed"):
        KvmMachine(memory, dirty="uffd-wp")
    with machine(memory, dirty="kvm-log") as kvm:
        with pytest.raises(UsageError, match="'kvm-ring': this guest has 'kvm-log'"):
            kvm.dirty_source("kvm-ring")
        assert kvm.dirty_source("kvm-log") is kvm.dirty_source("kvm-log")
    with machine(memory, dirty="kvm-ring") as kvm:
        with pytest.raises(UsageError, match="'kvm-log': this guest has 'kvm-ring'"):
            kvm.dirty_source("kvm-log")


def test_close_is_idempotent_and_final() -> None:
    kvm = KvmMachine(make_memory(9))
    kvm.start_fresh(UNPACED)
    kvm.close()
    kvm.close()
    with pytest.raises(GuestError, match="closed"):
        kvm.pause()


def vcpu_threads() -> int:
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return names.count("vmth-vcpu")


@pytest.mark.parametrize("dirty", DIRTY_SOURCES)
def test_nothing_is_left_of_a_closed_machine(dirty: str) -> None:
    memory = make_memory(10)
    fds = len(os.listdir("/proc/self/fd"))
    for running in (True, False, True):
        kvm = KvmMachine(memory, dirty=dirty)
        kvm.dirty_source(dirty).start()
        assert vcpu_threads() == 1
        if running:
            kvm.start_fresh(UNPACED)
            kvm.throttle(50)
        kvm.close()
    assert vcpu_threads() == 0
    assert len(os.listdir("/proc/self/fd")) == fds
    maps = Path("/proc/self/maps").read_text()
    assert "kvm-vcpu" not in maps


def test_probe_says_why() -> None:
    assert probe()[1].startswith("KVM runs flat 32-bit code")
