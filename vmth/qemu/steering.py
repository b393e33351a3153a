# SPDX-License-Identifier: Apache-2.0
"""What a migrating source QEMU tells over QMP, and the orders to it, without waiting for either.

QEMU answers no command while it waits for its stream to be read with its big lock held. Whoever
reads that stream must therefore never wait for an answer: a thread of its own ("vmth-steer") asks
and orders, and keeps what it heard.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from vmth.errors import ChannelError, VmthError
from vmth.policy.interface import Decision, RoundView
from vmth.qemu.dirty_limit import VcpuLimits
from vmth.qemu.qmp import Qmp, QmpEvent
from vmth.qemu.settings import MigrationSettings

__all__ = [
    "HELD_DOWNTIME_MS",
    "MAX_DOWNTIME_LIMIT_MS",
    "OWN_STOPS",
    "RUNS",
    "Helm",
    "Steering",
    "room_in_downtime_bytes",
]

log = logging.getLogger(__name__)

#: QEMU stops by itself only when there is next to nothing left.
HELD_DOWNTIME_MS = 1
#: Of QEMU: it stops its guest at once.
MAX_DOWNTIME_LIMIT_MS = 2_000_000
RUNS = frozenset({"running", "suspended"})
OWN_STOPS = frozenset({"finish-migrate", "postmigrate"})
#: QEMU answers when its last pages are read, which a slow link delays.
ANSWER_TIMEOUT_S = 60.0


class Helm(Protocol):
    """What the pass over the stream needs of ``Steering``; nothing here blocks."""

    @property
    def passes(self) -> int:
        """How many passes over memory QEMU has begun."""

    @property
    def remaining_bytes(self) -> int:
        """What QEMU had to send when it was asked last: at the begin of its last pass or later."""

    @property
    def throttle_percent(self) -> int:
        """By which auto-converge slows the vCPUs down."""

    @property
    def stopped_ns(self) -> int | None:
        """When the guest stopped, on the clock; None while it runs."""

    def hold_dirty_rate(self, rate_bps: int) -> None:
        """The vCPUs may dirty so many bytes/s together; 0: what they like."""

    def allow_downtime(self, limit_ns: int, room_bytes: int = 0) -> None:
        """QEMU may stop its guest when it expects to send the rest within that; 0: at once.
        ``room_bytes``: as many pages as fit, by what is known here; 0: as QEMU reckons."""

    def allow_no_downtime(self) -> None:
        """QEMU ends its passes, and does not stop its guest before next to nothing is left."""

    def check(self) -> None:
        """Raises what went wrong with an order."""


class Steering:
    """``Helm`` of a real QEMU. A context manager: leaving it ends the thread."""

    def __init__(
        self,
        qmp: Qmp,
        settings: MigrationSettings,
        clock: Callable[[], int] = time.monotonic_ns,
        on_stopped_elsewhere: Callable[[bool], None] | None = None,
    ) -> None:
        """``on_stopped_elsewhere``: called on the steering thread, True when somebody else, or an
        error, has stopped the guest, False when it runs again. QEMU is asked for its run state
        then; None: not, which a QEMU does not need that keeps it by itself (from 8.2 on)."""
        self._qmp = qmp
        self._settings = settings
        self._limits = VcpuLimits(qmp)
        self._clock = clock
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        #: What is wanted now. An order that is given again must not undo a later one.
        self._rate_bps = 0
        self._allowance = (HELD_DOWNTIME_MS, 0)
        self._trouble: VmthError | None = None
        self.passes = 0
        self.remaining_bytes = 0
        self.throttle_percent = 0
        self.stopped_ns: int | None = None
        self._on_stopped_elsewhere = on_stopped_elsewhere
        self._stopped_elsewhere = False
        self._forget_events = qmp.on_event(self._heard)
        self._thread = threading.Thread(target=self._steer, name="vmth-steer", daemon=True)
        self._thread.start()

    def hold_dirty_rate(self, rate_bps: int) -> None:
        self._rate_bps = rate_bps
        self._orders.put(self._hold)

    def allow_downtime(self, limit_ns: int, room_bytes: int = 0) -> None:
        limit_ms = MAX_DOWNTIME_LIMIT_MS
        if limit_ns:
            limit_ms = min(max(1, limit_ns // 1_000_000), MAX_DOWNTIME_LIMIT_MS)
        # QEMU's own measure has all the time in it that it waited for its vCPUs.
        self._allowance = (limit_ms, room_bytes * 1000 // limit_ms)
        self._orders.put(self._limit)

    def allow_no_downtime(self) -> None:
        self._allowance = (HELD_DOWNTIME_MS, 0)
        self._orders.put(self._limit)

    def check(self) -> None:
        if self._trouble is not None:
            raise self._trouble

    def close(self) -> None:
        """Idempotent; waits for the order that is being carried out."""
        self._forget_events()
        self._orders.put(None)
        self._thread.join()

    def __enter__(self) -> Steering:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- other threads -----------------------------------------------------------------------------

    def _heard(self, event: QmpEvent) -> None:
        """On the monitor's thread."""
        if event.name == "MIGRATION_PASS":
            self.passes = int(event.data.get("pass", self.passes + 1))
            self._orders.put(self._look)
        elif event.name in ("STOP", "RESUME"):
            self.stopped_ns = self._clock() if event.name == "STOP" else None
            if self._on_stopped_elsewhere is not None:
                self._orders.put(self._ask_who)
            if event.name == "RESUME":
                self._orders.put(self._look)  # of passes that began while somebody had stopped it

    def _steer(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                order()
            except ChannelError as error:
                # Gone, which the stream's reader sees; or busy, perhaps with its last pages: an
                # order that it did not hear must still reach it.
                log.info("steering the source QEMU: %s", error)
                if self._qmp.lost is None:
                    self._orders.put(order)
            except VmthError as error:
                self._trouble = self._trouble or error

    def _look(self) -> None:
        if self.stopped_ns is not None:
            return  # nothing is left to decide, and asking takes a core
        answer = self._qmp.execute("query-migrate", timeout_s=ANSWER_TIMEOUT_S)
        self.throttle_percent = int(answer.get("cpu-throttle-percentage", 0))
        ram = answer.get("ram")
        if ram is not None:
            self.remaining_bytes = int(ram["remaining"])
        self._limits.share_anew()

    def _ask_who(self) -> None:
        """A migration stops its guest in a run state of its own."""
        state = self._qmp.status()
        if state in OWN_STOPS:
            return  # a guest that was stopped before stays known as that
        elsewhere = state not in RUNS
        if elsewhere != self._stopped_elsewhere and self._on_stopped_elsewhere is not None:
            self._stopped_elsewhere = elsewhere
            self._on_stopped_elsewhere(elsewhere)

    def _hold(self) -> None:
        if self._rate_bps:
            self._limits.hold(self._rate_bps)
        else:
            self._limits.let_go()

    def _limit(self) -> None:
        """Before 8.2 there is only QEMU's own measure."""
        limit_ms, bps = self._allowance
        self._settings.apply(
            parameters={"avail-switchover-bandwidth": bps, "downtime-limit": limit_ms}
        )


def room_in_downtime_bytes(decision: Decision, view: RoundView) -> int:
    """Of pages that the downtime limit leaves time for, as the forecast has it."""
    expected = decision.forecast
    if expected.pages_ns <= 0:
        return 0
    room_ns = view.downtime_limit_ns - (expected.total_ns - expected.pages_ns)
    return max(0, view.dirty_pages * view.page_bytes * room_ns // expected.pages_ns)
