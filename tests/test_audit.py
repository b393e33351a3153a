# SPDX-License-Identifier: Apache-2.0
"""The byte comparison of two paused memories: blocks of more than one request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np

from vmth.audit import REQUEST_PAGES, Area, MemoryDigests, areas, differing_pages
from vmth.guest import Guest
from vmth.guests.memory import PAGE_BYTES, BlockPlan, GuestMemory


def digests_of(memory: GuestMemory) -> MemoryDigests:
    guest = cast(Guest, SimpleNamespace(blocks=memory.blocks))
    return MemoryDigests(guest, memory.views, PAGE_BYTES, 7)


def test_pages_that_differ_are_found_in_every_request_of_a_block() -> None:
    npages = REQUEST_PAGES + 70
    ours, theirs = (GuestMemory([BlockPlan("ram", 0, npages * PAGE_BYTES)]) for _ in range(2))
    try:
        assert len(list(areas(ours.blocks, REQUEST_PAGES))) == 2
        for memory in (ours, theirs):
            memory.views[0][:: PAGE_BYTES * 999] = 5
        different = [3, REQUEST_PAGES - 1, REQUEST_PAGES, npages - 1]
        theirs.views[0].reshape(-1, PAGE_BYTES)[different, 17] = 1
        here, there = digests_of(ours), digests_of(theirs)
        found = differing_pages(
            ours.blocks,
            here.subdigests,
            lambda area, step: lambda: there.subdigests(area, step),
            limit=10,
        )
        assert list(found) == [(0, page) for page in different]
        assert not np.array_equal(
            here.hashes(Area(0, npages - 1, 1)), there.hashes(Area(0, npages - 1, 1))
        )
    finally:
        ours.close()
        theirs.close()
