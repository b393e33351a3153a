# SPDX-License-Identifier: Apache-2.0
"""A QMP server for tests: it answers what it is told to answer, and behaves badly on request.

    with FakeQmp(folder / "qmp") as fake, Qmp(fake.path) as qmp:
        fake.answers["query-status"] = {"status": "paused", "running": False}
        fake.answers["migrate"] = FakeError("GenericError", "no")
        fake.emit("MIGRATION", status="completed")

It knows the settings of a migration as QEMU does (``capabilities``, ``parameters``): both are
plain dicts that a test may change or look at. Every received command is in ``received``.
"""

from __future__ import annotations

import contextlib
import copy
import json
import selectors
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["FakeError", "FakeLimits", "FakeQmp", "HangUp", "Silence"]

VERSION = (7, 2, 22)
CAPABILITIES = (
    "xbzrle",
    "auto-converge",
    "events",
    "postcopy-ram",
    "return-path",
    "pause-before-switchover",
    "multifd",
    "late-block-activate",
    "x-ignore-shared",
)
PARAMETERS: dict[str, Any] = {
    "max-bandwidth": 128 << 20,
    "downtime-limit": 300,
    "multifd-channels": 2,
    "multifd-compression": "none",
    "cpu-throttle-initial": 20,
    "tls-creds": "",
}


class FakeError(Exception):
    """An answer that is a QMP error. ``FakeError("GenericError", "why")``."""


class HangUp(Exception):  # noqa: N818 (it is an answer)
    """An answer that closes the connection instead."""


class Silence(Exception):  # noqa: N818 (it is an answer)
    """An answer that never comes."""


