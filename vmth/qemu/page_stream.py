# SPDX-License-Identifier: Apache-2.0
"""What a pass needs of the stream that it reads: ``vmth.qemu.outgoing.OutgoingStream`` has it."""

from __future__ import annotations

from functools import partial
from typing import Protocol, runtime_checkable

from vmth.channel.pump import CanPump, Pumped, PumpLimits
from vmth.qemu.stream import Event

__all__ = ["PageStream", "PumpedStream"]


class PageStream(Protocol):
    """Events, and orders how its bytes are read."""

    @property
    def given_out_bytes(self) -> int: ...
    @property
    def unread_bytes(self) -> int: ...
    def next_event(self, timeout_s: float) -> Event | None: ...
    def in_use(self, until: partial[None]) -> None: ...
    def limit_read(self, nbytes: int) -> None: ...
    def wait_for_more(self, patience_s: float) -> None: ...


@runtime_checkable
class PumpedStream(Protocol):
    """A stream whose pages native code may read and send."""

    def pump_pages(self, sender: CanPump, round_: int, limits: PumpLimits) -> Pumped | None: ...
