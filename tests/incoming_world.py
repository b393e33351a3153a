# SPDX-License-Identifier: Apache-2.0
"""A QEMU that waits for a stream, as far as a monitor and a socket show it: the test is its loader.

with IncomingWorld(folder) as world:
    stream = world.started()      # vmth's end
    world.loader.recv(...)        # QEMU's end
    world.say(Pong(1), Shut(0))
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fake_qmp import FakeError, FakeQmp

from vmth.qemu import stream as q
from vmth.qemu.incoming import IncomingStream
from vmth.qemu.qmp import Qmp


class IncomingWorld:
    """``status`` and ``migration`` are what the monitor answers; ``folder`` is where QEMU was told
    to listen. ``old``: a QEMU before 9.1."""

    def __init__(self, folder: Path, *, old: bool = False) -> None:
        self.status = "inmigrate"
        self.migration: dict[str, Any] = {}
        self.after_cont = "running"
        self.listens = True
        self.on_connect: Callable[[], None] | None = None  #: in a thread of its own
        self.folder: Path | None = None
        self.modes: list[int] = []
        self._old = old
        self._resources = contextlib.ExitStack()
        self._listener: socket.socket | None = None
        self._loader: socket.socket | None = None
        self.fake = self._resources.enter_context(FakeQmp(folder / "dst.qmp"))
        self.fake.capabilities["mapped-ram"] = False
        self.fake.answers |= {
            "query-status": lambda _: {"status": self.status, "running": self.status == "running"},
            "query-migrate": lambda _: self.migration,
            "stop": {},
            "cont": self._cont,
            "migrate-incoming": self._migrate_incoming,
        }
        self.qmp = self._resources.enter_context(Qmp(self.fake.path))

    def started(self, **options: Any) -> IncomingStream:
        """A stream that is open; closed with the world."""
        stream = self._resources.enter_context(IncomingStream(self.qmp, **options))
        stream.start()
        return stream

    @property
    def loader(self) -> socket.socket:
        if self._loader is None:
            assert self._listener is not None, "nobody connected"
            self._loader, _ = self._listener.accept()
            self._resources.callback(self._loader.close)
            self._loader.settimeout(10)
        return self._loader

    def say(self, *messages: q.ReturnMessage) -> None:
        for message in messages:
            self.loader.sendall(q.encode_return_message(message))

    def taken(self) -> bytes:
        """What has been written so far."""
        data = b""
        self.loader.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while piece := self.loader.recv(1 << 20):
                data += piece
        self.loader.settimeout(10)
        return data

    def place_is_held(self) -> bool:
        """Has this process, where vmth runs too, the directory's socket open by its name?"""
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(f"/proc/self/fd/{fd}").startswith(f"{self.folder}/"):
                    return True
        return False

    def switched_on(self) -> set[str]:
        """The capabilities that are on."""
        return {name for name, state in self.fake.capabilities.items() if state}

    def completes(self, status: str) -> None:
        """QEMU has loaded everything and is in that run state."""
        self.status, self.migration = status, {"status": "completed"}
        self.say(q.Shut(0))

    def fails(self, reason: str) -> None:
        """QEMU found something wrong."""
        self.migration = {"status": "failed", "error-desc": reason}
        self.loader.close()

    def __enter__(self) -> IncomingWorld:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def _migrate_incoming(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if self._old and "exit-on-error" in arguments:
            raise FakeError("GenericError", "Parameter 'exit-on-error' is unexpected")
        if not self.listens:
            return {}
        path = Path(arguments["uri"].removeprefix("unix:"))
        self.folder = path.parent
        self.modes.append(os.stat(self.folder).st_mode & 0o777)
        self._listener = self._resources.enter_context(socket.socket(socket.AF_UNIX))
        self._listener.bind(str(path))
        self._listener.listen(1)
        self.migration = {"status": "setup"}
        if self.on_connect is not None:
            thread = threading.Thread(target=self.on_connect)
            thread.start()
            self._resources.callback(thread.join)
        return {}

    def _cont(self, _: Mapping[str, Any]) -> dict[str, Any]:
        self.status = self.after_cont
        return {}
