# SPDX-License-Identifier: Apache-2.0
"""The kernels' speed as ratios of one run: each against its baseline, interleaved.

    python bench/kernels_table.py [rounds]

Baseline of the page kernels is a plain read of the same buffer (bench/plain_read.c, compiled for
this machine). Everything runs once a round, one after the other: a slow moment hits all alike;
medians are shown, with the quartiles as spread. One thread, whose CPU time is measured, so that a
busy machine counts less; still, compare only what one run printed, and look at the load it names.
Buffers are larger than caches, save the 1 % bitmap (32 MiB, 268 million pages: a 1 TiB guest).
Asserts nothing.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from kernel_content import pages

from vmth import kernels

NBYTES = 128 << 20
NBITS = 1 << 28
EMPTY_NBITS = 1 << 30
DIGEST_PAGES = 1 << 23  # a table of 128 MiB
CSRC = Path(__file__).parents[1] / "csrc"
U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]


def compiled(source: Path, *options: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "compiled.so"
        subprocess.run(
            ["cc", *options, "-shared", "-fPIC", str(source), "-o", str(library)], check=True
        )
        return ctypes.CDLL(str(library))


def plain_reader() -> Callable[[U8], None]:
    source = Path(__file__).with_name("plain_read.c")
    read = compiled(source, "-O3", "-march=native").plain_read
    read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    read.restype = ctypes.c_uint64
    return lambda memory: read(memory.ctypes.data, len(memory))


def with_kernel(family: str, name: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        kernels.select(family, name)
        return call()

    return run


def numpy_runs(words: U64) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """First and last page of each run: the fastest of the formulations that were tried."""
    bits = np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_)
    at = np.flatnonzero(bits)
    breaks = np.flatnonzero(np.diff(at) != 1)
    return at[np.r_[0, breaks + 1]], at[np.r_[breaks, at.size - 1]]


def numpy_runs_of_used_words(words: U64) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The same over the words that are not zero."""
    used = np.flatnonzero(words)
    bits = np.unpackbits(words[used].view(np.uint8), bitorder="little").view(np.bool_)
    at = np.flatnonzero(bits)
    at = used[at >> 6] << 6 | at & 63
    breaks = np.flatnonzero(np.diff(at) != 1)
    return at[np.r_[0, breaks + 1]], at[np.r_[breaks, at.size - 1]]


def in_pieces(words: U64, runs: Callable[[U64], object]) -> None:
    """Pieces that stay in the cache; runs across pieces are not even joined."""
    for at in range(0, len(words), 1 << 14):
        runs(words[at : at + (1 << 14)])


def all_runs(words: U64, out: U64) -> None:
    at = 0
    while at < 64 * len(words):
        _, at = kernels.bitmap_runs(words, 64 * len(words), at, out)


def digest_filler() -> Callable[[U64], None]:
    """vmth_digest_fill over a table, with one hash; C's own, since Python never holds the table."""
    fill = compiled(
        CSRC / "core" / "memory_digest.c", "-O2", f"-I{CSRC}", f"-I{CSRC / 'include'}"
    ).vmth_digest_fill
    fill.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_size_t]
    fill.argtypes += [ctypes.c_void_p] * 3
    fill.restype = None
    digest = np.zeros(3, dtype=np.uint64)
    hash_ = np.array([1, 2], dtype=np.uint64)
    return lambda table: fill(
        digest.ctypes.data, 0, 0, len(table), table.ctypes.data, hash_.ctypes.data, None
    )


