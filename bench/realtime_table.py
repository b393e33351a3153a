# SPDX-License-Identifier: Apache-2.0
"""What real-time priority of the few threads that a paused guest waits for does to the downtime.

    python bench/realtime_table.py [--rounds 25] [-- OPTIONS of vmth demo]

Moves the demonstration's guest by ``vmth demo`` with ``--realtime`` on and off in turns, in turned
order every other round; shows the downtime and each of its parts: median and 90th percentile, in
milliseconds. The default guest is small and writes all the time, so that a core is busy at either
end as soon as it runs there. Where real-time priority is not permitted there is nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence

from vmth.realtime import NOT_PERMITTED, permitted

PARTS = ("pause", "last_pages", "state", "seal", "grant", "resume")
DEFAULT = (
    *("--memory", "256MiB", "--workload", "zipf", "--dirty-rate", "100MB/s"),
    *("--working-set", "64MiB", "--warm-up", "300ms", "--run-on", "100ms"),
)


def move(realtime: str, options: Sequence[str]) -> dict[str, float]:
    """The downtime's parts of one move, and ``downtime``."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "vmth",
        "demo",
        "--json",
        "--realtime",
        realtime,
        *options,
    ]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    told = json.loads(run.stdout)
    return {"downtime": told["downtime_ms"], **told["downtime_parts_ms"]}


def shown(values: list[float]) -> str:
    ordered = sorted(values)
    return f"{statistics.median(ordered):6.2f}/{ordered[int(0.9 * len(ordered))]:5.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("options", nargs="*", help="of vmth demo, behind --")
    given = parser.parse_args()
    if not permitted():
        parser.exit(1, f"{NOT_PERMITTED}\n")
    runs: dict[str, list[dict[str, float]]] = {"off": [], "on": []}
    for number in range(given.rounds):
        for realtime in ("off", "on") if number % 2 == 0 else ("on", "off"):
            runs[realtime].append(move(realtime, given.options or DEFAULT))
    columns = ("downtime", *PARTS)
    print(f"{'realtime':<10}" + "".join(f"{name:>13}" for name in columns))
    for realtime, moves in runs.items():
        cells = (shown([parts[name] for parts in moves]) for name in columns)
        print(f"{realtime:<10}" + "".join(f"{cell:>13}" for cell in cells))


if __name__ == "__main__":
    main()
