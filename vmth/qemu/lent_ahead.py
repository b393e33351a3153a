# SPDX-License-Identifier: Apache-2.0
"""Pages lent to the page channels and not read by them yet: no more of them than a bound.

(ticket 5, 2 MiB) (ticket 6, 1 MiB) (ticket 7, 3 MiB)   ahead
 ^ waited for while all of it is more than the bound
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from vmth.channel.interface import PageSender
from vmth.qemu.queue_bounds import START_AHEAD_BYTES

__all__ = ["LentAhead"]

_TICKET_WAIT_NS = 50_000_000


@dataclass(slots=True)
class LentAhead:
    """Of one sender, from the thread that sends. ``check`` raises what ends a wait."""

    sender: PageSender
    check: Callable[[], None]
    limit_bytes: int = START_AHEAD_BYTES
    last_ticket: int = 0
    ahead_bytes: int = 0
    _lent: deque[tuple[int, int]] = field(default_factory=deque)  #: (ticket, bytes)

    def add(self, ticket: int, nbytes: int) -> None:
        """Waits for the oldest while there is more than the bound."""
        self.last_ticket = ticket
        self._lent.append((ticket, nbytes))
        self.ahead_bytes += nbytes
        done = self.sender.pages_read()
        while self._lent and (self._lent[0][0] <= done or self.ahead_bytes > self.limit_bytes):
            oldest, of_it = self._lent.popleft()
            self.ahead_bytes -= of_it
            if oldest > done:
                self.wait(oldest)
                done = oldest

    def pumped(self, ticket: int) -> None:
        """A pump has lent more, up to this ticket, and keeps it within the same bound itself."""
        self.last_ticket = ticket

    def wait(self, ticket: int) -> None:
        while not self.sender.wait_read(ticket, _TICKET_WAIT_NS):
            self.check()

    def all_read(self) -> bool:
        return self.last_ticket <= self.sender.pages_read()

    def landed(self) -> None:
        """A barrier is behind all of it."""
        self._lent.clear()
        self.ahead_bytes = 0