def print_digest_rates(rounds: int) -> None:
    fill = digest_filler()
    table = np.zeros((DIGEST_PAGES, 2), dtype=np.uint64)
    calls: dict[str, Callable[[], object]] = {
        "digest of a run of one hash": lambda: kernels.digest_fill_of(0, 0, DIGEST_PAGES, 1, 2),
        "digest fill, no page valid before": lambda: fill(table),
        "digest fill, every page valid before": lambda: fill(table),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        table.fill(0)
        for name, call in calls.items():
            start = time.thread_time()
            call()
            seconds[name].append(time.thread_time() - start)
    for name, times in seconds.items():
        low, median, high = np.percentile(times, [25, 50, 75]) * 1e9 / DIGEST_PAGES
        spread = f"{low:.2f} .. {high:.2f}"
        print(f"{name:58}{median:8.2f}ns{spread:>20}{1e3 / median:9.0f} M pages/s")


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def cases() -> dict[str, tuple[str, Callable[[], object]]]:
    """name -> (name of its baseline, call)"""
    read = plain_reader()
    zero, random = pages("zero", NBYTES), pages("random", NBYTES)
    hashes = np.zeros((NBYTES // 4096, 2), dtype=np.uint64)
    table: dict[str, tuple[str, Callable[[], object]]] = {
        "plain read, zero pages": ("", lambda: read(zero)),
        "plain read, random pages": ("", lambda: read(random)),
    }
    for name in kernels.kernels()["zero"]:
        table[f"zero scan, zero pages, {name}"] = (
            "plain read, zero pages",
            with_kernel("zero", name, lambda: kernels.zero_scan(zero, 4096)),
        )
    default = kernels.kernels()["zero"][0]
    for name in kernels.kernels()["hash"]:
        table[f"page hash, {name}"] = (
            "plain read, random pages",
            with_kernel("hash", name, lambda: kernels.page_hash(random, 4096, 1, hashes)),
        )
        table[f"fused zero+hash, {name}"] = (
            f"page hash, {name}",
            with_kernel(
                "zero",
                default,
                with_kernel("hash", name, lambda: kernels.page_hash_zero(random, 4096, 1, hashes)),
            ),
        )
    table["fused zero+hash, zero pages"] = (
        f"zero scan, zero pages, {default}",
        with_kernel("zero", default, lambda: kernels.page_hash_zero(zero, 4096, 1, hashes)),
    )
    for name in kernels.kernels()["content"]:
        table[f"content hash (BLAKE2b), {name}"] = (
            "content hash (BLAKE2b), scalar",
            with_kernel(
                "content",
                name,
                lambda: kernels.content_hash(random, 4096, bytes(32), hashes),
            ),
        )
    empty = np.zeros(EMPTY_NBITS // 64, dtype=np.uint64)
    empty.fill(0)  # pages of its own: the kernel's one zero page would stay in the cache
    sparse_bits = np.random.default_rng(1).random(NBITS, dtype=np.float32) < 0.01
    sparse = np.packbits(sparse_bits, bitorder="little").view(np.uint64)
    out = np.empty((65536, 2), dtype=np.uint64)
    table["plain read, empty bitmap"] = ("", lambda: read(empty.view(np.uint8)))
    numpy_forms: dict[str, Callable[[], object]] = {
        "NumPy runs, 1 %": lambda: numpy_runs(sparse),
        "NumPy runs, 1 %, used words": lambda: numpy_runs_of_used_words(sparse),
        "NumPy runs, 1 %, in pieces": lambda: in_pieces(sparse, numpy_runs),
    }
    for name, call in numpy_forms.items():
        table[name] = ("", call)
    for name in kernels.kernels()["bitmap"]:
        table[f"runs of an empty bitmap, {name}"] = (
            "plain read, empty bitmap",
            with_kernel("bitmap", name, lambda: all_runs(empty, out)),
        )
        for form in numpy_forms:
            table[f"runs, 1 %, {name}, against {form}"] = (
                form,
                with_kernel("bitmap", name, lambda: all_runs(sparse, out)),
            )
    return table


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    table = cases()
    seconds: dict[str, list[float]] = {name: [] for name in table}
    for round_ in range(rounds + 1):
        for name, (_, call) in table.items():
            start = time.thread_time()
            call()
            if round_ > 0:  # the first faults in what is written
                seconds[name].append(time.thread_time() - start)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{cpu_model()}, Python {platform.python_version()}, {rounds} rounds, load {load}")
    print(f"{'kernel':58}{'median':>10}{'quartiles':>20}{'speed / baseline':>18}")
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    for name, (baseline, _) in table.items():
        low, high = np.percentile(seconds[name], [25, 75])
        ratio = f"{medians[baseline] / medians[name]:.2f}" if baseline else ""
        spread = f"{low * 1e3:.2f} .. {high * 1e3:.2f}"
        print(f"{name:58}{medians[name] * 1e3:8.2f}ms{spread:>20}{ratio:>18}")
    print_digest_rates(rounds)


if __name__ == "__main__":
    main()
