# SPDX-License-Identifier: Apache-2.0
"""A real QEMU for the tests: paused, without devices of its own, driven by QMP over a socket.

Nothing is installed here. ``VMTH_QEMU_SRC`` and ``VMTH_QEMU_DST`` name other binaries.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

MEMORY_BYTES = 64 << 20
TIMEOUT_S = 60
RAM_ID = "pc.ram"


def qemu_binary(side: str) -> str:
    """Of ``SRC`` or ``DST``; the test fails where there is none."""
    name = os.environ.get(f"VMTH_QEMU_{side}", "qemu-system-x86_64")
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is not installed: apt-get install qemu-system-x86")
    return found


class Qemu:
    """One QEMU whose RAM is the file ``memory``, or its own if not ``shared``; leaving the context
    ends the process."""

    def __init__(
        self,
        folder: Path,
        side: str,
        *arguments: str,
        machine: str = "q35",
        shared: bool = True,
    ) -> None:
        self.memory = folder / f"{side}.ram"
        backend = f"memory-backend-ram,id={RAM_ID},size={MEMORY_BYTES}"
        if shared:
            with self.memory.open("wb") as file:
                file.truncate(MEMORY_BYTES)
            backend = backend.replace("-ram,", "-file,") + f",share=on,mem-path={self.memory}"
        self._socket = folder / f"{side}.qmp"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self._socket))
        listener.listen(1)
        listener.settimeout(TIMEOUT_S)
        self._process = subprocess.Popen(
            [
                *(qemu_binary(side), "-S", "-display", "none", "-nodefaults", "-accel", "tcg"),
                *("-machine", f"{machine},memory-backend={RAM_ID}"),
                *("-m", f"{MEMORY_BYTES >> 20}M", "-object", backend),
                *("-chardev", f"socket,id=qmp,path={self._socket}", "-mon", "qmp,mode=control"),
                *arguments,
            ]
        )
        with listener:
            self._connection, _ = listener.accept()
        self._socket.unlink()
        self._connection.settimeout(TIMEOUT_S)
        self._lines = self._connection.makefile("rb")
        self._lines.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        request = {"execute": command, "arguments": arguments}
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer = self._read()
            if "error" in answer:
                raise AssertionError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        assert line, "QEMU closed its QMP socket"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def capabilities(self, *names: str) -> None:
        self.execute(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": True} for name in names],
        )

    def version(self) -> tuple[int, int]:
        numbers = self.execute("query-version")["qemu"]
        return numbers["major"], numbers["minor"]

    def supports(self, capability: str) -> bool:
        rows = self.execute("query-migrate-capabilities")
        return any(row["capability"] == capability for row in rows)

    def wait_status(self, wanted: str) -> None:
        """Until the migration has that status; needs the capability ``events``."""
        while True:
            answer = self._read()
            if answer.get("event") == "MIGRATION":
                status = answer["data"]["status"]
                assert status != "failed" or wanted == status, self.execute("query-migrate")
                if status == wanted:
                    return

    def wait_pass(self, number: int) -> None:
        """Until so many passes over memory have begun; needs the capability ``events``."""
        while True:
            answer = self._read()
            if answer.get("event") == "MIGRATION_PASS" and answer["data"]["pass"] >= number:
                return

    def wait_migrated(self) -> None:
        self.wait_status("completed")

    def status(self) -> str:
        status: str = self.execute("query-status")["status"]
        return status

    def __enter__(self) -> Qemu:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lines.close()
        self._connection.close()
        self._process.kill()
        self._process.wait(TIMEOUT_S)


def accept_all(listener: socket.socket, count: int) -> list[bytearray]:
    """What ``count`` connections send until they close, in the order in which they connected."""
    listener.settimeout(TIMEOUT_S)
    received: list[bytearray] = []
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        closed = 0
        while closed < count:
            ready = selector.select(TIMEOUT_S)
            assert ready, "QEMU sends nothing"
            for key, _ in ready:
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    received.append(bytearray())
                    selector.register(connection, selectors.EVENT_READ, received[-1])
                    continue
                assert isinstance(key.fileobj, socket.socket)
                data = key.fileobj.recv(1 << 20)
                key.data.extend(data)
                if not data:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                    closed += 1
    return received


def relay(listener: socket.socket, onward: Path) -> tuple[bytearray, bytearray]:
    """Carry one connection on to a socket, both ways until both have closed; what was carried."""
    listener.settimeout(TIMEOUT_S)
    source, _ = listener.accept()
    destination = socket.socket(socket.AF_UNIX)
    destination.connect(str(onward))
    forth, back = bytearray(), bytearray()
    with source, destination, selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ, (destination, forth))
        selector.register(destination, selectors.EVENT_READ, (source, back))
        while selector.get_map():
            ready = selector.select(TIMEOUT_S)
            assert ready, "neither QEMU sends anything"
            for key, _ in ready:
                assert isinstance(key.fileobj, socket.socket)
                to, carried = key.data
                data = key.fileobj.recv(1 << 20)
                carried.extend(data)
                if data:
                    to.sendall(data)
                else:
                    selector.unregister(key.fileobj)
                    to.shutdown(socket.SHUT_WR)
    return forth, back


def walker_rom() -> bytes:
    """A 64 KiB firmware that for ever adds one to the first byte of each of 128 pages."""
    walk = bytes.fromhex(
        "b80010"  # again: mov ax, 0x1000, the segment of page 16
        "8ed8"  #   next:  mov ds, ax
        "fe060000"  #      inc byte [0]
        "050001"  #        add ax, 0x100, one page on
        "3d0090"  #        cmp ax, 0x9000
        "72f2"  #          jb next
        "ebed"  #          jmp again
    )
    reset = 0xFFF0
    jump = b"\xe9" + ((-(reset + 3)) & 0xFFFF).to_bytes(2, "little")
    return (walk.ljust(reset, b"\xf4") + jump).ljust(1 << 16, b"\xf4")


def fill(path: Path, pieces: Sequence[tuple[int, bytes]]) -> None:
    """Write guest memory from outside, through its shared file."""
    with path.open("r+b") as file:
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
