# SPDX-License-Identifier: Apache-2.0
"""Two hosts and a link between them: two network namespaces, a veth pair, tbf at both ends.

Needs root and iproute2. Loopback is a link too, without namespaces and without a limit.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

_numbers = itertools.count()
#: What a shaped queue may hold; a switch has about as much.
LATENCY_MS = 20


@dataclass(frozen=True, slots=True)
class Link:
    name: str
    source: tuple[str, ...]  #: prefix of a command line that runs at the source host
    destination: tuple[str, ...]
    address: str  #: of the destination


@contextmanager
def make_link(name: str, bits_per_second: int) -> Iterator[Link]:
    """0 bits/s: loopback. Everything that was made is removed at the end, also by SIGTERM, which
    then unwinds the main thread: guests and movers of the caller go the same way."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if bits_per_second == 0:
        yield Link(name, (), (), "127.0.0.1")
        return
    number = next(_numbers)
    a, b = (f"vs{os.getpid()}-{number}{side}" for side in "ab")
    subnet = f"10.213.{number % 250}"
    try:
        for namespace in (a, b):
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("link", "add", "va", "netns", a, "type", "veth", "peer", "name", "vb", "netns", b)
        for namespace, device, host in ((a, "va", 1), (b, "vb", 2)):
            _ip("-n", namespace, "address", "add", f"{subnet}.{host}/24", "dev", device)
            _ip("-n", namespace, "link", "set", device, "up")
            _shape(namespace, device, bits_per_second)
        inside = ("ip", "netns", "exec")
        yield Link(name, (*inside, a), (*inside, b), f"{subnet}.2")
    finally:
        for namespace in (a, b):
            subprocess.run(["ip", "netns", "delete", namespace], check=False)


def _shape(namespace: str, device: str, bits_per_second: int) -> None:
    burst_bytes = max(32 << 10, bits_per_second // 8 // 250)
    _ip(
        *("netns", "exec", namespace, "tc", "qdisc", "add", "dev", device, "root", "tbf"),
        *("rate", f"{bits_per_second}bit", "burst", f"{burst_bytes}", "latency", f"{LATENCY_MS}ms"),
    )


def _ip(*arguments: str) -> None:
    command: Sequence[str] = ("ip", *arguments)
    subprocess.run(command, check=True)
