# SPDX-License-Identifier: Apache-2.0
"""Where to connect or listen: ``tcp:``, ``unix:`` and ``fd:`` as QEMU and libvirt write them.

    tcp:HOST:PORT   tcp://HOST:PORT   tcp:[::1]:4444        IPv6 addresses stand in brackets
    unix:PATH       unix:///ABSOLUTE/PATH                   taken literally, nothing is decoded
    fd:N[,N...]                                             connected sockets that the caller passes

Pure: no name is resolved and nothing is opened.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from dataclasses import dataclass

from vmth.errors import UsageError

__all__ = ["Endpoint", "Scheme", "parse_endpoint"]

_ALLOWED = "tcp:HOST:PORT, tcp://HOST:PORT, unix:PATH, unix:///PATH, fd:N[,N...]"
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_.])?", re.ASCII)
_DECIMAL = re.compile(r"[0-9]{1,9}", re.ASCII)
#: sockaddr_un.sun_path without its terminating zero byte.
_UNIX_PATH_BYTES = 107


class Scheme(enum.Enum):
    TCP = "tcp"
    UNIX = "unix"
    FD = "fd"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One parsed URI; only the fields of its scheme are set. ``host`` is without brackets."""

    scheme: Scheme
    host: str = ""
    port: int = 0
    path: str = ""
    fds: tuple[int, ...] = ()

    @property
    def display(self) -> str:
        """The canonical short form; ``parse_endpoint`` reads it back."""
        if self.scheme is Scheme.TCP:
            host = f"[{self.host}]" if ":" in self.host else self.host
            return f"tcp:{host}:{self.port}"
        if self.scheme is Scheme.UNIX:
            return f"unix:{self.path}"
        return "fd:" + ",".join(str(fd) for fd in self.fds)

    def is_loopback(self) -> bool:
        """True if bytes cannot leave this machine: a loopback address, the name ``localhost``, a
        unix socket. False for any other name, which may resolve to anything, and for ``fd:``, where
        only the kernel knows the peer."""
        if self.scheme is Scheme.UNIX:
            return True
        if self.scheme is Scheme.FD:
            return False
        address = _address(self.host)
        if address is None:
            return self.host.lower().rstrip(".") == "localhost"
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_loopback


def parse_endpoint(text: str, *, listening: bool = False) -> Endpoint:
    """Read one URI. Port 0 (any free one) is allowed only for ``listening``. Raises ``UsageError``
    that names what was received and what is allowed."""
    if not isinstance(text, str):
        raise UsageError(f"URI: received {text!r}, allowed a text as tcp:HOST:PORT")
    scheme, colon, rest = text.partition(":")
    if not colon:
        raise UsageError(f"URI {text!r} has no scheme; allowed: {_ALLOWED}")
    if scheme == "tcp":
        return _parse_tcp(text, rest, 0 if listening else 1)
    if scheme == "unix":
        return _parse_unix(text, rest)
    if scheme == "fd":
        return _parse_fd(text, rest)
    raise UsageError(f"URI {text!r} has the unknown scheme {scheme!r}; allowed: {_ALLOWED}")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _parse_tcp(text: str, rest: str, lowest_port: int) -> Endpoint:
    if rest.startswith("//"):
        rest = rest[2:].removesuffix("/")
    if rest.startswith("["):
        host, bracket, port_text = rest[1:].partition("]:")
        if not bracket or not isinstance(_address(host), ipaddress.IPv6Address):
            raise UsageError(
                f"URI {text!r} has no IPv6 address in its brackets; allowed: tcp:[ADDRESS]:PORT"
            )
    else:
        host, colon, port_text = rest.rpartition(":")
        if not colon:
            raise UsageError(f"URI {text!r} has no port; allowed: tcp:HOST:PORT")
        if ":" in host:
            raise UsageError(
                f"URI {text!r} has an address with colons; allowed: tcp:[ADDRESS]:PORT for IPv6"
            )
        if not _HOST_NAME.fullmatch(host):
            raise UsageError(
                f"URI {text!r} has the host {host!r}; allowed: a name or an address "
                "(0.0.0.0 or [::] listens on every one)"
            )
    if not _DECIMAL.fullmatch(port_text) or not lowest_port <= int(port_text) <= 65535:
        raise UsageError(
            f"URI {text!r} has the port {port_text!r}; allowed: {lowest_port} to 65535"
        )
    return Endpoint(Scheme.TCP, host=host, port=int(port_text))


def _parse_unix(text: str, rest: str) -> Endpoint:
    path = rest
    if rest.startswith("//"):
        path = rest[2:]
        if not path.startswith("/"):
            raise UsageError(f"URI {text!r} names a host; allowed: unix:///PATH or unix:PATH")
    nbytes = len(path.encode(errors="surrogateescape"))
    if not 1 <= nbytes <= _UNIX_PATH_BYTES or "\0" in path:
        raise UsageError(
            f"URI {text!r} has a path of {nbytes} bytes; allowed: 1 to {_UNIX_PATH_BYTES}, no zero"
        )
    return Endpoint(Scheme.UNIX, path=path)


def _parse_fd(text: str, rest: str) -> Endpoint:
    parts = rest.split(",")
    if not all(_DECIMAL.fullmatch(part) for part in parts):
        raise UsageError(f"URI {text!r} has no list of numbers; allowed: fd:N[,N...]")
    fds = tuple(int(part) for part in parts)
    if len(set(fds)) != len(fds):
        raise UsageError(f"URI {text!r} names a descriptor twice; allowed: each one once")
    return Endpoint(Scheme.FD, fds=fds)
