# SPDX-License-Identifier: Apache-2.0
"""What makes a VM as it was before a save: for the save itself, and for a small process that does
it when the save was killed.

A guest that we stopped is not resumed by QEMU when our end of its stream is lost: it was paused
when the migration began. The guard waits on a pipe for ``done``; the pipe's end without that is the
save's death. It then waits for QEMU to give up, puts its settings back, and resumes the guest,
unless the file has got its name: then the file is the VM, and the guest stays paused.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from vmth.child import module_command
from vmth.errors import ChannelError, GuestError, NotResumedError, RefusedError, VmthError
from vmth.qemu.qmp import Qmp
from vmth.qemu.settings import is_over, migration_status, put_back

__all__ = ["SaveGuard", "act", "put_vm_back"]

#: For a QEMU to notice that its stream is gone; then it is told to cancel.
NOTICES_S = 10.0
GIVES_UP_S = 60.0
LOOK_S = 0.02
DONE = b"done\n"
READY = b"ready\n"


def put_vm_back(
    qmp: Qmp,
    saved: Mapping[str, Any],
    *,
    run: bool,
    unless: Callable[[], bool] = lambda: False,
) -> list[str]:
    """End a migration whose stream is gone, put settings back, and with ``run`` see that the guest
    runs, ``unless`` says otherwise then. Returns a sentence for each setting that could not be put
    back.

    Raises ChannelError when QEMU is gone, NotResumedError when the guest does not run.
    """
    began = time.monotonic()
    cancelled = False
    while not is_over(status := migration_status(qmp)):
        waited_s = time.monotonic() - began
        if waited_s > NOTICES_S and not cancelled:
            cancelled = True
            qmp.execute("migrate_cancel")
        if waited_s > GIVES_UP_S:
            raise NotResumedError(
                f"{qmp.path}: the migration is {status!r} after {GIVES_UP_S:g} s, and the guest is "
                f"{qmp.status()!r}; give the monitor migrate_cancel, then cont"
            )
        time.sleep(LOOK_S)
    notes = put_back(qmp, saved)
    if run and not unless():
        _run(qmp, began)
    return notes


def _run(qmp: Qmp, began: float) -> None:
    """QEMU resumes by itself a guest that it stopped itself, and not one that we did."""
    problem = ""
    while (status := qmp.status()) != "running":
        if status in ("paused", "postmigrate", "prelaunch") or problem:
            try:
                qmp.execute("cont")
            except ChannelError:
                raise
            except VmthError as error:
                problem = f": {error}"
        if time.monotonic() - began > GIVES_UP_S:
            raise NotResumedError(
                f"{qmp.path}: the guest is {status!r} and could not be resumed{problem}; give the "
                "monitor cont"
            )
        time.sleep(LOOK_S)


class SaveGuard:
    """The process; a context manager. From ``begin()`` on it acts when this process ends without
    ``done()``, which leaving the context is. Raises GuestError when it cannot be started."""

    def __init__(
        self, qmp: Qmp, path: str, identity: tuple[int, int], *, ran: bool, resume: bool
    ) -> None:
        self._order = {
            "qmp": qmp.path,
            "path": path,
            "identity": identity,
            "ran": ran,
            "resume": resume,
        }
        command, environment = module_command(__name__)
        self._process = subprocess.Popen(
            command,
            bufsize=0,  # nothing is left to be flushed into a pipe whose reader has ended
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # the terminal's Ctrl-C is the save's
        )

    def begin(self, saved: Mapping[str, Any]) -> None:
        """It is ready when this returns. ``saved`` are the settings that it shall put back."""
        self._tell(json.dumps({**self._order, "saved": saved}).encode() + b"\n")
        assert self._process.stdout is not None
        if self._process.stdout.readline() != READY:
            raise GuestError("the process that guards the save ended; its reason is on stderr")

    def done(self) -> None:
        """It has nothing to do any more. Idempotent."""
        if self._process.returncode is not None:
            return
        with contextlib.suppress(GuestError):  # it has ended, which is what is asked for
            self._tell(DONE)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait(GIVES_UP_S)

    def _tell(self, line: bytes) -> None:
        assert self._process.stdin is not None
        try:
            while line:
                line = line[self._process.stdin.write(line) :]
        except OSError as error:
            raise GuestError(f"the process that guards the save has ended: {error}") from error

    def __enter__(self) -> SaveGuard:
        return self

    def __exit__(self, *_: object) -> None:
        self.done()


def main() -> None:
    """The process's whole life."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the pipe's end is what ends it
    first = sys.stdin.buffer.readline()
    if first == DONE or not first.endswith(b"\n"):
        return
    order = json.loads(first)
    os.write(sys.stdout.fileno(), READY)
    if sys.stdin.buffer.readline() == DONE:
        return
    try:
        print(f"vmth: the save to {order['path']} was killed; {act(order)}", file=sys.stderr)
    except VmthError as error:
        print(f"vmth: error: the save to {order['path']} was killed: {error}", file=sys.stderr)


def act(order: Mapping[str, Any]) -> str:
    """Do what is left to do for a save that was killed; what was done, for people. Raises as
    ``put_vm_back``."""
    published = _identity(order["path"]) == tuple(order["identity"])
    run = bool(order["ran"] and (order["resume"] or not published))
    with _monitor(order["qmp"]) as qmp:
        put_vm_back(qmp, order["saved"], run=run)
        status = qmp.status()
    if published:
        return f"the file is whole, and the guest is {status!r}"
    return f"there is no file, and the guest is {status!r}"


def _monitor(path: str) -> Qmp:
    """QEMU takes a moment to see that the client before us is gone."""
    began = time.monotonic()
    while True:
        try:
            return Qmp(path)
        except (RefusedError, ChannelError):
            if time.monotonic() - began > GIVES_UP_S:
                raise
        time.sleep(LOOK_S)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


if __name__ == "__main__":
    main()
