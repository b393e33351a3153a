# SPDX-License-Identifier: Apache-2.0
"""Several links of unequal rates carry one migration: what each carries, and the time it takes.

    python bench/channels_table.py [--rates 200,50] [--mib 256] [--rounds 3] [--workload idle]

Mbit/s of each link; needs root and iproute2 (bench/several_links.py). A guest of incompressible
memory moves over each link alone and then over all of them, with a channel a link (--bind). Ideal:
the bytes that were sent, at the sum of the rates of the links, less what Ethernet, IP and TCP
headers take of a full segment. The last round is what was sent while the guest was paused.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from several_links import Hosts, several_links

#: Payload of a full segment (MTU 1500, timestamps) and what it takes of the link (tbf counts it).
SEGMENT_PAYLOAD, SEGMENT_BYTES = 1448, 1514
PORT = 4444


def move(
    hosts: Hosts, addresses: Sequence[str], mib: int, options: Sequence[str]
) -> dict[str, Any]:
    """What the source says of one migration over those of its addresses."""
    vmth = (sys.executable, "-P", "-m", "vmth", "demo", "--insecure")
    with tempfile.TemporaryDirectory(prefix="vmth-bench-") as directory:
        there = subprocess.Popen(
            [
                *hosts.destination,
                *vmth,
                "--receive",
                f"tcp:0.0.0.0:{PORT}",
                "--state-dir",
                f"{directory}/d",
                "--run-on",
                "0s",
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert there.stdout is not None
        for line in there.stdout:
            if "listening" in line:
                break
        said = subprocess.run(
            [
                *hosts.source,
                *vmth,
                "--send",
                f"tcp:{hosts.address}:{PORT}",
                "--json",
                "--memory",
                f"{mib}MiB",
                "--content",
                "random=100",
                "--seed",
                "1",
                "--forms",
                "zero",
                "--channels",
                str(len(addresses)),
                "--bind",
                ",".join(addresses),
                "--state-dir",
                f"{directory}/s",
                *options,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
        )
        there.communicate(timeout=60)
    told: dict[str, Any] = json.loads(said.stdout)
    if not told["verified"]:
        raise SystemExit(f"not verified: {told['error']}")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rates", default="200,50", help="Mbit/s of each link")
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workload", default="idle")
    parser.add_argument("--dirty-rate", default="2MB/s")
    given = parser.parse_args()
    rates = [int(text) * 10**6 for text in given.rates.split(",")]
    options = ["--workload", given.workload]
    if given.workload != "idle":
        options += ["--dirty-rate", given.dirty_rate]
    print(f"{given.mib} MiB incompressible, {given.workload}, links of {given.rates} Mbit/s, "
          f"{given.rounds} runs; {time.strftime('%F')}")  # fmt: skip
    with several_links(rates) as hosts:
        sets = [[index] for index in range(len(rates))] + [list(range(len(rates)))]
        for links in sets:
            runs = [
                move(hosts, [hosts.local_addresses[i] for i in links], given.mib, options)
                for _ in range(given.rounds)
            ]
            show(links, [rates[i] for i in links], runs)


def show(links: Sequence[int], rates: Sequence[int], runs: Sequence[dict[str, Any]]) -> None:
    goodput_bps = [rate / 8 * SEGMENT_PAYLOAD / SEGMENT_BYTES for rate in rates]
    middle = sorted(runs, key=lambda told: float(told["rounds"][0]["duration_ns"]))[len(runs) // 2]
    times = [sum(one["duration_ns"] for one in told["rounds"]) / 1e9 for told in runs]
    ideal_s = middle["wire_bytes"] / sum(goodput_bps)
    took_s = sum(one["duration_ns"] for one in middle["rounds"]) / 1e9
    print(
        f"links {'+'.join(str(i) for i in links):<6} rounds took {took_s:6.2f} s (runs "
        f"{min(times):.2f} to {max(times):.2f}), ideal {ideal_s:6.2f} s, ratio "
        f"{took_s / ideal_s:.3f}; downtime {statistics.median(t['downtime_ms'] for t in runs):.1f} "
        f"ms, {len(middle['rounds'])} rounds"
    )
    total = sum(one["wire_bytes"] for one in middle["transfer"]["channels"])
    for one, rate_bps in zip(middle["transfer"]["channels"], goodput_bps, strict=True):
        print(
            f"    channel {one['index']} from {one['local']:<18} {rate_bps * 8 / 1e6:7.1f} Mbit/s "
            f"of payload, {one['wire_bytes'] / 1e6:8.1f} MB, {one['wire_bytes'] / total:6.1%} of "
            f"the bytes, {rate_bps / sum(goodput_bps):6.1%} of the rates; {one['pages']} pages, "
            f"acknowledged at {one['acked_bps'] * 8 / 1e6:.1f} Mbit/s"
        )


if __name__ == "__main__":
    main()
