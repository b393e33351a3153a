# SPDX-License-Identifier: Apache-2.0
"""The walker in plain Python: the slow, obvious twin that defines what a step does."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from vmth.guests.schedule import Control


def replay(memory: npt.NDArray[np.uint8], steps: int) -> Control:
    """Take ``steps`` steps over ``memory`` in place, as machine.py describes them; the control
    block in memory is written at beats only. Returns the registers."""
    start = Control.read(memory)
    index, loops, beats, countdown = start.index, start.loops, start.beats, start.countdown
    registers = start
    for _ in range(steps):
        at = start.schedule_gpa + 16 * index
        write_gpa, value, counter_gpa, _ = struct.unpack_from("<4I", memory.data, at)
        stored = (value + (loops & start.value_mask)) % (1 << 32)
        source_gpa = start.pool_gpa + ((value + loops * start.pool_step) & start.pool_mask)
        dwords = struct.Struct(f"<{start.store_dwords}I")
        stores = [stored] * start.store_dwords
        if start.pool_gpa:
            stores = list(dwords.unpack_from(memory.data, source_gpa))
        dwords.pack_into(memory.data, write_gpa, *stores)
        (counter,) = struct.unpack_from("<I", memory.data, counter_gpa)
        struct.pack_into("<I", memory.data, counter_gpa, (counter + 1) % (1 << 32))
        index += 1
        if index == start.entries:
            index, loops = 0, loops + 1
        countdown -= 1
        at_beat = countdown == 0
        if at_beat:
            countdown, beats = start.writes_per_beat, beats + 1
        registers = Control(
            index,
            start.entries,
            start.schedule_gpa,
            loops,
            beats,
            start.writes_per_beat,
            countdown,
            start.store_dwords,
            start.value_mask,
            start.pool_gpa,
            start.pool_mask,
            start.pool_step,
        )
        if at_beat:
            registers.write(memory)
    return registers
