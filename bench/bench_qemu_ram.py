# SPDX-License-Identifier: Apache-2.0
"""Reading and writing plain RAM of a migration stream, beside memcpy of the same bytes. Asserts no
time: ``extra_info`` holds GB/s of stream (median), for ratios within one run.

The stream is incompressible pages of one block, with pages that continue the one before (``runs``)
or not (``scattered``: every record its own run), and zero pages between (``mixed``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vmth.qemu.ram import RUN, BlockTable, PageKind, RamEncoder, RamParser
from vmth.qemu.stream import RamPages, StreamReader, StreamWriter
from vmth.qemu.stream.events import BlockListed, RamEnd, RamSize, SectionKind, SectionStarted

PAGE = 4096
NPAGES = 65536  # 256 MiB
TABLE = BlockTable([("pc.ram", NPAGES * PAGE)])
FEED_BYTES = 1 << 20


def records(layout: str) -> memoryview:
    """The records of all pages, as QEMU sends them."""
    runs = np.zeros(NPAGES, dtype=RUN)
    order = np.arange(NPAGES)
    if layout == "scattered":
        order = np.random.default_rng(1).permutation(NPAGES)
    runs["page"], runs["npages"], runs["kind"] = order, 1, PageKind.PAGE
    runs["at"] = order * PAGE
    runs["stride"] = runs["nbytes"] = PAGE
    if layout == "mixed":
        runs["kind"][::2] = PageKind.ZERO
    data = np.random.default_rng(2).integers(0, 256, NPAGES * PAGE, dtype=np.uint8)
    return memoryview(RamEncoder().encode(TABLE, runs, data.data))


def stream(payload: memoryview) -> bytes:
    """A START section around the records."""
    writer = StreamWriter()
    started = SectionStarted(SectionKind.START, 2, "ram", 0, 4)
    listed = BlockListed("pc.ram", NPAGES * PAGE)
    head = [b"QEVM\0\0\0\3", writer.send(started), writer.send(RamSize(NPAGES * PAGE))]
    head.append(writer.send(listed))
    return b"".join((*map(bytes, head), payload, bytes(writer.send(RamEnd()))))


def measure(benchmark: Any, call: Callable[[], object], nbytes: int) -> None:
    benchmark.pedantic(call, rounds=7, warmup_rounds=1)
    benchmark.extra_info["bytes"] = nbytes
    benchmark.extra_info["GB_per_s"] = nbytes / benchmark.stats.stats.median / 1e9


@pytest.fixture(scope="module", params=["runs", "mixed", "scattered"])
def layout(request: pytest.FixtureRequest) -> tuple[str, memoryview]:
    return request.param, records(request.param)


def test_memcpy(benchmark: Any, layout: tuple[str, memoryview]) -> None:
    source = np.frombuffer(layout[1], dtype=np.uint8)
    target = np.zeros_like(source)
    measure(benchmark, lambda: np.copyto(target, source), source.nbytes)


def test_parse(benchmark: Any, layout: tuple[str, memoryview]) -> None:
    """The native parser alone."""

    def parse() -> None:
        parser, at = RamParser(), 0
        while at < len(layout[1]):
            at += parser.parse(TABLE, layout[1][at:]).used

    measure(benchmark, parse, len(layout[1]))


@pytest.mark.parametrize("write", [False, True], ids=["read", "rebuild"])
def test_stream(benchmark: Any, layout: tuple[str, memoryview], write: bool) -> None:
    """The reader fed a megabyte at a time; with the writer behind it, pages are copied once."""
    data = memoryview(stream(layout[1]))

    def go() -> None:
        reader, writer = StreamReader(), StreamWriter()
        for at in range(0, len(data), FEED_BYTES):
            reader.feed(data[at : at + FEED_BYTES])
            while (event := reader.next_event()) is not None:
                if write and isinstance(event, RamPages | RamSize | BlockListed):
                    writer.send(event)

    measure(benchmark, go, len(data))
