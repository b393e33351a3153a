# SPDX-License-Identifier: Apache-2.0
"""The holder process: ``python -m vmth.guests.holder FD``. It owns a guest, so that a mover can
die.

FD is one end of a SOCK_SEQPACKET socket pair; its first datagram is ``Setup``. From then on the
holder also listens on a socket in a private directory, where a new mover attaches and anybody of
the same user asks for the status. One thread does everything, so a request that takes long
(``Prepare``) delays the others; every answer goes out without waiting, and a peer that does not
take it is dropped.

How it ends, so that none is left over: on ``Release`` or ``Shutdown``, on SIGTERM, or when its
lease runs out. The lease is its owner process (a pidfd: it works whichever thread spawned us) or,
without one, ``linger_s`` since the last mover went. A *held* guest may be the only copy there is:
neither ends it, it waits ``hold_linger_s`` for somebody to attach and decide.
"""

from __future__ import annotations

import array
import contextlib
import os
import selectors
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from dataclasses import dataclass
from types import FrameType

from vmth.errors import GuestError, UsageError, VmthError
from vmth.guests import requests as rq
from vmth.guests.hosted import Hosted, MakeMachine, Phase, make_machine

__all__ = ["Holder", "main", "socket_folder"]

CONNECTIONS_MAX = 16
#: A connection that is not the mover's is dropped after so long without a request.
IDLE_S = 60.0
SETUP_S = 60.0
_UCRED = struct.Struct("3i")


def socket_folder() -> str:
    """A new private (0700) directory for a holder's socket."""
    base = os.environ.get("XDG_RUNTIME_DIR") or None
    if base is not None and not os.access(base, os.W_OK | os.X_OK):
        base = None
    return tempfile.mkdtemp(prefix="vmth-holder-", dir=base)


@dataclass(slots=True)
class _Peer:
    socket: socket.socket
    heard_at_s: float
    mover: bool = False


