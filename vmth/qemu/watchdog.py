# SPDX-License-Identifier: Apache-2.0
"""A small process that outlives a mover of a QEMU's guest and leaves the guest in a known state.

When a mover dies, QEMU notices by its stream's end, gives the migration up and runs its guest on:
but not in pre-switchover, where it waits for an order with the guest stopped. And nobody puts the
migration's settings back. So the watchdog waits on a pipe for ``done``; the pipe's end without it
is the mover's death:

    setup, active, device   QEMU gives up by itself; cancelled if it does not within NOTICES_S
    pre-switchover          cancelled: the destination does not have the guest's state yet
    then failed, cancelled  the guest runs here again, unless the mover knew that somebody else has
                            stopped it; the settings are put back
    completed (postmigrate) the guest stays paused: it may have been granted to the destination,
                            which stands in the journal; the command that settles it is reported

What it did is one line on stderr; what an operator must do stands also in a note beside the
journal. It ends in any case within BOUND_S.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vmth.child import module_command
from vmth.errors import ChannelError, GuestError, RefusedError, UsageError, VmthError
from vmth.journal import note_path
from vmth.qemu.qmp import Qmp, QmpError
from vmth.qemu.settings import is_over, migration_status, put_back

__all__ = ["Watchdog"]

READY_S = 30.0
#: For QEMU to notice by itself that its stream has ended.
NOTICES_S = 10.0
BOUND_S = 120.0
LOOK_S = 0.02
DONE = b"done\n"
STOPPED = b"stopped elsewhere\n"
RUNS_AGAIN = b"runs again\n"
READY = b"ready\n"


class Watchdog:
    """The mover's end. The process is ready when the constructor returns; start it after the
    settings were applied and before ``migrate``.

    ``saved`` is ``MigrationSettings.saved()``, ``state_dir`` where the session's journal is. Raises
    GuestError when the process cannot be started.
    """

    def __init__(
        self,
        qmp_path: str | os.PathLike[str],
        saved: Mapping[str, Any],
        session_id: bytes,
        *,
        state_dir: Path,
        was_running: bool = True,
    ) -> None:
        settle = ["vmth", "recover", "--session", session_id.hex(), "--state-dir", str(state_dir)]
        order = {
            "qmp": os.path.abspath(qmp_path),
            "saved": saved,
            "session": session_id.hex(),
            "note": str(note_path(state_dir, session_id)),
            "settle": shlex.join(settle),
            "was_running": was_running,
        }
        command, environment = module_command(__name__)
        self._process = subprocess.Popen(
            command,
            bufsize=0,  # nothing is left to be flushed into a pipe whose reader has ended
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # the terminal's Ctrl-C is the mover's
        )
        try:
            self._tell(json.dumps(order).encode() + b"\n")
            self._await_ready()
        except BaseException:
            self._process.kill()
            self._let_go()
            raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def stopped_elsewhere(self, elsewhere: bool) -> None:
        """Somebody else has stopped the guest, or made it run again: the process leaves it so. Any
        thread, before ``done()``."""
        with contextlib.suppress(GuestError):  # it has ended: nothing will be done
            self._tell(STOPPED if elsewhere else RUNS_AGAIN)

    def done(self) -> None:
        """The mover has settled everything itself: the process ends without a word. Idempotent."""
        if self._process.returncode is None:
            try:
                self._tell(DONE)
            except GuestError:
                pass  # it has ended, which is what is asked for
            self._let_go()

    def _tell(self, line: bytes) -> None:
        assert self._process.stdin is not None
        try:
            while line:
                line = line[self._process.stdin.write(line) :]
        except OSError as error:
            raise GuestError(f"the watchdog has ended: {error.strerror}") from error

    def _await_ready(self) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline() != READY:
            raise GuestError("the watchdog ended before it began; its reason is on stderr")

    def _let_go(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait(READY_S)


# ---- the process ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Order:
    """What the mover said when it began."""

    qmp: str
    saved: Mapping[str, Any]
    session: str
    note: str
    settle: str
    was_running: bool


class _OutOfTimeError(VmthError):
    """The guest is not where it should be, and BOUND_S are over."""


def main() -> None:
    """The process's whole life."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the pipe's end is what ends it
    first = sys.stdin.buffer.readline()
    if not first.endswith(b"\n"):
        return
    order = _Order(**json.loads(first))
    os.write(sys.stdout.fileno(), READY)
    while line := sys.stdin.buffer.readline():
        if line == DONE:
            return
        order = replace(order, was_running=line == RUNS_AGAIN)
    try:
        said, todo = _act(order, time.monotonic() + BOUND_S)
    except VmthError as error:
        said, todo = str(error), order.settle
    _report(order, said, todo)


