# SPDX-License-Identifier: Apache-2.0
"""Sweep of the kernels: size x implementation x content. Asserts nothing about time.

    python -m pytest bench/test_bench_kernels.py --benchmark-json=kernels.json

Each result says bytes/s and ns/page in ``extra_info``, with what was measured.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kernel_content import CONTENTS, pages
from pytest_benchmark.fixture import BenchmarkFixture

from vmth import kernels

SIZES = [256 << 10, 64 << 20]  # within L2, and far past every cache
NBITS = 1 << 26


def measure(
    benchmark: BenchmarkFixture,
    call: Callable[[], object],
    nbytes: int,
    npages: int,
    **info: object,
) -> None:
    call()
    rounds: Any = benchmark  # its methods have no types
    rounds.pedantic(call, rounds=7, iterations=max(1, (16 << 20) // nbytes))
    seconds: float = rounds.stats["median"]
    benchmark.extra_info.update(
        info, bytes=nbytes, bytes_per_s=nbytes / seconds, ns_per_page=seconds * 1e9 / npages
    )


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("kernel", ["zero_scan", "page_hash", "page_hash_zero"])
def test_pages(benchmark: BenchmarkFixture, kernel: str, nbytes: int, content: str) -> None:
    memory = pages(content, nbytes)
    out = np.zeros((nbytes // 4096, 2), dtype=np.uint64)
    calls: dict[str, Callable[[], object]] = {
        "zero_scan": lambda: kernels.zero_scan(memory, 4096),
        "page_hash": lambda: kernels.page_hash(memory, 4096, 1, out),
        "page_hash_zero": lambda: kernels.page_hash_zero(memory, 4096, 1, out),
    }
    measure(
        benchmark,
        calls[kernel],
        nbytes,
        nbytes // 4096,
        kernel=kernel,
        content=content,
        implementation={family: kernels.selected(family) for family in ("zero", "hash")},
    )


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family in ("zero", "hash") for name in kernels.kernels()[family]],
)
@pytest.mark.parametrize("nbytes", SIZES)
def test_implementations(benchmark: BenchmarkFixture, family: str, name: str, nbytes: int) -> None:
    memory = pages("zero" if family == "zero" else "random", nbytes)
    out = np.zeros((nbytes // 4096, 2), dtype=np.uint64)
    kernels.select(family, name)
    try:
        if family == "zero":
            measure(benchmark, lambda: kernels.zero_scan(memory, 4096), nbytes, len(out), name=name)
        else:
            measure(
                benchmark,
                lambda: kernels.page_hash(memory, 4096, 1, out),
                nbytes,
                len(out),
                name=name,
            )
    finally:
        kernels.select(family, kernels.kernels()[family][0])


@pytest.mark.parametrize("density", [0.0, 0.0001, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("name", kernels.kernels()["bitmap"])
def test_bitmap_runs(benchmark: BenchmarkFixture, name: str, density: float) -> None:
    bits = np.random.default_rng(1).random(NBITS) < density
    words = np.packbits(bits, bitorder="little").view(np.uint64)
    out = np.empty((65536, 2), dtype=np.uint64)

    def all_runs() -> None:
        at = 0
        while at < NBITS:
            _, at = kernels.bitmap_runs(words, NBITS, at, out)

    kernels.select("bitmap", name)
    try:
        measure(benchmark, all_runs, NBITS // 8, NBITS, name=name, density=density)
    finally:
        kernels.select("bitmap", kernels.kernels()["bitmap"][0])


def test_digest_of_zero_runs(benchmark: BenchmarkFixture) -> None:
    npages = 1 << 20
    measure(benchmark, lambda: kernels.digest_fill_of(0, 0, npages, 1, 2), 16 * npages, npages)
