# SPDX-License-Identifier: Apache-2.0
"""map_blocks: the right bytes, at the right place, checked, and nothing leaked."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest

from vmth.errors import UsageError
from vmth.memory import address_of, map_blocks
from vmth.types import Mapping, RamBlock

PAGE = mmap.PAGESIZE


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("vmth-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, 8 * PAGE)
    yield fd
    os.close(fd)


def block(mapping: Mapping, npages: int = 4) -> RamBlock:
    return RamBlock("ram", npages * PAGE, 0, mapping)


def test_a_file_is_mapped_shared_from_its_offset(memfd: int) -> None:
    os.pwrite(memfd, b"hello", 3 * PAGE)
    with map_blocks([block(Mapping(fd=memfd, offset=3 * PAGE))], writable=True) as (mapped,):
        assert bytes(mapped.view[:5]) == b"hello"
        assert mapped.view.nbytes == 4 * PAGE
        assert mapped.address == address_of(mapped.view)
        mapped.view[PAGE] = 65
    assert os.pread(memfd, 1, 4 * PAGE) == b"A"


def test_an_address_is_used_as_it_is() -> None:
    owner = np.frombuffer(mmap.mmap(-1, 4 * PAGE), dtype=np.uint8)
    with map_blocks([block(Mapping(address=address_of(owner)))], writable=True) as (mapped,):
        mapped.view[7] = 9
        assert mapped.address == address_of(owner)
    assert owner[7] == 9


@pytest.mark.parametrize("by_fd", [True, False])
def test_views_are_read_only_unless_asked_otherwise(memfd: int, by_fd: bool) -> None:
    owner = np.frombuffer(mmap.mmap(-1, 4 * PAGE), dtype=np.uint8)
    mapping = Mapping(fd=memfd) if by_fd else Mapping(address=address_of(owner))
    with map_blocks([block(mapping)]) as (mapped,):
        assert not mapped.view.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            mapped.view[0] = 1


def test_blocks_come_in_table_order(memfd: int) -> None:
    blocks = [block(Mapping(fd=memfd, offset=offset * PAGE), 1) for offset in (5, 0, 2)]
    for index, offset in enumerate((5, 0, 2)):
        os.pwrite(memfd, bytes([index + 1]), offset * PAGE)
    with map_blocks(blocks) as mapped:
        assert [int(item.view[0]) for item in mapped] == [1, 2, 3]
        assert [item.block for item in mapped] == blocks


def mappings_of(fd: int) -> int:
    inode = os.fstat(fd).st_ino
    with open("/proc/self/maps", encoding="utf-8") as lines:
        return sum(line.split()[4] == str(inode) and "memfd" in line for line in lines)


def test_nothing_stays_mapped_or_open(memfd: int) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with map_blocks([block(Mapping(fd=memfd)), block(Mapping(fd=memfd))]):
        assert mappings_of(memfd) == 2
    assert mappings_of(memfd) == 0
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_failure_leaves_nothing_mapped(memfd: int) -> None:
    with pytest.raises(UsageError):
        with map_blocks([block(Mapping(fd=memfd)), block(Mapping(fd=memfd), npages=9)]):
            pass
    assert mappings_of(memfd) == 0


def test_a_view_that_is_kept_keeps_its_mapping(memfd: int) -> None:
    with map_blocks([block(Mapping(fd=memfd))], writable=True) as (mapped,):
        view = mapped.view
    del mapped
    view[0] = 3
    assert os.pread(memfd, 1, 0) == b"\x03"
    del view
    assert mappings_of(memfd) == 0


def test_the_block_may_end_where_the_file_ends(memfd: int) -> None:
    with map_blocks([block(Mapping(fd=memfd, offset=4 * PAGE), 4)]) as (mapped,):
        assert mapped.view[-1] == 0


@pytest.mark.parametrize(
    ("mapping", "npages", "message"),
    [
        (Mapping(fd=0, address=0x1000), 4, "fd and address are set, allowed one of them"),
        (Mapping(), 0, "an empty block"),
        (Mapping(address=0x1008), 4, "address 0x1008 is not a multiple of 4096"),
        (Mapping(address=-PAGE), 4, "is not a multiple of 4096"),
        (Mapping(address=PAGE), 0, "an empty block"),
    ],
)
def test_what_cannot_be_mapped_is_refused(mapping: Mapping, npages: int, message: str) -> None:
    with pytest.raises(UsageError, match=f"'ram'.*{message}"):
        with map_blocks([block(mapping, npages)]):
            pass


def test_a_block_without_memory_is_hostless(memfd: int) -> None:
    with map_blocks([block(Mapping()), block(Mapping(fd=memfd))]) as (absent, present):
        assert (absent.hostless, absent.address, absent.view.nbytes) == (True, 0, 0)
        assert not present.hostless


def test_a_file_that_is_too_short_or_unaligned_is_refused(memfd: int) -> None:
    for mapping, npages, message in (
        (Mapping(fd=memfd), 9, f"the file has {8 * PAGE} bytes, the block needs {9 * PAGE}"),
        (Mapping(fd=memfd, offset=5 * PAGE), 4, f"needs {9 * PAGE}"),
        (Mapping(fd=memfd, offset=100), 4, "offset 0x64 is not a multiple of 4096"),
    ):
        with pytest.raises(UsageError, match=message):
            with map_blocks([block(mapping, npages)]):
                pass


def test_a_pipe_is_refused() -> None:
    reader, writer = os.pipe()
    with pytest.raises(UsageError, match="not a regular file"):
        with map_blocks([block(Mapping(fd=reader))]):
            pass
    os.close(reader)
    os.close(writer)
