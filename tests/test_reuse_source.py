# SPDX-License-Identifier: Apache-2.0
"""What an index may hand to the page channels."""

from typing import Any

import numpy as np
import pytest

from vmth.channel.reuse import KEY_BYTES, ReuseSource
from vmth.errors import UsageError


def source(**changes: Any) -> ReuseSource:
    values: dict[str, Any] = {
        "path": "warm.raw",
        "fd": 0,
        "page_bytes": 4096,
        "key": bytes(KEY_BYTES),
        "hashes": np.zeros((3, 2), dtype=np.uint64),
        "places": np.arange(3, dtype=np.uint64),
        "frames": np.array([[0, 2, 0, 8192], [2, 256, 9000, 77]], dtype=np.uint64),
    }
    return ReuseSource(**(values | changes))


def frames(*rows: list[int]) -> dict[str, Any]:
    return {"frames": np.array(rows, dtype=np.uint64).reshape(-1, 4)}


def test_what_fits_is_taken() -> None:
    source()
    source(**frames())
    source(**frames([0, 1 << 39, 0, 1 << 51], [1 << 39, 1, 5, 4096]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hashes": np.zeros((3, 2), dtype=np.int64)}, "hashes: received int64"),
        ({"hashes": np.zeros((2, 2), dtype=np.uint64)}, r"shape \(2, 2\), allowed .*\(3, 2\)"),
        ({"hashes": np.zeros((3, 4), dtype=np.uint64)[:, ::2]}, "C-contiguous"),
        ({"places": np.zeros((3, 1), dtype=np.uint64)}, "places: received"),
        ({"frames": np.zeros((3, 3), dtype=np.uint64)}, "frames: received"),
        ({"page_bytes": 4097}, "received 4097"),
        ({"page_bytes": 4 << 20}, "received 4194304"),
        ({"key": bytes(16)}, "received 16 bytes, allowed 32"),
        (frames([0, 0, 0, 4096]), "frame 0"),
        (frames([0, 1, 0, 0]), "frame 0"),
        (frames([0, 1, 1 << 62, 4096]), "frame 0"),
        (frames([0, 1, 0, 4096], [2**64 - 1, 1, 0, 4096]), "frame 1"),
        (frames([0, 257, 0, 4096]), "received 257 pages"),
        (frames([0, 2, 0, 8192], [1, 1, 0, 4096]), "overlap"),
        (frames([5, 1, 0, 4096], [4, 1, 0, 4096]), "overlap"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        source(**changes)
