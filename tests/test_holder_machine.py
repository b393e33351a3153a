# SPDX-License-Identifier: Apache-2.0
"""The process guest's machine: the native walker does what its Python twin does, to the byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import wait_until
from walker_replay import replay

from vmth.errors import GuestError, StreamError, UsageError
from vmth.guests.check import check
from vmth.guests.machine import CONTROL_GPA, SCHEDULE_GPA, Pace
from vmth.guests.memory import PAGE_BYTES, GuestMemory, plan_blocks
from vmth.guests.process_machine import (
    STATE_VERSION,
    ProcessMachine,
    decode_state,
    encode_state,
)
from vmth.guests.schedule import WORKLOADS, Control, Program, Workload, install, plan

MIB = 1 << 20
BEAT_TIMEOUT_NS = 20_000_000_000


def small_program(kind: str = "uniform", rate_bps: int = 0) -> Program:
    return plan(Workload(kind, rate_bps, 32 * PAGE_BYTES, seed=5), MIB)


@contextmanager
def machine_of(program: Program | None) -> Iterator[tuple[ProcessMachine, GuestMemory]]:
    memory = GuestMemory(plan_blocks(MIB))
    if program is not None:
        install(program, memory.views[0])
    machine = ProcessMachine(memory)
    try:
        yield machine, memory
    finally:
        machine.close()
        memory.close()


def registers_of(machine: ProcessMachine) -> Control:
    registers, _, _, _ = decode_state(*machine.save_state())
    return Control(*registers)


@pytest.mark.parametrize("kind", WORKLOADS)
def test_walker_does_what_the_replay_does(kind: str) -> None:
    program = small_program(kind, rate_bps=1 << 22)
    with machine_of(program) as (machine, memory):
        twin = memory.views[0].copy()
        machine.start_fresh(program.paces)
        for beats in (1, 2, 3):
            wait_until(lambda beats=beats: machine.beat_report().beats > beats)  # type: ignore[misc]
            machine.pause()
            registers = registers_of(machine)
            steps = registers.writes - Control.read(twin).writes
            if steps > 2_000:  # too many for the twin
                break
            # The control block in memory is of the last beat; the registers are of now.
            expected = replay(twin, steps)
            assert expected == registers
            assert np.array_equal(twin, memory.views[0])
            expected.write(twin)
            registers.write(memory.views[0])
            machine.resume()


def test_counters_are_exact_at_a_beat_after_pauses() -> None:
    with machine_of(small_program(rate_bps=1 << 30)) as (machine, memory):
        machine.start_fresh(small_program(rate_bps=1 << 30).paces)
        for _ in range(20):
            beats = machine.beat_report().beats
            wait_until(lambda beats=beats: machine.beat_report().beats > beats)  # type: ignore[misc]
            assert machine.pause()
            assert not machine.pause()
            machine.resume()
        assert machine.pause_at_beat(BEAT_TIMEOUT_NS)
        found = check(memory.views[0])
        assert found.ok and found.beats > 20, found
        assert registers_of(machine) == Control.read(memory.views[0])
        assert machine.pause_at_beat(0), "it stands there"
        assert machine.beat_report().beats == found.beats
        assert machine.beat_report().out_of_order == 0


def test_a_guest_goes_on_where_it_was_paused_after_a_move_by_plain_copy() -> None:
    program = small_program("sparse")
    with machine_of(program) as (source, memory), machine_of(None) as (destination, arrived):
        source.start_fresh(program.paces)
        wait_until(lambda: source.beat_report().beats > 2)
        assert source.pause()
        arrived.views[0][:] = memory.views[0]
        destination.load_state(*source.save_state())
        assert destination.save_state() == source.save_state()
        before = registers_of(source)
        destination.resume()
        wait_until(lambda: destination.beat_report().beats > before.beats)
        assert destination.pause_at_beat(BEAT_TIMEOUT_NS)
        report, found = destination.beat_report(), check(arrived.views[0])
        assert found.ok and found.writes > before.writes, found
        assert report.out_of_order == 0
        assert report.running_ns >= source.beat_report().running_ns


def test_memory_of_another_beat_than_the_state_is_noticed() -> None:
    program = small_program("sparse")
    with machine_of(program) as (source, memory), machine_of(None) as (destination, arrived):
        source.start_fresh(program.paces)
        assert source.pause_at_beat(BEAT_TIMEOUT_NS)
        arrived.views[0][:] = memory.views[0]
        arrived.views[0][CONTROL_GPA + 16] ^= 1
        version, data = source.save_state()
        # Not at a beat: the next step must not wait for pause_at_beat to see it standing there.
        registers, paces, running_ns, due_ns = decode_state(version, data)
        moved = (*registers[:6], registers[6] - 1, *registers[7:])
        destination.load_state(version, encode_state(moved, paces, running_ns, due_ns))
        destination.resume()
        assert destination.pause_at_beat(BEAT_TIMEOUT_NS)
        assert destination.beat_report().out_of_order == 1


GOLDEN_STATE = bytes.fromhex(
    "010000000200000000000100030000000400000005000000060000000700000008000000"
    "0b0000000c0000000d00000002000000"
    "0900000000000000"
    "0a00000000000000"
    "00000000000000000b00000000000000"
    "0c000000000000000d00000000000000"
)


def test_state_bytes_are_golden() -> None:
    parts = ((1, 2, 0x10000, 3, 4, 5, 6, 7, 8, 11, 12, 13), [(0, 11), (12, 13)], 9, 10)
    assert encode_state(*parts) == GOLDEN_STATE
    assert decode_state(STATE_VERSION, GOLDEN_STATE) == parts


HOSTILE_REGISTERS = [
    # (register, value): each outside its bounds in a guest of 1 MiB
    (0, 1 << 31),
    (1, 0),
    (1, 1 << 31),
    (2, 0xFFFFFFF0),
    (5, 0),
    (6, 0),
    (6, 1 << 31),
    (7, 0),
    (7, 1024),
    (9, 1 << 20),
    (9, MIB - 4096),  # the pool's end
    (10, 1),
    (10, MIB - 4),
]


@pytest.mark.parametrize(("register", "value"), HOSTILE_REGISTERS)
def test_registers_outside_their_bounds_are_refused(register: int, value: int) -> None:
    program = small_program("rewrite")
    with machine_of(program) as (machine, _):
        machine.start_fresh(program.paces)
        machine.pause()
        registers, paces, running_ns, due_ns = decode_state(*machine.save_state())
        bad = (*registers[:register], value, *registers[register + 1 :])
    with machine_of(None) as (machine, _):
        with pytest.raises(StreamError, match="bounds"):
            machine.load_state(STATE_VERSION, encode_state(bad, paces, running_ns, due_ns))
        with pytest.raises(GuestError):
            machine.resume()


@pytest.mark.parametrize(
    ("version", "data"),
    [(1, GOLDEN_STATE), (2, b""), (2, GOLDEN_STATE[:-1]), (2, GOLDEN_STATE + b"\0")],
)
def test_bytes_that_are_no_state_are_refused(version: int, data: bytes) -> None:
    with pytest.raises(StreamError):
        decode_state(version, data)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, len(GOLDEN_STATE) - 1), st.integers(0, 255), st.binary(max_size=100))
def test_any_state_loads_or_is_refused(at: int, byte: int, other: bytes) -> None:
    flipped = GOLDEN_STATE[:at] + bytes([byte]) + GOLDEN_STATE[at + 1 :]
    with machine_of(None) as (machine, _):
        for data in (flipped, other):
            try:
                machine.load_state(1, data)
            except StreamError:
                continue
            machine.save_state()


def test_a_schedule_that_leaves_memory_crashes_the_guest_and_nothing_else() -> None:
    program = small_program()
    with machine_of(program) as (machine, memory):
        memory.views[0][SCHEDULE_GPA : SCHEDULE_GPA + 4] = 0xFF
        machine.start_fresh(program.paces)
        wait_until(lambda: crashed(machine))
        asks: list[Callable[[], object]] = [
            machine.pause,
            machine.resume,
            lambda: machine.pause_at_beat(0),
        ]
        for ask in asks:
            with pytest.raises(GuestError, match="outside"):
                ask()


def crashed(machine: ProcessMachine) -> bool:
    try:
        machine.beat_report()
    except GuestError:
        return True
    return False


def test_nothing_runs_before_it_is_loaded() -> None:
    with machine_of(None) as (machine, memory):
        with pytest.raises(GuestError):
            machine.resume()
        with pytest.raises(GuestError):
            machine.save_state()
        with pytest.raises(GuestError):
            machine.start_fresh([Pace(0, 0)])  # the control block is all zero
        assert not machine.pause() and not machine.pause_at_beat(0)
        assert not memory.views[0].any()


def test_bad_paces_are_refused() -> None:
    program = small_program()
    for paces in ([Pace(1, 0)], [Pace(0, 0), Pace(0, 5)], [Pace(0, 1 << 62)]):
        with machine_of(program) as (machine, _), pytest.raises(GuestError):
            machine.start_fresh(paces)


def test_throttle_takes_time_of_a_guest_and_lets_go() -> None:
    with machine_of(small_program()) as (machine, _):
        machine.throttle(99)
        machine.start_fresh([Pace(0, 0)])
        wait_until(lambda: machine.beat_report().beats > 100)
        machine.throttle(0)
        beats = machine.beat_report().beats
        wait_until(lambda: machine.beat_report().beats > beats)
        for percent in (-1, 100):
            with pytest.raises(UsageError):
                machine.throttle(percent)


def test_an_unknown_dirty_source_is_a_usage_error() -> None:
    with machine_of(None) as (machine, _), pytest.raises(UsageError, match="uffd-wp"):
        machine.dirty_source("kvm-log")
