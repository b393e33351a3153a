"""Cython over csrc/core/qemu_ram.c; vmth.qemu.ram makes dataclasses and StreamErrors of it."""

from typing import Any

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
Runs = npt.NDArray[Any]
RUN: np.dtype[Any]

class RecordError(Exception):
    """args: (field, received, allowed)"""

class Blocks:
    def __init__(self, page_bytes: int, lengths: U64, names: bytes) -> None: ...

class Parser:
    def __init__(self, cap: int) -> None: ...
    def forget(self) -> None: ...
    def parse(
        self, blocks: Blocks, data: bytes | memoryview
    ) -> tuple[int, int, int, int, Runs]: ...

class Encoder:
    def __init__(self) -> None: ...
    def forget(self) -> None: ...
    def encode(
        self, blocks: Blocks, runs: npt.NDArray[np.uint8], data: bytes | memoryview
    ) -> bytes | memoryview: ...
