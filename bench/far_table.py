# SPDX-License-Identifier: Apache-2.0
"""Hosts that are far from each other: total time and downtime, by round trip, beside bare sockets
and QEMU's own ways.

    python bench/far_table.py [--rtt 10,50,100] [--mib 256] [--rounds 3] [--mbit 1000]
        [--qemu QEMU-BINARY] [--workload idle|zipf:20]

Incompressible memory over a link that delays (bench/far_link.py). ``bare``: so many bytes over one
socket, as the kernel's buffers let it. Each way runs once before any runs again; shown are medians
and the least and most of the total. Without --qemu only vmth's core is measured. Needs root,
iproute2 and /dev/net/tun.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence

from far_link import far_link
from versus_link import Link
from versus_runs import Case, Outcome, QemuMode, run_core, run_qemu, run_qemu_path

MIB = 1 << 20
SERVE = """
import socket, sys
listener = socket.create_server((sys.argv[1], 5001))
print("ready", flush=True)
sock, _ = listener.accept()
room = bytearray(1 << 20)
while sock.recv_into(room):
    pass
sock.sendall(b"k")
"""
SEND = """
import os, socket, sys, time
sock = socket.create_connection((sys.argv[1], 5001))
data = os.urandom(1 << 20)
began = time.monotonic()
for _ in range(int(sys.argv[2])):
    sock.sendall(data)
sock.shutdown(socket.SHUT_WR)
sock.recv(1)
print(time.monotonic() - began)
"""


def bare(link: Link, mib: int) -> Outcome:
    python = (sys.executable, "-P", "-c")
    with subprocess.Popen(
        [*link.destination, *python, SERVE, link.address], stdout=subprocess.PIPE
    ) as there:
        assert there.stdout is not None
        there.stdout.readline()
        said = subprocess.run(
            [*link.source, *python, SEND, link.address, str(mib)],
            check=True,
            capture_output=True,
            text=True,
        )
    return Outcome(True, float(said.stdout), 0.0, mib * MIB, 0.0)


def ways(case: Case, link: Link, qemu: Sequence[str]) -> dict[str, Callable[[], Outcome]]:
    made: dict[str, Callable[[], Outcome]] = {
        "bare, 1 socket": lambda: bare(link, case.memory_bytes // MIB),
        "core, 1 channel": lambda: run_core(case, link, ("--channels", "1")),
        "core, 4 channels": lambda: run_core(case, link, ("--channels", "4")),
    }
    if qemu:
        multifd = QemuMode("multifd", ("multifd",), {"multifd-channels": 2})
        made |= {
            "QEMU plain": lambda: run_qemu(case, link, QemuMode("plain"), qemu),
            "QEMU multifd, 2": lambda: run_qemu(case, link, multifd, qemu),
            "vmth, memory, 2": lambda: run_qemu_path(case, link, qemu, "memory"),
            "vmth, stream, 2": lambda: run_qemu_path(case, link, qemu, "stream"),
        }
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rtt", default="10,50,100", help="milliseconds")
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mbit", type=int, default=1000)
    parser.add_argument("--qemu", default="")
    parser.add_argument("--workload", default="idle", help="kind, or kind:MB/s")
    given = parser.parse_args()
    kind, _, rate = given.workload.partition(":")
    memory_bytes = given.mib * MIB
    case = Case(
        "far",
        memory_bytes,
        "random=100",
        kind,
        int(float(rate or 0) * 1e6),
        memory_bytes // 4 if rate else 0,
        limit_s=120.0,
    )
    for trip in given.rtt.split(","):
        with far_link("far", given.mbit * 1_000_000, float(trip)) as link:
            made = ways(case, link, [given.qemu] if given.qemu else [])
            runs: dict[str, list[Outcome]] = {way: [] for way in made}
            for _ in range(given.rounds):
                for way, run in made.items():
                    print(f"  {trip} ms {way} ...", file=sys.stderr, flush=True)
                    runs[way].append(run())
        print(f"\n{given.mib} MiB, {given.workload}, {given.mbit} Mbit/s, round trip {trip} ms")
        for way, rows in runs.items():
            totals = [run.total_s for run in rows]
            downtime_ms = statistics.median(run.downtime_s for run in rows) * 1e3
            converged = sum(run.converged for run in rows)
            print(
                f"  {way:<17}{statistics.median(totals):>7.2f} s "
                f"({min(totals):.2f} to {max(totals):.2f})"
                f"{downtime_ms:>8.0f} ms of downtime{converged:>4} of {len(rows)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
