# SPDX-License-Identifier: Apache-2.0
"""A migration stream through relays against the same bytes over one socket. Asserts nothing.

    python bench/relay_table.py [--mib 2048] [--rounds 3] [--content random|mixed] [--latency 2000]

A sender and a receiver of their own processes, unix sockets at both ends, as QEMU's would be:
plain ram records of 64 pages a write, so that the relays parse as they do in earnest. Ways: direct;
one relay; two with checked frames over loopback TCP; the same with zstd. Ways are interleaved,
figures are medians of the rounds, ratios are of one run; CPU is of all relays' processes together.
Then the time of a page request and its page through each way, one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

__all__ = ["WAYS", "Figures", "main"]

PAGE = 4096
WRITE_PAGES = 64
FLAG_PAGE, FLAG_CONTINUE, FLAG_MEM_SIZE, FLAG_EOS = 0x8, 0x20, 0x4, 0x10
REQUEST = b"\0\4\0\x0c" + bytes(12)
#: Relays on the way, and the options of the sending one.
WAYS: dict[str, tuple[int, tuple[str, ...]]] = {
    "direct": (0, ()),
    "one relay": (1, ()),
    "two, frames": (2, ()),
    "two, frames, zstd": (2, ("--compress",)),
}


@dataclass
class Figures:
    """Of one way, a value a round."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    wire_ratio: list[float] = field(default_factory=list)
    request_us: float = 0.0
    unread: int = 0


def head_of(nbytes: int) -> bytes:
    """File header, machine, and the start of ``ram`` with one block."""
    idstr = b"\6pc.ram"
    return b"".join(
        (
            b"QEVM\0\0\0\3\7",
            struct.pack(">I", 10),
            b"pc-q35-7.2",
            b"\1\0\0\0\2\3ram\0\0\0\0\0\0\0\4",
            struct.pack(">Q", nbytes | FLAG_MEM_SIZE),
            idstr,
            struct.pack(">Q", nbytes),
            struct.pack(">Q", FLAG_EOS),
            b"\x7e\0\0\0\2\2\0\0\0\2",
            struct.pack(">Q", FLAG_PAGE),
            idstr,
            bytes(PAGE),
        )
    )


