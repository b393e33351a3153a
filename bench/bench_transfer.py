# SPDX-License-Identifier: Apache-2.0
"""Cold transfers over loopback, and bare sockets beside them; transfer_table.py has the ratios."""

from __future__ import annotations

from typing import Any

import pytest
from transfer_table import bare, filled, fresh, holes, transfer

NBYTES = 512 << 20


@pytest.fixture(scope="module")
def source() -> Any:
    return filled(NBYTES, random=True)


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("how", ["bare", "digest-off", "digest-on"])
@pytest.mark.parametrize("state", ["populated", "fresh"])
def test_incompressible(benchmark: Any, source: Any, channels: int, how: str, state: str) -> None:
    used = filled(NBYTES, random=False)

    def run() -> None:
        destination = used if state == "populated" else fresh(NBYTES)
        if how == "bare":
            bare(source, destination, channels)
        else:
            transfer(source, destination, channels, digest=how == "digest-on")

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    benchmark.extra_info["bytes_per_second"] = NBYTES / benchmark.stats.stats.median


@pytest.mark.parametrize("digest", [False, True])
def test_holes(benchmark: Any, digest: bool) -> None:
    npages = 1 << 24
    benchmark.pedantic(lambda: holes(npages, 2, digest=digest), rounds=3)
    benchmark.extra_info["pages_per_second"] = npages / benchmark.stats.stats.median
