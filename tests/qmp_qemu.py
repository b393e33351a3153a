# SPDX-License-Identifier: Apache-2.0
"""A real QEMU whose monitor listens at a socket, as a manager would start it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import TracebackType

from qemu_process import qemu_binary

from vmth.qemu.qmp import Qmp

__all__ = ["QmpQemu"]

TIMEOUT_S = 60


class QmpQemu:
    """One QEMU without devices of its own, stopped unless ``paused`` is False; leaving the context
    ends it. The monitor answers when the constructor returns."""

    def __init__(
        self,
        folder: Path,
        side: str,
        *arguments: str,
        name: str = "qmp",
        machine: str = "q35",
        memory: str = "16M",
        paused: bool = True,
        accel: str = "tcg",
    ) -> None:
        self.path = folder / name
        self.process = subprocess.Popen(
            [
                *(qemu_binary(side), *(["-S"] if paused else []), "-display", "none"),
                *("-nodefaults", "-accel", accel, "-machine", machine, "-m", memory),
                *("-qmp", f"unix:{self.path},server=on,wait=off", *arguments),
            ]
        )
        try:
            self._wait_listening()
        except BaseException:
            self.kill()
            raise

    def _wait_listening(self) -> None:
        Qmp(self.path, appears_within_s=TIMEOUT_S).close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT_S)

    def __enter__(self) -> QmpQemu:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
