# SPDX-License-Identifier: Apache-2.0
"""Pages that multifd brought twice in one round: they wait until the first copies have landed.

    packet n    1024 ... 1151        QEMU before 8.0 looks at a packet that it has handed over, and
    packet n+1  1151 ... 1278        may put the last page of one into the next as well (a race);
    packet n+2  1278 ... 1405        with several channels, n+1 may be the last of these to come

The page channels keep an order across barriers only, so no page goes twice between two. A barrier
for each such page would be one for each 512 KiB; kept here, one serves them all.
"""

from __future__ import annotations

import numpy as np

from vmth.qemu.ram import RUN, PageKind, Runs

__all__ = ["PagesAgain", "without_ends"]


class PagesAgain:
    """Content of pages, the newest of each. Bounded by who keeps them. One thread."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
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
