# SPDX-License-Identifier: Apache-2.0
"""Which congestion control a TCP connection gets."""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path
from typing import Any

from vmth.errors import OptionError

__all__ = ["UNPACED", "check_congestion_control", "is_on_this_host", "set_congestion_control"]

#: Those that send as soon as the window lets them, in the order in which they are tried. reno is in
#: every kernel and allowed to everybody.
UNPACED = ("cubic", "reno")
#: TCP_CA_NAME_MAX without its terminating zero byte.
_NAME = re.compile(r"[\x21-\x7e]{1,15}")
_ALLOWED = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")


def check_congestion_control(name: str) -> None:
    """OptionError where this process cannot give ``name`` to a connection: the kernel does not have
    it, or it is not in net.ipv4.tcp_allowed_congestion_control and CAP_NET_ADMIN is missing."""
    reason = "no name of one"
    if _NAME.fullmatch(name):
        with socket.socket() as probe:
            try:
                _set(probe, name)
            except OSError as error:
                reason = error.strerror or str(error)
            else:
                return
    allowed = ""
    with contextlib.suppress(OSError):
        allowed = f", allowed here: {', '.join(_ALLOWED.read_text().split())}"
    raise OptionError("congestion_control", f"received {name!r} ({reason}){allowed}")


def set_congestion_control(sock: socket.socket, address: Any, name: str) -> None:
    """For a socket that is not yet connected to ``address``. With an empty ``name`` the system's
    default stays, but on a connection within this host none that paces: there is no queue on the
    way that pacing could spare, and the timer that it starts for every few segments costs more than
    a tenth of the sender's time (in a virtual machine each is an exit). It has to be chosen before
    the connection is made: one that has begun to pace goes on with it under every other one.
    Raises OSError for a ``name`` that the kernel refuses."""
    if name:
        _set(sock, name)
    elif is_on_this_host(sock.family, address):
        for unpaced in UNPACED:
            with contextlib.suppress(OSError):
                _set(sock, unpaced)
                return


def is_on_this_host(family: int, address: Any) -> bool:
    """Whether ``address``, of the ``family`` AF_INET or AF_INET6, is one of this network
    namespace's own. Sends nothing: the kernel takes such an address as the source too."""
    host = str(address[0])
    if host == "::1" or host.startswith("127."):
        return True
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(address)
        except OSError:
            return False
        return bool(probe.getsockname()[0] == host)


def _set(sock: socket.socket, name: str) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
