# SPDX-License-Identifier: Apache-2.0
"""What the vCPUs after the first leave in memory, and what is found when it is damaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from vmth.guests.bystander import beats_in_memory, check_bystanders, install
from vmth.guests.machine import CODE_GPA, CONTROL_GPA, VCPUS_MAX
from vmth.guests.schedule import Control

U8 = npt.NDArray[np.uint8]
BYTES = 0x4000
STEPS = 8


def memory_after(steps: list[int]) -> U8:
    """Of a guest whose vCPUs after the first have made so many steps each."""
    memory = np.zeros(BYTES, dtype=np.uint8)
    install(memory, len(steps) + 1)
    for vcpu, done in enumerate(steps, 1):
        beats, since = divmod(done, STEPS)
        control = Control.read(memory, vcpu)
        replace(control, loops=done, beats=beats, countdown=STEPS - since).write(memory, vcpu)
        counter(memory, vcpu)[0] = done
    return memory


def counter(memory: U8, vcpu: int) -> npt.NDArray[np.uint32]:
    """Where the entry in memory says, seen from the vCPU's lane."""
    control = Control.read(memory, vcpu)
    lane = memory[0x40 * vcpu :]
    entry = lane[control.schedule_gpa :][:16].view("<u4")
    return lane[int(entry[2]) :][:4].view("<u4")


def test_programs_lie_in_the_control_page_and_do_not_overlap() -> None:
    memory = np.zeros(BYTES, dtype=np.uint8)
    install(memory, VCPUS_MAX)
    outside = memory.copy()
    outside[CONTROL_GPA:CODE_GPA] = 0
    assert not outside.any()
    assert not memory[CONTROL_GPA:][:64].any()  # the first vCPU's
    places = {int(counter(memory, vcpu).ctypes.data) for vcpu in range(1, VCPUS_MAX)}
    places |= {
        int(memory[Control.read(memory, vcpu).schedule_gpa + 0x40 * vcpu :].ctypes.data)
        for vcpu in range(1, VCPUS_MAX)
    }
    assert len(places) == 2 * (VCPUS_MAX - 1)
    for vcpu in range(1, VCPUS_MAX):
        counter(memory, vcpu)[0] = vcpu
    assert [int(counter(memory, vcpu)[0]) for vcpu in range(1, VCPUS_MAX)] == [*range(1, VCPUS_MAX)]


def test_one_vcpu_has_none() -> None:
    memory = np.zeros(BYTES, dtype=np.uint8)
    install(memory, 1)
    assert not memory.any()
    found = check_bystanders(memory, 1)
    assert found.beats == () and not found.problems and found.steps == 0


def test_steps_are_checked_and_counted() -> None:
    memory = memory_after([800, 16])
    found = check_bystanders(memory, 3)
    assert found.problems == () and found.beats == beats_in_memory(memory, 3) == (100, 2)
    assert (found.steps, found.lost, found.repeated) == (816, 0, 0)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda memory: counter(memory, 2).__setitem__(0, 15), "vCPU 2: 1 steps lost"),
        (lambda memory: counter(memory, 1).__setitem__(0, 803), "vCPU 1: 3 steps too many"),
        (
            lambda memory: replace(Control.read(memory, 1), beats=99).write(memory, 1),
            "vCPU 1: 99 beats do not agree with 800 steps",
        ),
        (
            lambda memory: replace(Control.read(memory, 2), entries=2).write(memory, 2),
            "vCPU 2: its control block is damaged: entries is 2",
        ),
    ],
)
def test_damage_is_found(damage: Callable[[U8], None], problem: str) -> None:
    memory = memory_after([800, 16])
    damage(memory)
    assert problem in check_bystanders(memory, 3).problems


def test_counts_go_round() -> None:
    memory = memory_after([2**32 - 8])
    counter(memory, 1)[0] = 3
    found = check_bystanders(memory, 2)
    assert (found.lost, found.repeated) == (0, 11)
