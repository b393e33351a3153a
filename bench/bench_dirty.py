# SPDX-License-Identifier: Apache-2.0
"""What a round asks of the kernel: fetching dirty pages and finding populated ones. ns a page.

Memory is written before it is tracked, so that page tables are as a running guest leaves them.
``extra_info`` holds the pages of one call and the nanoseconds a page of the median.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from vmth.dirty.populated import populated_bits
from vmth.dirty.uffd import UffdWpSource
from vmth.memory import Memory, address_of
from vmth.types import Mapping, RamBlock, new_bitmaps

TRACKED_BYTES = 256 << 20
EMPTY_BYTES = 8 << 30
PAGE = mmap.PAGESIZE

MEMORY = {
    "anon": (mmap.MAP_PRIVATE, mmap.MADV_NOHUGEPAGE),
    "thp": (mmap.MAP_PRIVATE, mmap.MADV_HUGEPAGE),
    "shared": (mmap.MAP_SHARED, mmap.MADV_NOHUGEPAGE),
}


def anonymous(nbytes: int, flags: int, advice: int) -> tuple[Memory, RamBlock]:
    mapped = mmap.mmap(-1, nbytes, flags | mmap.MAP_ANONYMOUS)
    mapped.madvise(advice)
    view: Memory = np.frombuffer(mapped, dtype=np.uint8)
    return view, RamBlock("ram", nbytes, 0, Mapping(address=address_of(view)))


def measure(
    benchmark: Any, call: Callable[[], None], npages: int, before: Callable[[], None] | None = None
) -> None:
    benchmark.pedantic(call, setup=before, rounds=10, warmup_rounds=1)
    benchmark.extra_info["npages"] = npages
    benchmark.extra_info["ns_per_page"] = benchmark.stats.stats.median * 1e9 / npages


@pytest.fixture(params=MEMORY)
def tracked(request: pytest.FixtureRequest) -> Iterator[tuple[Memory, RamBlock, UffdWpSource]]:
    view, block = anonymous(TRACKED_BYTES, *MEMORY[request.param])
    view[::PAGE] = 1
    source = UffdWpSource([block])
    yield view, block, source
    source.stop()


@pytest.mark.parametrize("dirty_percent", [0, 1, 12, 100])
def test_fetch(
    benchmark: Any, tracked: tuple[Memory, RamBlock, UffdWpSource], dirty_percent: int
) -> None:
    view, block, source = tracked
    source.start()
    bitmaps = new_bitmaps([block])
    count = block.npages * dirty_percent // 100
    pages = np.random.default_rng(1).permutation(block.npages)[:count]

    def dirty() -> None:
        view[pages * PAGE] += 1

    measure(benchmark, lambda: source.fetch(bitmaps), block.npages, dirty)


def test_start(benchmark: Any, tracked: tuple[Memory, RamBlock, UffdWpSource]) -> None:
    _, block, source = tracked
    measure(benchmark, source.start, block.npages, source.stop)


@pytest.mark.parametrize("kind", ["memfd", "anon"])
@pytest.mark.parametrize("state", ["never-populated", "every-64th-page", "full"])
def test_populated(benchmark: Any, kind: str, state: str) -> None:
    nbytes = EMPTY_BYTES if state == "never-populated" else TRACKED_BYTES
    if kind == "memfd":
        fd = os.memfd_create("vmth-bench", os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes)
        view: Memory = np.frombuffer(mmap.mmap(fd, nbytes), dtype=np.uint8)
        block = RamBlock("ram", nbytes, 0, Mapping(fd=fd))
    else:
        view, block = anonymous(nbytes, *MEMORY["anon"])
    if state != "never-populated":
        view[:: PAGE if state == "full" else PAGE * 64] = 1
    (out,) = new_bitmaps([block])
    measure(benchmark, lambda: populated_bits(block, 0, block.npages, out), block.npages)
    if kind == "memfd":
        os.close(fd)


def test_populated_after_arming(benchmark: Any) -> None:
    """Never-populated memory that uffd-wp tracks, asked of the source."""
    _view, block = anonymous(EMPTY_BYTES, *MEMORY["anon"])
    source = UffdWpSource([block])
    source.start()
    (out,) = new_bitmaps([block])
    measure(benchmark, lambda: source.populated(0, 0, block.npages, out), block.npages)
    source.stop()
