# SPDX-License-Identifier: Apache-2.0
"""Guest memory as addresses and NumPy views: what ``RamBlock.mapping`` stands for in this process.

Reading a hole of shared memory through such a view allocates a page of zeros; ask
``vmth.dirty.populated`` first, which does not touch memory.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vmth._native import _sys
from vmth.errors import UsageError
from vmth.types import RamBlock

__all__ = [
    "MappedBlock",
    "Memory",
    "address_of",
    "holes_are_exact",
    "make_page_tables",
    "map_blocks",
    "map_shared",
]

Memory: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class MappedBlock:
    """A ramblock and where its bytes are in this process."""

    block: RamBlock
    address: int  #: of its first byte; valid as long as ``view`` lives. 0: hostless
    view: Memory  #: ``used_length`` bytes; read-only unless it was mapped writable
    anew: bool = False  #: mapped for this use: page tables are made where it is touched

    @property
    def hostless(self) -> bool:
        """It has no memory in this process: ``view`` is empty."""
        return self.address == 0


class _AddressRange:
    """Lends memory that someone else owns to NumPy, without a copy."""

    def __init__(self, address: int, length: int, writable: bool) -> None:
        self.__array_interface__: dict[str, Any] = {
            "data": (address, not writable),
            "shape": (length,),
            "typestr": "|u1",
            "version": 3,
        }


def address_of(array: npt.NDArray[Any]) -> int:
    """The address of an array's first byte; valid as long as the array lives."""
    return int(array.__array_interface__["data"][0])


@contextmanager
def map_blocks(
    blocks: Sequence[RamBlock], *, writable: bool = False
) -> Iterator[list[MappedBlock]]:
    """Map every block, in block-table order: a file is mapped shared, an address is used as it is,
    and a block whose mapping names neither is *hostless* (its pages are in another program).

    Shared memory that is mapped writable is advised to be huge pages (MADV_HUGEPAGE), and a mapping
    of it that was made before (``Mapping.made``) is taken.

    Leaving the context gives the mappings up. A view that is still referenced then keeps its
    mapping until it dies: a file's mapping is never pulled away under a view. An ``address`` stays
    the owner's. The owner must not shrink a file while it is mapped (an access would raise SIGBUS).

    Raises UsageError, with nothing left mapped, if a block's mapping names both fd and address, a
    file is too short or not a regular file, or something is not page aligned; OSError if the kernel
    does not map it.
    """
    mapped = [_map_block(block, writable) for block in blocks]
    try:
        yield mapped
    finally:
        mapped.clear()


def _map_block(block: RamBlock, writable: bool) -> MappedBlock:
    mapping = block.mapping
    if mapping.fd is not None and mapping.address is not None:
        raise UsageError(f"ramblock {block.idstr!r}: fd and address are set, allowed one of them")
    _check_aligned(block, "length", block.used_length)
    if block.used_length == 0:
        raise UsageError(f"ramblock {block.idstr!r}: an empty block cannot be mapped")
    anew = False
    if mapping.fd is not None:
        view, anew = _map_file(block, mapping.fd, writable)
    elif mapping.address is None:
        return MappedBlock(block, 0, np.empty(0, dtype=np.uint8))
    else:
        _check_aligned(block, "address", mapping.address)
        view = np.asarray(_AddressRange(mapping.address, block.used_length, writable))
    return MappedBlock(block, address_of(view), view, anew)


def _check_aligned(block: RamBlock, what: str, value: int) -> None:
    if value < 0 or value % mmap.PAGESIZE != 0:
        raise UsageError(
            f"ramblock {block.idstr!r}: {what} {value:#x} is not a multiple of {mmap.PAGESIZE}"
        )


def _map_file(block: RamBlock, fd: int, writable: bool) -> tuple[Memory, bool]:
    offset = block.mapping.offset
    _check_aligned(block, "offset", offset)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"ramblock {block.idstr!r}: fd {fd} is not a regular file or memfd")
    if status.st_size < offset + block.used_length:
        raise UsageError(
            f"ramblock {block.idstr!r}: the file has {status.st_size} bytes, "
            f"the block needs {offset + block.used_length}"
        )
    made = block.mapping.made.take() if writable and block.mapping.made is not None else None
    if made is not None and len(made[0]) == block.used_length:
        return np.frombuffer(made[0], dtype=np.uint8), not made[1]
    return np.frombuffer(map_shared(fd, offset, block.used_length, writable), dtype=np.uint8), True


def map_shared(fd: int, offset: int, nbytes: int, writable: bool) -> mmap.mmap:
    """Part of a file, whole pages. Raises OSError if the kernel does not map it."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    mapped = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, protection, offset=offset)
    if writable and _sys.populated_file_is_exact(fd):
        # What lands first decides what the guest has for good: huge pages, where this machine gives
        # shared memory those on advice. A kernel that has none says so here. A disk's file would be
        # read ahead by megabytes.
        with suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


def holes_are_exact(fd: int) -> bool:
    """Is a hole of this file memory that nobody ever wrote (tmpfs, memfd)?"""
    return _sys.populated_file_is_exact(fd)


def make_page_tables(mapped: mmap.mmap, at: int, nbytes: int) -> bool:
    """Map [at, at + nbytes), whole pages, if all of it is in memory; False if not, since a hole
    would be allocated. The interpreter's lock is free meanwhile. Raises OSError where the kernel
    does not (MADV_POPULATE_READ, Linux 5.14)."""
    address = address_of(np.frombuffer(mapped, dtype=np.uint8)) + at
    if _sys.resident(address, nbytes) * mmap.PAGESIZE < nbytes:
        return False
    _sys.populate_read(address, nbytes)
    return True
