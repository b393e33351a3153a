# SPDX-License-Identifier: Apache-2.0
"""A QEMU's migration cancelled so that QEMU calls it ``cancelled``, and not ``failed``.

Up to and including 11, QEMU's ``migrate_cancel`` shuts the stream down first and notes the cancel
after that: its migration thread, if it writes just then, sees a broken stream and reports failure.
So nothing is to be written at that moment, if that can be had:

    max-bandwidth all but zero -> read what is under way, until the thread writes its share of a
    tenth of a second and sleeps -> migrate_cancel -> wait for the end, still reading

The stream must be read all the time: a QEMU whose write does not end may not answer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from vmth.errors import VmthError
from vmth.qemu.qmp import Qmp
from vmth.qemu.settings import MigrationSettings, is_over, migration_status

__all__ = ["CANCEL_S", "cancel_migration"]

log = logging.getLogger(__name__)

#: A migration that has not ended by then is left to whoever closes its stream.
CANCEL_S = 5.0
#: QEMU divides it by ten, and takes zero for no limit.
ALMOST_NOTHING_BPS = 10
#: QEMU's migration thread sleeps for up to 100 ms between two writes.
SETTLES_S = 0.5
#: Of silence: what was written in one go has been read.
QUIET_S = 0.02
#: Nothing is read so long, unless the new bandwidth is set: a guest that has little left to send
#: would stop meanwhile.
HOLDS_BACK_S = 0.1
LOOK_S = 0.01
_PIECE_BYTES = 1 << 20


def cancel_migration(
    qmp: Qmp,
    settings: MigrationSettings,
    sockets: Sequence[socket.socket],
    *,
    stopped: bool = False,
    timeout_s: float = CANCEL_S,
) -> bool:
    """Cancel the migration whose stream comes out of ``sockets``; what comes is thrown away. True
    if it ended within ``timeout_s`` (0.2 s is usual). The sockets are the caller's, to close after.

    ``stopped``: the guest was stopped for its last pages, and every moment is downtime: the cancel
    is not prepared then. Raises nothing for a QEMU that does not answer or is gone.
    """
    deadline = time.monotonic() + timeout_s
    with contextlib.suppress(VmthError), _Drain(sockets) as drain:
        if stopped:
            drain.begin()
        told = qmp.execute("query-migrate")
        if is_over(str(told.get("status", ""))):
            return True
        # With nothing left QEMU would stop its guest as soon as it is read: then the cancel comes
        # first, and the two threads' race is QEMU's.
        if not stopped and told.get("ram", {}).get("remaining", 0):
            settings.apply(parameters={"max-bandwidth": ALMOST_NOTHING_BPS})
            drain.begin()
            drain.wait_written(SETTLES_S)
        qmp.execute("migrate_cancel", timeout_s=max(LOOK_S, deadline - time.monotonic()))
        while not is_over(status := migration_status(qmp)):
            if time.monotonic() > deadline:
                log.info("%s: the cancelled migration is %r still", qmp.path, status)
                return False
            time.sleep(LOOK_S)
        return True
    return False  # it does not answer


class _Drain:
    """Reads sockets on a thread of its own ("vmth-drain"), from ``begin()`` or HOLDS_BACK_S on
    until the context is left."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        self._sockets = [sock for sock in sockets if sock.fileno() >= 0]
        self._changed = threading.Condition()
        self._silent = False  #: nothing has come for QUIET_S
        self._bursts = 0  #: times that something came after a silence
        self._over = False
        self._begun = threading.Event()
        self._woken, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._read, name="vmth-drain", daemon=True)

    def begin(self) -> None:
        self._begun.set()

    def wait_written(self, timeout_s: float) -> None:
        """Until something has come after a silence, and silence after that; in any case not longer
        than that: a QEMU that has nothing to send sleeps as well."""
        with self._changed:
            bursts = self._bursts
            self._changed.wait_for(
                lambda: self._over or (self._silent and self._bursts > bursts), timeout_s
            )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._begun.set()
        os.write(self._wake, b"x")
        self._thread.join()
        os.close(self._wake)
        os.close(self._woken)

    def _read(self) -> None:
        poll, piece = select.poll(), bytearray(_PIECE_BYTES)
        by_fd = {sock.fileno(): sock for sock in self._sockets}
        for fd in (self._woken, *by_fd):
            poll.register(fd, select.POLLIN)
        self._begun.wait(HOLDS_BACK_S)
        while True:
            ready = [fd for fd, _ in poll.poll(QUIET_S * 1000)]
            if self._woken in ready:
                break
            for fd in ready:
                if not _take(by_fd[fd], piece):
                    poll.unregister(fd)
            self._note(silent=not ready)
        self._note(silent=True, over=True)

    def _note(self, *, silent: bool, over: bool = False) -> None:
        with self._changed:
            if self._silent and not silent:
                self._bursts += 1
            self._silent, self._over = silent, over
            self._changed.notify_all()


def _take(sock: socket.socket, piece: bytearray) -> bool:
    """False at the stream's end."""
    try:
        return sock.recv_into(piece, flags=socket.MSG_DONTWAIT) > 0
    except BlockingIOError:
        return True
    except OSError:
        return False
