# SPDX-License-Identifier: Apache-2.0
"""What the kernel tests share: run a test once for every implementation this CPU can run."""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

from vmth import kernels

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]

PAGE_SIZES = [4096 << shift for shift in range(10)]  # 4 KiB to 2 MiB


def each_kernel(family: str) -> Callable[..., Iterator[str]]:
    """A fixture that selects one implementation of ``family`` after another."""

    @pytest.fixture(params=kernels.kernels()[family])
    def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
        default = kernels.kernels()[family][0]
        kernels.select(family, request.param)
        assert kernels.selected(family) == request.param
        yield request.param
        kernels.select(family, default)

    return kernel


def aligned(nbytes: int, offset: int) -> U8:
    """Zeroed bytes that begin ``offset`` past a 64-byte boundary."""
    memory = np.zeros(nbytes + 128, dtype=np.uint8)
    start = -memory.ctypes.data % 64 + offset
    return memory[start : start + nbytes]


def bits_of(words: U64, npages: int) -> npt.NDArray[np.bool_]:
    """The bitmap as booleans: NumPy's reading of the layout."""
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:npages].view(np.bool_)


def words_of(bits: npt.NDArray[np.bool_]) -> U64:
    """Booleans as bitmap words, padded with zeros."""
    packed = np.packbits(bits, bitorder="little")
    padded = np.zeros((len(bits) + 63) // 64 * 8, dtype=np.uint8)
    padded[: len(packed)] = packed
    return padded.view(np.uint64)
