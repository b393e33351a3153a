# SPDX-License-Identifier: Apache-2.0
"""The choice of forms against every fixed set of them: contents x links, one run.

    python bench/forms_matrix.py [--rounds 3] [--link loopback,1gbit,100mbit] [--content NAME,...]
        [--json FILE]

Each cell moves an idle guest of vmth's core, once in every way before any way is run again. Shown:
the median total time of each way; the choice's ratio to the fastest fixed set (1.00: as good as if
the best had been known), and the spread of that fixed set's own runs. Memory is smaller where the
link is slower. Needs root and iproute2 for the links that are shaped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from dataclasses import asdict

from versus_link import Link, make_link
from versus_runs import Case, Outcome, run_core

MIB = 1 << 20
LINKS = {  # name: (bits a second, memory)
    "loopback": (0, 1024 * MIB),
    "1gbit": (1_000_000_000, 512 * MIB),
    "100mbit": (100_000_000, 96 * MIB),
}
CONTENTS = {
    "standard": "zero=30,dup=15,files=35,random=20",
    "random": "random=100",
    "files": "files=100",
    "half-zero": "zero=50,random=50",
}
FIXED = {
    "zero": "zero",
    "same, dedup": "zero,same,dedup",
    "delta": "zero,same,dedup,delta",
    "zstd 1": "zero,zstd",
    "all, zstd 1": "zero,same,dedup,delta,zstd",
    "all, zstd 3": "zero,same,dedup,delta,zstd",
}
CHOICE = "the choice"


def options(way: str) -> tuple[str, ...]:
    channels = ("--channels", "2")
    if way == CHOICE:
        return channels
    level = way[-1] if "zstd" in way else "1"
    return (*channels, "--forms", FIXED[way], "--fixed-forms", "--zstd-level", level)


def cell(content: str, link: Link, memory_bytes: int, rounds: int) -> dict[str, list[Outcome]]:
    case = Case(f"{content} {link.name}", memory_bytes, CONTENTS[content], limit_s=120.0)
    runs: dict[str, list[Outcome]] = {way: [] for way in (*FIXED, CHOICE)}
    for _ in range(rounds):
        for way, outcomes in runs.items():
            print(f"  {case.name} {way} ...", file=sys.stderr, flush=True)
            outcomes.append(run_core(case, link, options(way)))
    return runs


def show(content: str, link: str, memory_bytes: int, runs: dict[str, list[Outcome]]) -> None:
    print(f"\n{content} ({CONTENTS[content]}), {link}, {memory_bytes // MIB} MiB")
    medians = {way: statistics.median(run.total_s for run in rows) for way, rows in runs.items()}
    best = min(FIXED, key=lambda way: medians[way])
    for way, rows in runs.items():
        totals = [run.total_s for run in rows]
        mb = statistics.median(run.wire_bytes for run in rows) / 1e6
        cpu = statistics.median(run.cpu_s for run in rows)
        print(
            f"  {way:<12}{medians[way]:>7.2f} s ({min(totals):.2f} to {max(totals):.2f})"
            f"{mb:>8.0f} MB{cpu:>7.2f} CPU s{'   best fixed set' if way == best else ''}"
        )
    times = [run.total_s for run in runs[best]]
    spread = (max(times) - min(times)) / medians[best]
    ratio = medians[CHOICE] / medians[best]
    print(f"  the choice / {best}: {ratio:.2f}; spread of {best}: {spread:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--link", default=",".join(LINKS))
    parser.add_argument("--content", default=",".join(CONTENTS))
    parser.add_argument("--json", help="write all runs there")
    given = parser.parse_args()
    links, contents = given.link.split(","), given.content.split(",")
    for what, names, allowed in (("link", links, LINKS), ("content", contents, CONTENTS)):
        for name in names:
            if name not in allowed:
                parser.error(f"--{what}: received {name}, allowed {', '.join(allowed)}")
    results = []
    for link_name in links:
        bits_per_second, memory_bytes = LINKS[link_name]
        with make_link(link_name, bits_per_second) as link:
            for content in contents:
                runs = cell(content, link, memory_bytes, given.rounds)
                show(content, link_name, memory_bytes, runs)
                rows = {way: [asdict(run) for run in of] for way, of in runs.items()}
                results.append({"content": content, "link": link_name, "runs": rows})
    if given.json:
        machine = {"machine": platform.platform(), "cpus": os.cpu_count()}
        with open(given.json, "w") as file:
            json.dump({**machine, "command": sys.argv, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
