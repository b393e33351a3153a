# SPDX-License-Identifier: Apache-2.0
"""What a warm destination reuses: a file with pages, and the index of their contents.

    hashes   | digest | digest | ...      16 bytes a row, ascending by column 0, then column 1
    places   | page   | page   | ...      where row i's content is: a page of the file's page space
    frames   | first page, pages, offset, bytes | ...      where pages of that space are in the file

A digest is ``kernels.content_hash`` of the page with ``key``. A frame whose bytes are its pages
times the page size holds them as they are; any other is one zstd frame of exactly those pages. A
raw file is thus one frame, from page 0 on. Frames rise by first page and do not overlap; the page
space may have holes between them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vmth.errors import UsageError

__all__ = ["KEY_BYTES", "MAX_FRAME_BYTES", "MAX_REUSE_PAGES", "ReuseSource"]

#: Of the content hash (``vmth/content_hash.h``).
KEY_BYTES = 32
#: A packed frame's pages: what is unpacked, and kept, for a single page of it.
MAX_FRAME_BYTES = 1 << 20
#: Contents of one source: 4 GiB of index for 1 TiB of 4 KiB pages.
MAX_REUSE_PAGES = 1 << 28

U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class ReuseSource:
    """One file and its index; all sources of a session have one ``key`` and one page size.

    ``fd`` is open for reading and belongs to the owner, who keeps it and the arrays (they may be
    mapped from a file, read-only) until the session that uses them has ended. What the file holds
    is hashed again when it is read: an index that is wrong, or a file that was changed or cut
    behind it, costs time but never a wrong page.

    Raises UsageError for arrays that are not C-contiguous ``uint64`` of these shapes, a page size,
    key or number of pages out of bounds, or frames that are not in order.
    """

    path: str  #: for messages and results
    fd: int
    page_bytes: int
    key: bytes = field(repr=False)
    hashes: U64 = field(repr=False)  #: shape (n, 2)
    places: U64 = field(repr=False)  #: shape (n,)
    frames: U64 = field(repr=False)  #: shape (m, 4): first page, pages, offset, bytes

    def __post_init__(self) -> None:
        n, m = len(self.places), len(self.frames)
        for name, array, shape in (
            ("hashes", self.hashes, (n, 2)),
            ("places", self.places, (n,)),
            ("frames", self.frames, (m, 4)),
        ):
            if array.dtype != np.uint64 or array.shape != shape or not array.flags.c_contiguous:
                raise UsageError(
                    f"{self.path}: {name}: received {array.dtype} of shape {array.shape}, "
                    f"allowed C-contiguous uint64 of shape {shape}"
                )
        size = self.page_bytes
        if not 4096 <= size <= 2 << 20 or size & (size - 1):
            raise UsageError(
                f"{self.path}: page size: received {size}, allowed powers of two from 4096 to "
                f"{2 << 20}"
            )
        if len(self.key) != KEY_BYTES:
            raise UsageError(
                f"{self.path}: key: received {len(self.key)} bytes, allowed {KEY_BYTES}"
            )
        if n > MAX_REUSE_PAGES:
            raise UsageError(f"{self.path}: pages: received {n}, allowed up to {MAX_REUSE_PAGES}")
        self._check_frames()

    def _check_frames(self) -> None:
        first, pages, offset, nbytes = (self.frames[:, column] for column in range(4))
        # Each bounded before it is added to another: no sum wraps.
        in_bounds = (first < 1 << 40) & (pages > 0) & (pages < 1 << 40)
        in_bounds &= (offset < 1 << 62) & (nbytes > 0) & (nbytes < 1 << 62)
        if not in_bounds.all():
            row = int(np.flatnonzero(~in_bounds)[0])
            raise UsageError(f"{self.path}: frame {row}: {self.frames[row].tolist()} out of bounds")
        packed = nbytes != pages * np.uint64(self.page_bytes)
        if (pages[packed] * np.uint64(self.page_bytes) > MAX_FRAME_BYTES).any():
            raise UsageError(
                f"{self.path}: packed frames: received {int(pages[packed].max())} pages of "
                f"{self.page_bytes}, allowed up to {MAX_FRAME_BYTES} bytes"
            )
        if (first[1:] < (first + pages)[:-1]).any():
            raise UsageError(f"{self.path}: frames overlap or do not rise by first page")
