# SPDX-License-Identifier: Apache-2.0
"""Plain data that every layer shares: the block table and its parts.

Nothing here does I/O. A ``Gpa`` is a guest physical byte address; pages are counted within their
ramblock.
"""

from __future__ import annotations

import enum
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NewType, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "Bitmap",
    "Bitmaps",
    "BlockFlags",
    "Gpa",
    "MadeMapping",
    "Mapping",
    "RamBlock",
    "bitmap_words",
    "new_bitmaps",
]

Gpa = NewType("Gpa", int)

#: One bit a page of one ramblock, LSB first in uint64 words (``csrc/include/vmth/bitmap.h``).
Bitmap: TypeAlias = npt.NDArray[np.uint64]
#: One bitmap a ramblock, in block-table order.
Bitmaps: TypeAlias = Sequence[Bitmap]


class BlockFlags(enum.IntFlag):
    """What a ramblock is. Bits 16..31 are *critical*: a peer that does not know one refuses."""

    NONE = 0
    ROM = 1 << 0  #: the guest cannot write it; the destination may hold other bytes beforehand
    SHARED = 1 << 1  #: mapped by another process too (vhost-user): its writes need a dirty source
    DISCARDABLE = 1 << 2  #: parts may be discarded by the guest (balloon, virtio-mem)


class MadeMapping(Protocol):
    """A file's bytes that were mapped before anybody knew whether they are needed."""

    def take(self) -> tuple[mmap.mmap, bool] | None:
        """The mapping (shared, writable), the caller's from now on, and whether it has all page
        tables. None: somebody has it already, or it was given up. Any thread."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """Where a ramblock's bytes are: a file (``fd`` + ``offset``, mapped shared) or an ``address``
    in this process. At most one of ``fd`` and ``address`` is set; with neither the block is
    *hostless*: another program holds its bytes, and they travel by ``PageSender.send_pages`` and a
    ``StreamSink``. The owner keeps both alive until the job that uses them has ended.
    """

    fd: int | None = None
    offset: int = 0
    address: int | None = None
    #: Of the block's bytes in that file: taken by whoever maps them to write, instead of mapping
    #: them anew.
    made: MadeMapping | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class RamBlock:
    """One named region of guest memory. Lengths are bytes, multiples of ``tracking_page_size``."""

    idstr: str
    used_length: int
    gpa: int
    mapping: Mapping = field(compare=False)
    max_length: int = 0  #: 0: same as used_length
    tracking_page_size: int = 4096  #: granularity of the dirty bitmaps
    backing_page_size: int = 4096  #: host page behind it (hugetlb: 2 MiB); the two ends may differ
    flags: BlockFlags = BlockFlags.NONE
    numa_node: int = -1

    @property
    def npages(self) -> int:
        """Pages of ``tracking_page_size``."""
        return self.used_length // self.tracking_page_size


def bitmap_words(npages: int) -> int:
    """uint64 words that hold ``npages`` bits."""
    return (npages + 63) // 64


def new_bitmaps(blocks: Sequence[RamBlock]) -> list[Bitmap]:
    """All-clear bitmaps for a block table."""
    return [np.zeros(bitmap_words(block.npages), dtype=np.uint64) for block in blocks]
