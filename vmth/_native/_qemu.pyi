"""Cython over csrc/core/qemu_ram.c and qemu_multifd.c; vmth.qemu.ram makes dataclasses and
StreamErrors of it."""

from typing import Any

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
Runs = npt.NDArray[Any]
RUN: np.dtype[Any]

PACKET_SHORT: int  #: why ``PacketParser.parse()`` stopped (``enum vmth_multifd_stop``)
PACKETS_FULL: int
PACKET_OTHER: int

class RecordError(Exception):
    """args: (field, received, allowed)"""

class Blocks:
    def __init__(self, page_bytes: int, lengths: U64, names: bytes) -> None: ...

class Parser:
    def __init__(self, cap: int) -> None: ...
    def forget(self) -> None: ...
    def continues(self) -> int:
        """The block that CONTINUE means, for who parses what comes next."""

    def go_on(self, block: int) -> None:
        """Behind what somebody else has parsed."""

    def parse(
        self, blocks: Blocks, data: bytes | memoryview
    ) -> tuple[int, int, int, int, Runs]: ...

class PacketParser:
    def __init__(self, cap: int) -> None: ...
    def parse(self, blocks: Blocks, data: bytes | memoryview) -> tuple[int, int, Runs]:
        """(why it stopped, bytes of whole packets, runs). ValueError for a ``cap`` that is less
        than the pages of one packet."""

class Encoder:
    def __init__(self) -> None: ...
    def forget(self) -> None: ...
    def encode(
        self, blocks: Blocks, runs: npt.NDArray[np.uint8], data: bytes | memoryview
    ) -> bytes | memoryview: ...