def _report(order: _Order, said: str, todo: str) -> None:
    line = f"vmth: watchdog: the mover of session {order.session} ended early; {said}"
    if todo:
        line += f"; next: {todo}"
        try:
            Path(order.note).write_text(line + "\n")
        except OSError as error:
            line += f" (this could not be kept in {order.note}: {error.strerror})"
    print(line, file=sys.stderr, flush=True)


def _act(order: _Order, deadline_s: float) -> tuple[str, str]:
    """What became of the guest, and the command that an operator must give, if any."""
    with _monitor(order.qmp, deadline_s) as qmp:
        status = _end_migration(qmp, deadline_s)
        run_state = qmp.status()
        if status != "completed":
            run_state = _run_again(qmp, order.was_running, deadline_s)
        problems = put_back(qmp, order.saved)
    notes = "".join(f"; {problem}" for problem in problems)
    if run_state == "running":
        return f"the guest runs here, the migration is {status or 'over'}{notes}", ""
    if status == "completed":
        return (
            f"the guest is paused here in {run_state}, and may run at the destination{notes}",
            order.settle,
        )
    said = f"the guest is {run_state} here, the migration is {status or 'over'}{notes}"
    return said, "" if not order.was_running else f"{order.settle}, or give its monitor `cont`"


def _monitor(path: str, deadline_s: float) -> Qmp:
    """QEMU takes a moment to see that the client before us is gone."""
    while True:
        try:
            return Qmp(path)
        except UsageError as error:
            # After a grant that is how it should be: the journal tells.
            raise GuestError(f"its QEMU is gone too ({error})") from None
        except (RefusedError, ChannelError) as error:
            if time.monotonic() > deadline_s:
                raise _OutOfTimeError(f"its QEMU does not talk to us: {error}") from None
        time.sleep(LOOK_S)


def _end_migration(qmp: Qmp, deadline_s: float) -> str:
    """The status in which the migration has ended."""
    began_s = time.monotonic()
    while not is_over(status := migration_status(qmp)):
        if status == "pre-switchover" or time.monotonic() - began_s > NOTICES_S:
            qmp.execute("migrate_cancel")
        if time.monotonic() > deadline_s:
            raise _OutOfTimeError(f"the migration is still {status}, the guest {qmp.status()}")
        time.sleep(LOOK_S)
    return status


def _run_again(qmp: Qmp, was_running: bool, deadline_s: float) -> str:
    """After a migration that failed or was cancelled, never granted: QEMU resumes its guest, or we
    do. The run state that results; a guest that somebody paused stays so."""
    began_s = time.monotonic()
    while True:
        run_state = qmp.status()
        if run_state in ("running", "paused", "prelaunch") or not was_running:
            return run_state
        if time.monotonic() - began_s > NOTICES_S:
            try:
                qmp.execute("cont")
            except QmpError as error:
                if time.monotonic() > deadline_s:
                    raise _OutOfTimeError(f"the guest is {run_state} here: {error}") from None
        time.sleep(LOOK_S)


if __name__ == "__main__":
    main()
