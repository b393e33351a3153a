# SPDX-License-Identifier: Apache-2.0
"""A real Linux moves to B and back while it writes memory, and finds nothing damaged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from qemu_guest import Walk
from qemu_linux_guest import APPEND, MEMORY_BYTES, fetched, initramfs, read_console
from qemu_world import Machine, World, modern_build
from waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class LinuxWorld(World):
    memory_bytes = MEMORY_BYTES

    def __init__(self) -> None:
        super().__init__(Walk(), [modern_build()])
        folder = fetched()
        self._kernel = folder / "vmlinuz"
        self._initrd = self.folder / "initrd"
        self._initrd.write_bytes(initramfs((folder / "busybox").read_bytes()))

    def arguments(self, name: str, *, shared: bool) -> list[str]:
        return [
            *super().arguments(name, shared=shared),
            *("-smp", "2", "-kernel", str(self._kernel), "-initrd", str(self._initrd)),
            *("-append", APPEND),
        ]

    def work_on(self, machine: Machine) -> None:
        """Every worker checks and writes all its files here."""
        before = self.done()
        wait_until(
            lambda: all(now >= then + 8 for then, now in zip(before, self.done(), strict=True))
        )

    def done(self) -> list[int]:
        return read_console([host.written() for host in self.hosts])


@pytest.fixture
def world() -> Iterator[LinuxWorld]:
    with LinuxWorld() as world:
        yield world


def test_linux_moves_there_and_back_while_it_works(world: LinuxWorld) -> None:
    qemu = modern_build()
    a = world.boot("a", qemu)
    world.work_on(a)
    b = world.await_guest("b", qemu)
    world.move(a, b, "memory")
    world.work_on(b)
    back = world.await_guest("back", qemu, shared=False)
    world.move(b, back, "stream")
    world.work_on(back)
