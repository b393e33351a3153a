# SPDX-License-Identifier: Apache-2.0
"""One carried connection: two threads, one a direction, each reads one end and writes the other.

    near (who connected here)  --forward-->  far (what this relay connected to)
                               <-backward--

A half-close is carried as one. A direction that breaks ends the connection at both ends: at once
where its reader broke, after the other direction has handed on what it still had where its writer
broke (a destination QEMU says why it fails, then closes).
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from vmth.errors import StreamError, let_frames_go
from vmth.qemu.relay.ends import Breaker, BrokenError, End, SourceLostError
from vmth.qemu.relay.frames import DamageError

__all__ = ["DRAIN_S", "Direction", "Link", "LinkState", "LinkWatcher"]

#: How long the other direction may go on when one can no longer be written.
DRAIN_S = 2.0


class Direction(enum.Enum):
    FORWARD = "forward"
    BACKWARD = "backward"


class LinkWatcher(Protocol):
    """Is told what a connection carries, after it was carried. Called from both threads; must not
    block, and what it raises breaks nothing."""

    def carried(self, direction: Direction, data: memoryview | bytes) -> None:
        """``data`` is valid only during the call."""

    def finished(self, direction: Direction) -> None:
        """A half-close was carried."""


class LinkState(enum.Enum):
    OPEN = "open"
    CLOSED = "closed"  #: both ends closed, everything was delivered
    BROKEN = "broken"


@dataclass(slots=True)
class Counters:
    """Bytes delivered each way, before any compression."""

    forward_bytes: int = 0
    backward_bytes: int = 0


@dataclass(slots=True)
class _Watched:
    watcher: LinkWatcher | None
    fault: str = field(default="")

    def carried(self, direction: Direction, data: memoryview | bytes) -> None:
        if self.watcher is not None:
            try:
                self.watcher.carried(direction, data)
            except Exception as error:  # whatever it is, the bytes were carried
                self._lost(error)

    def finished(self, direction: Direction) -> None:
        if self.watcher is not None:
            try:
                self.watcher.finished(direction)
            except Exception as error:
                self._lost(error)

    def _lost(self, error: Exception) -> None:
        let_frames_go(error)
        self.watcher, self.fault = None, f"{type(error).__name__}: {error}"


class Link:
    """Carries from ``start()`` on; ``on_closed`` is called once, from one of its threads, when both
    ends are closed. Owns both ends and the breaker."""

    def __init__(
        self,
        name: str,
        near: End,
        far: End,
        breaker: Breaker,
        *,
        watcher: LinkWatcher | None = None,
        on_closed: Callable[[Link], None] = lambda link: None,
    ) -> None:
        self.counters = Counters()
        self.state = LinkState.OPEN
        self.reason = ""
        self.damaged = False
        self.near, self.far = near, far
        near.heed(far)
        far.heed(near)
        self._breaker = breaker
        self._watched = _Watched(watcher)
        self._on_closed = on_closed
        self._lock = threading.Lock()
        self._left = 2
        self._over = {direction: threading.Event() for direction in Direction}
        self._threads = [
            threading.Thread(target=self._run, args=(direction,), name=f"{name}-{mark}")
            for direction, mark in ((Direction.FORWARD, "f"), (Direction.BACKWARD, "b"))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.daemon = True  # a process that must end ends; the kernel then resets both sides
            thread.start()

    def fail(self, reason: str, *, damaged: bool = False) -> None:
        """Break the connection at both ends; the first reason counts. Thread-safe, returns at
        once; a connection that is closed stays so."""
        with self._lock:
            if self._left == 0:
                return
            if not self.reason:
                self.reason, self.damaged = reason, damaged
            self._breaker.fire()

    @property
    def watch_fault(self) -> str:
        """Why the watcher is no longer told anything; empty: it is, or there is none."""
        return self._watched.fault

    def join(self, timeout_s: float | None = None) -> bool:
        """True once both threads have ended."""
        for thread in self._threads:
            thread.join(timeout_s)
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, direction: Direction) -> None:
        try:
            self._carry(direction)
        except BrokenError:
            pass
        except DamageError as error:
            self.fail(f"{self._source(direction).name}: {error}", damaged=True)
        except Exception as error:  # a thread that dies silently would hang QEMU
            let_frames_go(error)
            text = error if isinstance(error, StreamError | OSError) else repr(error)
            self.fail(f"{self._source(direction).name}: {text}")
        finally:
            self._over[direction].set()
            self._leave()

    def _source(self, direction: Direction) -> End:
        return self.near if direction is Direction.FORWARD else self.far

    def _carry(self, direction: Direction) -> None:
        source = self._source(direction)
        target = self.far if direction is Direction.FORWARD else self.near
        while len(data := source.receive()):
            try:
                target.send(data)
            except SourceLostError:
                raise
            except (OSError, StreamError) as error:
                self._cannot_send(direction, source, target, error)
                return
            self._count(direction, len(data))
            self._watched.carried(direction, data)
            if self._breaker.fired:
                return
        try:
            target.finish()
        except (OSError, StreamError) as error:
            self._cannot_send(direction, source, target, error)
            return
        self._watched.finished(direction)
        source.delivered()

    def _count(self, direction: Direction, nbytes: int) -> None:
        if direction is Direction.FORWARD:
            self.counters.forward_bytes += nbytes
        else:
            self.counters.backward_bytes += nbytes

    def _cannot_send(
        self, direction: Direction, source: End, target: End, error: OSError | StreamError
    ) -> None:
        """What ``target`` still says is handed on first, within a bound."""
        let_frames_go(error)
        source.stop_reading()
        other = Direction.BACKWARD if direction is Direction.FORWARD else Direction.FORWARD
        self._over[other].wait(DRAIN_S)
        self.fail(f"{target.name}: {error}", damaged=isinstance(error, DamageError))

    def _leave(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        # The last thread out; nobody else uses the ends any more.
        if self.reason:
            # Each on its own: one that does not read must not keep the news from the other.
            other = threading.Thread(target=self.far.abort, args=(self.reason,))
            other.start()
            self.near.abort(self.reason)
            other.join()
        else:
            self.near.close()
            self.far.close()
        self._breaker.close()
        self.state = LinkState.BROKEN if self.reason else LinkState.CLOSED
        self._on_closed(self)
