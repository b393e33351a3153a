# SPDX-License-Identifier: Apache-2.0
"""Two hosts with several links between them, each of its own rate: two network namespaces, a veth
pair with tbf at both ends for each link.

All links lead to one address of the destination; which one a connection takes is said by the
address that it is sent from (policy routing, as hosts with two network cards have it). Needs root
and iproute2. Used by bench/channels_table.py and by tests/test_several_links.py.
"""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Hosts", "several_links"]

_numbers = itertools.count()
#: What a shaped queue may hold; a switch has about as much.
LATENCY_MS = 20
BURST_BYTES = 32 << 10


@dataclass(frozen=True, slots=True)
class Hosts:
    source: tuple[str, ...]  #: prefix of a command line that runs at the source host
    destination: tuple[str, ...]
    address: str  #: of the destination
    local_addresses: tuple[str, ...]  #: of the source, one a link


@contextmanager
def several_links(bits_per_second: Sequence[int]) -> Iterator[Hosts]:
    """Raises CalledProcessError or FileNotFoundError where namespaces cannot be made. Everything
    that was made is removed at the end."""
    number = next(_numbers)
    a, b = (f"vl{os.getpid()}-{number}{side}" for side in "ab")
    address = "10.214.0.2"
    try:
        for namespace in (a, b):
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        for index, rate in enumerate(bits_per_second):
            _link(a, b, index, rate)
            table = str(100 + index)
            _ip("-n", a, "rule", "add", "from", f"10.214.{index}.1", "table", table)
            gateway = f"10.214.{index}.2"
            _ip(*("-n", a, "route", "add", gateway, "dev", f"va{index}", "table", table))
            if gateway != address:
                _ip(*("-n", a, "route", "add", address, "via", gateway, "table", table))
        inside = ("ip", "netns", "exec")
        locals_ = tuple(f"10.214.{index}.1" for index in range(len(bits_per_second)))
        yield Hosts((*inside, a), (*inside, b), address, locals_)
    finally:
        for namespace in (a, b):
            subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)


def _link(a: str, b: str, index: int, bits_per_second: int) -> None:
    names = f"va{index}", f"vb{index}"
    _ip(
        *("link", "add", names[0], "netns", a, "type", "veth"), "peer", "name", names[1], "netns", b
    )
    for namespace, device, host in ((a, names[0], 1), (b, names[1], 2)):
        _ip("-n", namespace, "address", "add", f"10.214.{index}.{host}/24", "dev", device)
        _ip("-n", namespace, "link", "set", device, "up")
        _ip(
            *("netns", "exec", namespace, "tc", "qdisc", "add", "dev", device, "root", "tbf"),
            *("rate", f"{bits_per_second}bit", "burst", str(BURST_BYTES)),
            *("latency", f"{LATENCY_MS}ms"),
        )


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
