# SPDX-License-Identifier: Apache-2.0
"""A QEMU for which this process stands: its monitor is a fake, its memory this process's files."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path
from typing import Any

from fake_qmp import FakeError, FakeQmp

from vmth.qemu.landing import Land, Landing, choose_landing
from vmth.qemu.qmp import Qmp
from vmth.types import Gpa, Mapping, RamBlock

__all__ = ["HEAD", "MIB", "World", "mappings_of"]

MIB = 1 << 20
HEAD = "              Block Name    PSize              Offset               Used              Total"


class World:
    """A monitor whose peer is this process: its memfds and mappings are QEMU's."""

    def __init__(self, folder: Path) -> None:
        self.resources = contextlib.ExitStack()
        self.backends: list[dict[str, Any]] = []
        self.properties: dict[tuple[str, str], Any] = {}  #: (backend, name) -> value
        self.rows: list[str] = []
        self.offered: list[RamBlock] = []
        self.shows_addresses = False
        fake = self.resources.enter_context(FakeQmp(folder / "qmp"))
        fake.answers |= {
            "query-memdev": lambda _: self.backends,
            "qom-get": self._qom_get,
            "human-monitor-command": lambda _: "\r\n".join([HEAD, *self.rows]) + "\r\n",
        }
        self.fake = fake
        self.qmp = self.resources.enter_context(Qmp(fake.path))

    def _qom_get(self, arguments: dict[str, str]) -> Any:
        asked = arguments["path"].removeprefix("/objects/"), arguments["property"]
        if asked not in self.properties:
            raise FakeError("GenericError", "Property not found")
        return self.properties[asked]

    def memfd(self, nbytes: int = 2 * MIB) -> int:
        fd = os.memfd_create("memory-backend-memfd")
        self.resources.callback(os.close, fd)
        os.ftruncate(fd, nbytes)
        return fd

    def file(self, path: Path, nbytes: int = 2 * MIB) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        self.resources.callback(os.close, fd)
        os.ftruncate(fd, nbytes)
        return fd

    def backend(self, name: str, nbytes: int = 2 * MIB, *, share: bool = True) -> None:
        self.backends.append({"id": name, "size": nbytes, "share": share})
        self.block(name, nbytes)

    def block(self, idstr: str, nbytes: int, fd: int = -1, offset: int = 0) -> None:
        """One that QEMU has and the source offers; mapped shared where there is a file for it."""
        hva = ""
        if fd >= 0:
            view = mmap.mmap(fd, nbytes, offset=offset)
            self.resources.callback(view.close)
            with open("/proc/self/maps") as maps:
                inode = str(os.fstat(fd).st_ino)
                start = next(line for line in maps if line.split()[4] == inode).split("-")[0]
            hva = f" 0x{int(start, 16):016x}  rw"
        self.rows.append(f"{idstr:>24}    4 KiB  0x{0:016x} 0x{nbytes:016x} 0x{nbytes:016x}{hva}")
        self.offered.append(RamBlock(idstr, nbytes, Gpa(0), Mapping()))

    def choose(self, wanted: Land = Land.AUTO) -> Landing:
        landing = choose_landing(self.qmp, self.offered, wanted)
        self.resources.callback(landing.close)
        return landing


def mappings_of(fd: int) -> int:
    """How often this process has mapped the file."""
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    with open("/proc/self/maps") as maps:
        return sum(line.split()[3:5] == [device, str(status.st_ino)] for line in maps)
