# SPDX-License-Identifier: Apache-2.0
"""Dialing and listening: from a URI to connected stream sockets, with the link's options set."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from dataclasses import dataclass

from vmth._native import _sys, _xfer
from vmth.channel.congestion import check_congestion_control, set_congestion_control
from vmth.errors import ChannelError, OptionError, UsageError
from vmth.uri import Endpoint, Scheme

__all__ = [
    "UNMARKED",
    "DialError",
    "LinkOptions",
    "ListeningSocket",
    "dial",
    "fd_sockets",
    "local_address",
    "queue_ahead",
    "set_link_options",
    "take_arrived",
]


#: Linux: as SO_SNDBUF, beyond net.core.wmem_max, for who may.
_SO_SNDBUFFORCE = 32
UNMARKED = -1  #: as a DSCP: the packets' is left alone


class DialError(ChannelError):
    """A connection was never made: our end knows why, whatever becomes of those that were."""


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """What both ends may set on every connection; zero or empty leaves the system's default."""

    source_addresses: tuple[str, ...] = ()  #: local ones: control is sent from the first, page
    #: channel k from number k, and from the first again behind the last
    interfaces: tuple[str, ...] = ()  #: the same with SO_BINDTODEVICE (needs CAP_NET_RAW)
    dscp: int = UNMARKED  #: 0 to 63, or not marked
    connect_timeout_s: float = 5.0
    keepalive_s: int = 5
    user_timeout_ms: int = 10_000  #: TCP_USER_TIMEOUT: unacknowledged for so long = lost
    send_buffer_bytes: int = 0
    receive_buffer_bytes: int = 0
    congestion_control: str = ""  #: of the connections that this end makes; empty: on the same host
    #: one without pacing

    def __post_init__(self) -> None:
        for address in self.source_addresses:
            _check_address(address)
        for name in self.interfaces:
            if not 1 <= len(name.encode()) <= _INTERFACE_BYTES or set(name) & set("/ \0"):
                raise OptionError(
                    "interfaces",
                    f"received {name!r}, allowed names of 1 to {_INTERFACE_BYTES} bytes",
                )
        if self.congestion_control:
            check_congestion_control(self.congestion_control)
        if not UNMARKED <= self.dscp <= 63:
            raise OptionError("dscp", f"received {self.dscp}, allowed 0 to 63")
        if not 0 < self.connect_timeout_s <= 3600:
            raise OptionError(
                "connect_timeout_s", f"received {self.connect_timeout_s}, allowed over 0 to 3600"
            )
        for name, most in _MOST.items():
            if not 0 <= getattr(self, name) <= most:
                raise OptionError(name, f"received {getattr(self, name)}, allowed 0 to {most}")

    def check_for(self, endpoint: Endpoint) -> None:
        """OptionError where connections to ``endpoint`` cannot take the addresses, interfaces and
        congestion control that were chosen for them: only TCP has such; or as ``check_here``."""
        control = (self.congestion_control,) if self.congestion_control else ()
        for name, chosen in (
            ("source_addresses", self.source_addresses),
            ("interfaces", self.interfaces),
            ("congestion_control", control),
        ):
            if chosen and endpoint.scheme is not Scheme.TCP:
                raise OptionError(
                    name,
                    f"received {','.join(chosen)} for {endpoint.display}, allowed with "
                    "tcp:HOST:PORT only",
                )
        self.check_here()

    def check_here(self) -> None:
        """OptionError for an address or interface that this host does not have."""
        for address in self.source_addresses:
            _check_is_here(address)
        here = [name for _, name in socket.if_nameindex()] if self.interfaces else []
        for name in self.interfaces:
            if name not in here:
                raise OptionError("interfaces", f"received {name!r}, allowed {', '.join(here)}")


#: IFNAMSIZ without its terminating zero byte.
_INTERFACE_BYTES = 15


def _check_address(address: str) -> None:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise OptionError(
            "source_addresses", f"received {address!r}, allowed IP addresses of this host"
        ) from None


