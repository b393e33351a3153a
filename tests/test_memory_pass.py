# SPDX-License-Identifier: Apache-2.0
"""What a pass over memory looks at: a paused guest waits for every step of the last one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest

from vmth.memory_pass import CHUNK_BYTES, SPAN_BYTES, MemoryPass
from vmth.types import Bitmap, bitmap_words

PAGE = 4096
SPAN, CHUNK = SPAN_BYTES // PAGE, CHUNK_BYTES // PAGE
TAIL = 100  #: pages behind the last whole span


@dataclass
class Block:
    npages: int


@dataclass
class Rearmed:
    """A dirty source that is told what is read."""

    ranges: list[tuple[int, int, int]] = field(default_factory=list)

    def rearm(self, block: int, first: int, n: int) -> None:
        self.ranges.append((block, first, n))


@dataclass
class FakeGuest:
    blocks: list[Block]
    dirty: list[Rearmed]


@dataclass
class FakeSender:
    ranges: list[tuple[int, int, int]] = field(default_factory=list)

    def send(self, block: int, first: int, n: int, todo: Bitmap, number: int) -> None:
        assert number == 1
        self.ranges.append((block, first, n))


@pytest.mark.parametrize(
    ("page", "looked"),
    [
        (0, SPAN // CHUNK),
        (SPAN - 1, SPAN // CHUNK),
        (SPAN, SPAN // CHUNK),
        (5 * SPAN + 7 * CHUNK + 3, SPAN // CHUNK),
        (8 * SPAN, 1),
        (8 * SPAN + TAIL - 1, 1),
    ],
)
def test_spans_without_a_dirty_page_cost_one_look(page: int, looked: int) -> None:
    source, sender = Rearmed(), FakeSender()
    npages = [8 * SPAN + TAIL, 3 * SPAN]
    guest = FakeGuest([Block(n) for n in npages], [source])
    checks: list[None] = []
    memory_pass = MemoryPass(
        cast(Any, guest), cast(Any, sender), PAGE, lambda: checks.append(None), rearm=True
    )
    todo = [np.zeros(bitmap_words(n), dtype=np.uint64) for n in npages]
    memory_pass.send(todo, 1)
    assert not checks and not sender.ranges and not source.ranges
    todo[0][page // 64] = np.uint64(1 << page % 64)
    memory_pass.send(todo, 1)
    assert len(checks) == looked
    (sent,) = sender.ranges
    assert source.ranges == [sent]
    block, first, n = sent
    assert block == 0 and first <= page < first + n <= npages[0] and n <= CHUNK
