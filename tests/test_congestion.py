# SPDX-License-Identifier: Apache-2.0
"""The congestion control of vmth's connections: the system's between hosts, none that paces within
one, and always the one that was asked for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from listener_world import World, one_world

from vmth.channel.congestion import UNPACED, is_on_this_host, set_congestion_control
from vmth.channel.sockets import LinkOptions, dial
from vmth.errors import UsageError
from vmth.uri import parse_endpoint

ALLOWED = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control").read_text().split()


def _of(sock: socket.socket) -> str:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with one_world(tmp_path) as made:
        yield made


@pytest.fixture(params=["127.0.0.1", "127.0.0.9", "::1"])
def listening(request: pytest.FixtureRequest) -> Iterator[str]:
    host: str = request.param
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.bind((host, 0))
        sock.listen()
        shown = f"[{host}]" if ":" in host else host
        yield f"tcp:{shown}:{sock.getsockname()[1]}"


def test_a_connection_within_a_host_does_not_pace(listening: str) -> None:
    with dial(parse_endpoint(listening), LinkOptions()) as sock:
        assert _of(sock) in UNPACED


@pytest.mark.parametrize("name", ALLOWED)
def test_the_one_that_was_asked_for_is_used(listening: str, name: str) -> None:
    with dial(parse_endpoint(listening), LinkOptions(congestion_control=name)) as sock:
        assert _of(sock) == name


@pytest.mark.parametrize("address", ["127.0.0.1", "127.200.0.1", "::1"])
def test_loopback_is_on_this_host(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    assert is_on_this_host(family, (address, 9))


#: Prints what is on this host of the addresses that follow, and what a connection to another host
#: would get (it is never made: nobody answers there).
PROBE = """
import socket, sys
from vmth.channel.congestion import is_on_this_host, set_congestion_control
for name in sys.argv[1:]:
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    address = (name, 9) if family == socket.AF_INET else (name, 9, 0, 0)
    with socket.socket(family) as sock:
        set_congestion_control(sock, address, "")
        got = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\\0").decode()
    print(name, is_on_this_host(family, address), got)
"""


def test_an_address_of_its_own_is_told_from_a_neighbours() -> None:
    """In a network namespace, whose default is one that paces where the kernel has it."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    default = "bbr" if "bbr" in ALLOWED else "reno"
    script = f"""
set -e
ip link set lo up
ip link add here type veth peer name there
ip link set there up
ip addr add 192.0.2.1/24 dev here
ip -6 addr add 2001:db8::1/64 dev here nodad
ip link set here up
echo {default} > /proc/sys/net/ipv4/tcp_congestion_control
exec "$@" 192.0.2.1 192.0.2.2 203.0.113.1 2001:db8::1 2001:db8::2
"""
    told = subprocess.run(
        ["unshare", "--net", "sh", "-c", script, "sh", sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    rows = [line.split() for line in told.stdout.splitlines()]
    assert [(name, here) for name, here, _ in rows] == [
        ("192.0.2.1", "True"),
        ("192.0.2.2", "False"),
        ("203.0.113.1", "False"),
        ("2001:db8::1", "True"),
        ("2001:db8::2", "False"),
    ]
    assert all((got in UNPACED) if here == "True" else got == default for _, here, got in rows)


def test_what_the_kernel_does_not_have_is_refused_before_anything(world: World) -> None:
    for name in ("none-such", "a" * 16, "\n", "cubic\0"):
        with pytest.raises(
            UsageError, match=r"congestion_control: received .*allowed here: .*reno"
        ):
            LinkOptions(congestion_control=name)
    world.moves(world.listen())


def test_all_connections_of_a_session_have_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = world.listen()
    seen: list[str] = []

    def observed(sock: socket.socket, address: Any, name: str) -> None:
        set_congestion_control(sock, address, name)
        seen.append(_of(sock))

    monkeypatch.setattr("vmth.channel.sockets.set_congestion_control", observed)
    for name in ALLOWED:
        world.moves(listener, channels=2, link=LinkOptions(congestion_control=name))
    assert seen == [name for name in ALLOWED for _ in range(3)]
