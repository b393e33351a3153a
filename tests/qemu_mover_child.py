# SPDX-License-Identifier: Apache-2.0
"""A vmth command that is killed, or kills a QEMU, at a named step of the handover.

    qemu_mover_child.py source|destination STEP before|after PID COMMAND...
    qemu_mover_child.py destination cont within PID COMMAND...

STEP is an Action's value ("journal GRANTED"); PID is killed then with SIGKILL, 0 for the command's
own process. COMMAND is what stands behind ``vmth``. The second form stands for a QEMU that ends
when it has read ``cont`` and before it says anything: it is killed, and never told.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from vmth.cli import main
from vmth.destination_record import DestinationRecord
from vmth.errors import ChannelError
from vmth.qemu.qmp import Qmp
from vmth.source_record import SourceRecord
from vmth.wire.handover import Action


def kill_at(record: type, place: str, step: str, when: str, pid: int) -> None:
    """Wrap a method that executes actions, so that ``pid`` dies before or after that step."""
    execute: Any = getattr(record, place)

    def wrapped(self: object, action: Action, *rest: object) -> object:
        if action.value == step and when == "before":
            os.kill(pid or os.getpid(), signal.SIGKILL)
        result = execute(self, action, *rest)
        if action.value == step and when == "after":
            os.kill(pid or os.getpid(), signal.SIGKILL)
        return result

    setattr(record, place, wrapped)


def kill_within_cont(pid: int) -> None:
    execute: Any = Qmp.execute

    def wrapped(self: Qmp, command: str, *rest: object, **named: object) -> object:
        if command != "cont":
            return execute(self, command, *rest, **named)
        os.kill(pid, signal.SIGKILL)
        raise ChannelError("QEMU closed the monitor, and had read this")

    Qmp.execute = wrapped  # type: ignore[method-assign]


if __name__ == "__main__":
    side, step, when, pid, *command = sys.argv[1:]
    if when == "within":
        kill_within_cont(int(pid))
    elif side == "source":
        kill_at(SourceRecord, "_do", step, when, int(pid))
    else:  # a destination sends when all else is done
        kill_at(DestinationRecord, "_do", step, when, int(pid))
        kill_at(DestinationRecord, "_tell", step, when, int(pid))
    main(command)
