# SPDX-License-Identifier: Apache-2.0
"""Images of saved VMs: writing, checking, reading all pages, reading one page. Asserts no time.

``extra_info``: GB/s of guest memory (median of wall time), CPU seconds a GiB of all threads, and
the file's share of memory. Content: ``random`` does not compress; ``real`` is 30 % zeros, 50 %
bytes of this machine's programs, 20 % random, in stretches of 16 pages.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vmth.qemu.image import AtomicFile, Image, ImageWriter, Meta, SavedBlock
from vmth.qemu.ram import RUN, PageKind, Runs

PAGE = 4096
NPAGES = 65536  # 256 MiB
STRETCH = 16
PIECE = 256
WORKERS = 2
META = Meta("pc", "7.2", "0", 1, "", "", True, False, PAGE, (SavedBlock("pc.ram", NPAGES * PAGE),))

Piece = tuple[Runs, memoryview]


def programs() -> npt.NDArray[np.uint8]:
    """32 MiB of /usr/bin."""
    data = bytearray()
    for path in sorted(Path("/usr/bin").iterdir()):
        if path.is_file() and not path.is_symlink() and len(data) < 32 << 20:
            content = path.read_bytes()
            data += content + bytes(-len(content) % PAGE)
    return np.frombuffer(bytes(data), dtype=np.uint8).reshape(-1, PAGE)


def pieces(content: str) -> list[Piece]:
    """As a stream brings them: 8 bytes before each page."""
    chance = np.random.default_rng(1)
    files = programs()
    found = []
    for first in range(0, NPAGES, PIECE):
        rows: list[tuple[int, ...]] = []
        data = np.zeros((PIECE, PAGE + 8), dtype=np.uint8)
        for page in range(0, PIECE, STRETCH):
            part = data[page : page + STRETCH, 8:]
            kind = 2 if content == "random" else int(chance.choice(3, p=[0.3, 0.5, 0.2]))
            if kind == 0:
                rows.append((first + page, STRETCH, 0, 0, 0, 0, PageKind.ZERO))
                continue
            at = int(chance.integers(len(files) - STRETCH))
            part[:] = (
                files[at : at + STRETCH]
                if kind == 1
                else chance.integers(0, 256, part.shape, dtype=np.uint8)
            )
            place = page * (PAGE + 8) + 8
            rows.append((first + page, STRETCH, place, PAGE + 8, PAGE, 0, PageKind.PAGE))
        found.append((np.array(rows, dtype=RUN), data.reshape(-1).data))
    return found


class Nowhere:
    """A sink that costs nothing."""

    def write(self, data: bytes | memoryview, /) -> None:
        pass


def write(sink: Any, content: list[Piece], level: int) -> int:
    with ImageWriter(sink, META, b"head", level=level, workers=WORKERS) as writer:
        for runs, data in content:
            writer.pages(runs, data)
        writer.state(b"state")
        return writer.finish().file_bytes


def measure(benchmark: Any, call: Callable[[], object], file_bytes: int) -> None:
    cpu: list[float] = []

    def timed() -> None:
        began = time.process_time()
        call()
        cpu.append(time.process_time() - began)

    benchmark.pedantic(timed, rounds=5, warmup_rounds=1)
    memory = NPAGES * PAGE
    benchmark.extra_info["GB_per_s"] = memory / benchmark.stats.stats.median / 1e9
    benchmark.extra_info["CPU_s_per_GiB"] = sorted(cpu)[len(cpu) // 2] * (1 << 30) / memory
    benchmark.extra_info["file_share"] = file_bytes / memory


@pytest.fixture(scope="module", params=["random", "real"])
def content(request: pytest.FixtureRequest) -> list[Piece]:
    return pieces(request.param)


@pytest.mark.parametrize("level", [0, 1, 3])
def test_write(benchmark: Any, content: list[Piece], level: int) -> None:
    file_bytes = write(Nowhere(), content, level)
    measure(benchmark, lambda: write(Nowhere(), content, level), file_bytes)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("what", ["check", "frames", "page"])
def test_read(benchmark: Any, content: list[Piece], level: int, what: str, tmp_path: Path) -> None:
    with AtomicFile(tmp_path / "image") as file:
        file_bytes = write(file, content, level)
        file.publish()
    with Image.open(tmp_path / "image") as image:
        if what == "check":
            measure(benchmark, image.check, file_bytes)
        elif what == "frames":
            measure(benchmark, lambda: [None for _ in image.frames(workers=WORKERS)], file_bytes)
        else:
            places = iter(np.random.default_rng(2).permutation(NPAGES).tolist())
            benchmark.pedantic(lambda: image.read_page(0, next(places)), rounds=500)
