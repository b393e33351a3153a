# SPDX-License-Identifier: Apache-2.0
"""Two hosts far from each other: two network namespaces, a tun device in each, and a process that
carries packets from one to the other, late and at a rate.

    source   tun --> [ queue at the link's rate | delay ] --> tun   destination
             tun <-- [          delay | queue           ] <-- tun

Kernels without netem have no other way to delay packets, and a proxy would end the connections that
are to be far. TCP sees the round trip, and loses a packet when the queue is full. Needs root,
iproute2 and /dev/net/tun.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from versus_link import Link

__all__ = ["far_link"]

_numbers = itertools.count()
MTU = 9000
#: What the queue in front of the link holds: a router's, not the path's whole product of bandwidth
#: and delay.
QUEUE_MS = 20
TUNSETIFF = 0x400454CA
IFF_TUN_NO_PI = 0x0001 | 0x1000
CLONE_NEWNET = 0x40000000


@contextmanager
def far_link(name: str, bits_per_second: int, round_trip_ms: float) -> Iterator[Link]:
    """Everything that was made is removed at the end. CalledProcessError where it cannot be."""
    number = next(_numbers)
    a, b = (f"vf{os.getpid()}-{number}{side}" for side in "ab")
    subnet = f"10.215.{number % 250}"
    carrier = None
    try:
        for namespace in (a, b):
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        command = [sys.executable, __file__, a, b, str(bits_per_second), str(round_trip_ms / 2)]
        carrier = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert carrier.stdout is not None
        if carrier.stdout.readline().strip() != "ready":
            raise OSError(f"{' '.join(command)}: no tun devices")
        for namespace, device, host in ((a, "va", 1), (b, "vb", 2)):
            _ip("-n", namespace, "address", "add", f"{subnet}.{host}/24", "dev", device)
            _ip("-n", namespace, "link", "set", device, "mtu", str(MTU), "up")
        inside = ("ip", "netns", "exec")
        yield Link(name, (*inside, a), (*inside, b), f"{subnet}.2")
    finally:
        if carrier is not None:
            carrier.terminate()
            carrier.communicate()
        for namespace in (a, b):
            subprocess.run(["ip", "netns", "delete", namespace], check=False)


def _ip(*arguments: str) -> None:
    command: Sequence[str] = ("ip", *arguments)
    subprocess.run(command, check=True)


# -- the process between ---------------------------------------------------------------------------


class Direction:
    """Packets of one tun device on their way to the other."""

    def __init__(self, from_fd: int, to_fd: int, bytes_per_s: float, delay_s: float) -> None:
        self.from_fd = from_fd
        self._to_fd = to_fd
        self._second_per_byte = 1 / bytes_per_s
        self._delay_s = delay_s
        self._on_link_until = 0.0
        self._under_way: deque[tuple[float, bytes]] = deque()

    def take(self, now: float) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):
                packet = os.read(self.from_fd, MTU + 64)
                begins = max(now, self._on_link_until)
                if begins - now > QUEUE_MS / 1e3:
                    continue  # the queue is full: dropped
                self._on_link_until = begins + len(packet) * self._second_per_byte
                self._under_way.append((self._on_link_until + self._delay_s, packet))

    def deliver(self, now: float) -> float | None:
        """What is due; returns when the next one is."""
        while self._under_way and self._under_way[0][0] <= now:
            with contextlib.suppress(OSError):  # its queue is full, or it is not up yet
                os.write(self._to_fd, self._under_way[0][1])
            self._under_way.popleft()
        return self._under_way[0][0] if self._under_way else None


def _tun(namespace: str, device: str) -> int:
    """A tun device inside; the descriptor is used from outside."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(there, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN_NO_PI))
        if libc.setns(here, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns back")
        return fd
    finally:
        os.close(here)
        os.close(there)


def carry(a: str, b: str, bits_per_second: int, delay_ms: float) -> None:
    """Until a signal ends it."""
    fds = _tun(a, "va"), _tun(b, "vb")
    print("ready", flush=True)
    rate, delay = bits_per_second / 8, delay_ms / 1e3
    ways = {fds[0]: Direction(*fds, rate, delay), fds[1]: Direction(*fds[::-1], rate, delay)}
    poll = select.epoll()
    for fd in fds:
        poll.register(fd, select.EPOLLIN)
    timeout = -1.0
    while True:
        ready = poll.poll(timeout)
        now = time.monotonic()
        for fd, _ in ready:
            ways[fd].take(now)
        due = [at for way in ways.values() if (at := way.deliver(time.monotonic())) is not None]
        timeout = max(0.0, min(due) - time.monotonic()) if due else -1.0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller's Ctrl-C: the caller ends this
    carry(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
