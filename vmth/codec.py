# SPDX-License-Identifier: Apache-2.0
"""The forms that make pages smaller, on buffers: zstd frames, deltas, places of contents.

The page channels do this natively (``codec.h``, ``delta.h``, ``content_index.h`` under
``csrc/include/vmth``); here it serves tools and tests. Nothing does I/O. Each call releases the GIL
for its work; an object is used by one thread at a time. What a peer could have made and is no valid
encoding raises ``StreamError``; an argument outside its bounds raises ``UsageError``; then nothing
has changed, save that ``apply_delta`` may have changed some of the page.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vmth._native import _codec
from vmth.errors import StreamError, UsageError

__all__ = [
    "MAX_LEVEL",
    "MIN_LEVEL",
    "Codec",
    "ContentIndex",
    "apply_delta",
    "encode_delta",
    "promising",
]

MIN_LEVEL = -10
MAX_LEVEL = 19
Buffer = bytes | bytearray | memoryview | npt.NDArray[np.uint8]


class Codec:
    """zstd contexts, kept from call to call. Raises ``MemoryError`` where there is none."""

    def __init__(self) -> None:
        self._codec = _codec.Codec()

    def compress(self, pages: Buffer, level: int, room: int | None = None) -> bytes | None:
        """One frame of ``pages``, or None where it would take more than ``room`` bytes.

        ``room`` is the size of ``pages`` unless told: a frame that is not smaller does not pay.
        """
        try:
            return self._codec.compress(pages, level, len(pages) if room is None else room)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def decompress(self, frame: Buffer, nbytes: int) -> bytes:
        """The content of one frame, which must be of ``nbytes``."""
        try:
            return self._codec.decompress(frame, nbytes)
        except ValueError as error:
            raise StreamError(str(error)) from None

    @property
    def held_bytes(self) -> int:
        """Memory that the contexts hold now, in bytes."""
        return self._codec.held_bytes()


class ContentIndex:
    """Where a content is known to be: a lossy table from hashes (lo, hi) to (block, page).

    ``nbytes`` is its memory, 16 bytes an entry, rounded down to a power of two of buckets of 64.
    """

    def __init__(self, nbytes: int) -> None:
        try:
            self._index = _codec.ContentIndex(nbytes)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def insert(self, content: tuple[int, int], block: int, page: int) -> None:
        """``content`` is at (block, page); a place told before stays."""
        self._index.insert(*content, block, page)

    def find(self, content: tuple[int, int]) -> tuple[int, int] | None:
        """(block, page) of ``content``, or None."""
        return self._index.find(*content)

    def forget(self, content: tuple[int, int], block: int, page: int) -> None:
        """(block, page) no longer has this content."""
        self._index.forget(*content, block, page)


def promising(page: Buffer) -> bool:
    """Might zstd make this page smaller? False for encrypted or compressed content."""
    try:
        return _codec.promising(page)
    except ValueError as error:
        raise UsageError(str(error)) from None


def encode_delta(base: Buffer, now: Buffer, room: int | None = None) -> bytes | None:
    """What makes the page ``now`` of ``base``, or None where it takes more than ``room`` bytes.

    ``room`` is the page's size unless told. Equal pages give no bytes.
    """
    try:
        return _codec.delta_encode(base, now, len(now) if room is None else room)
    except ValueError as error:
        raise UsageError(str(error)) from None


def apply_delta(page: bytearray | npt.NDArray[np.uint8], delta: Buffer) -> None:
    """Change ``page``, which holds the base, into what ``delta`` says."""
    try:
        _codec.delta_apply(page, delta)
    except ValueError as error:
        raise StreamError(str(error)) from None
