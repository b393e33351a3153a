# SPDX-License-Identifier: Apache-2.0
"""Whether a dictionary would pay for zstd: bytes and time with and without one.

    python bench/dictionary_table.py [MiB] [rounds]

Content is this machine's files as a page cache has them, in an order that has no file twice. A
dictionary is trained from pages spread over all of it, as a source could sample them before its
first round; the dictionary itself counts, as it would have to be sent. Cells
are interleaved, times are medians of one core. ``bytes`` is what is sent with the dictionary as a
share of what is sent without, ``speed`` the ratio of the content compressed in a second.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import zstandard
from kernels_forms import files

PAGE = 4096
SAMPLES = 2000  # pages that a dictionary is trained from


@dataclass(frozen=True)
class Cell:
    nbytes: int
    seconds: float


def frames(content: bytes, frame_bytes: int, compressor: zstandard.ZstdCompressor) -> Cell:
    began = time.perf_counter()
    total = sum(
        len(compressor.compress(content[at : at + frame_bytes]))
        for at in range(0, len(content), frame_bytes)
    )
    return Cell(total, time.perf_counter() - began)


def trained(content: bytes, nbytes: int) -> tuple[zstandard.ZstdCompressionDict, float]:
    step = len(content) // PAGE // SAMPLES
    samples: list[bytes | bytearray | memoryview] = [
        content[at * step * PAGE :][:PAGE] for at in range(SAMPLES)
    ]
    began = time.perf_counter()
    dictionary = zstandard.train_dictionary(nbytes, samples, k=1024, d=8)  # fixed: no search
    return dictionary, time.perf_counter() - began


def main() -> None:
    mib, rounds = (int(word) for word in (sys.argv[1:] + ["64", "3"][len(sys.argv) - 1 :]))
    content = np.asarray(files(mib << 20)).tobytes()
    dictionaries = {size: trained(content, size << 10) for size in (16, 112)}
    print(f"{mib} MiB of files, {rounds} rounds, zstd {'.'.join(map(str, zstandard.ZSTD_VERSION))}")
    print(f"{'level':>5}{'frame':>8}{'dictionary':>12}{'trained s':>11}{'bytes':>8}{'speed':>8}")
    for level in (1, 3):
        for frame_kib in (4, 16, 64):
            runs: dict[int, list[Cell]] = {size: [] for size in (0, *dictionaries)}
            for _ in range(rounds):
                for size, cells in runs.items():
                    used = dictionaries[size][0] if size else None
                    compressor = zstandard.ZstdCompressor(level=level, dict_data=used)
                    cells.append(frames(content, frame_kib << 10, compressor))
            plain = statistics.median(cell.seconds for cell in runs[0])
            for size, (dictionary, training_s) in dictionaries.items():
                sent = runs[size][0].nbytes + len(dictionary)
                seconds = statistics.median(cell.seconds for cell in runs[size])
                print(
                    f"{level:>5}{frame_kib:>5}KiB{size:>9}KiB{training_s:>11.2f}"
                    f"{sent / runs[0][0].nbytes:>8.3f}{plain / seconds:>8.2f}"
                )


if __name__ == "__main__":
    main()
