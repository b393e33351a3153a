# SPDX-License-Identifier: Apache-2.0
"""userfaultfd WP_ASYNC as a dirty source: the conformance suite, its limits, and its refusals."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from collections.abc import Mapping as MappingOf
from dataclasses import replace

import numpy as np
import pytest
from dirty_conformance import DirtyHarness, DirtySourceConformance, pages_of

from vmth.dirty.probe import Finding, Status, probe
from vmth.dirty.uffd import UffdWpSource
from vmth.errors import RefusedError, UsageError
from vmth.memory import Memory, address_of, map_blocks
from vmth.types import BlockFlags, Mapping, RamBlock, new_bitmaps

pytestmark = pytest.mark.skipif(
    probe()["uffd-wp"].status is not Status.OK, reason=f"uffd-wp: {probe()['uffd-wp'].reason}"
)

HUGE_BYTES = 2 << 20


class MemoryHarness:
    """Real memory; a write adds one to a byte whose place in the page changes with every write."""

    def __init__(self, blocks: Sequence[RamBlock], views: Sequence[Memory]) -> None:
        self.blocks = blocks
        self.source = UffdWpSource(blocks, [address_of(view) for view in views])
        self._pages = [view.reshape(-1, mmap.PAGESIZE) for view in views]
        self._writes = 0

    def write(self, block: int, page: int) -> None:
        self._writes += 1
        self._pages[block][page, self._writes * 61 % mmap.PAGESIZE] += 1

    def settle(self) -> None:
        pass

    def read(self, block: int, page: int) -> bytes:
        return bytes(self._pages[block][page])


def anonymous(npages: int, flags: int = mmap.MAP_PRIVATE, advice: int | None = None) -> Memory:
    """Anonymous memory that begins at a huge-page boundary; it lives as long as the view."""
    mapped = mmap.mmap(-1, npages * mmap.PAGESIZE + HUGE_BYTES, flags | mmap.MAP_ANONYMOUS)
    if advice is not None:
        mapped.madvise(advice)
    view: Memory = np.frombuffer(mapped, dtype=np.uint8)
    start = -address_of(view) % HUGE_BYTES
    return view[start : start + npages * mmap.PAGESIZE]


def block_of(view: Memory, idstr: str = "ram", flags: BlockFlags = BlockFlags.NONE) -> RamBlock:
    return RamBlock(idstr, view.nbytes, 0, Mapping(address=address_of(view)), flags=flags)


def anonymous_harness(sizes: Sequence[int], flags: int, advice: int | None) -> MemoryHarness:
    views = [anonymous(npages, flags, advice) for npages in sizes]
    blocks = [block_of(view, f"ram{index}") for index, view in enumerate(views)]
    return MemoryHarness(blocks, views)


class TestAnonymous(DirtySourceConformance):
    @pytest.fixture
    def harness(self) -> Iterator[DirtyHarness]:
        harness = anonymous_harness((130, 64, 7), mmap.MAP_PRIVATE, mmap.MADV_NOHUGEPAGE)
        yield harness
        harness.source.stop()


class TestSharedAnonymous(DirtySourceConformance):
    @pytest.fixture
    def harness(self) -> Iterator[DirtyHarness]:
        harness = anonymous_harness((130, 64, 7), mmap.MAP_SHARED, None)
        yield harness
        harness.source.stop()


class TestHugePages(DirtySourceConformance):
    """Transparent huge pages, populated as such: the first write to an armed one splits it."""

    @pytest.fixture
    def harness(self) -> Iterator[DirtyHarness]:
        harness = anonymous_harness((512 + 70, 66), mmap.MAP_PRIVATE, mmap.MADV_HUGEPAGE)
        for block in range(2):
            harness.write(block, 0)
        yield harness
        harness.source.stop()


class TestMemfd(DirtySourceConformance):
    """One file, its blocks at offsets."""

    @pytest.fixture
    def harness(self) -> Iterator[DirtyHarness]:
        sizes = (130, 64, 7)
        fd = os.memfd_create("vmth-test", os.MFD_CLOEXEC)
        os.ftruncate(fd, sum(sizes) * mmap.PAGESIZE)
        blocks = [
            RamBlock(
                f"ram{index}",
                npages * mmap.PAGESIZE,
                0,
                Mapping(fd=fd, offset=sum(sizes[:index]) * mmap.PAGESIZE),
            )
            for index, npages in enumerate(sizes)
        ]
        with map_blocks(blocks, writable=True) as mapped:
            harness = MemoryHarness(blocks, [item.view for item in mapped])
            yield harness
            harness.source.stop()
        os.close(fd)


def fetch(source: UffdWpSource, blocks: Sequence[RamBlock]) -> set[int]:
    bitmaps = new_bitmaps(blocks)
    source.fetch(bitmaps)
    return {page for _, page in pages_of(bitmaps)}


def test_a_system_calls_write_is_reported() -> None:
    view = anonymous(70)
    blocks = [block_of(view)]
    source = UffdWpSource(blocks)
    source.start()
    with open("/dev/zero", "rb", buffering=0) as zeros:
        zeros.readinto(view[65 * 4096 : 65 * 4096 + 3].data)
    assert fetch(source, blocks) == {65}
    source.stop()


@pytest.mark.parametrize("step", [2, 3, 64])
def test_more_regions_than_one_answer_holds(step: int) -> None:
    """The kernel stops, and says where, when its answer is full: what it armed must be reported."""
    view = anonymous(32768, advice=mmap.MADV_NOHUGEPAGE)
    blocks = [block_of(view)]
    source = UffdWpSource(blocks)
    source.start()
    view[:: step * 4096] = 1
    assert fetch(source, blocks) == set(range(0, 32768, step))
    assert fetch(source, blocks) == set()
    source.stop()


@pytest.mark.parametrize("advice", [mmap.MADV_HUGEPAGE, mmap.MADV_NOHUGEPAGE])
def test_discarded_anonymous_memory_is_reported(advice: int) -> None:
    """It reads as zeros afterwards, which is a change like any other."""
    mapped = mmap.mmap(-1, 4 * HUGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped.madvise(advice)
    view: Memory = np.frombuffer(mapped, dtype=np.uint8)
    view[:] = 1
    blocks = [block_of(view)]
    source = UffdWpSource(blocks)
    source.start()
    mapped.madvise(mmap.MADV_DONTNEED, HUGE_BYTES, 2 * HUGE_BYTES)
    assert fetch(source, blocks) == set(range(512, 512 * 3))
    source.stop()


def test_populated_is_judged_when_a_page_is_armed() -> None:
    """Armed entries without a page look like swap in the page table; the source is not fooled."""
    view = anonymous(200, advice=mmap.MADV_NOHUGEPAGE)
    view[3 * 4096] = 1
    assert view[5 * 4096] == 0  # reads map the kernel's page of zeros
    blocks = [block_of(view)]
    source = UffdWpSource(blocks)
    source.start()
    view[70 * 4096] = 1
    (out,) = new_bitmaps(blocks)
    source.populated(0, 0, 200, out)
    assert pages_of([out]) == {(0, 3)}
    assert fetch(source, blocks) == {70}
    source.stop()


def test_populated_keeps_to_the_pages_that_were_asked_about() -> None:
    view = anonymous(200, advice=mmap.MADV_NOHUGEPAGE)
    view[:] = 1
    source = UffdWpSource([block_of(view)])
    source.start()
    (out,) = new_bitmaps([block_of(view)])
    source.populated(0, 60, 70, out)
    source.populated(0, 190, 0, out)
    assert pages_of([out]) == {(0, page) for page in range(60, 130)}
    with pytest.raises(UsageError, match=r"pages \[199, 201\) of 200"):
        source.populated(0, 199, 2, out)
    source.stop()


def test_populated_asks_the_file_of_shared_memory() -> None:
    fd = os.memfd_create("vmth-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, 70 * 4096)
    blocks = [RamBlock("ram", 70 * 4096, 0, Mapping(fd=fd))]
    with map_blocks(blocks, writable=True) as mapped:
        source = UffdWpSource(blocks, [mapped[0].address])
        source.start()
        os.pwrite(fd, b"x", 66 * 4096)
        (out,) = new_bitmaps(blocks)
        source.populated(0, 0, 70, out)
        source.stop()
    os.close(fd)
    assert (0, 66) in pages_of([out])


def test_start_leaves_no_descriptor_behind() -> None:
    view = anonymous(8)
    source = UffdWpSource([block_of(view)])
    before = len(os.listdir("/proc/self/fd"))
    source.start()
    assert len(os.listdir("/proc/self/fd")) == before + 2
    source.stop()
    assert len(os.listdir("/proc/self/fd")) == before


def test_two_sources_on_one_memory_are_refused() -> None:
    view = anonymous(8)
    first, second = UffdWpSource([block_of(view)]), UffdWpSource([block_of(view)])
    first.start()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UsageError, match="another userfaultfd"):
        second.start()
    assert len(os.listdir("/proc/self/fd")) == before
    view[0] = 1
    assert fetch(first, [block_of(view)]) == {0}
    first.stop()


def test_calls_before_start_and_a_second_start_are_refused() -> None:
    view = anonymous(8)
    source = UffdWpSource([block_of(view)])
    with pytest.raises(UsageError, match="not started"):
        fetch(source, [block_of(view)])
    source.start()
    with pytest.raises(UsageError, match="started already"):
        source.start()
    source.stop()


def test_memory_that_is_not_mapped_is_refused() -> None:
    below_mmap_min_addr = RamBlock("ram", 4096, 0, Mapping(address=0x1000))
    with pytest.raises(UsageError, match="'ram': 0x1000 is not mapped throughout"):
        UffdWpSource([below_mmap_min_addr]).start()


def test_a_file_block_needs_the_writers_address() -> None:
    block = RamBlock("ram", 4096, 0, Mapping(fd=0))
    with pytest.raises(UsageError, match=r"'ram'.*pass the address"):
        UffdWpSource([block])
    with pytest.raises(UsageError, match="2 addresses for 1 ramblocks"):
        UffdWpSource([block], [4096, 8192])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tracking_page_size": 2 << 20}, "its tracking page has 2097152"),
        ({"backing_page_size": 2 << 20}, "its backing page has 2097152"),
    ],
)
def test_other_page_sizes_are_refused_by_name(change: dict[str, int], message: str) -> None:
    block = RamBlock("ram", 2 << 20, 0, Mapping(address=0x10000))
    with pytest.raises(RefusedError, match=message):
        UffdWpSource([replace(block, **change)])  # type: ignore[arg-type]


def test_an_unaligned_address_is_refused() -> None:
    with pytest.raises(UsageError, match="0x10010"):
        UffdWpSource([RamBlock("ram", 4096, 0, Mapping(address=0x10010))])


def faulty(*names: str) -> MappingOf[str, Finding]:
    findings = {name: Finding(Status.OK) for name in probe()}
    return findings | {name: Finding(Status.FAULTY, f"fault {name}") for name in names}


@pytest.mark.parametrize(
    ("fault", "flags", "advice", "discardable", "refused"),
    [
        ("discard-anon", mmap.MAP_PRIVATE, None, True, True),
        ("discard-anon", mmap.MAP_PRIVATE, None, False, False),
        ("discard-anon-thp", mmap.MAP_PRIVATE, mmap.MADV_HUGEPAGE, False, True),
        ("discard-anon-thp", mmap.MAP_PRIVATE, mmap.MADV_NOHUGEPAGE, False, False),
        ("discard-anon-thp", mmap.MAP_SHARED, None, True, False),
        ("discard-shared", mmap.MAP_SHARED, None, True, True),
        ("discard-shared", mmap.MAP_SHARED, None, False, False),
        ("discard-shared", mmap.MAP_PRIVATE, None, True, False),
        ("kernel-writes", mmap.MAP_PRIVATE, None, False, True),
    ],
)
def test_a_kernel_fault_refuses_the_blocks_that_would_meet_it(
    fault: str, flags: int, advice: int | None, discardable: bool, refused: bool
) -> None:
    view = anonymous(8, flags, advice)
    block = block_of(view, flags=BlockFlags.DISCARDABLE if discardable else BlockFlags.NONE)
    source = UffdWpSource([block], findings=lambda: faulty(fault))
    if refused:
        with pytest.raises(RefusedError, match=f"'ram': fault {fault}"):
            source.start()
    else:
        source.start()
    source.stop()


def test_discards_that_another_source_reports_are_accepted() -> None:
    view = anonymous(8, mmap.MAP_SHARED)
    source = UffdWpSource(
        [block_of(view, flags=BlockFlags.DISCARDABLE)],
        discards_reported=True,
        findings=lambda: faulty("discard-shared"),
    )
    source.start()
    source.stop()
