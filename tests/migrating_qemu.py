# SPDX-License-Identifier: Apache-2.0
"""A source QEMU for tests, without one: its monitor, its stream, and what it does when that ends.

It behaves as QEMU was seen to: while its stream is read it is active; it stops its guest before the
end; told SHUT 0 it says completed (postmigrate); if its stream is lost before, it says failed, or
cancelled if it was told so, and resumes its guest by itself, unless that was paused.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import qemu_streams as s
from fake_qmp import FakeError, FakeQmp, HangUp
from outgoing_world import FakeSource

from vmth.errors import MigrationError
from vmth.guest import DirtySource, StateStream
from vmth.handshake import Incoming
from vmth.types import Mapping as BlockMapping
from vmth.types import RamBlock

__all__ = ["HALF", "FakeWatchdog", "MigratingQemu", "TakingGuest"]

GLOBALSTATE = 11
#: Bytes of a stream up to which a source may be read before it falls silent.
HALF = 20_000


def stream_of(run_state: str) -> bytes:
    """Every plain record, and a globalstate as QEMU writes it."""
    state = s.u32(len(run_state) + 1) + run_state.encode().ljust(100, b"\0")
    whole = s.plain()
    at = whole.rindex(b"\x00\x06")
    devices = [("timer", len(s.TRICKY)), ("0000:00:1f.2/ahci", 1000), ("globalstate", len(state))]
    return b"".join(
        (whole[:at], s.full(GLOBALSTATE, "globalstate", state), b"\x00", s.description(devices))
    )


class MigratingQemu:
    """``was``: its run state before. ``stops_after``: bytes after which it goes silent, 0: never.
    ``says_failed``: to SHUT it answers so."""

    def __init__(
        self,
        folder: Path,
        was: str = "running",
        *,
        stream: bytes | None = None,
        stops_after: int = 0,
        says_failed: bool = False,
    ) -> None:
        self.qmp = FakeQmp(folder / "source.qmp")
        self.was = self.status = was
        self.migration = ""
        self.says_failed = says_failed
        self.cont_fails = ""
        self.cancelling = False
        self.ended = threading.Event()  #: its migration is over
        self._stream = (stream or stream_of(was))[: stops_after or None]
        self._source = FakeSource(self._stream)
        self._watch = threading.Thread(target=self._until_over, daemon=True)
        self.before = dict(self.qmp.capabilities), dict(self.qmp.parameters)
        self.qmp.answers |= {
            "query-status": lambda _: {"status": self.status},
            "query-migrate": self._query,
            "migrate": self._migrate,
            "migrate_cancel": self._cancel,
            "cont": self._cont,
            "quit": self._quit,
        }

    @property
    def path(self) -> Path:
        return self.qmp.path

    @property
    def settings_are_back(self) -> bool:
        return (self.qmp.capabilities, self.qmp.parameters) == self.before

    def _query(self, _: object) -> Mapping[str, Any]:
        if not self.migration:
            return {}
        return {"status": self.migration, "ram": {"remaining": 0}}

    def _migrate(self, arguments: Mapping[str, Any]) -> Any:
        self.migration = "active"
        self._source.execute("migrate", arguments)
        self._watch.start()
        return {}

    def _until_over(self) -> None:
        """The connection's thread ends at SHUT or at the stream's end."""
        self._source.wait_over()
        if self._source.answered.is_set() and not self.says_failed:
            self.migration, self.status = "completed", "postmigrate"
        else:
            self.migration = "cancelled" if self.cancelling else "failed"
            self.status = self.was
        try:
            self.qmp.emit("MIGRATION", status=self.migration)
        except (AssertionError, OSError):
            pass  # nobody listens any more
        self.ended.set()

    def _cancel(self, _: object) -> Any:
        """Heard late: a stream that is lost before makes it a failure."""
        if not self.ended.wait(0.1):
            self.cancelling = True
            self._source.close()
        return {}

    def _cont(self, _: object) -> Any:
        if self.cont_fails:
            raise FakeError("GenericError", self.cont_fails)
        self.status = "running"
        return {}

    def _quit(self, _: object) -> Any:
        self.status = "gone"
        raise HangUp

    def __enter__(self) -> MigratingQemu:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._source.close()
        if self._watch.is_alive():
            self._watch.join()
        self.qmp.__exit__(kind, value, traceback)


class TakingGuest:
    """A destination's guest with the offered blocks, in memory of this process."""

    dirty: Sequence[DirtySource] = ()

    def __init__(self, incoming: Incoming) -> None:
        self.info = dict(incoming.guest)
        self.fails = ""
        self.running = self.released = False
        self.streams: list[StateStream] = []
        self.blocks: list[RamBlock] = []
        for block in incoming.blocks:
            fd = os.memfd_create(block.idstr.replace("/", "-"))
            os.ftruncate(fd, block.used_length)
            self.blocks.append(
                RamBlock(block.idstr, block.used_length, block.gpa, BlockMapping(fd=fd))
            )

    def page(self, block: int, page: int) -> bytes:
        fd = self.blocks[block].mapping.fd
        assert fd is not None
        return os.pread(fd, s.PAGE, page * s.PAGE)

    def pause(self) -> bool:
        return False

    def resume(self) -> None:
        self.running = True

    def save_state(self, write: object) -> None:
        raise AssertionError("a destination saves nothing")

    def load_state(self, streams: Iterable[StateStream]) -> None:
        if self.fails:
            raise MigrationError(self.fails)
        self.streams = list(streams)

    def release(self) -> None:
        self.released = True

    def close(self) -> None:
        for block in self.blocks:
            assert block.mapping.fd is not None
            os.close(block.mapping.fd)


@dataclass
class FakeWatchdog:
    """Notes what it was told to watch; ``alive`` until ``done()``."""

    made: list[FakeWatchdog] = field(default_factory=list)
    order: tuple[Any, ...] = ()
    alive: bool = True
    told: list[bool] = field(default_factory=list)

    def __call__(self, *order: Any, **options: Any) -> FakeWatchdog:
        dog = FakeWatchdog(order=(*order, options))
        self.made.append(dog)
        return dog

    def stopped_elsewhere(self, elsewhere: bool) -> None:
        self.told.append(elsewhere)

    def done(self) -> None:
        self.alive = False
