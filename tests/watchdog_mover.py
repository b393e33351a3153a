# SPDX-License-Identifier: Apache-2.0
"""A mover that brings a QEMU's migration to a phase and waits there to be killed.

    python watchdog_mover.py QMP PHASE STATE_DIR [finish]

Prints the watchdog's pid once the phase is reached. With ``finish`` it does not wait: it lets go in
order, as a mover that has settled everything itself.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from waiting import wait_until

from vmth.qemu.outgoing import OutgoingStream
from vmth.qemu.qmp import Qmp
from vmth.qemu.settings import MigrationSettings, migration_status
from vmth.qemu.stream import StreamFinished
from vmth.qemu.watchdog import Watchdog

SESSION = bytes(range(16))


def main() -> None:
    path, phase, state_dir = sys.argv[1:4]
    qmp = Qmp(path)
    was_running = qmp.status() == "running"
    settings = MigrationSettings(qmp)
    settings.apply(
        {
            "events": True,
            "return-path": True,
            "pause-before-switchover": phase == "pre-switchover",
        },
        # A stream of nothing but zero pages must not be over before it can be cut.
        {"downtime-limit": 1000, "max-bandwidth": 4096 if phase == "active" else 1 << 40},
    )
    watchdog = Watchdog(
        path, settings.saved(), SESSION, state_dir=Path(state_dir), was_running=was_running
    )
    stream = OutgoingStream(qmp)
    stream.start()
    if phase != "active":
        reader = threading.Thread(target=read, args=(stream,), daemon=True)
        reader.start()
        if phase in ("device", "completed"):
            reader.join()
        if phase == "completed":
            stream.shut(0)
    if phase == "device":
        # The status: 7.2 has "device" only after pre-switchover.
        wait_until(lambda: qmp.status() == "finish-migrate")
    else:
        wait_until(lambda: migration_status(qmp) == phase)
    if sys.argv[4:] == ["finish"]:
        stream.close()
        settings.restore()
        watchdog.done()
        watchdog.done()
    print(watchdog.pid, flush=True)
    sys.stdin.read()


def read(stream: OutgoingStream) -> None:
    while not isinstance(stream.next_event(60.0), StreamFinished):
        pass


if __name__ == "__main__":
    main()
