# SPDX-License-Identifier: Apache-2.0
"""Seeded page contents for the kernel benches."""

import numpy as np
import numpy.typing as npt

CONTENTS = ["zero", "random", "text", "mixed"]

_WORDS = (
    b"the guest moves while it runs and its pages follow in rounds until the last fits ".split()
)


def pages(content: str, nbytes: int, seed: int = 1) -> npt.NDArray[np.uint8]:
    """``nbytes`` (a multiple of 4096) of the named content, page-aligned and faulted in.

    zero; random; text (words in random order); mixed (each 4 KiB page one of the three).
    """
    rng = np.random.default_rng(seed)
    raw = np.empty(nbytes + 4096, dtype=np.uint8)
    start = -raw.ctypes.data % 4096
    memory = raw[start : start + nbytes]
    if content == "zero":
        memory[:] = 0
    elif content == "random":
        memory.view(np.uint64)[:] = rng.integers(0, 2**64, nbytes // 8, dtype=np.uint64)
    elif content == "text":
        piece = b" ".join(_WORDS[i] for i in rng.integers(0, len(_WORDS), 20000))
        memory[:] = np.resize(np.frombuffer(piece, dtype=np.uint8), nbytes)
    elif content == "mixed":
        parts = [pages(part, nbytes, seed) for part in ("zero", "random", "text")]
        choice = rng.integers(0, 3, nbytes // 4096)
        for i, part in enumerate(parts):
            chosen = choice == i
            memory.reshape(-1, 4096)[chosen] = part.reshape(-1, 4096)[chosen]
    else:
        raise ValueError(f"content {content!r}: known are {', '.join(CONTENTS)}")
    return memory
