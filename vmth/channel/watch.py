# SPDX-License-Identifier: Apache-2.0
"""Finds page channels on which nothing moves although the peer's control connection lives, and
sessions in which nothing happens at all."""

from __future__ import annotations

import threading
from collections.abc import Callable

from vmth.channel.pages import NativeSender
from vmth.errors import ChannelError, VmthError

__all__ = ["IdleRule", "ProgressWatch"]

_LOOKS_PER_TIMEOUT = 4


class ProgressWatch:
    """Calls ``on_stall`` once when bytes are in flight and none was acknowledged for ``timeout_s``.
    A packet is at most 2 MiB, and 256 KiB on a channel that was not fast: a link is taken for dead
    below so much a timeout. Context manager; a thread of its own inside it."""

    def __init__(
        self, sender: NativeSender, timeout_s: float, on_stall: Callable[[VmthError], None]
    ) -> None:
        self._sender = sender
        self._timeout_s = timeout_s
        self._on_stall = on_stall
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vmth-watch", daemon=True)

    def __enter__(self) -> ProgressWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        acked_bytes, still = -1, 0
        while not self._stop.wait(self._timeout_s / _LOOKS_PER_TIMEOUT):
            try:
                now, in_flight = self._sender.counters().acked_bytes, self._sender.in_flight()
            except VmthError:
                return  # failed already, and said so
            still = still + 1 if in_flight and now == acked_bytes else 0
            acked_bytes = now
            if still >= _LOOKS_PER_TIMEOUT:
                self._on_stall(
                    ChannelError(
                        f"page channels: {in_flight} bytes in flight and nothing acknowledged for "
                        f"{self._timeout_s:g} s"
                    )
                )
                return


class IdleRule:
    """Judges a destination's session by what has happened in it. Pure: time is an argument.

    A peer that only answers pings holds a session's place and its guest's memory. All ``channels``
    must be attached within ``attach_s``, and something must happen every ``idle_s``.
    """

    def __init__(self, channels: int, attach_s: float, idle_s: float, now_s: float) -> None:
        self._channels = channels
        self._attach_s = attach_s
        self._idle_s = idle_s
        self._began_s = now_s
        self._moved_s = now_s
        self._seen: tuple[int, ...] = ()

    def not_before(self, now_s: float) -> None:
        """Until now no channel could have come: the peer was being told something first."""
        self._began_s = now_s

    def judge(self, now_s: float, attached: int, *seen: int) -> ChannelError | None:
        """Why the session is over. ``seen``: counters that grow with whatever happens."""
        if attached < self._channels and now_s - self._began_s > self._attach_s:
            return ChannelError(
                f"{attached} of {self._channels} page channels came within {self._attach_s:g} s"
            )
        if seen != self._seen:
            self._seen, self._moved_s = seen, now_s
        if now_s - self._moved_s > self._idle_s:
            return ChannelError(
                f"the source lives, but nothing has happened for {self._idle_s:g} s"
            )
        return None
