# SPDX-License-Identifier: Apache-2.0
"""A micro-VM of several vCPUs on the real /dev/kvm: all of them stop, move and are told apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from kvm_walker import BEAT_TIMEOUT_NS, UNPACED, data_words, make_memory, replay
from waiting import wait_until

from vmth._native import _kvm
from vmth.errors import GuestError, StreamError, UsageError
from vmth.guests import bystander
from vmth.guests.kvm_machine import DIRTY_SOURCES, KvmMachine, probe
from vmth.guests.kvm_state import decode_states
from vmth.guests.machine import LANE_BYTES, VCPUS_MAX
from vmth.guests.memory import GuestMemory
from vmth.types import new_bitmaps

RUNS_KVM, REASON = probe()
pytestmark = pytest.mark.skipif(not RUNS_KVM, reason=f"no KVM guest here: {REASON}")

VCPUS = 3


@contextmanager
def machine(
    memory: GuestMemory, dirty: str = "kvm-log", vcpus: int = VCPUS
) -> Iterator[KvmMachine]:
    made = KvmMachine(memory, dirty=dirty, vcpus=vcpus)
    try:
        yield made
    finally:
        made.close()


def fresh_memory(seed: int, vcpus: int = VCPUS) -> GuestMemory:
    memory = make_memory(seed)
    bystander.install(memory.views[0], vcpus)
    return memory


def registers_of(kvm: KvmMachine) -> list[bytes]:
    """Not the time stamp counter's, which runs on."""
    return [state["regs"] for state in decode_states(*kvm.save_state(), VCPUS)]


def wait_beats(kvm: KvmMachine, more: int) -> None:
    wanted = kvm.beat_report().other_beats[0] + more
    wait_until(lambda: kvm.beat_report().other_beats[0] >= wanted)


def check_standing(kvm: KvmMachine, memory: GuestMemory) -> None:
    """All stand at a heartbeat: memory has exactly what each has told."""
    found, report = bystander.check_bystanders(memory.views[0], VCPUS), kvm.beat_report()
    assert not found.problems and found.beats == report.other_beats
    assert report.out_of_order == 0


def test_python_and_c_agree_on_the_lanes() -> None:
    assert (_kvm.MAX_VCPUS, _kvm.LANE_BYTES) == (VCPUS_MAX, LANE_BYTES)


@pytest.mark.parametrize("dirty", DIRTY_SOURCES)
def test_every_vcpu_walks_and_stands_at_its_beat(dirty: str) -> None:
    memory = fresh_memory(1)
    initial = memory.views[0].copy()
    with machine(memory, dirty) as kvm:
        assert kvm.vcpus == VCPUS
        kvm.start_fresh(UNPACED)
        for _ in range(5):
            wait_until(lambda: min(kvm.beat_report().other_beats) >= 3)
            assert kvm.pause_at_beat(BEAT_TIMEOUT_NS)
            check_standing(kvm, memory)
            assert np.array_equal(data_words(memory), replay(initial, memory))
            kvm.resume()


def test_a_pause_stops_all_of_them() -> None:
    memory = fresh_memory(2)
    with machine(fresh_memory(2)) as clock, machine(memory) as kvm:
        clock.start_fresh(UNPACED)
        kvm.start_fresh(UNPACED)
        wait_until(lambda: min(kvm.beat_report().other_beats) >= 1)
        for _ in range(5):
            assert kvm.pause() and not kvm.pause()
            before = memory.views[0].copy()
            beats = kvm.beat_report()
            registers = registers_of(kvm)
            wait_beats(clock, 5)
            assert np.array_equal(before, memory.views[0])
            assert kvm.beat_report() == beats and registers_of(kvm) == registers
            kvm.resume()


def test_all_go_on_where_they_were_in_another_machine() -> None:
    memory = fresh_memory(3)
    initial = memory.views[0].copy()
    with machine(memory) as kvm:
        kvm.start_fresh(UNPACED)
        wait_until(lambda: min(kvm.beat_report().other_beats) >= 2)
        assert kvm.pause()
        version, data = kvm.save_state()
        before = kvm.beat_report()
    arrived = fresh_memory(3)
    arrived.views[0][:] = memory.views[0]
    with machine(arrived) as kvm:
        kvm.load_state(version, data)
        kvm.resume()
        wait_until(lambda: min(kvm.beat_report().other_beats) >= max(before.other_beats) + 3)
        assert kvm.pause_at_beat(BEAT_TIMEOUT_NS)
        check_standing(kvm, arrived)
        assert np.array_equal(data_words(arrived), replay(initial, arrived))


