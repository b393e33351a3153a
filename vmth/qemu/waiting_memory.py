# SPDX-License-Identifier: Apache-2.0
"""The memory of a QEMU that waits for a guest, mapped before one comes.

Its page tables are made meanwhile by a thread, which then watches the process: memory that is
mapped here would outlive it. Whoever writes the pages takes the mapping.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from types import TracebackType
from typing import Self

from vmth.mapped_ahead import MappedAhead
from vmth.memory import holes_are_exact
from vmth.qemu.landing import shared_blocks
from vmth.qemu.qmp import Qmp, QmpError

__all__ = ["WaitingMemory"]


class WaitingMemory:
    """Of the QEMU behind ``qmp``, which is asked in the constructor only. A context manager.

    What cannot be mapped ahead (memory that is not shared, a process that cannot be watched) is
    left for later: only time is lost. Raises ChannelError when QEMU is gone.
    """

    def __init__(self, qmp: Qmp) -> None:
        self._resources = contextlib.ExitStack()
        self._mapped: list[MappedAhead] = []
        self._found: list[MappedAhead] = []
        try:
            process = os.pidfd_open(qmp.pid)
        except (OSError, AttributeError):  # a Python without it: built on old headers
            return
        self._resources.callback(os.close, process)
        try:
            self._mapped = _map_shared_blocks(qmp)
            if self._mapped:
                self._start(process)
        except (OSError, RuntimeError):  # of pipe, thread
            self.close()
        except BaseException:
            self.close()
            raise
        if not self._mapped:
            self.close()

    def _start(self, process: int) -> None:
        stopped, stop = os.pipe2(os.O_CLOEXEC)
        self._resources.callback(os.close, stopped)
        work = threading.Thread(
            target=self._work, args=(process, stopped), name="vmth-ahead", daemon=True
        )
        self._resources.callback(lambda: work.join() if work.is_alive() else None)
        self._resources.callback(os.close, stop)
        work.start()

    def find(self, fd: int, offset: int, nbytes: int) -> MappedAhead | None:
        """What is mapped of these very bytes."""
        for ahead in self._mapped:
            if ahead.is_of(fd, offset, nbytes):
                self._found.append(ahead)
                return ahead
        return None

    def close_rest(self) -> None:
        """Let go of what was not found: the landing is chosen, and nobody needs it any more."""
        for ahead in self._mapped:
            if ahead not in self._found:
                ahead.close()

    def close(self) -> None:
        """Let go of what nobody has taken. Idempotent."""
        self._resources.close()
        for ahead in self._mapped:
            ahead.close()

    def _work(self, process: int, stopped: int) -> None:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        poll.register(stopped, select.POLLIN)
        for ahead in self._mapped:
            ahead.populate(lambda: not poll.poll(0))
        poll.poll()
        for ahead in self._mapped:
            ahead.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()


def _map_shared_blocks(qmp: Qmp) -> list[MappedAhead]:
    """But for files on a disk, which would be read, and huge pages of a file system, which a
    mapping reserves and which need next to no page tables."""
    mapped: list[MappedAhead] = []
    with contextlib.ExitStack() as opened, contextlib.suppress(QmpError):
        for block in shared_blocks(qmp, opened):
            place = block.mapping
            # ValueError: the file is shorter by now.
            with contextlib.suppress(OSError, ValueError):
                if place.fd is not None and holes_are_exact(place.fd):
                    mapped.append(MappedAhead(place.fd, place.offset, block.used_length))
    return mapped
