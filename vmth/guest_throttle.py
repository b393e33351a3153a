# SPDX-License-Identifier: Apache-2.0
"""The throttle of one guest during one job: all vCPUs alike, or those that dirty memory.

since the last change   vCPU 0: 9000 pages, vCPU 1: 1 page      throttle by 40 %
asked of the guest      vCPU 0: 40 %,       vCPU 1: 0 %
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vmth.guest import CanThrottle, CanThrottleVcpus, Guest
from vmth.policy.throttle import vcpu_percents

__all__ = ["GuestThrottle"]


@dataclass(slots=True)
class GuestThrottle:
    """One thread. Raises what the guest raises."""

    guest: Guest
    percent: int = 0
    vcpu_percents: tuple[int, ...] = ()  #: empty: all vCPUs give up ``percent``
    #: When the throttle was last changed; empty: not known.
    _pages: Sequence[int] = field(default_factory=tuple)

    @property
    def possible(self) -> bool:
        return isinstance(self.guest, CanThrottle)

    def begin(self) -> None:
        """Dirty pages are reported from now on."""
        self._pages = self._dirty_pages()

    def set(self, percent: int) -> bool:
        """True if the guest can be throttled, and was."""
        guest: object = self.guest
        if not isinstance(guest, CanThrottle):
            return False
        percents, pages = self._shares(percent)
        if percent:
            self.percent = percent  # before, so that what is half done is let go as well
        if percents and isinstance(guest, CanThrottleVcpus):
            guest.throttle_vcpus(percents)
        else:
            guest.throttle(percent)
        self.percent, self.vcpu_percents, self._pages = percent, percents, pages
        return True

    def _shares(self, percent: int) -> tuple[tuple[int, ...], Sequence[int]]:
        """(of each vCPU or none, dirty pages now)"""
        if percent == 0:
            return (), ()  # nothing is asked of a guest that is let go
        pages = self._dirty_pages()
        if len(pages) < 2 or len(pages) != len(self._pages):
            return (), pages
        dirtied = [after - before for before, after in zip(self._pages, pages, strict=True)]
        now = self.vcpu_percents or (self.percent,) * len(pages)
        return vcpu_percents(percent, dirtied, now), pages

    def _dirty_pages(self) -> Sequence[int]:
        return self.guest.vcpu_dirty_pages() if isinstance(self.guest, CanThrottleVcpus) else ()
