# SPDX-License-Identifier: Apache-2.0
"""The forms' speed per core: zstd against bare libzstd, the delta encoder, the content index.

    python bench/kernels_forms.py [rounds]

All of it is C (bench/forms_loop.c, compiled with csrc/core at -O2), one thread, timed by its CPU
time. Everything runs once a round, one after the other, so that a slow moment hits all alike;
medians are shown, with the quartiles as spread; a ratio is of medians of one run. Buffers are
larger than caches. Contents: "files" are this machine's Python and shared libraries, as guests
have them in their page cache; "letters" are random; "random" is incompressible. Asserts nothing.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from kernel_content import pages

from vmth import kernels

PAGE = 4096
ZSTD_BYTES = 16 << 20
DELTA_BYTES = 128 << 20
INDEX_BYTES = 64 << 20  # 4 million entries
CSRC = Path(__file__).parents[1] / "csrc"
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Case:
    """One timed call. ``amount`` per call is in ``unit``; ``baseline`` names another case."""

    name: str
    call: Callable[[], int]
    amount: float
    unit: str
    baseline: str = ""


def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "forms.so"
        sources = sorted(map(str, CSRC.glob("core/**/*.c")))
        sources.append(str(Path(__file__).with_name("forms_loop.c")))
        options = ["-std=gnu11", "-O2", "-shared", "-fPIC", f"-I{CSRC}", f"-I{CSRC / 'include'}"]
        subprocess.run(["cc", *options, *sources, "-o", str(target), "-lzstd"], check=True)
        loaded = ctypes.CDLL(str(target))
    void, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for name, arguments in {
        "bare_zstd": [void, size, size, number],
        "form_zstd": [void, size, size, number, number],
        "bare_unzstd": [void, size, size, number, number],
        "form_unzstd": [void, size, size, number, number],
        "promise": [void, size],
        "delta_encode": [void, void, size, size],
        "delta_apply": [void, void, size, number],
        "index_make": [void, void, size],
        "index_insert": [void, void, size],
        "index_find": [void, void, size],
    }.items():
        function = getattr(loaded, name)
        function.argtypes = arguments
        function.restype = ctypes.c_uint64 if name != "index_make" else ctypes.c_int
    return loaded


def files(nbytes: int) -> U8:
    """The machine's own files, whole pages, half text and half machine code."""
    memory = np.zeros(nbytes, dtype=np.uint8)
    folders = [(sysconfig.get_path("stdlib"), "*.py"), ("/usr/lib", "*.so*")]
    for part, (folder, pattern) in enumerate(folders):
        at, end = part * nbytes // 2, (part + 1) * nbytes // 2
        for path in sorted(Path(folder).rglob(pattern)):
            if at < end and path.is_file() and not path.is_symlink():
                content = np.fromfile(path, dtype=np.uint8, count=min(1 << 20, end - at))
                memory[at : at + len(content)] = content
                at += -(-len(content) // PAGE) * PAGE
    return memory


def contents(nbytes: int) -> dict[str, U8]:
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz0123456789", dtype=np.uint8)
    return {
        "files": files(nbytes),
        "letters": np.random.default_rng(1).choice(letters, nbytes),
        "random": pages("random", nbytes),
    }


def zstd_cases(forms: ctypes.CDLL) -> Iterator[Case]:
    for content, memory in contents(ZSTD_BYTES).items():
        at = memory.ctypes.data
        for frame, level in ((64 << 10, 1), (64 << 10, 3), (4 << 10, 1)):
            what = f"zstd {level}, {frame >> 10} KiB frames, {content}"
            bare = f"{what}, bare libzstd"

            def run(name: str, *rest: int, memory: U8 = memory) -> int:
                return int(getattr(forms, name)(memory.ctypes.data, len(memory), *rest))

            def lazily(*arguments: object, run: Callable[..., int] = run) -> Callable[[], int]:
                return lambda: run(*arguments)

            yield Case(bare, lazily("bare_zstd", frame, level), len(memory), "B")
            yield Case(what, lazily("form_zstd", frame, level, 0), len(memory), "B", bare)
            yield Case(
                f"{what}, promising pages only",
                lazily("form_zstd", frame, level, 1),
                len(memory),
                "B",
                bare,
            )
        yield Case(
            f"promise, {content}",
            lambda at=at: int(forms.promise(at, ZSTD_BYTES)),  # type: ignore[misc]
            ZSTD_BYTES,
            "B",
        )
        if content == "files":
            bare = "unpack zstd 1, 64 KiB, files, bare libzstd"
            times = ZSTD_BYTES >> 16
            name = "unpack zstd 1, 64 KiB, files"
            for which, function in ((bare, forms.bare_unzstd), (name, forms.form_unzstd)):
                unpack = partial(function, at, 0, 64 << 10, 1, times)
                yield Case(which, unpack, ZSTD_BYTES, "B", bare if which == name else "")


def changed(base: U8, runs: int, longest: int) -> U8:
    """A copy with ``runs`` runs of 1 to ``longest`` changed bytes in each page; 0: none."""
    now = base.copy()
    rng = np.random.default_rng(2)
    for page in now.reshape(-1, PAGE):
        for start in rng.integers(0, PAGE - longest, runs):
            length = int(rng.integers(1, longest + 1))
            page[start : start + length] ^= rng.integers(1, 256, length, dtype=np.uint8)
    return now


def delta_cases(forms: ctypes.CDLL, keep: list[U8]) -> Iterator[Case]:
    base = pages("random", DELTA_BYTES)
    kinds = {
        "equal pages": changed(base, 0, 1),
        "one change of 1 to 64 bytes": changed(base, 1, 64),
        "eight changes of 8 bytes": changed(base, 8, 8),
        "64 changes of 16 bytes": changed(base, 64, 16),
        "all new": pages("random", DELTA_BYTES, seed=3),
    }
    keep += [base, *kinds.values()]
    for name, now in kinds.items():
        yield Case(
            f"delta, {name}",
            lambda now=now: int(  # type: ignore[misc]
                forms.delta_encode(base.ctypes.data, now.ctypes.data, DELTA_BYTES, PAGE // 2)
            ),
            DELTA_BYTES,
            "B",
        )
    small = kinds["one change of 1 to 64 bytes"]
    fastest, *others = kernels.kernels()["delta"]

    def with_kernel(name: str) -> int:
        forms.vmth_kernel_select(b"delta", name.encode())
        total = forms.delta_encode(base.ctypes.data, small.ctypes.data, DELTA_BYTES, PAGE // 2)
        forms.vmth_kernel_select(b"delta", fastest.encode())
        return int(total)

    for name in others:
        yield Case(
            f"delta, one change of 1 to 64 bytes, {name}",
            lambda name=name: with_kernel(name),  # type: ignore[misc]
            DELTA_BYTES,
            "B",
            "delta, one change of 1 to 64 bytes",
        )
    yield Case(
        "apply a delta of one change",
        lambda: int(forms.delta_apply(base.ctypes.data, small.ctypes.data, 0, 100000)),
        100000,
        "pages",
    )


def index_cases(forms: ctypes.CDLL, keep: list[U8]) -> Iterator[Case]:
    memory = pages("zero", INDEX_BYTES)
    n = INDEX_BYTES // 16 // 2
    known = pages("random", 16 * n, seed=4)
    unknown = pages("random", 16 * n, seed=5)
    index = np.zeros(16, dtype=np.uint8)
    keep += [memory, known, unknown, index]
    at = index.ctypes.data
    if forms.index_make(at, memory.ctypes.data, INDEX_BYTES) != 0:
        raise SystemExit("the content index refused its memory")
    for what, hashes in (("known", known), ("unknown", unknown)):
        for name in ("insert", "find") if what == "known" else ("find",):
            function = getattr(forms, f"index_{name}")
            yield Case(
                f"content index, {name} {what}",
                lambda f=function, h=hashes: int(f(at, h.ctypes.data, n)),  # type: ignore[misc]
                n,
                "calls",
            )


def rate(amount: float, unit: str, seconds: float) -> str:
    if unit == "B":
        return f"{amount / seconds / 1e9:7.2f} GB/s"
    return f"{amount / seconds / 1e6:7.1f} M {unit}/s"


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    forms = library()
    keep: list[U8] = []
    cases = [*zstd_cases(forms), *delta_cases(forms, keep), *index_cases(forms, keep)]
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    results: dict[str, int] = {}
    for round_ in range(rounds + 1):
        for case in cases:
            start = time.thread_time()
            results[case.name] = case.call()
            if round_ > 0:  # the first makes contexts and faults memory in
                seconds[case.name].append(time.thread_time() - start)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{platform.machine()}, {rounds} rounds, load {load}")
    print(f"{'form':58}{'median':>16}{'quartiles':>18}{'yield':>8}{'of baseline':>13}")
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    for case in cases:
        low, high = np.percentile(seconds[case.name], [25, 75])
        scale = 1e9 if case.unit == "B" else 1e6
        spread = f"{case.amount / high / scale:.2f} .. {case.amount / low / scale:.2f}"
        packs = case.name.startswith(("zstd", "delta"))
        share = f"{results[case.name] / case.amount:.3f}" if packs else ""
        ratio = f"{medians[case.baseline] / medians[case.name]:.3f}" if case.baseline else ""
        speed = rate(case.amount, case.unit, medians[case.name])
        print(f"{case.name:58}{speed:>16}{spread:>18}{share:>8}{ratio:>13}")


if __name__ == "__main__":
    main()
