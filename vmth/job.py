# SPDX-License-Identifier: Apache-2.0
"""A running migration as an object: look at it, steer it, wait for it, await it."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Generator, Iterator
from typing import Protocol

from vmth.errors import OptionError, let_frames_go
from vmth.events import Completed, Event, EventLog, Failed
from vmth.stats import JobStats, MigrationResult
from vmth.tuning import Tuning

__all__ = ["JobSession", "MigrationJob"]


#: Of any setting: what the native core counts in.
MOST = (1 << 63) - 1


class JobSession(Protocol):
    """What a job runs: a ``SourceSession``, or one with something around it."""

    @property
    def session_id(self) -> bytes: ...
    @property
    def events(self) -> EventLog: ...
    @property
    def tuning(self) -> Tuning: ...
    def cancel(self, reason: str) -> None: ...
    def retune(
        self, bandwidth_bps: int | None, downtime_limit_ns: int | None, timeout_ns: int | None
    ) -> None: ...
    def stats(self) -> JobStats: ...
    def run(self) -> MigrationResult: ...


class MigrationJob:
    """Made by ``vmth.start_migration``. Every method may be called from any thread; nothing needs
    an event loop, and ``await job`` works in one. The job's own thread is named ``vmth-job``; it
    alone calls the guest.
    """

    def __init__(self, session: JobSession) -> None:
        self._session = session
        self._result: MigrationResult | None = None
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vmth-job", daemon=True)
        self._thread.start()

    @property
    def session_id(self) -> str:
        """32 hex digits."""
        return self._session.session_id.hex()

    @property
    def done(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> MigrationResult:
        """The result, or the MigrationError that says how it ended. TimeoutError leaves it
        running."""
        if not self._ended.wait(timeout_s):
            raise TimeoutError(f"the migration has not ended within {timeout_s:g} s")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """Ask for the end: the source guest runs on. Without effect once the grant is given: the
        job then ends by itself. Returns at once; ``wait()`` raises CancelledError."""
        self._session.cancel("cancelled by the caller")

    def switchover(self) -> None:
        """Switch over after the current round, whatever is left."""
        self._session.tuning.switchover_requested = True

    def set(
        self,
        *,
        bandwidth_bps: int | None = None,
        downtime_limit_ns: int | None = None,
        timeout_ns: int | None = None,
    ) -> None:
        """Change settings while it runs; the bandwidth takes effect within 50 ms, the others with
        the next decision. ``bandwidth_bps=0`` takes the cap away."""
        for name, value, least in (
            ("bandwidth_bps", bandwidth_bps, 0),
            ("downtime_limit_ns", downtime_limit_ns, 1),
            ("timeout_ns", timeout_ns, 0),
        ):
            if value is not None and not least <= value <= MOST:
                raise OptionError(name, f"received {value}, allowed {least} to {MOST}")
        self._session.retune(bandwidth_bps, downtime_limit_ns, timeout_ns)

    def stats(self) -> JobStats:
        """A snapshot; kept after the end."""
        return self._session.stats()

    def events(self) -> Iterator[Event]:
        """Every event from the start on, ending when the job has ended. One reader."""
        while True:
            try:
                event = self._session.events.get(timeout=0.1)
            except queue.Empty:
                if self._ended.is_set() and self._session.events.empty():
                    return
                continue
            if event is None:
                return
            yield event

    def __await__(self) -> Generator[object, None, MigrationResult]:
        return asyncio.to_thread(self.wait).__await__()

    def _run(self) -> None:
        try:
            self._result = self._session.run()
            self._session.events.put(Completed(time.monotonic_ns(), self._result))
        except BaseException as error:  # wait() raises it: nothing is swallowed
            self._error = error
            runs = getattr(error, "source_runs", True)
            self._session.events.put(Failed(time.monotonic_ns(), str(error), runs))
        finally:
            let_frames_go(self._error)
            self._session.events.put(None)
            self._ended.set()
