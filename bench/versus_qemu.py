# SPDX-License-Identifier: Apache-2.0
"""vmth against QEMU's own migration: the same guests, the same dirtying, the same link, one run.

    python bench/versus_qemu.py [--case NAME ...] [--link loopback,1gbit,100mbit] [--rounds 3]
        [--only REGEX] [--qemu BINARY] [--json FILE]

Every way is run once before any is run again, in the other order. Medians with the spread of the
runs; the ratio is to the QEMU way that was fastest in that case. Before each run as much memory as
it will take is written to and freed: where this machine is a virtual one whose host takes idle
memory back, no way pays for getting it again. Needs root (network namespaces,
writing guest memory), a QEMU of 9.0 or later (before that a busy guest under TCG loses writes),
binutils and iproute2.
bench/versus_plot.py draws the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from versus_link import Link, make_link
from versus_runs import (
    Case,
    Outcome,
    QemuMode,
    run_core,
    run_core_beside_sibling,
    run_core_from_disk,
    run_core_warm,
    run_qemu,
    run_qemu_path,
)

MIB = 1 << 20
MIX = "zero=30,dup=15,files=35,random=20"
NOISE = "random=100"

#: Scaled to two cores and 1 Gbit/s from the workloads that peers publish.
CASES = {
    case.name: case
    for case in (
        Case("noise-2g", 2048 * MIB, NOISE),
        # Where a hypervisor takes freed memory back, less of it has to be given out again.
        Case("noise-1g", 1024 * MIB, NOISE),
        Case("W0-idle", 1024 * MIB, MIX, "uniform", 4_000_000, 64 * MIB),
        Case("W1-128m", 1024 * MIB, MIX, "sequential", 100_000_000, 128 * MIB),
        Case("W5-zero50", 1024 * MIB, "zero=50,random=50"),
        Case("W5-zero100", 1024 * MIB, "zero=100"),
        Case("W7-zipf", 1024 * MIB, MIX, "zipf", 100_000_000, 256 * MIB),
        Case("W9-sequential", 512 * MIB, MIX, "sequential", 0, 256 * MIB),
        Case("W11-sparse", 1024 * MIB, MIX, "sparse", 200_000_000, 256 * MIB),
        Case("W12-silent", 1024 * MIB, MIX, "silent", 200_000_000, 256 * MIB),
        Case("W13-jump", 1024 * MIB, MIX, "uniform", 4_000_000, 64 * MIB, jump_s=2.0),
        Case("random-110", 1024 * MIB, NOISE, "uniform", 110_000_000, 256 * MIB),
        Case("rewrite-110", 1024 * MIB, MIX, "rewrite", 110_000_000, 256 * MIB),
        Case("rewrite-150", 1024 * MIB, MIX, "rewrite", 150_000_000, 256 * MIB),
        Case("dup-template", 1024 * MIB, "zero=30,template=15,files=35,random=20"),
        Case("dup-file-copy", 1024 * MIB, "zero=30,file-copy=15,files=35,random=20"),
    )
}
LINKS = {"loopback": 0, "1gbit": 1_000_000_000, "100mbit": 100_000_000}
FAST = {"multifd-channels": 2}
QEMU_MODES = (
    QemuMode("plain"),
    QemuMode("multifd", ("multifd",), FAST),
    *(
        QemuMode(
            f"multifd+zstd{level}",
            ("multifd",),
            {**FAST, "multifd-compression": "zstd", "multifd-zstd-level": level},
        )
        for level in (1, 3, 6)
    ),
    QemuMode("xbzrle", ("xbzrle",), {"xbzrle-cache-size": 512 * MIB}),
    QemuMode("auto-converge", ("auto-converge",)),
)
#: Name -> options of ``vmth demo``.
CORE_WAYS: dict[str, tuple[str, ...]] = {
    "vmth, 1 channel": ("--channels", "1"),
    "vmth, 2 channels": ("--channels", "2"),
}


def ways(qemu: Sequence[str]) -> dict[str, Callable[[Case, Link], Outcome]]:
    found: dict[str, Callable[[Case, Link], Outcome]] = {}
    for mode in QEMU_MODES:
        found[f"QEMU {mode.name}"] = partial(run_qemu, mode=mode, binary=qemu)
    for land in ("memory", "stream"):
        found[f"vmth for QEMU, {land}"] = partial(run_qemu_path, binary=qemu, land=land)
    for name, options in CORE_WAYS.items():
        found[name] = partial(run_core, options=options)
    warm = ("--channels", "2")
    found["vmth, warm return"] = partial(run_core_warm, options=warm)
    found["vmth, sibling"] = partial(run_core_beside_sibling, options=warm)
    found["vmth, base disk"] = partial(run_core_from_disk, options=warm)
    return found


def measure(
    case: Case, link_name: str, wanted: re.Pattern[str], rounds: int, qemu: Sequence[str]
) -> dict[str, Any]:
    runs: dict[str, list[Outcome]] = {}
    chosen = [(name, run) for name, run in ways(qemu).items() if wanted.search(name)]
    with make_link(link_name, LINKS[link_name]) as link:
        for number in range(rounds):
            for name, run in chosen if number % 2 == 0 else reversed(chosen):
                print(f"  {case.name} {link_name} {name} ...", file=sys.stderr, flush=True)
                runs.setdefault(name, []).append(run(case, link))
    return {"case": asdict(case), "link": link_name, "runs": _as_rows(runs)}


def _as_rows(runs: dict[str, list[Outcome]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [asdict(outcome) for outcome in outcomes] for name, outcomes in runs.items()}


def _median(rows: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(float(row[key]) for row in rows)


def show(result: dict[str, Any]) -> None:
    """One table: a way a line, QEMU's fastest converged one is 1.00."""
    runs = result["runs"]
    case = result["case"]
    memory, working_set = (case[key] // MIB for key in ("memory_bytes", "working_set_bytes"))
    print(
        f"\n{case['name']}, {result['link']}: {memory} MiB, {case['content']}, {case['workload']} "
        f"{case['rate_bps'] / 1e6:g} MB/s over {working_set} MiB"
    )
    print(
        f"{'way':<22}{'total s':>9}{'(min to max)':>18}{'ratio':>7}{'downtime ms':>13}"
        f"{'MB sent':>9}{'CPU s':>7}  converged"
    )
    best = min(
        (
            _median(rows, "total_s")
            for name, rows in runs.items()
            if name.startswith("QEMU") and all(row["converged"] for row in rows)
        ),
        default=0.0,
    )
    for name, rows in runs.items():
        totals = [row["total_s"] for row in rows]
        total = statistics.median(totals)
        good = sum(row["converged"] for row in rows)
        ratio = f"{total / best:.2f}" if best and good == len(rows) else "-"
        print(
            f"{name:<22}{total:>9.2f}{f'({min(totals):.2f} to {max(totals):.2f})':>18}{ratio:>7}"
            f"{_median(rows, 'downtime_s') * 1e3:>13.1f}{_median(rows, 'wire_bytes') / 1e6:>9.0f}"
            f"{_median(rows, 'cpu_s'):>7.2f}  {good} of {len(rows)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", action="append", choices=sorted(CASES))
    parser.add_argument("--link", default="loopback,1gbit,100mbit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=".", help="ways whose name matches")
    parser.add_argument("--qemu", default=os.environ.get("VMTH_QEMU_SRC", "qemu-system-x86_64"))
    parser.add_argument("--json", help="write all runs there")
    given = parser.parse_args()
    results = []
    for link_name in given.link.split(","):
        if link_name not in LINKS:
            parser.error(f"--link: received {link_name}, allowed {', '.join(LINKS)}")
        for name in given.case or CASES:
            result = measure(
                CASES[name],
                link_name,
                re.compile(given.only),
                given.rounds,
                shlex.split(given.qemu),
            )
            results.append(result)
            show(result)
            if given.json:
                with open(given.json, "w") as file:
                    json.dump(
                        {
                            "machine": platform.platform(),
                            "cpus": os.cpu_count(),
                            "command": sys.argv,
                            "results": results,
                        },
                        file,
                        indent=1,
                    )


if __name__ == "__main__":
    main()
