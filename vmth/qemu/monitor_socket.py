# SPDX-License-Identifier: Apache-2.0
"""The socket of a QEMU's monitor: how it is reached, what of it is another client's, and how much
went out.

QEMU lets a client in before it has forgotten the one before: what happens in that moment is still
told, and a command that was being carried out is answered to whoever is connected then. Seen with
7.2 and 10.0; ahead of the greeting, and between it and the answer to ``qmp_capabilities``.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
import time
from typing import Any

from vmth.errors import RefusedError, UsageError

__all__ = ["MonitorSocket", "connect_when_there"]

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.01
#: A greeting has less than 200 bytes, an event rarely more than 1000.
_MAX_LINE_BYTES = 1 << 20


class MonitorSocket(socket.socket):
    """asyncio sends through it and does not tell what it has sent: ``sent_bytes``. Until the
    capabilities are negotiated ``recv`` gives whole lines, and leaves out those that are for the
    client before. For the one thread that reads and writes."""

    sent_bytes = 0

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._greeted = self._negotiated = False
        self._line = b""

    def send(self, data: Any, flags: int = 0, /) -> int:
        nbytes = super().send(data, flags)
        self.sent_bytes += nbytes
        return nbytes

    def sendmsg(self, buffers: Any, *rest: Any) -> int:
        nbytes = super().sendmsg(buffers, *rest)
        self.sent_bytes += nbytes
        return nbytes

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        while not self._negotiated:
            piece = super().recv(bufsize, flags)  # BlockingIOError: what there was stays in _line
            *lines, self._line = (self._line + piece).split(b"\n")
            kept = b"".join(line + b"\n" for line in lines if self._is_for_us(line))
            if self._negotiated or not piece or len(self._line) > _MAX_LINE_BYTES:
                kept, self._line = kept + self._line, b""
            if kept or not piece:
                return kept
        return super().recv(bufsize, flags)

    def _is_for_us(self, line: bytes) -> bool:
        if self._negotiated:
            return True
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return True  # and refused by who reads it
        if not isinstance(message, dict):
            return True
        # Ahead of the greeting nothing is for us, and then no event, nor an answer with an id: the
        # command that negotiates goes without one.
        stray = {"event", "id"} if self._greeted else {"event", "return", "error"}
        if not stray.isdisjoint(message):
            log.debug("for the monitor's client before: %r", line)
            return False
        self._greeted = self._greeted or "QMP" in message
        self._negotiated = "return" in message
        return True


def connect_when_there(path: str, timeout_s: float, appears_within_s: float) -> MonitorSocket:
    """A connected socket, the caller's to close. Raises UsageError for what is no socket that
    somebody listens at, RefusedError when too many wait at it already, in the words of who gave
    the path; what is not there yet is waited for up to ``appears_within_s``."""
    give_up_s = time.monotonic() + appears_within_s
    while True:
        try:
            return _connect(path, timeout_s)
        except UsageError:
            if time.monotonic() >= give_up_s:
                raise
        time.sleep(_LOOK_AGAIN_S)


def _connect(path: str, timeout_s: float) -> MonitorSocket:
    allowed = "allowed: the socket of a running QEMU's -qmp unix:PATH,server=on,wait=off"
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise UsageError(f"{path} is no socket; {allowed}")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; {allowed}") from None
    connection = MonitorSocket(socket.AF_UNIX)
    try:
        connection.settimeout(timeout_s)
        connection.connect(path)
    except (BlockingIOError, TimeoutError):
        connection.close()
        raise RefusedError(
            f"{path}: too many wait for this monitor already: QMP serves one client at a time"
        ) from None
    except OSError as error:
        connection.close()
        raise UsageError(f"{path}: {error.strerror or error}; {allowed}") from None
    except BaseException:
        connection.close()
        raise
    return connection
