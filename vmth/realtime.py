# SPDX-License-Identifier: Apache-2.0
"""While a guest is paused, the threads that it waits for run before all others, on cores that are
awake.

A paused guest waits for a few threads, each of which does little, sleeps, and is woken by the next
message. On a host whose cores are busy with guests every wake-up may wait for a time slice of
somebody else, and as soon as the guest runs at the destination its own vCPUs are among them. So
these threads get SCHED_FIFO with the lowest priority, sched(7), from the pause until the guest runs
somewhere; then each is again what it was. The threads that carry pages are left alone: they work as
long as there are pages. So is every vCPU: a thread that is started meanwhile gets the usual policy
and nice 0 (SCHED_RESET_ON_FORK).

A core that has nothing to do sleeps, and each of those messages wakes one. How long that may take
is asked of the kernel by a latency of 0 in /dev/cpu_dma_latency, which counts for all cores as long
as the file is open (Documentation/power/pm_qos_interface.rst): from the pause on idle cores wait
for work instead of sleeping.

A destination's threads are raised a little earlier, when the pause is near: whoever handles the
word that it has come must not wait for others either.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from vmth.guest import CanNameThreads

__all__ = ["LONGEST_NS", "NOT_PERMITTED", "PRIORITY", "Realtime", "keeps_awake", "permitted"]

log = logging.getLogger(__name__)

PRIORITY = 1
#: A device of this host, which has one kernel.
LATENCY_PATH = "/dev/cpu_dma_latency"
NOT_PERMITTED = (
    "real-time priority: not permitted (CAP_SYS_NICE or RLIMIT_RTPRIO, and real-time run time of "
    "the cgroup where the kernel divides that)"
)
#: A number of 32 bits, in the order of this host.
LATENCY_US = bytes(4)
#: No pause that is worth it lasts longer; whatever the other end does, it is over then.
LONGEST_NS = 5_000_000_000
#: What a thread may be taken from; one with another policy has been given it by somebody.
_USUAL = (os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE)


@dataclass(slots=True)
class Realtime:
    """Of one session, for its thread, which alone calls it. Without ``wanted`` nothing is done."""

    wanted: bool = True
    clock: Callable[[], int] = time.monotonic_ns
    refused: bool = False  #: the kernel did not permit it to the calling thread
    _before: dict[int, int] = field(default_factory=dict)  #: thread -> policy
    _awake_fd: int | None = None  #: open while cores are kept awake
    _spent: bool = False  #: it has lasted that long once, and waits for the pause itself
    _begun_ns: int = 0

    @property
    def works(self) -> bool:
        """It is wanted and, as tried with the calling thread, permitted."""
        return self.wanted and not self.refused and permitted()

    @property
    def held(self) -> bool:
        """Something is raised, or kept awake: ``check_time()`` is to be called now and then."""
        return bool(self._before) or self._awake_fd is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """For the result's ``fallbacks``."""
        return (NOT_PERMITTED,) if self.refused else ()

    def begin(self, guest: object, *threads: int | None, paused: bool = True) -> None:
        """Raise the calling thread, these (kernel ids; None is left out) and those that the guest
        names, if it names any. A thread that has ended, has a real-time policy already or may not
        be raised stays as it is. With ``paused`` (it is, or just about to be) cores are kept awake
        too, and time counts from here. Once begun, threads are not looked at again before
        ``end()``; once that took LONGEST_NS, nothing begins before the pause. Never raises."""
        if not self.wanted or (self._spent and not paused):
            return
        if paused or not self._before:
            self._begun_ns = self.clock()
        if paused:
            self._keep_awake()
        if self.refused or self._before:
            return
        own = threading.get_native_id()
        trouble = self._raise(own)
        if trouble is not None:
            self.refused = True
            log.info("%s: %s", NOT_PERMITTED, trouble)
            return
        for thread in (*threads, *_named(guest)):
            if thread is not None and (trouble := self._raise(thread)) is not None:
                log.info("thread %s keeps its priority: %s", thread, trouble)

    def check_time(self) -> None:
        """``end()`` once LONGEST_NS have passed."""
        if self.held and self.clock() - self._begun_ns > LONGEST_NS:
            self.end()
            self._spent = True

    def end(self) -> None:
        """Each is again what it was. Idempotent, never raises."""
        if self._awake_fd is not None:
            os.close(self._awake_fd)
            self._awake_fd = None
        while self._before:
            thread, policy = self._before.popitem()
            try:
                _set(thread, policy)
            except ProcessLookupError:
                pass  # it has ended
            except PermissionError:
                # Only CAP_SYS_NICE takes the flag back. With it, what the thread starts later has
                # no negative nice value.
                with contextlib.suppress(OSError):
                    _set(thread, policy | os.SCHED_RESET_ON_FORK)
            except OSError as error:
                log.warning("thread %d keeps its real-time priority: %s", thread, error)

    def _keep_awake(self) -> None:
        if self._awake_fd is not None:
            return
        try:
            fd = os.open(LATENCY_PATH, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            log.info("idle cores may sleep: %s", error)
            return
        try:
            os.write(fd, LATENCY_US)
        except OSError as error:
            log.info("idle cores may sleep: %s", error)
            os.close(fd)
            return
        self._awake_fd = fd

    def _raise(self, thread: int) -> Exception | None:
        """What the kernel had against it; a thread that has ended is no trouble."""
        if thread in self._before:
            return None
        try:
            policy = os.sched_getscheduler(thread)
            if policy & ~os.SCHED_RESET_ON_FORK in _USUAL:
                _set(thread, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, PRIORITY)
                self._before[thread] = policy
        except (OSError, OverflowError, TypeError, ValueError) as error:  # the guest's numbers
            return None if getattr(error, "errno", 0) == errno.ESRCH else error
        return None


def _named(guest: object) -> Iterable[int]:
    if not isinstance(guest, CanNameThreads):
        return ()
    try:
        return tuple(guest.switchover_threads())
    except Exception as error:
        log.warning("the guest's threads for the switchover are not known: %s", error)
        return ()


def permitted() -> bool:
    """Would the kernel? Tries it with the calling thread."""
    trial = Realtime()
    trial.begin(None, paused=False)
    trial.end()
    return not trial.refused


def keeps_awake() -> bool:
    """May this process keep cores awake?"""
    return os.access(LATENCY_PATH, os.W_OK)


def _set(thread: int, policy: int, priority: int = 0) -> None:
    os.sched_setscheduler(thread, policy, os.sched_param(priority))
