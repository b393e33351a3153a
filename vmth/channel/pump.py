# SPDX-License-Identifier: Apache-2.0
"""Pages of a QEMU's plain stream straight to the page channels, in the midst of a pass.

    events  |--- a section's begin ---|                  |-- its end, the next one's begin --|
    a pump                            |-- pages, pages --|                                   |--

Native code reads, parses and queues piece after piece as long as nothing but pages comes: a piece
is then still in a cache when it is sent, and no Python runs for it. All else in the stream goes to
whoever reads it, event by event.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

__all__ = ["FIRST_BYTES", "CanPump", "PagePump", "PumpLimits", "PumpStop", "Pumped"]

#: A pump takes at most so many bytes that were read before.
FIRST_BYTES = 64 << 10


class PumpStop(enum.IntEnum):
    """Why a pump came back (``csrc/xfer/stream_pump.hpp``)."""

    TIME = 1  #: or the channels still read what had to be waited for
    PAGES = 2  #: so many are queued
    IDLE = 3  #: nothing came, or the connection has ended: reading it tells
    OTHER = 4  #: what is left begins with something else than pages that may go out


@dataclass(frozen=True, slots=True)
class PumpLimits:
    """It comes back for the first of these."""

    time_ns: int  #: looked at once a piece
    patience_ns: int  #: nothing came for so long
    pages: int  #: so many are queued, or a batch's more
    ahead_bytes: int  #: no more payload is queued and not read when a piece is read
    piece_bytes: int  #: read at once, at most


@dataclass(frozen=True, slots=True)
class Pumped:
    stop: PumpStop
    block: int  #: that CONTINUE means in what is left
    read_bytes: int  #: of the socket
    used_bytes: int  #: of the stream: whole records, of what was given and what was read
    pages: int  #: queued
    ahead_bytes: int  #: payload queued by this pump and not read by the channels yet
    ticket: int  #: of the last of that; 0: there is none
    left: bytes  #: of the stream, neither used nor lost


class PagePump(Protocol):
    """Of one sender and one stream; used from the thread that sends."""

    def run(self, first: bytes, block: int, round_: int, limits: PumpLimits) -> Pumped:
        """``first``: up to FIRST_BYTES of the stream that were read before, and ``block`` what
        CONTINUE means in them. Raises what ``PageSender.send_pages`` raises for a lost channel,
        and ChannelError for the stream's; either ends the transfer."""


@runtime_checkable
class CanPump(Protocol):
    """A ``PageSender`` that can."""

    def page_pump(self, fd: int, lengths: Sequence[int], names: bytes, page_bytes: int) -> PagePump:
        """For the stream that comes on ``fd`` (a stream socket, duplicated) with these blocks, the
        sender's in its order: lengths in bytes, and 256 bytes of each name as it is on the wire.
        UsageError for what does not fit."""
