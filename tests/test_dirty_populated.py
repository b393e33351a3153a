# SPDX-License-Identifier: Apache-2.0
"""The never-populated rule on real memory; csrc/tests/test_uffd_populated.c has swapped pages."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from dirty_conformance import pages_of

from vmth._native import _sys
from vmth.dirty.populated import or_bits, populated_bits
from vmth.dirty.probe import Status, probe
from vmth.errors import UsageError
from vmth.memory import Memory, address_of, map_blocks
from vmth.types import Mapping, RamBlock, new_bitmaps

PAGE = mmap.PAGESIZE
NPAGES = 200

knows_holes = pytest.mark.skipif(
    probe()["seek-data"].status is not Status.OK, reason=probe()["seek-data"].reason
)
knows_page_tables = pytest.mark.skipif(
    probe()["pagemap-scan"].status is not Status.OK, reason=probe()["pagemap-scan"].reason
)


def populated(block: RamBlock, page: int = 0, npages: int | None = None) -> set[int]:
    (out,) = new_bitmaps([block])
    populated_bits(block, page, block.npages - page if npages is None else npages, out)
    return {found for _, found in pages_of([out])}


def file_block(fd: int, npages: int = NPAGES, offset: int = 0) -> RamBlock:
    return RamBlock("ram", npages * PAGE, 0, Mapping(fd=fd, offset=offset * PAGE))


def anonymous_block(flags: int = mmap.MAP_PRIVATE) -> tuple[mmap.mmap, Memory, RamBlock]:
    mapped = mmap.mmap(-1, NPAGES * PAGE, flags | mmap.MAP_ANONYMOUS)
    mapped.madvise(mmap.MADV_NOHUGEPAGE)
    view: Memory = np.frombuffer(mapped, dtype=np.uint8)
    return mapped, view, RamBlock("ram", view.nbytes, 0, Mapping(address=address_of(view)))


def resident_kib(address: int) -> int:
    """Rss of the mapping that begins at ``address``."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.startswith(f"{address:x}-"))
    return int(next(line for line in lines if line.startswith("Rss:")).split()[1])


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("vmth-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, NPAGES * PAGE)
    yield fd
    os.close(fd)


@knows_holes
class TestSharedMemory:
    def test_a_new_memfd_has_nothing(self, memfd: int) -> None:
        assert populated(file_block(memfd)) == set()

    def test_a_page_written_with_pwrite_is_populated(self, memfd: int) -> None:
        """It is not present in our page table: the file knows."""
        os.pwrite(memfd, b"x", 70 * PAGE + 5)
        assert populated(file_block(memfd)) == {70}

    def test_a_page_written_through_another_mapping_is_populated(self, memfd: int) -> None:
        block = file_block(memfd)
        with map_blocks([block], writable=True) as writer, map_blocks([block]) as reader:
            writer[0].view[PAGE * 66] = 1
            assert populated(block) == {66}
            assert reader[0].view[PAGE * 66] == 1

    def test_asking_allocates_nothing(self, memfd: int) -> None:
        populated(file_block(memfd))
        assert os.fstat(memfd).st_blocks == 0

    def test_a_punched_hole_is_not_populated_any_more(self, memfd: int) -> None:
        mapped = mmap.mmap(memfd, NPAGES * PAGE)
        mapped[:] = b"x" * len(mapped)
        assert populated(file_block(memfd)) == set(range(NPAGES))
        mapped.madvise(mmap.MADV_REMOVE, 64 * PAGE, 3 * PAGE)
        assert populated(file_block(memfd)) == set(range(NPAGES)) - {64, 65, 66}
        mapped[65 * PAGE] = 1
        assert populated(file_block(memfd)) == set(range(NPAGES)) - {64, 66}

    def test_reused_memory_is_populated_although_it_was_zeroed(self, memfd: int) -> None:
        os.pwrite(memfd, b"x" * PAGE, 3 * PAGE)
        os.pwrite(memfd, bytes(PAGE), 3 * PAGE)
        assert populated(file_block(memfd)) == {3}

    def test_the_blocks_offset_in_the_file_counts(self, memfd: int) -> None:
        for page in (9, 10, 75, 100):
            os.pwrite(memfd, b"x", page * PAGE)
        assert populated(file_block(memfd, npages=90, offset=10)) == {0, 65}

    def test_only_the_pages_asked_about_are_marked(self, memfd: int) -> None:
        for page in range(NPAGES):
            os.pwrite(memfd, b"x", page * PAGE)
        assert populated(file_block(memfd), 63, 67) == set(range(63, 130))
        assert populated(file_block(memfd), NPAGES, 0) == set()

    def test_bits_that_were_set_stay_set(self, memfd: int) -> None:
        (out,) = new_bitmaps([file_block(memfd)])
        out[1] = 1
        populated_bits(file_block(memfd), 0, NPAGES, out)
        assert pages_of([out]) == {(0, 64)}

    @pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no tmpfs at /dev/shm")
    def test_a_file_on_tmpfs_is_shared_memory(self) -> None:
        fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
        os.ftruncate(fd, NPAGES * PAGE)
        os.pwrite(fd, b"x", 199 * PAGE)
        assert populated(file_block(fd)) == {199}
        os.close(fd)


@knows_page_tables
class TestPrivateAnonymousMemory:
    def test_written_pages_are_populated(self) -> None:
        _, view, block = anonymous_block()
        view[[0, 63 * PAGE, 64 * PAGE, 199 * PAGE]] = 1
        assert populated(block) == {0, 63, 64, 199}
        assert populated(block, 64, 10) == {64}

    def test_a_page_that_was_only_read_is_not_populated(self) -> None:
        _, view, block = anonymous_block()
        assert not view.any()
        assert populated(block) == set()
        view[5 * PAGE] = 1
        assert populated(block) == {5}

    def test_asking_populates_nothing(self) -> None:
        _, view, block = anonymous_block()
        assert populated(block) == set()
        assert resident_kib(address_of(view)) == 0

    def test_discarded_and_reused_memory(self) -> None:
        mapped, view, block = anonymous_block()
        view[:] = 1
        mapped.madvise(mmap.MADV_DONTNEED, 64 * PAGE, 8 * PAGE)
        assert populated(block) == set(range(NPAGES)) - set(range(64, 72))
        view[70 * PAGE] = 0
        assert populated(block) == set(range(NPAGES)) - set(range(64, 72)) | {70}


class TestOtherMappingsAreAlwaysPopulated:
    def test_a_file_on_a_disk(self, tmp_path: Path) -> None:
        fd = os.open(tmp_path / "ram", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        os.ftruncate(fd, NPAGES * PAGE)
        on_tmpfs = _sys.populated_file_is_exact(fd)
        pages = populated(file_block(fd))
        os.close(fd)
        if on_tmpfs:
            pytest.skip("the temporary directory is on tmpfs")
        assert pages == set(range(NPAGES))

    def test_shared_memory_known_by_its_address_alone(self) -> None:
        mapped, _, block = anonymous_block(mmap.MAP_SHARED)
        assert populated(block, 60, 70) == set(range(60, 130))
        assert len(mapped) == block.used_length

    def test_a_private_mapping_of_a_file(self, memfd: int) -> None:
        mapped = mmap.mmap(memfd, NPAGES * PAGE, mmap.MAP_PRIVATE)
        view: Memory = np.frombuffer(mapped, dtype=np.uint8)
        block = RamBlock("ram", view.nbytes, 0, Mapping(address=address_of(view)))
        assert populated(block) == set(range(NPAGES))

    def test_huge_tracking_pages(self, memfd: int) -> None:
        block = RamBlock("ram", 128 * PAGE, 0, Mapping(fd=memfd), tracking_page_size=2 * PAGE)
        assert populated(block) == set(range(64))


def test_memory_that_is_not_mapped_is_refused() -> None:
    with pytest.raises(UsageError, match="0x1000 is not mapped throughout"):
        populated(RamBlock("ram", PAGE, 0, Mapping(address=0x1000)))


@pytest.mark.parametrize(("page", "npages"), [(0, 201), (200, 1), (-1, 1), (5, -1)])
def test_pages_outside_of_the_block_are_refused(memfd: int, page: int, npages: int) -> None:
    with pytest.raises(UsageError, match=f"{page}, .* of 200"):
        populated(file_block(memfd), page, npages)


def test_a_bitmap_that_is_too_short_is_refused(memfd: int) -> None:
    with pytest.raises(UsageError, match="200 pages, a bitmap of 192 bits"):
        populated_bits(file_block(memfd), 0, 1, np.zeros(3, dtype=np.uint64))


@pytest.mark.parametrize("page", [0, 1, 63, 64, 100])
@pytest.mark.parametrize("npages", [0, 1, 63, 64, 65, 92])
def test_or_bits_takes_exactly_its_range(page: int, npages: int) -> None:
    ones = np.full(4, 0xFFFF_FFFF_FFFF_FFFF, dtype=np.uint64)
    out = np.zeros(4, dtype=np.uint64)
    out[3] = 1 << 63
    or_bits(out, ones, page, npages)
    assert pages_of([out]) == {(0, 255), *((0, found) for found in range(page, page + npages))}
    assert (ones == 0xFFFF_FFFF_FFFF_FFFF).all()
