# SPDX-License-Identifier: Apache-2.0
"""While a guest is paused, the threads that it waits for run before all others.

A paused guest waits for a few threads, each of which does little, sleeps, and is woken by the next
message. On a host whose cores are busy with guests every wake-up may wait for a time slice of
somebody else, and as soon as the guest runs at the destination its own vCPUs are among them. So
these threads get SCHED_FIFO with the lowest priority, sched(7), from the pause until the guest runs
somewhere; then each is again what it was. The threads that carry pages are left alone: they work as
long as there are pages. So is every vCPU: a thread that is started meanwhile inherits nothing
(SCHED_RESET_ON_FORK).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from vmth.guest import CanNameThreads

__all__ = ["NOT_PERMITTED", "PRIORITY", "Realtime", "permitted"]

log = logging.getLogger(__name__)

PRIORITY = 1
NOT_PERMITTED = "real-time priority: needs CAP_SYS_NICE, or RLIMIT_RTPRIO of 1 and more"
#: What a thread may be taken from; one with another policy has been given it by somebody.
_USUAL = (os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE)


@dataclass(slots=True)
class Realtime:
    """Of one session, for its thread, which alone calls it. Without ``wanted`` nothing is done."""

    wanted: bool = True
    refused: bool = False  #: the kernel did not permit it
    _before: dict[int, int] = field(default_factory=dict)  #: thread -> policy

    def begin(self, guest: object, *threads: int | None) -> None:
        """Raise the calling thread, these (kernel ids; None is left out) and those that the guest
        names, if it names any. A thread that has ended, or has a real-time policy already, stays as
        it is. Never raises."""
        if not self.wanted:
            return
        named: Iterable[int] = ()
        if isinstance(guest, CanNameThreads):
            try:
                named = tuple(guest.switchover_threads())
            except Exception as error:
                log.warning("the guest's threads for the switchover are not known: %s", error)
        for thread in (threading.get_native_id(), *threads, *named):
            if thread is not None and thread not in self._before and not self.refused:
                self._raise(thread)

    def end(self) -> None:
        """Each is again what it was. Idempotent, never raises."""
        while self._before:
            thread, policy = self._before.popitem()
            try:
                _set(thread, policy)
            except ProcessLookupError:
                pass  # it has ended
            except PermissionError:
                # Without CAP_SYS_NICE the flag cannot be taken back; here it changes nothing.
                with contextlib.suppress(OSError):
                    _set(thread, policy | os.SCHED_RESET_ON_FORK)
            except OSError as error:
                log.warning("thread %d keeps its real-time priority: %s", thread, error)

    def _raise(self, thread: int) -> None:
        try:
            policy = os.sched_getscheduler(thread)
            if policy & ~os.SCHED_RESET_ON_FORK not in _USUAL:
                return
            _set(thread, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, PRIORITY)
        except ProcessLookupError:
            return
        except OSError as error:  # EPERM, or a sandbox's answer
            self.refused = True
            log.info("%s (%s)", NOT_PERMITTED, error)
            return
        self._before[thread] = policy


def permitted() -> bool:
    """Would the kernel? Tries it with the calling thread."""
    trial = Realtime()
    trial.begin(None)
    trial.end()
    return not trial.refused


def _set(thread: int, policy: int, priority: int = 0) -> None:
    os.sched_setscheduler(thread, policy, os.sched_param(priority))