class Holder:
    """Serves one guest until it is to end. Owns the sockets; ``close()`` frees everything."""

    def __init__(
        self, first: socket.socket, setup: rq.Setup, factory: MakeMachine = make_machine
    ) -> None:
        self._setup = setup
        self._done = False
        self._peers: dict[int, _Peer] = {}
        self._selector = selectors.DefaultSelector()
        self._owner_fd = -1
        self._folder = ""
        self._lease_ends_at_s: float | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._hosted = Hosted(setup, factory)
        except BaseException:
            self._listener.close()
            self._selector.close()
            raise
        try:
            self._folder = socket_folder()
            self.socket_path = os.path.join(self._folder, "holder.sock")
            self._listener.bind(self.socket_path)
            self._listener.listen(8)
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ)
            self._add(first, mover=True)
            self._watch_owner(setup.owner_pid)
            self._reply(self._peers[first.fileno()], self._attached(), [])
        except BaseException:
            self.close()
            raise

    def _watch_owner(self, pid: int) -> None:
        if pid == 0:
            return
        try:
            self._owner_fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._owner_gone()
            return
        self._selector.register(self._owner_fd, selectors.EVENT_READ)

    def _attached(self) -> rq.Attached:
        return rq.Attached(
            kind=self._hosted.kind,
            dirty_source=self._hosted.dirty_source,
            blocks=self._hosted.rows,
            socket_path=self.socket_path,
            vcpus=self._hosted.vcpus,
        )

    # ---- the loop ------------------------------------------------------------------------------

    def serve(self) -> None:
        """Until the end: see the file's head for what that is."""
        while not self._done:
            for key, _ in self._selector.select(self._wait_s()):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fd == self._owner_fd:
                    self._owner_gone()
                elif key.fd in self._peers:
                    self._serve_peer(self._peers[key.fd])
            self._expire()

    def _wait_s(self) -> float | None:
        ends = [peer.heard_at_s + IDLE_S for peer in self._peers.values() if not peer.mover]
        if self._lease_ends_at_s is not None:
            ends.append(self._lease_ends_at_s)
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _expire(self) -> None:
        now_s = time.monotonic()
        for peer in list(self._peers.values()):
            if not peer.mover and now_s >= peer.heard_at_s + IDLE_S:
                self._drop(peer)
        if self._lease_ends_at_s is not None and now_s >= self._lease_ends_at_s:
            self._done = True

    def _serve_peer(self, peer: _Peer) -> None:
        peer.heard_at_s = time.monotonic()
        try:
            data = peer.socket.recv(rq.REQUEST_MAX_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(peer)
            return
        try:
            request = rq.decode_request(data)
        except GuestError as error:
            self._reply(peer, rq.Failed("usage", str(error)), [])
            return
        self._reply(peer, *self._answer(peer, request))

    def _answer(self, peer: _Peer, request: rq.Request) -> tuple[rq.Reply, list[int]]:
        if isinstance(request, rq.Status):
            return self._hosted.status(self._mover is not None), []
        if isinstance(request, rq.Attach):
            return self._attach(peer, request), []
        if not peer.mover:
            return rq.Failed(
                "usage", "attach first: this connection may only ask for the status"
            ), []
        if isinstance(request, rq.Release | rq.Shutdown):
            self._done = True
            return rq.Ack(), []
        return self._hosted.handle(request)

    def _attach(self, peer: _Peer, request: rq.Attach) -> rq.Reply:
        if request.protocol != rq.HOLDER_PROTOCOL:
            return rq.Failed(
                "refused",
                f"holder protocol {request.protocol}: this holder speaks {rq.HOLDER_PROTOCOL}",
            )
        mover = self._mover
        if mover is not None and _hung_up(mover.socket):
            self._drop(mover)  # it died, and its successor was heard first
            mover = None
        if mover is not None:
            return rq.Failed("busy", f"the guest of holder {os.getpid()} has a mover already")
        peer.mover = True
        self._lease_ends_at_s = None
        return self._attached()

    # ---- connections ---------------------------------------------------------------------------

    @property
    def _mover(self) -> _Peer | None:
        return next((peer for peer in self._peers.values() if peer.mover), None)

    def _add(self, connection: socket.socket, mover: bool = False) -> None:
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ)
        self._peers[connection.fileno()] = _Peer(connection, time.monotonic(), mover)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        _, uid, _ = _UCRED.unpack(credentials)
        if uid not in (0, os.geteuid()) or len(self._peers) >= CONNECTIONS_MAX:
            connection.close()
            return
        self._add(connection)

    def _reply(self, peer: _Peer, reply: rq.Reply, fds: list[int]) -> None:
        try:
            data = rq.encode(reply)
        except GuestError as error:
            data, fds = rq.encode(rq.Failed("guest", str(error))), []
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            peer.socket.sendmsg([data], ancillary)
        except OSError:
            self._drop(peer)

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.socket)
        del self._peers[peer.socket.fileno()]
        peer.socket.close()
        if peer.mover and not self._done:
            self._hosted.mover_gone()
            self._start_lease()

    def _owner_gone(self) -> None:
        if self._owner_fd >= 0:
            self._selector.unregister(self._owner_fd)
            os.close(self._owner_fd)
            self._owner_fd = -1
        if self._mover is None:
            self._start_lease()

    def _start_lease(self) -> None:
        now_s = time.monotonic()
        if self._owner_fd >= 0:
            self._lease_ends_at_s = None
        elif self._hosted.phase is Phase.HELD:
            self._lease_ends_at_s = now_s + self._setup.hold_linger_s
        elif self._setup.owner_pid:
            self._lease_ends_at_s = now_s
        else:
            self._lease_ends_at_s = now_s + self._setup.linger_s

    def close(self) -> None:
        """End the guest, close every socket, remove the socket's directory. Idempotent."""
        self._done = True
        for peer in list(self._peers.values()):
            self._drop(peer)
        self._listener.close()
        if self._owner_fd >= 0:
            os.close(self._owner_fd)
            self._owner_fd = -1
        self._selector.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._hosted.close()


def _hung_up(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _setup_of(first: socket.socket) -> rq.Setup:
    """The spawner's first datagram. GuestError if it is not a ``Setup`` of our protocol."""
    first.settimeout(SETUP_S)
    setup = rq.decode_request(first.recv(rq.REQUEST_MAX_BYTES + 1))
    if not isinstance(setup, rq.Setup):
        raise GuestError(f"a holder begins with Setup, not {type(setup).__name__}")
    if setup.protocol != rq.HOLDER_PROTOCOL:
        raise GuestError(f"holder protocol {setup.protocol}: this one is {rq.HOLDER_PROTOCOL}")
    return setup


def _terminate(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)


def main(arguments: list[str]) -> int:
    """Run a holder on the socket whose descriptor is the only argument. Returns the exit code."""
    # Ctrl-C is for the mover: the guest must outlive it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _terminate)
    first = socket.socket(fileno=int(arguments[0]))
    try:
        holder = Holder(first, _setup_of(first))
    except Exception as error:
        kind = "usage" if isinstance(error, UsageError) else "guest"
        text = str(error) if isinstance(error, VmthError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            first.send(rq.encode(rq.Failed(kind, text[:4000])))
        return 1
    with contextlib.closing(holder):
        holder.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
