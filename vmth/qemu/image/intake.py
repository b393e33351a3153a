# SPDX-License-Identifier: Apache-2.0
"""A migration stream's events to an image: its head and tail as bytes, its pages as frames. No I/O.

    header, configuration, commands, START of ram | pages of all passes | END of ram, the rest
                       HEAD                       |       PAGES         |       STATE

HEAD, one ram section with the pages, and STATE are a whole stream again. What would have to be
stored between the pages without being understood, such as dirty bitmaps, is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmth.errors import RefusedError
from vmth.qemu.image.layout import MAX_HEAD_BYTES
from vmth.qemu.image.meta import SavedBlock
from vmth.qemu.image.writer import ImageWriter
from vmth.qemu.stream import (
    BlockListed,
    Configuration,
    ConfigurationField,
    Event,
    PassThrough,
    RamEnd,
    RamFlush,
    RamPages,
    RawBytes,
    SectionFinished,
    SectionKind,
    SectionStarted,
    StreamWriter,
    run_state_in,
)

__all__ = ["Intake", "StreamHead"]


#: Of the state: QEMU's own sections come before those of devices that may have hundreds of MiB.
SEEN_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class StreamHead:
    """What the stream said before its first page."""

    machine: str
    page_bytes: int
    blocks: tuple[SavedBlock, ...]
    data: bytes


class Intake:
    """``begin`` is called once, when the head is whole; the writer that it returns stays its
    owner's. Raises RefusedError for what an image cannot hold, and what the writer raises."""

    def __init__(self, begin: Callable[[StreamHead], ImageWriter]) -> None:
        self._begin = begin
        self._writer: ImageWriter | None = None
        self._encoder = StreamWriter()
        self._machine = ""
        self._page_bytes = 4096
        self._blocks: list[SavedBlock] = []
        self._head = bytearray()
        self._seen = bytearray()  #: the first of the state
        self._tail = bytearray()
        self._ending = self._ended = False

    @property
    def run_state(self) -> str | None:
        """Of the guest before QEMU stopped it, once all was taken; None where the stream does not
        tell."""
        return run_state_in(bytes(self._seen))

    def take(self, event: Event) -> None:
        """The next event; what its buffers refer to is copied before this returns."""
        match event:
            case RamPages():
                self._begun().pages(event.runs, event.data)
            case RawBytes() if self._ended:
                self._seen += event.data[: SEEN_BYTES - len(self._seen)]
                self._begun().state(event.data)
            case PassThrough():
                if not self._ended:
                    raise RefusedError(
                        f"this VM cannot be saved: its stream has {event.reason} at byte "
                        f"{event.position}, allowed is ram alone before the device state"
                    )
            case _:
                self._plain(event)

    def _plain(self, event: Event) -> None:
        match event:
            case Configuration():
                self._machine = event.machine
            case ConfigurationField(name="target-page-bits"):
                self._page_bytes = 1 << int.from_bytes(event.body, "big")
            case BlockListed():
                if event.page_size is not None or event.gpa is not None:
                    raise RefusedError(
                        f"this VM cannot be saved: block {event.idstr!r} is listed with page size "
                        f"{event.page_size} and address {event.gpa}, allowed are neither"
                    )
                self._blocks.append(SavedBlock(event.idstr, event.used_length))
            case SectionStarted(kind=SectionKind.PART):
                self._begun()
                return  # pages are sent in sections of the restore's own
            case SectionStarted(kind=SectionKind.END):
                self._begun()
                self._ending = True
        self._keep(event)
        if isinstance(event, SectionFinished) and self._ending and not self._ended:
            self._ended = True
            self._begun().state(self._tail)

    def _keep(self, event: Event) -> None:
        """The event's bytes, to where they stand: what is between PART sections goes before END."""
        data = bytes(self._encoder.send(event))
        if self._writer is None:
            self._head += data
            if len(self._head) > MAX_HEAD_BYTES:
                raise RefusedError(
                    f"this VM cannot be saved: {len(self._head)} bytes before its memory, allowed "
                    f"{MAX_HEAD_BYTES}"
                )
        elif self._ended:
            self._writer.state(data)
        elif self._ending or not _of_a_part(event):
            self._tail += data

    def _begun(self) -> ImageWriter:
        if self._writer is None:
            head = StreamHead(
                self._machine, self._page_bytes, tuple(self._blocks), bytes(self._head)
            )
            self._writer = self._begin(head)
        return self._writer


def _of_a_part(event: Event) -> bool:
    """Is it of a PART section's frame? No other section is open between ram's START and END."""
    return isinstance(event, SectionFinished | RamEnd | RamFlush)
