# SPDX-License-Identifier: Apache-2.0
"""Pages that a QEMU did not send because its guest calls them free (a balloon's hints).

They arrive as zeros, as they would from QEMU itself, and the digest is of all memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vmth.channel.interface import PageSender
from vmth.types import RamBlock

__all__ = ["send_unsent_as_holes"]

#: Hashes that are looked at together: 1 MiB of them.
TABLE_PAGES = 65536


def send_unsent_as_holes(sender: PageSender, blocks: Sequence[RamBlock], round_: int) -> int:
    """Queue a hole for each page that has no hash, all others having been read; how many. 0 also
    where the digest is off and none has one. The barrier behind them is the caller's."""
    known = sender.digest()[2]
    unsent = sum(block.npages for block in blocks) - known
    if known == 0 or unsent == 0:
        return 0
    for index, block in enumerate(blocks):
        for first in range(0, block.npages, TABLE_PAGES):
            n = min(TABLE_PAGES, block.npages - first)
            runs = _unhashed(sender.hashes(index, first, n), first)
            if len(runs):
                sender.send_holes(index, runs, round_)
    return unsent


def _unhashed(hashes: npt.NDArray[np.uint64], first: int) -> npt.NDArray[np.uint64]:
    """Runs {page, npages} of pages without a hash; the table's first page is ``first``."""
    missing = ~hashes.any(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], missing, [False]))))
    begins, ends = edges[::2], edges[1::2]
    return np.stack((begins + first, ends - begins), axis=1).astype(np.uint64)
