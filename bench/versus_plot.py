# SPDX-License-Identifier: Apache-2.0
"""Draw what bench/versus_qemu.py measured: one SVG, a panel a case and link.

    python bench/versus_qemu.py --json runs.json
    python bench/versus_plot.py runs.json versus.svg

Bars are medians of the total time, lines the spread of the runs; the bytes on the wire and the
downtime stand behind. A way that did not converge has no bar. Needs matplotlib (``pip install
'vmth[bench]'``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

OURS, THEIRS = "#1b6ca8", "#b8b8b8"


def panel(axes: Any, result: dict[str, Any]) -> None:
    case, runs = result["case"], result["runs"]
    names = list(runs)
    axes.set_title(f"{case['name']}, {result['link']}", fontsize=9, loc="left")
    for at, name in enumerate(names):
        rows = runs[name]
        if not all(row["converged"] for row in rows):
            axes.text(0, at, "  did not converge", va="center", fontsize=7, color="#a00000")
            continue
        totals = [row["total_s"] for row in rows]
        middle = statistics.median(totals)
        axes.barh(at, middle, color=OURS if name.startswith("vmth") else THEIRS, height=0.7)
        axes.hlines(at, min(totals), max(totals), color="black", linewidth=0.8)
        megabytes = statistics.median(row["wire_bytes"] for row in rows) / 1e6
        downtime_ms = statistics.median(row["downtime_s"] for row in rows) * 1e3
        axes.text(
            max(totals), at, f"  {megabytes:.0f} MB, {downtime_ms:.0f} ms", va="center", fontsize=7
        )
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel("total time, s (MB on the wire, downtime)", fontsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", help="the JSON of versus_qemu.py")
    parser.add_argument("picture", help="what to write: .svg or .png")
    given = parser.parse_args()
    try:
        import matplotlib
    except ModuleNotFoundError:
        sys.exit("versus_plot: matplotlib is missing: pip install 'vmth[bench]'")
    matplotlib.use("Agg")
    # Text stays text, and the same runs give the same file.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "vmth"}
    from matplotlib import pyplot

    with open(given.runs) as file:
        told = json.load(file)
    results = told["results"]
    columns = 2 if len(results) > 1 else 1
    rows = -(-len(results) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(5.6 * columns, 2.4 * rows))
    panels = list(grid.flat) if len(results) > 1 else [grid]
    for axes, result in zip(panels, results, strict=False):
        panel(axes, result)
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    figure.suptitle(f"{told['cpus']} CPUs, {told['machine']}", fontsize=7, x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(given.picture, metadata={"Date": None} if given.picture.endswith("svg") else {})


if __name__ == "__main__":
    main()