class FakeQmp:
    """Listens at ``path`` from the constructor on and serves one client after another, as QEMU
    does; leaving the context ends it."""

    def __init__(self, path: Path, *, greeting: bytes | None = None, greets: bool = True) -> None:
        self.path = path
        self.received: list[tuple[str, Any]] = []
        self.answers: dict[str, Any] = {}
        self.capabilities = dict.fromkeys(CAPABILITIES, False)
        self.parameters = copy.deepcopy(PARAMETERS)
        self.version = VERSION  #: of the next client's greeting
        self.before: list[bytes] = []  #: lines that each client is told ahead of the greeting
        self.between: list[bytes] = []  #: and ahead of the answer to qmp_capabilities
        self.deaf = False  #: closes on the next command without reading it, as one that dies
        self._greeting = greeting
        self._greets = greets
        self._lock = threading.Lock()
        self._client: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(4)
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="fake-qmp", daemon=True)
        self._thread.start()

    def emit(self, name: str, /, **data: Any) -> None:
        """Send an event to the client that is connected; underscores stay."""
        event = {
            "event": name,
            "data": data,
            "timestamp": {"seconds": 1700000000, "microseconds": 250},
        }
        self.send(json.dumps(event).encode())

    def send(self, line: bytes) -> None:
        """Any bytes, as a line."""
        with self._lock:
            assert self._client is not None, "nobody is connected"
            self._client.sendall(line + b"\r\n")

    def hang_up(self) -> None:
        """Close the client's connection."""
        with self._lock:
            assert self._client is not None, "nobody is connected"
            self._client.shutdown(socket.SHUT_RDWR)

    def commands(self) -> list[str]:
        """The names of what was received, without the negotiation."""
        return [name for name, _ in self.received if name != "qmp_capabilities"]

    def __enter__(self) -> FakeQmp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._wake.close()
        self._thread.join()
        self._woken.close()
        self._listener.close()

    # ---- on the thread ---------------------------------------------------------------------------

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if self._woken in ready:
                    return
                client, _ = self._listener.accept()
                with client, contextlib.suppress(OSError):
                    if self._talk(client):
                        return

    def _talk(self, client: socket.socket) -> bool:
        """Serve it to its end; True when the server is to end."""
        with self._lock:
            self._client = client
        try:
            for line in self.before:
                client.sendall(line + b"\r\n")
            if self._greets:
                client.sendall(self._greeting or json.dumps(self._told()).encode() + b"\r\n")
            with selectors.DefaultSelector() as selector:
                selector.register(client, selectors.EVENT_READ)
                selector.register(self._woken, selectors.EVENT_READ)
                data = b""
                while True:
                    if any(key.fileobj is self._woken for key, _ in selector.select()):
                        return True
                    if self.deaf:
                        return False
                    piece = client.recv(1 << 16)
                    if not piece:
                        return False
                    requests, data = _split(data + piece)
                    for request in requests:
                        if not self._answer_request(request):
                            return False
        finally:
            with self._lock:
                self._client = None

    def _answer_request(self, request: dict[str, Any]) -> bool:
        command = request.get("execute") or request["exec-oob"]
        arguments = request.get("arguments") or {}
        self.received.append((command, arguments))
        answer: dict[str, Any] = {"id": request["id"]} if "id" in request else {}
        try:
            answer["return"] = self._answer(command, arguments)
        except FakeError as error:
            answer["error"] = {"class": error.args[0], "desc": error.args[1]}
        except HangUp:
            return False
        except Silence:
            return True
        for line in self.between if command == "qmp_capabilities" else ():
            self.send(line)
        self.send(json.dumps(answer).encode())
        return True

    def _answer(self, command: str, arguments: Mapping[str, Any]) -> Any:
        if command in self.answers:
            found = self.answers[command]
            if isinstance(found, type) and issubclass(found, Exception):
                raise found
            if isinstance(found, Exception):
                raise found
            return found(arguments) if callable(found) else found
        known: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            "qmp_capabilities": lambda _: {},
            "query-version": lambda _: self._told()["QMP"]["version"],
            "query-status": lambda _: {"status": "running", "running": True},
            "query-migrate": lambda _: {},
            "query-commands": lambda _: [{"name": name} for name in {*known, *self.answers}],
            "query-migrate-capabilities": lambda _: [
                {"capability": name, "state": state} for name, state in self.capabilities.items()
            ],
            "query-migrate-parameters": lambda _: self.parameters,
            "migrate-set-capabilities": self._set_capabilities,
            "migrate-set-parameters": self._set_parameters,
        }
        if command not in known:
            raise FakeError("CommandNotFound", f"The command {command} has not been found")
        return known[command](arguments)

    def _told(self) -> dict[str, Any]:
        numbers = dict(zip(("major", "minor", "micro"), self.version, strict=True))
        return {"QMP": {"version": {"qemu": numbers, "package": "fake"}, "capabilities": ["oob"]}}

    def _set_capabilities(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        rows = arguments["capabilities"]
        for row in rows:
            if row["capability"] not in self.capabilities:
                raise FakeError("GenericError", f"does not accept value '{row['capability']}'")
        self.capabilities.update({row["capability"]: row["state"] for row in rows})
        return {}

    def _set_parameters(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        for name in arguments:
            if name not in self.parameters:
                raise FakeError("GenericError", f"Parameter '{name}' is unexpected")
        self.parameters.update(arguments)
        return {}


class FakeLimits:
    """The dirty limits of a QEMU's vCPUs, MiB/s, answered for by ``fake``. ``rates``: what each
    dirties, which a test may change. ``ring`` False: QEMU without KVM's dirty ring. For clients
    that connect from now on it is QEMU 10.0."""

    def __init__(
        self,
        fake: FakeQmp,
        limits: Mapping[int, int] | None = None,
        *,
        vcpus: int = 2,
        ring: bool = True,
    ) -> None:
        fake.version = (10, 0, 0)
        self.limits = dict(limits or {})
        self.rates = dict.fromkeys(range(vcpus), 0)
        self.ring = ring
        fake.answers |= {
            "set-vcpu-dirty-limit": self._set,
            "cancel-vcpu-dirty-limit": self._cancel,
            "query-vcpu-dirty-limit": lambda _: [
                {"cpu-index": index, "limit-rate": limit, "current-rate": self.rates[index]}
                for index, limit in self.limits.items()
            ],
            "query-cpus-fast": lambda _: [
                {"cpu-index": index, "qom-path": f"/machine/unattached/device[{index}]"}
                for index in self.rates
            ],
        }

    def _set(self, arguments: Mapping[str, Any]) -> Any:
        if not self.ring:
            raise FakeError(
                "GenericError",
                "dirty page limit feature requires KVM with accelerator property "
                "'dirty-ring-size' set'",
            )
        if arguments["dirty-rate"] == 0:
            return self._cancel(arguments)
        for index in [arguments["cpu-index"]] if "cpu-index" in arguments else list(self.rates):
            self.limits[index] = arguments["dirty-rate"]
        return {}

    def _cancel(self, arguments: Mapping[str, Any]) -> Any:
        if "cpu-index" in arguments:
            self.limits.pop(arguments["cpu-index"], None)
        else:
            self.limits.clear()
        return {}


def _split(data: bytes) -> tuple[list[Any], bytes]:
    """The whole JSON values, and what is left; nothing needs to stand between them."""
    text, found = data.decode(), []
    decoder = json.JSONDecoder()
    while text := text.lstrip():
        try:
            value, end = decoder.raw_decode(text)
        except ValueError:
            break
        found.append(value)
        text = text[end:]
    return found, text.encode()
