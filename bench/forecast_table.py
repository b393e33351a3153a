# SPDX-License-Identifier: Apache-2.0
"""How well the end was known after round 1: forecast and actual total time and downtime.

    python bench/forecast_table.py [--link 1gbit] [--rounds 3] [--case NAME ...] [--json FILE]
        [-- OPTIONS of vmth demo]

Moves guests of vmth's core. An error is a share of what came, positive where too much was forecast;
shown are every run and the 90th percentile of the absolute errors over the runs that converged.
``ms off`` is the downtime's error in time, of which the 90th percentile is shown as a share of the
limit too. ``floor`` is what the machine leaves: that percentile for somebody who knew beforehand
the median of each case's downtimes, and said that. ``medians``: of each case's forecasts against
that of its downtimes, which leaves what is wrong with the forecast itself. A guest that is switched
over after the full pass has its forecast from there. All moves have one state directory, as those
of a host do: forecasts count with what its last handovers took. Needs root and iproute2 for links
that are shaped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import asdict
from typing import Any

from versus_link import make_link
from versus_qemu import CASES, LINKS
from versus_runs import DOWNTIME_LIMIT_MS, Outcome, run_core

CONVERGING = ("W0-idle", "W1-128m", "W5-zero50", "W7-zipf", "W11-sparse", "W12-silent")


def percentile(values: list[float], share: float) -> float:
    """The smallest value that is not exceeded by ``share`` of them."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def show(name: str, link: str, outcome: Outcome) -> tuple[float, float, float] | None:
    """One row; the absolute errors of a run that converged and was expected to: of total time, of
    the downtime, and of the downtime in milliseconds."""
    told: dict[str, Any] = outcome.detail.get("forecast") or {}
    if not outcome.converged or told.get("total_time_error") is None:
        expected = "to converge" if told.get("converges") else "not to converge, or none was made"
        came = "converged" if outcome.converged else "did not converge"
        print(f"{name:<14}{link:<10}{came}; the forecast: {expected}", flush=True)
        return None
    total, downtime = told["total_time_error"], told["downtime_error"]
    off_ms = told["downtime_ms"] - outcome.downtime_s * 1e3
    print(
        f"{name:<14}{link:<10}{told['after_round']:>6}{outcome.total_s:>9.2f}"
        f"{told['total_time_ms'] / 1e3:>10.2f}{total:>8.1%}{outcome.downtime_s * 1e3:>13.1f}"
        f"{told['downtime_ms']:>10.1f}{downtime:>8.0%}{off_ms:>8.1f}",
        flush=True,
    )
    return abs(total), abs(downtime), abs(off_ms)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", action="append", choices=sorted(CASES))
    parser.add_argument("--link", default="1gbit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write all runs there")
    parser.add_argument("options", nargs="*", help="of vmth demo, behind --")
    given = parser.parse_args()
    print(
        f"{'case':<14}{'link':<10}{'after':>6}{'total s':>9}{'forecast':>10}{'error':>8}"
        f"{'downtime ms':>13}{'forecast':>10}{'error':>8}{'ms off':>8}"
    )
    errors: list[tuple[float, float, float]] = []
    downtimes: dict[tuple[str, str], list[float]] = {}
    forecasts: dict[tuple[str, str], list[float]] = {}
    runs: list[dict[str, Any]] = []
    for link_name in given.link.split(","):
        if link_name not in LINKS:
            parser.error(f"--link: received {link_name}, allowed {', '.join(LINKS)}")
        with (
            make_link(link_name, LINKS[link_name]) as link,
            tempfile.TemporaryDirectory(prefix="forecasts-") as state_dir,
        ):
            options = ("--channels", "2", "--state-dir", state_dir, *given.options)
            for _ in range(given.rounds):
                for name in given.case or CONVERGING:
                    outcome = run_core(CASES[name], link, options)
                    runs.append({"case": name, "link": link_name, **asdict(outcome)})
                    found = show(name, link_name, outcome)
                    if found is not None:
                        errors.append(found)
                        downtimes.setdefault((link_name, name), []).append(outcome.downtime_s)
                        said_ms = outcome.detail["forecast"]["downtime_ms"]
                        forecasts.setdefault((link_name, name), []).append(said_ms / 1e3)
    for what, values in zip(("total time", "downtime"), zip(*errors, strict=True), strict=False):
        print(f"{what}: 90th percentile of the error {percentile(list(values), 0.9):.1%}")
    off_ms = percentile([error[2] for error in errors], 0.9)
    print(f"          {off_ms:.1f} ms, {off_ms / DOWNTIME_LIMIT_MS:.1%} of the limit")
    known = [abs(statistics.median(own) / one - 1) for own in downtimes.values() for one in own]
    print(f"          floor {percentile(known, 0.9):.1%}")
    for (link_name, name), own in downtimes.items():
        said, came = statistics.median(forecasts[link_name, name]), statistics.median(own)
        print(
            f"          medians of {name}, {link_name}: {said * 1e3:.1f} ms for {came * 1e3:.1f}, "
            f"{said / came - 1:+.0%}"
        )
    if given.json:
        machine = {"machine": platform.platform(), "cpus": os.cpu_count()}
        with open(given.json, "w") as file:
            json.dump({**machine, "command": sys.argv, "runs": runs}, file, indent=1)


if __name__ == "__main__":
    main()
