# SPDX-License-Identifier: Apache-2.0
"""What the connections carry is looked at on the side, by one thread, after it was carried.

    carrying threads --copies--> queue --> thread "vmth-observe" --> a ConnectionParser each

Nothing here can hold up, change or end what is carried. A connection whose copies fill its part of
the queue is no longer observed from there on, and its migration's report says so.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from vmth.errors import let_frames_go
from vmth.qemu.relay.link import Direction
from vmth.qemu.relay.migration import ConnectionParser, MigrationNotes, role_of

__all__ = ["BACKLOG_BYTES", "ConnectionWatch", "Observer"]

#: Copies of one connection that may wait to be parsed.
BACKLOG_BYTES = 32 << 20
#: Copies go to the observer in batches: to wake it and to parse for each would cost too much.
BATCH_BYTES = 1 << 20
#: Of answers that are seen before the connection is known.
EARLY_BYTES = 64 << 10


class ConnectionWatch:
    """One connection as it is observed (a ``LinkWatcher``). ``key``: connections with the same one
    come from the same source, None when that is not known."""

    def __init__(self, observer: Observer, number: int, key: object) -> None:
        self.number = number
        self.key = key
        self.role = "empty"
        self.migration: MigrationNotes | None = None
        self.parser: ConnectionParser | None = None
        self._observer = observer
        # Of each pair one carrying thread writes its direction; the observer writes ``_taken``.
        self._staged: dict[Direction, bytearray] = {}
        self._staged_bytes = dict.fromkeys(Direction, 0)
        self._queued = dict.fromkeys(Direction, 0)
        self._taken = dict.fromkeys(Direction, 0)
        self._overrun = False
        self._head = b""
        self._early = b""

    # ---- carrying threads ----------------------------------------------------------------------

    def carried(self, direction: Direction, data: memoryview | bytes) -> None:
        if self._overrun:
            return
        if self.waiting_bytes > BACKLOG_BYTES - BATCH_BYTES:
            self._overrun = True
            self._observer.put(lambda: self._lose("the observer did not keep up"))
            return
        if self._queued[direction] == 0:
            # What a connection begins with says what it is: before anything is answered.
            self._put(direction, bytes(data), len(data))
        else:
            self._stage(direction, memoryview(data))

    def _stage(self, direction: Direction, data: memoryview) -> None:
        at = self._staged_bytes[direction]
        if at + len(data) > BATCH_BYTES:
            self._hand_over(direction)
            at = 0
        if at == 0:
            self._staged[direction] = bytearray(BATCH_BYTES)
        self._staged[direction][at : at + len(data)] = data
        self._staged_bytes[direction] = at + len(data)

    @property
    def waiting_bytes(self) -> int:
        """Buffers that wait to be looked at; may be a little too high while they are."""
        return sum(self._queued.values()) - sum(self._taken.values())

    def finished(self, direction: Direction) -> None:
        self._hand_over(direction)
        if not self._overrun:
            self._put(direction, b"", 0)

    def flush(self) -> None:
        """Hand over what is left, once no thread carries any more."""
        for direction in Direction:
            self._hand_over(direction)

    def _hand_over(self, direction: Direction) -> None:
        nbytes, self._staged_bytes[direction] = self._staged_bytes[direction], 0
        if nbytes:
            buffer = self._staged.pop(direction)
            self._put(direction, memoryview(buffer)[:nbytes], len(buffer))

    def _put(self, direction: Direction, data: memoryview | bytes, held_bytes: int) -> None:
        self._queued[direction] += held_bytes
        self._observer.put(lambda: self._take(direction, data, held_bytes))

    # ---- the observer's thread -----------------------------------------------------------------

    def _take(self, direction: Direction, data: memoryview | bytes, held_bytes: int) -> None:
        self._taken[direction] += held_bytes
        try:
            self._look_at(direction, data)
        except Exception as error:  # a fault of ours costs this report, no more
            let_frames_go(error)
            self._lose(f"{type(error).__name__}: {error}")

    def _look_at(self, direction: Direction, data: memoryview | bytes) -> None:
        if direction is Direction.FORWARD:
            self._forward(data)
        elif self.parser is not None:
            self.parser.backward(data)
        else:  # the answer was quicker than the note of what it answers
            self._early = (self._early + data)[: EARLY_BYTES + 1]

    def _forward(self, data: memoryview | bytes) -> None:
        if self.parser is None:
            self._head += data
            role = role_of(self._head)
            if role is None and not data:
                role = "other"
            if role in (None, "empty"):
                return
            assert role is not None
            self.role, data, self._head = role, self._head, b""
            self.migration = self._observer.join(self)
            self.parser = ConnectionParser(self.number, role, self.migration)
            early, self._early = self._early, b""
            if len(early) > EARLY_BYTES:
                self._lose("the destination spoke first")
            elif early:
                self.parser.backward(early)
        self.parser.forward(data)

    def _lose(self, reason: str) -> None:
        if self.parser is not None:
            self.parser.give_up(reason)


class Observer:
    """Owns the thread. ``on_migration`` is called from it whenever a migration's last connection
    has closed."""

    def __init__(self, on_migration: Callable[[MigrationNotes], None]) -> None:
        self._on_migration = on_migration
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._open: list[MigrationNotes] = []
        self._count = 0
        self._thread = threading.Thread(target=self._run, name="vmth-observe", daemon=True)
        self._thread.start()

    def watch(self, number: int, key: object) -> ConnectionWatch:
        return ConnectionWatch(self, number, key)

    def put(self, step: Callable[[], None]) -> None:
        self._queue.put(step)

    def close(self, timeout_s: float | None = None) -> bool:
        """Look at what waits, then stop. False if that takes longer."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def join(self, watch: ConnectionWatch) -> MigrationNotes:
        """The open migration that this connection belongs to, or a new one."""
        fitting = [
            notes
            for notes in self._open
            if notes.key == watch.key and not (watch.role == "main" and notes.stream is not None)
        ]
        if len(fitting) == 1:
            notes = fitting[0]
        else:
            self._count += 1
            notes = MigrationNotes(self._count, watch.key)
            self._open.append(notes)
            if fitting:
                notes.remark(
                    f"connection {watch.number} may belong to any of {len(fitting)} migrations"
                )
        notes.connections.append(watch.number)
        notes.open_connections += 1
        return notes

    def left(self, watch: ConnectionWatch) -> None:
        notes = watch.migration
        if notes is None:
            return
        notes.open_connections -= 1
        if notes.open_connections == 0:
            self._open.remove(notes)
            self._on_migration(notes)

    def _run(self) -> None:
        while (step := self._queue.get()) is not None:
            step()
