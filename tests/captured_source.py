# SPDX-License-Identifier: Apache-2.0
"""A QEMU's captured stream as a paused source guest: its memory lies in this process, so the core
moves it as any other, and only the destination's end of a QEMU migration is under test."""

from __future__ import annotations

import base64
import mmap
import os
from collections.abc import Callable, Iterable, Sequence

from vmth.guest import DirtySource, StateStream
from vmth.handshake import SCOPE_STREAM
from vmth.job import MigrationJob
from vmth.options import MigrateOptions
from vmth.qemu import stream as q
from vmth.qemu.destination import DEVICE_STREAM
from vmth.source_session import SourceSession
from vmth.stats import MigrationResult
from vmth.types import Gpa, Mapping, RamBlock
from vmth.uri import parse_endpoint
from vmth.wire.messages import Mode


class CapturedSource:
    """Made of a whole plain stream. ``was_running``: what it says of itself. Context manager."""

    dirty: Sequence[DirtySource] = ()

    def __init__(self, data: bytes, *, was_running: bool = True) -> None:
        self.running = self.was_running = was_running
        self.released = False
        self.before_state: Callable[[], None] = lambda: None  #: all pages have landed
        self.memory: dict[str, mmap.mmap] = {}
        self.head = b""
        self.devices = b""
        self.blocks: list[RamBlock] = []
        self._fds: list[int] = []
        self._take(data)

    def _take(self, data: bytes) -> None:
        reader, writer = q.StreamReader(), q.StreamWriter()
        reader.feed(data)
        reader.feed_eof()
        sections: list[q.SectionStarted] = []
        behind_ram = False
        while (event := reader.next_event()) is not None:
            piece = bytes(writer.send(event))
            if isinstance(event, q.SectionStarted):
                sections.append(event)
            if behind_ram:
                self.devices += piece
            elif not sections:
                self.head += piece
            elif isinstance(event, q.BlockListed):
                self._add_block(event)
            elif isinstance(event, q.RamPages):
                for page in event.pages():
                    at = page.page * 4096
                    self.memory[page.idstr][at : at + 4096] = bytes(page.data) or bytes(4096)
            elif isinstance(event, q.SectionFinished):
                behind_ram = sections[-1].kind is q.SectionKind.END

    def _add_block(self, listed: q.BlockListed) -> None:
        fd = os.memfd_create("captured")
        self._fds.append(fd)
        os.ftruncate(fd, listed.used_length)
        self.memory[listed.idstr] = mmap.mmap(fd, listed.used_length)
        self.blocks.append(RamBlock(listed.idstr, listed.used_length, Gpa(0), Mapping(fd=fd)))

    def move(
        self, uri: str, options: MigrateOptions, features: Sequence[str] = (SCOPE_STREAM,)
    ) -> MigrationResult:
        """By the core, cold."""
        session = SourceSession(self, parse_endpoint(uri), options, features=features)
        return MigrationJob(session).wait(60)

    def entries(self) -> dict[str, str]:
        """What a QEMU source says in its offer."""
        return {"qemu.head": base64.b64encode(self.head).decode()}

    # -- the Guest protocol ------------------------------------------------------------------------

    def pause(self) -> bool:
        self.running = False
        return self.was_running

    def resume(self) -> None:
        self.running = True

    def save_state(self, write: Callable[[StateStream], None]) -> None:
        self.before_state()
        write(StateStream(DEVICE_STREAM, 1, self.devices))

    def load_state(self, streams: Iterable[StateStream]) -> None:
        raise AssertionError("a source")

    def release(self) -> None:
        self.released = True

    def __enter__(self) -> CapturedSource:
        return self

    def __exit__(self, *_: object) -> None:
        for memory in self.memory.values():
            memory.close()
        for fd in self._fds:
            os.close(fd)


def cold(**options: object) -> MigrateOptions:
    return MigrateOptions(mode=Mode.COLD, zerocopy=False, **options)  # type: ignore[arg-type]
