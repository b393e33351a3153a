# SPDX-License-Identifier: Apache-2.0
"""Memory that is mapped before it is needed: taken once, with its page tables, and never more in
memory for it than there was."""

from __future__ import annotations

import mmap
import os
import re
import threading
from collections.abc import Iterator

import pytest
from landing_world import mappings_of
from waiting import wait_until

from vmth import mapped_ahead
from vmth.channel.pages import _areas
from vmth.mapped_ahead import PIECE_BYTES, MappedAhead
from vmth.memory import MappedBlock, make_page_tables, map_blocks, map_shared
from vmth.types import Gpa, Mapping, RamBlock

PAGE = mmap.PAGESIZE
#: Two pieces and a bit, so that the last one is short.
NBYTES = 2 * PIECE_BYTES + 3 * PAGE


@pytest.fixture
def memory() -> Iterator[int]:
    """A memfd of NBYTES behind one page, all of it in memory."""
    fd = os.memfd_create("vmth-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGE + NBYTES)
    os.pwrite(fd, bytes(PAGE + NBYTES), 0)
    yield fd
    os.close(fd)


@pytest.fixture
def page_tables(memory: int) -> None:
    """What needs a kernel that makes them."""
    try:
        make_page_tables(map_shared(memory, 0, PAGE, True), 0, PAGE)
    except OSError as error:
        pytest.skip(f"MADV_POPULATE_READ, from Linux 5.14 on: {error}")


def ahead_of(fd: int) -> MappedAhead:
    return MappedAhead(fd, PAGE, NBYTES)


def mapped_with(fd: int, made: MappedAhead, nbytes: int = NBYTES) -> Iterator[MappedBlock]:
    block = RamBlock("ram", nbytes, Gpa(0), Mapping(fd=fd, offset=PAGE, made=made))
    with map_blocks([block], writable=True) as (mapped,):
        yield mapped


def page_table_bytes(address: int) -> int:
    """Mapped by page tables of the mapping that begins there."""
    with open("/proc/self/smaps") as smaps:
        text = smaps.read()
    found = re.search(rf"^{address:x}-.*?^Rss: +(\d+) kB", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return int(found[1]) << 10


def allocated_bytes(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


@pytest.mark.usefixtures("page_tables")
def test_it_is_taken_with_its_page_tables(memory: int) -> None:
    made = ahead_of(memory)
    assert made.populate()
    for mapped in mapped_with(memory, made):
        assert not mapped.anew
        assert page_table_bytes(mapped.address) == NBYTES
        mapped.view[PAGE : PAGE + 5] = list(b"pages")
        assert os.pread(memory, 5, 2 * PAGE) == b"pages"


@pytest.mark.usefixtures("page_tables")
@pytest.mark.parametrize("populated", [True, False])
def test_a_receiver_makes_the_page_tables_that_are_missing(memory: int, populated: bool) -> None:
    made = ahead_of(memory)
    if populated:
        made.populate()
    for mapped in mapped_with(memory, made):
        ((_, _, anew),) = _areas([mapped], PAGE)
        assert anew is not populated


def test_only_the_first_takes_it(memory: int) -> None:
    made = ahead_of(memory)
    made.populate()
    for first in mapped_with(memory, made):
        for second in mapped_with(memory, made):
            assert second.address != first.address and second.anew
            first.view[0] = 7
            assert second.view[0] == 7


def test_a_view_to_read_leaves_it(memory: int) -> None:
    made = ahead_of(memory)
    block = RamBlock("ram", NBYTES, Gpa(0), Mapping(fd=memory, offset=PAGE, made=made))
    with map_blocks([block]) as (mapped,):
        assert not mapped.view.flags.writeable
    assert made.take() is not None


def test_without_all_page_tables_it_counts_as_made_anew(memory: int) -> None:
    made = ahead_of(memory)
    for mapped in mapped_with(memory, made):
        assert mapped.anew


def test_another_length_is_mapped_for_itself(memory: int) -> None:
    made = ahead_of(memory)
    made.populate()
    for mapped in mapped_with(memory, made, NBYTES - PAGE):
        assert mapped.anew and mapped.view.nbytes == NBYTES - PAGE


@pytest.mark.usefixtures("page_tables")
def test_holes_stay_holes(memory: int) -> None:
    os.ftruncate(memory, PAGE + PIECE_BYTES)
    os.ftruncate(memory, PAGE + NBYTES)
    before = allocated_bytes(memory)
    made = ahead_of(memory)
    assert not made.populate()
    for mapped in mapped_with(memory, made):
        assert mapped.anew
        assert page_table_bytes(mapped.address) == PIECE_BYTES
    assert allocated_bytes(memory) == before


def test_a_kernel_that_cannot_leaves_it_for_later(
    memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bool:
        raise OSError("MADV_POPULATE_READ")

    monkeypatch.setattr(mapped_ahead, "make_page_tables", refuse)
    made = ahead_of(memory)
    assert not made.populate()
    for mapped in mapped_with(memory, made):
        assert mapped.anew


def test_who_takes_it_meanwhile_waits_for_one_piece(memory: int) -> None:
    made, begun, pieces = ahead_of(memory), threading.Event(), 0

    def goes_on() -> bool:
        nonlocal pieces
        pieces += 1
        begun.set()
        wait_until(lambda: made._wanted)
        return True

    thread = threading.Thread(target=made.populate, args=(goes_on,))
    thread.start()
    assert begun.wait(60)
    taken = made.take()
    thread.join()
    assert taken is not None and not taken[1]
    assert pieces == 1 < NBYTES // PIECE_BYTES


def test_it_ends_when_told_to(memory: int) -> None:
    made, steps = ahead_of(memory), 0

    def goes_on() -> bool:
        nonlocal steps
        steps += 1
        return steps < 2

    assert not made.populate(goes_on)
    assert steps == 2
    made.close()
    assert not made.populate() and made.take() is None


def test_the_same_bytes_are_known_by_any_descriptor(memory: int) -> None:
    made = ahead_of(memory)
    again = os.open(f"/proc/self/fd/{memory}", os.O_RDWR)
    other = os.memfd_create("vmth-other")
    try:
        assert made.is_of(again, PAGE, NBYTES)
        assert not made.is_of(again, 0, NBYTES)
        assert not made.is_of(again, PAGE, PIECE_BYTES)
        assert not made.is_of(other, PAGE, NBYTES)
    finally:
        os.close(again)
        os.close(other)
    made.close()


def test_what_is_let_go_is_not_mapped_any_more(memory: int) -> None:
    made = ahead_of(memory)
    made.populate()
    assert mappings_of(memory) == 1
    made.close()
    made.close()
    assert mappings_of(memory) == 0
