# SPDX-License-Identifier: Apache-2.0
"""The pool of the ``rewrite`` workload: incompressible bytes in guest memory to copy pages from.

A page's content is a *window* of the pool, all of the page but its counter. Window of page j of the
working set at loop n, in bytes from the pool's start, modulo the pool's bytes (a power of two):

    window(j, n) = base + j x 4096 + (j x 4096 / pool bytes) x 16 + n x POOL_STEP

One page behind the pool lets a window begin at its last dword. What follows from the constants:

- Neighbours in memory never overlap, nor do pages at a distance of less than half of the pool: a
  compressor that looks back over a few MiB finds nothing.
- Where the pool wraps, 16 bytes keep the page from the one that had this window first.
- POOL_STEP is 4 x an odd number: a page sees each window of its own once in pool bytes / 4 loops,
  then they repeat (from 16,384 loops on in the smallest pool, 4 million in one of 16 MiB). It is
  near the golden section of the pool, so that windows of near loops lie far apart, and its lowest
  12 bits keep those of different pages from being equal within at least eight loops.

The content follows from ``key`` alone, by a generator whose stream NumPy keeps: who checks a guest
makes it again instead of believing what has arrived.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vmth.guests.memory import PAGE_BYTES

__all__ = [
    "POOL_MASK_MAX",
    "POOL_TAIL_BYTES",
    "pool_bytes",
    "pool_content",
    "pool_step",
    "window_offsets",
]

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]

POOL_BYTES_MIN = 64 << 10
POOL_BYTES_MAX = 64 << 20
POOL_MASK_MAX = POOL_BYTES_MAX - 4
#: Of a guest's memory, at most this part.
POOL_SHARE = 32
#: Behind the pool, for windows that begin at its end.
POOL_TAIL_BYTES = PAGE_BYTES
WRAP_BYTES = 16
GOLDEN_SECTION = 0.618
#: 4 x 159: 159 is the golden section of 256, the number of WRAP_BYTES in a page.
STEP_IN_PAGE_BYTES = 636


def pool_bytes(low_bytes: int) -> int:
    """Bytes of the pool, without its tail, for a guest with so much memory in reach: a power of
    two."""
    share = 1 << (max(1, low_bytes // POOL_SHARE).bit_length() - 1)
    return max(POOL_BYTES_MIN, min(POOL_BYTES_MAX, share))


def pool_step(nbytes: int) -> int:
    """POOL_STEP for a pool of ``nbytes``."""
    pages = int(nbytes // PAGE_BYTES * GOLDEN_SECTION)
    return pages * PAGE_BYTES + STEP_IN_PAGE_BYTES


def window_offsets(page_numbers: U32, nbytes: int) -> U32:
    """Where the windows of these pages of the working set begin at loop 0, without base; modulo
    2^32."""
    wraps = page_numbers // np.uint32(nbytes // PAGE_BYTES)
    return page_numbers * np.uint32(PAGE_BYTES) + wraps * np.uint32(WRAP_BYTES)


def pool_content(key: int, nbytes: int) -> U8:
    """The pool of ``nbytes`` (a multiple of 8) and its tail."""
    generator = np.random.SFC64([key, 0x706F6F6C])
    words: npt.NDArray[np.uint64] = generator.random_raw((nbytes + POOL_TAIL_BYTES) // 8)
    return words.astype("<u8", copy=False).view(np.uint8)
