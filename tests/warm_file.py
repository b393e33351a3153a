# SPDX-License-Identifier: Apache-2.0
"""A file that a destination reuses, with an index made here without the code that builds them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from memory_guest import PAGE

from vmth import kernels
from vmth.channel.reuse import KEY_BYTES, ReuseSource

KEY = bytes(range(KEY_BYTES))

Pages = npt.NDArray[np.uint8]


def stored(path: Path, pages: Pages) -> ReuseSource:
    """A raw file of these pages and its index; the test closes the descriptor."""
    path.write_bytes(pages.tobytes())
    npages = len(pages) // PAGE
    hashes = np.zeros((npages, 2), dtype=np.uint64)
    kernels.content_hash(pages, PAGE, KEY, hashes)
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    return ReuseSource(
        path=str(path),
        fd=os.open(path, os.O_RDONLY | os.O_CLOEXEC),
        page_bytes=PAGE,
        key=KEY,
        hashes=np.ascontiguousarray(hashes[order]),
        places=order.astype(np.uint64),
        frames=np.array([[0, npages, 0, len(pages)]], dtype=np.uint64),
    )
