# SPDX-License-Identifier: Apache-2.0
"""Pages that go out once more: they wait until what went before has landed.

Those that multifd brought twice in one round:

    packet n    1024 ... 1151        QEMU before 8.0 looks at a packet that it has handed over, and
    packet n+1  1151 ... 1278        may put the last page of one into the next as well (a race);
    packet n+2  1278 ... 1405        with several channels, n+1 may be the last of these to come

The page channels keep an order across barriers only, so no page goes twice between two. A barrier
for each such page would be one for each 512 KiB; kept here, one serves them all.

And those that the destination missed: it did not have what a page was said to be the same as. QEMU
cannot be asked for them again, but the page channels have kept their content.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from vmth.channel.interface import PageSender
from vmth.errors import VerificationError
from vmth.qemu.ram import RUN, PageKind, Runs
from vmth.types import RamBlock, new_bitmaps

__all__ = ["PagesAgain", "without_ends"]


#: How often one page may be missed.
MOST_MISSES = 8


class PagesAgain:
    """Content of pages, the newest of each. Bounded by who keeps them. One thread."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._times_missed: Counter[tuple[int, int]] = Counter()
        self._kept: dict[tuple[int, int], bytes] = {}  #: by block and page; empty: zeros

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, run: Runs, at: int, data: memoryview) -> None:
        """Page number ``at`` of a run, of kind ZERO or PAGE, whose content is in ``data``."""
        content = b""
        if int(run["kind"]) == PageKind.PAGE:
            begin = int(run["at"]) + at * int(run["stride"])
            content = bytes(data[begin : begin + self._page_bytes])
        self._kept[int(run["block"]), int(run["page"]) + at] = content

    def keep_missed(self, sender: PageSender, blocks: Sequence[RamBlock]) -> None:
        """Behind a barrier: what was missed, unless a newer copy is here. Raises VerificationError
        for what was damaged on the way, and for pages that are missed time and again."""
        missed = sender.take_missed(new_bitmaps(blocks))
        if not missed:
            return
        pages = sender.take_missed_pages()
        if len(pages) < missed:
            raise VerificationError(
                f"{missed - len(pages)} pages arrived damaged: QEMU cannot be asked for them again"
            )
        for block, page, content in pages:
            self._times_missed[block, page] += 1
            if self._times_missed[block, page] > MOST_MISSES:
                raise VerificationError(
                    f"page {page} of ramblock {blocks[block].idstr!r} was missed more than "
                    f"{MOST_MISSES} times"
                )
            self._kept.setdefault((block, page), content)

    def take(self) -> tuple[Runs, bytes]:
        """All of them, and forget them: runs of one page each, and the data that they refer to."""
        runs = np.zeros(len(self._kept), dtype=RUN)
        data = b"".join(self._kept.values())
        if len(runs):
            lengths = np.fromiter(map(len, self._kept.values()), dtype=np.uint64)
            runs["block"], runs["page"] = np.array(list(self._kept)).T
            runs["npages"] = 1
            runs["kind"] = np.where(lengths > 0, int(PageKind.PAGE), int(PageKind.ZERO))
            runs["at"] = np.where(lengths > 0, np.cumsum(lengths) - lengths, 0)
            runs["stride"] = runs["nbytes"] = lengths
        self._kept.clear()
        return runs, data


def without_ends(run: Runs, first: bool, last: bool) -> Runs:
    """An array of the run without its first page, its last page, or both; empty where none is
    left."""
    rest = np.array([run], dtype=RUN)
    dropped = int(first) + int(last)
    if int(run["npages"]) <= dropped:
        return rest[:0]
    rest["npages"] -= dropped
    if first:
        rest["page"] += 1
        rest["at"] += rest["stride"]
    return rest
