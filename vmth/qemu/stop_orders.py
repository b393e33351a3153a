# SPDX-License-Identifier: Apache-2.0
"""When a QEMU may stop its guest, as the pass over its stream orders it.

nothing  --allow-->  allowed: QEMU stops when the rest fits the user's limit
nothing  --allow_near_end-->  (room)  --little is left-->  allowed
any      --now-->  told to stop, whatever is left
"""

from __future__ import annotations

from collections.abc import Callable

from vmth.policy.interface import RoundView
from vmth.qemu.steering import Helm
from vmth.tuning import Tuning

__all__ = ["ORDER_NS", "StopOrders"]

#: Before the end of a pass: QEMU looks ten times a second at what it may, so that some orders come
#: too late and some too soon. Either costs another pass.
ORDER_NS = 60_000_000
_SECOND_NS = 1_000_000_000


class StopOrders:
    """What was ordered, and what is to be. One thread; nothing here blocks."""

    def __init__(self, helm: Helm, tuning: Tuning) -> None:
        self._helm = helm
        self._tuning = tuning
        self._room_bytes: int | None = None  # to be allowed when ``_at_bytes`` are left
        self._at_bytes = 0
        self.allowed = False  #: QEMU stops when the rest fits
        self.told_now = False  #: that order stands

    @property
    def nothing_allowed(self) -> bool:
        """Nor will anything be by itself."""
        return not (self.allowed or self.told_now or self._room_bytes is not None)

    def allow(self, room_bytes: int) -> None:
        """``room_bytes``: as many of pages as fit the user's limit; 0: as QEMU reckons."""
        self.allowed, self._room_bytes = True, None
        self._helm.allow_downtime(self._tuning.downtime_limit_ns, room_bytes)

    def allow_near_end(self, room_bytes: int, view: RoundView) -> None:
        """A vCPU under a dirty limit writes a ringful and sleeps, so each look of QEMU's at what is
        dirty may bring as much as the last one, however soon it follows. QEMU looks when what is
        left seems to fit, so that is to be so little that a ringful fits as well."""
        dirty_bytes = view.dirty_pages * view.page_bytes
        order_bytes = round(view.rounds[-1].bandwidth_bps * ORDER_NS / _SECOND_NS)
        self._at_bytes = max(order_bytes, room_bytes - dirty_bytes)
        if dirty_bytes <= self._at_bytes:
            self.allow(room_bytes)
        else:
            self.allow_nothing()
            self._room_bytes = room_bytes

    def left(self, left_bytes: Callable[[], int]) -> None:
        """Of QEMU's pass: asked only when something waits to be allowed near its end."""
        if self._room_bytes is not None and left_bytes() <= self._at_bytes:
            self.allow(self._room_bytes)

    def allow_nothing(self) -> None:
        """QEMU would end its passes where the rest fits, and none would become small."""
        self._room_bytes = None
        if self.allowed:
            self.allowed = False
            self._helm.allow_no_downtime()

    def now(self) -> None:
        """Whatever is left: asked for, or the timeout came."""
        if not self.told_now:
            self.told_now = True
            self._helm.allow_downtime(0)
