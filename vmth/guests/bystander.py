# SPDX-License-Identifier: Apache-2.0
"""The vCPUs after the first: each counts, beats its own heart, and dirties one page.

They are there to be disturbed: a throttle that slows down the vCPU which dirties memory has no
reason to slow these, and their heartbeats show whether it did. Each runs the walker (machine.py) in
a lane of its own: vCPU k sees memory from 64 k bytes on, so that its control block is the k-th in
the first's page. All that it has lies in that page:

    gpa 0x1000 + 64 k   control block of vCPU k
        0x1400 + 16 k   its schedule: one entry
        0x1600 +  4 k   its counter

One step stores nothing and adds 1 to the counter, which therefore tells all steps ever made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vmth.guests.machine import CONTROL_FIELDS, CONTROL_GPA, LANE_BYTES, Pace
from vmth.guests.schedule import BEAT_NS, Control

__all__ = ["BYSTANDER_PACES", "BystanderCheck", "beats_in_memory", "check_bystanders", "install"]

U8 = npt.NDArray[np.uint8]

_SCHEDULE_GPA = CONTROL_GPA + 0x400
_COUNTER_GPA = CONTROL_GPA + 0x600
#: Where KVM emulates, some 0.3 ms of each millisecond.
_STEPS_PER_BEAT = 8
BYSTANDER_PACES = (Pace(0, BEAT_NS),)
_MOVING_FIELDS = ("loops", "beats", "countdown")


@dataclass(frozen=True, slots=True)
class BystanderCheck:
    """Of all of them. ``problems`` empty: no step of any was lost or made twice."""

    beats: tuple[int, ...]
    steps: int
    lost: int
    repeated: int
    problems: tuple[str, ...]


def _fresh(vcpu: int) -> Control:
    return Control(
        index=0,
        entries=1,
        schedule_gpa=_SCHEDULE_GPA + 16 * vcpu - LANE_BYTES * vcpu,
        loops=0,
        beats=0,
        writes_per_beat=_STEPS_PER_BEAT,
        countdown=_STEPS_PER_BEAT,
        store_dwords=0,
        value_mask=0,
    )


def install(memory: U8, vcpus: int) -> None:
    """The programs of all vCPUs but the first, into guest memory (gpa 0 first)."""
    for vcpu in range(1, vcpus):
        _fresh(vcpu).write(memory, vcpu)
        entry = memory[_SCHEDULE_GPA + 16 * vcpu :][:16].view("<u4")
        counter_gpa = _COUNTER_GPA + 4 * vcpu - LANE_BYTES * vcpu
        entry[:] = [counter_gpa, 0, counter_gpa, 0]
        _counter(memory, vcpu)[:] = 0


def beats_in_memory(memory: U8, vcpus: int) -> tuple[int, ...]:
    """What each of them has counted."""
    return tuple(Control.read(memory, vcpu).beats for vcpu in range(1, vcpus))


def check_bystanders(memory: U8, vcpus: int) -> BystanderCheck:
    """Of a guest whose vCPUs all stand at a heartbeat. Reads only."""
    beats, steps, lost, repeated = [], 0, 0, 0
    problems: list[str] = []
    for vcpu in range(1, vcpus):
        control = Control.read(memory, vcpu)
        beats.append(control.beats)
        steps += control.writes
        moved = {name: getattr(control, name) for name in _MOVING_FIELDS}
        if replace(_fresh(vcpu), **moved) != control:
            problems.append(
                f"vCPU {vcpu}: its control block is damaged: {_differing(vcpu, control)}"
            )
            continue
        done = control.beats * _STEPS_PER_BEAT + _STEPS_PER_BEAT - control.countdown
        if (done - control.writes) % (1 << 32):
            problems.append(
                f"vCPU {vcpu}: {control.beats} beats do not agree with {control.writes} steps"
            )
        missing = (control.writes - int(_counter(memory, vcpu)[0]) + (1 << 31)) % (1 << 32)
        missing -= 1 << 31
        lost, repeated = lost + max(0, missing), repeated + max(0, -missing)
        if missing:
            problems.append(
                f"vCPU {vcpu}: {abs(missing)} steps {'lost' if missing > 0 else 'too many'}"
            )
    return BystanderCheck(tuple(beats), steps, lost, repeated, tuple(problems))


def _counter(memory: U8, vcpu: int) -> npt.NDArray[np.uint32]:
    return memory[_COUNTER_GPA + 4 * vcpu :][:4].view("<u4")


def _differing(vcpu: int, control: Control) -> str:
    fresh = _fresh(vcpu)
    return ", ".join(
        f"{name} is {getattr(control, name)}"
        for name in CONTROL_FIELDS
        if name not in _MOVING_FIELDS and getattr(control, name) != getattr(fresh, name)
    )