def test_a_state_of_another_number_of_vcpus_is_refused() -> None:
    memory = fresh_memory(4)
    with machine(memory, vcpus=2) as kvm:
        kvm.start_fresh(UNPACED)
        kvm.pause()
        version, data = kvm.save_state()
    for vcpus in (1, 3):
        with machine(memory, vcpus=vcpus) as kvm:
            with pytest.raises(StreamError, match=f"of 2 vCPUs received, {vcpus} allowed"):
                kvm.load_state(version, data)


def test_the_ring_tells_who_dirtied_and_the_log_does_not() -> None:
    memory = fresh_memory(5)
    with machine(memory, "kvm-ring") as kvm:
        source = kvm.dirty_source("kvm-ring")
        source.start()
        kvm.start_fresh(UNPACED)
        wait_until(lambda: min(kvm.beat_report().other_beats) >= 20)
        kvm.pause()
        bitmaps = new_bitmaps(memory.blocks)
        source.fetch(bitmaps)
        pages = kvm.vcpu_dirty_pages()
        assert len(pages) == VCPUS
        # Each dirties the control page; whoever wrote there first has it.
        assert pages[0] > 100 and sum(pages[1:]) <= 1
        assert sum(pages) == sum(int(word).bit_count() for word in bitmaps[0])
        assert list(kvm.vcpu_dirty_pages()) == list(pages)  # they stand still
        source.stop()
    with machine(memory, "kvm-log") as kvm:
        assert list(kvm.vcpu_dirty_pages()) == []


def test_one_vcpu_is_slowed_down_and_the_others_are_not() -> None:
    """By the same clock: while the first gets through one beat, the others beat on."""
    memory = fresh_memory(6)
    initial = memory.views[0].copy()
    with machine(memory) as kvm:
        kvm.throttle_vcpus([99, 0, 0])
        kvm.start_fresh(UNPACED)
        wait_until(lambda: min(kvm.beat_report().other_beats) >= 300)
        held = kvm.beat_report()
        kvm.throttle(0)
        wait_until(lambda: min(kvm.beat_report().other_beats) >= 600)
        free = kvm.beat_report()
        assert free.beats - held.beats > 4 * held.beats
        assert kvm.pause_at_beat(BEAT_TIMEOUT_NS)
        check_standing(kvm, memory)
        assert np.array_equal(data_words(memory), replay(initial, memory))


@pytest.mark.parametrize(
    ("percents", "error"),
    [
        ([50], "throttle of 1 vCPUs: this guest has 3"),
        ([0, 0, 0, 0], "throttle of 4 vCPUs: this guest has 3"),
        ([0, 0, 100], "100 percent: 0 to 99 allowed"),
        ([-1, 0, 0], "-1 percent: 0 to 99 allowed"),
    ],
)
def test_shares_have_bounds(percents: list[int], error: str) -> None:
    with machine(fresh_memory(7)) as kvm:
        with pytest.raises(UsageError, match=error):
            kvm.throttle_vcpus(percents)


@pytest.mark.parametrize("vcpus", [0, 9, -1])
def test_the_number_of_vcpus_has_bounds(vcpus: int) -> None:
    with pytest.raises(UsageError, match=f"{vcpus} vCPUs: 1 to 8 allowed"):
        KvmMachine(fresh_memory(8), vcpus=vcpus)


def test_a_crash_of_one_is_the_guests_and_says_which() -> None:
    memory = fresh_memory(9)
    memory.views[0][0x1400 + 16 * 2 :][:16].view("<u4")[2] = 0xFFFF0000
    with machine(memory) as kvm:
        kvm.start_fresh(UNPACED)
        with pytest.raises(GuestError, match="the vCPU crashed: vCPU 2: access outside of memory"):
            wait_until(lambda: kvm.beat_report().beats < 0)
        with pytest.raises(GuestError, match="vCPU 2"):
            kvm.pause()
