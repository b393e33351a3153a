# SPDX-License-Identifier: Apache-2.0
"""A ``vmth save`` or ``vmth restore`` that kills itself with SIGKILL at a named step.

qemu_save_child.py STEP COMMAND...
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from vmth.cli import main
from vmth.qemu.image import AtomicFile, FrameDigest, Image, ImageWriter
from vmth.qemu.incoming import IncomingStream
from vmth.qemu.outgoing import OutgoingStream
from vmth.qemu.settings import MigrationSettings

#: step -> (class, method, after which call of it; 0: before the first one)
STEPS: dict[str, tuple[type, str, int]] = {
    "settings": (MigrationSettings, "apply", 1),
    "pages": (ImageWriter, "pages", 20),
    "checked": (Image, "check", 1),
    "shut": (OutgoingStream, "shut", 0),
    "completed": (AtomicFile, "publish", 0),
    "published": (AtomicFile, "publish", 1),
}
RESTORE_STEPS: dict[str, tuple[type, str, int]] = {
    **STEPS,
    "pages": (FrameDigest, "take", 20),
    "state": (Image, "state", 1),
    "loaded": (IncomingStream, "await_loaded", 1),
}


def die_at(owner: type, name: str, count: int) -> None:
    """Kill this process when the method has been called so often."""
    method: Any = getattr(owner, name)
    calls = 0

    def wrapped(self: object, *given: Any, **named: Any) -> Any:
        nonlocal calls
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = method(self, *given, **named)
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    step, *command = sys.argv[1:]
    die_at(*(STEPS if command[0] == "save" else RESTORE_STEPS)[step])
    main(command)