def writes_of(nbytes: int, content: str) -> Iterator[bytearray]:
    """The pages' records, made in place: what a QEMU writes at once."""
    rng = np.random.default_rng(1)
    pages = np.frombuffer(rng.bytes(WRITE_PAGES * PAGE), dtype=np.uint8).copy()
    if content == "mixed":  # about what a Linux guest's memory makes of zstd
        pages.reshape(-1, PAGE)[:, PAGE // 3 :] = 7
    record = np.empty((WRITE_PAGES, 8 + PAGE), dtype=np.uint8)
    record[:, 8:] = pages.reshape(-1, PAGE)
    buffer = bytearray(record.tobytes())
    headers = np.frombuffer(buffer, dtype=np.uint8).reshape(WRITE_PAGES, 8 + PAGE)[:, :8]
    for at in range(0, nbytes, WRITE_PAGES * PAGE):
        words = np.arange(at, at + WRITE_PAGES * PAGE, PAGE, dtype=">u8")
        words = (words | np.uint64(FLAG_PAGE | FLAG_CONTINUE)).astype(">u8")
        headers[:] = words.view(np.uint8).reshape(-1, 8)
        yield buffer


def send(sock: socket.socket, nbytes: int, content: str) -> None:
    sock.sendall(head_of(nbytes))
    for piece in writes_of(nbytes, content):
        sock.sendall(piece)
    sock.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def way_to(folder: Path, name: str) -> Iterator[tuple[str, list[subprocess.Popen[str]]]]:
    """The path to connect to, and the relays that stand between it and ``folder``/out."""
    count, options = WAYS[name]
    path, connect = folder / "out", f"unix:{folder}/out"
    relays: list[subprocess.Popen[str]] = []

    def relay(*arguments: str) -> str:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vmth", "relay", "--once", "--json", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        relays.append(process)
        assert process.stderr is not None
        return process.stderr.readline().split()[-1]

    try:
        if count == 2:
            connect = relay(
                *("--listen", "tcp:127.0.0.1:0", "--connect", connect, "--peer", "listen")
            )
        if count:
            peer = ("--peer", "connect") if count == 2 else ()
            path = folder / "in"
            relay("--listen", f"unix:{path}", "--connect", connect, *peer, *options)
        yield str(path), relays
    finally:
        for process in relays:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def connected(
    name: str,
) -> Iterator[tuple[socket.socket, socket.socket, list[subprocess.Popen[str]]]]:
    with (
        tempfile.TemporaryDirectory(prefix="vmth-bench-") as made,
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as source,
    ):
        listener.bind(f"{made}/out")
        listener.listen()
        with way_to(Path(made), name) as (path, relays):
            source.connect(path)
            destination, _ = listener.accept()
            with destination:
                yield source, destination, relays


def children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def idle_cpu_seconds() -> float:
    """Of a process that only starts."""
    before = children_cpu_seconds()
    subprocess.run(
        [sys.executable, "-P", "-m", "vmth", "relay", "--help"], capture_output=True, check=True
    )
    return children_cpu_seconds() - before


def transfer(name: str, nbytes: int, content: str, idle: float, figures: Figures) -> None:
    with connected(name) as (source, destination, relays):
        sender = os.fork()
        if sender == 0:
            send(source, nbytes, content)
            os._exit(0)
        source.close()
        buffer = bytearray(1 << 20)
        began = time.perf_counter()
        while destination.recv_into(buffer):
            pass
        figures.seconds.append(time.perf_counter() - began)
        destination.close()
        os.waitpid(sender, 0)
        before = children_cpu_seconds()
        for process in relays:
            report = json.loads(process.communicate()[0])
            figures.unread += bool(report["last_migrations"][0]["remarks"])
            if report["peer"] == "connect":
                sent = report["wire_sent_bytes"] / report["forward_bytes"]
                figures.wire_ratio.append(sent)
        if relays:
            cpu = children_cpu_seconds() - before - idle * len(relays)
            figures.cpu_seconds.append(max(cpu, 0.0))


def latency(name: str, count: int) -> float:
    """Microseconds for a request back and a page forth, the median."""
    page = bytes(8 + PAGE)
    times = []
    with connected(name) as (source, destination, _):
        for _ in range(count):
            began = time.perf_counter()
            destination.sendall(REQUEST)
            source.recv(len(REQUEST), socket.MSG_WAITALL)
            source.sendall(page)
            destination.recv(len(page), socket.MSG_WAITALL)
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--content", choices=["random", "mixed"], default="random")
    parser.add_argument("--latency", type=int, default=2000, help="requests; 0: none")
    given = parser.parse_args()
    nbytes = given.mib << 20
    idle = idle_cpu_seconds()
    found = {name: Figures() for name in WAYS}
    for _ in range(given.rounds):
        for name, figures in found.items():
            transfer(name, nbytes, given.content, idle, figures)
    for name, figures in found.items() if given.latency else ():
        figures.request_us = latency(name, given.latency)
    print(f"{given.mib} MiB, {given.content}, {given.rounds} rounds, {os.cpu_count()} CPUs")
    print(
        f"{'way':<20}{'GB/s':>8}{'ratio':>8}{'CPU s/GiB':>11}{'wire':>7}{'request us':>12}"
        f"{'unread':>8}"
    )
    direct = statistics.median(found["direct"].seconds)
    for name, figures in found.items():
        seconds = statistics.median(figures.seconds)
        cpu = statistics.median(figures.cpu_seconds or [0.0]) / (nbytes / (1 << 30))
        wire = statistics.median(figures.wire_ratio or [1.0])
        print(
            f"{name:<20}{nbytes / seconds / 1e9:>8.2f}{direct / seconds:>8.2f}{cpu:>11.2f}"
            f"{wire:>7.2f}{figures.request_us:>12.0f}{figures.unread:>8}"
        )


if __name__ == "__main__":
    main()