def _check_is_here(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.bind((address, 0))
    except OSError as error:
        raise OptionError(
            "source_addresses",
            f"received {address!r}, allowed IP addresses of this host ({error.strerror})",
        ) from None


#: What the kernel takes.
_MOST = {
    "keepalive_s": 32767,
    "user_timeout_ms": 2**31 - 1,
    "send_buffer_bytes": 2**31 - 1,
    "receive_buffer_bytes": 2**31 - 1,
}


def set_link_options(sock: socket.socket, options: LinkOptions) -> None:
    """TCP options for an established connection; a no-op for other families. Raises ChannelError
    when the kernel refuses one."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    try:
        _xfer.connect_options(
            sock.fileno(),
            dscp=options.dscp,
            keepalive_s=options.keepalive_s,
            user_timeout_ms=options.user_timeout_ms,
            send_buffer_bytes=options.send_buffer_bytes,
            receive_buffer_bytes=options.receive_buffer_bytes,
        )
    except _xfer.TransferError as error:
        raise ChannelError(f"link options: {error}") from error


def take_arrived(sock: socket.socket, buffer: memoryview, patience_s: float) -> tuple[int, bool]:
    """Read into ``buffer`` what arrives on a stream socket, in one piece as large as can be had
    without waiting longer than ``patience_s`` for the next bytes. Never waits for the first.
    Returns (bytes, has the peer closed). The interpreter is free meanwhile. Raises OSError."""
    return _sys.sock_take(sock.fileno(), buffer, int(patience_s * 1e9))


def queue_ahead(sock: socket.socket, nbytes: int) -> None:
    """Let so many bytes, as the kernel counts them, be written to a unix socket and not read yet,
    or as many as this process may have."""
    told = nbytes // 2  # socket(7): the kernel doubles it, for its own bookkeeping
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, told)
    except OSError:  # not allowed: as much as anybody gets
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, told)


def dial(endpoint: Endpoint, options: LinkOptions, index: int = 0) -> socket.socket:
    """Connect. ``index``: which connection of the session this is (0 control, k page channel k -
    1); it picks the descriptor of an ``fd:`` endpoint, and the local address and interface. Raises
    DialError naming them."""
    if endpoint.scheme is Scheme.FD:
        return _adopt(endpoint, index)
    try:
        if endpoint.scheme is Scheme.UNIX:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(options.connect_timeout_s)
                sock.connect(endpoint.path)
            except BaseException:
                sock.close()
                raise
            return sock
        return _dial_tcp(endpoint, options, index)
    except OSError as error:
        own = _taken(options.source_addresses, index), _taken(options.interfaces, index)
        via = "".join(
            f" {word} {name}" for word, name in zip(("from", "over"), own, strict=True) if name
        )
        raise DialError(f"cannot connect to {endpoint.display}{via}: {error}") from error


def _taken(names: tuple[str, ...], index: int) -> str:
    """Of local addresses or interfaces the one that connection ``index`` uses; empty: any."""
    return names[max(0, index - 1) % len(names)] if names else ""


def local_address(fd: int) -> str:
    """Where a connected socket sends from: "10.0.0.1:40000", "[::1]:40000"; empty where it has no
    address of its own."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return ""
        host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _dial_tcp(endpoint: Endpoint, options: LinkOptions, index: int) -> socket.socket:
    interface = _taken(options.interfaces, index)
    source_address = _taken(options.source_addresses, index)
    last: OSError | None = None
    # As a str even an address goes through the codec for names, whose import takes milliseconds.
    host = endpoint.host.encode()  # ASCII: parse_endpoint()
    found = socket.getaddrinfo(host, endpoint.port, type=socket.SOCK_STREAM)
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(options.connect_timeout_s)
            if interface:
                sock.setsockopt(
                    socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0"
                )
            if source_address:
                sock.bind((source_address, 0))
            set_congestion_control(sock, address, options.congestion_control)
            sock.connect(address)
            set_link_options(sock, options)
        except OSError as error:
            sock.close()
            last = error
            continue
        return sock
    raise last if last is not None else OSError(errno.EHOSTUNREACH, "no address found")


def _adopt(endpoint: Endpoint, index: int) -> socket.socket:
    if index >= len(endpoint.fds):
        raise UsageError(
            f"{endpoint.display}: connection {index} asked for, but only {len(endpoint.fds)} "
            "descriptors given; allowed: one for control and one a channel"
        )
    return _stream_socket(endpoint.fds[index])


def _stream_socket(fd: int) -> socket.socket:
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise UsageError(f"fd:{fd} is not a socket; allowed: connected stream sockets")
        sock = socket.socket(fileno=os.dup(fd))
    except OSError as error:
        raise UsageError(f"fd:{fd} cannot be used: {error}") from error
    if sock.type != socket.SOCK_STREAM:
        sock.close()
        raise UsageError(f"fd:{fd} is a socket of type {sock.type}; allowed: stream sockets")
    return sock


def fd_sockets(endpoint: Endpoint) -> list[socket.socket]:
    """The connected sockets of an ``fd:`` endpoint, duplicated: all, or UsageError and none."""
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(_stream_socket(fd)) for fd in endpoint.fds]
        opened.pop_all()
    return sockets


class ListeningSocket:
    """A bound, listening socket for ``tcp:`` or ``unix:``. Context manager."""

    def __init__(self, endpoint: Endpoint, options: LinkOptions, backlog: int = 128) -> None:
        self._options = options
        self._unlink = ""
        try:
            if endpoint.scheme is Scheme.UNIX:
                self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._bind_unix(endpoint.path)
                self.endpoint = endpoint
            else:
                self.sock = self._bind_tcp(endpoint)
                host, port = self.sock.getsockname()[:2]
                self.endpoint = Endpoint(Scheme.TCP, host=host, port=port)
            self.sock.listen(backlog)
        except OSError as error:
            if hasattr(self, "sock"):
                self.sock.close()
            raise ChannelError(f"cannot listen on {endpoint.display}: {error}") from error

    def _bind_unix(self, path: str) -> None:
        try:
            self.sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not is_stale(path):
                raise
            os.unlink(path)
            self.sock.bind(path)
        self._unlink = path

    @staticmethod
    def _bind_tcp(endpoint: Endpoint) -> socket.socket:
        found = socket.getaddrinfo(
            endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
        return sock

    def accept(self) -> tuple[socket.socket, str]:
        """A connection with the link's options set, and its peer for messages."""
        sock, address = self.sock.accept()
        try:
            set_link_options(sock, self._options)
        except BaseException:
            sock.close()
            raise
        if sock.family == socket.AF_UNIX:
            return sock, self.endpoint.display
        return sock, f"tcp:{address[0]}:{address[1]}"

    def close(self) -> None:
        """Idempotent; wakes a blocked accept()."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # not supported on every family while listening; close below does it then
        self.sock.close()
        if self._unlink:
            try:
                os.unlink(self._unlink)
            except FileNotFoundError:
                pass  # somebody cleaned up before us
            self._unlink = ""

    def __enter__(self) -> ListeningSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_stale(path: str) -> bool:
    """A unix socket file that nobody listens on any more."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
