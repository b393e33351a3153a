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
from vmth.qemu.landing import listed_blocks, open_shared
from vmth.qemu.qmp import Qmp, QmpError
from vmth.types import Gpa, Mapping, RamBlock

__all__ = ["WaitingMemory"]


class WaitingMemory:
    """Of the QEMU behind ``qmp``, which is asked in the constructor only. A context manager.

    What cannot be mapped ahead (memory that is not shared, a process that cannot be watched) is
    left for later: only time is lost. Raises ChannelError when QEMU is gone.
    """

    def __init__(self, qmp: Qmp) -> None:
        self._resources = contextlib.ExitStack()
        self._mapped: list[MappedAhead] = []
        try:
            process = os.pidfd_open(qmp.pid)
        except OSError:
            return
        self._resources.callback(os.close, process)
        try:
            self._mapped = _map_shared_blocks(qmp)
            stopped, stop = os.pipe2(os.O_CLOEXEC)
            self._resources.callback(os.close, stopped)
            work = threading.Thread(
                target=self._work, args=(process, stopped), name="vmth-ahead", daemon=True
            )
            self._resources.callback(lambda: work.join() if work.is_alive() else None)
            self._resources.callback(os.close, stop)
            work.start()
        except BaseException:
            self.close()
            raise

    def find(self, fd: int, offset: int, nbytes: int) -> MappedAhead | None:
        """What is mapped of these very bytes."""
        found = (ahead for ahead in self._mapped if ahead.is_of(fd, offset, nbytes))
        return next(found, None)

    def close(self) -> None:
        """Let go of what nobody has taken. Idempotent."""
        for ahead in self._mapped:
            ahead.close()
        self._resources.close()

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
    blocks = [
        RamBlock(listed.idstr, listed.used_length, Gpa(0), Mapping())
        for listed in (listed_blocks(qmp) or {}).values()
    ]
    mapped: list[MappedAhead] = []
    with contextlib.ExitStack() as opened, contextlib.suppress(QmpError):
        for block, place in zip(blocks, open_shared(qmp, blocks, opened), strict=True):
            if place.fd is not None:
                with contextlib.suppress(OSError):
                    mapped.append(MappedAhead(place.fd, place.offset, block.used_length))
    return mapped
