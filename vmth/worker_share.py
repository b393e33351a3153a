# SPDX-License-Identifier: Apache-2.0
"""How promptly the scheduler serves the threads that send pages, where others run as well."""

from __future__ import annotations

from pathlib import Path

__all__ = ["WorkerShare"]

#: Threads that wanted less tell nothing of what more of it would meet.
LEAST_WANTED_NS = 2_000_000
#: New workers are looked for every so many calls; a listing costs more than the reading.
LOOK_EVERY = 10


class WorkerShare:
    """Of the threads of this process whose name begins with ``prefix``. One thread."""

    def __init__(self, prefix: str = "vmth-send-", tasks: str = "/proc/self/task") -> None:
        self._prefix = prefix
        self._tasks = Path(tasks)
        self._calls = 0
        self._before: dict[str, tuple[int, int]] = {}

    def share(self) -> float:
        """Since the last call: the part of the time in which they wanted a core that they had one,
        0 to 1. 0.0 where that is not known: the first time, while they hardly want any, and on a
        kernel without it (schedstat of proc(5))."""
        if not self._before or self._calls % LOOK_EVERY == 0:
            for task in self._workers():
                self._before.setdefault(task, (0, 0))
        self._calls += 1
        ran_ns = waited_ns = 0
        for task, (ran_before, waited_before) in list(self._before.items()):
            try:
                ran, waited, _ = map(int, (self._tasks / task / "schedstat").read_text().split())
            except (OSError, ValueError):  # it has ended, or there is no such file
                del self._before[task]
                continue
            self._before[task] = ran, waited
            ran_ns += ran - ran_before
            waited_ns += waited - waited_before
        wanted_ns = ran_ns + waited_ns
        return ran_ns / wanted_ns if wanted_ns >= LEAST_WANTED_NS else 0.0

    def _workers(self) -> list[str]:
        found = []
        for task in self._tasks.iterdir() if self._tasks.is_dir() else ():
            try:
                name = (task / "comm").read_text()
            except OSError:
                continue
            if name.startswith(self._prefix):
                found.append(task.name)
        return found
