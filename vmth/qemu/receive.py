# SPDX-License-Identifier: Apache-2.0
"""Take in the guests of ``vmth migrate``: a listener in front of one QEMU that waits, or of a
command line that starts one for each guest."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any

from vmth import __version__
from vmth.errors import (
    CancelledError,
    ExitCode,
    MigrationError,
    RefusedError,
    UsageError,
    VmthError,
)
from vmth.guest import Guest
from vmth.handshake import Incoming
from vmth.journal import default_state_dir
from vmth.listener import Listener
from vmth.options import WIRE_PAGE_BYTES, ReceiveOptions
from vmth.qemu.destination import HeldQemu, QemuDestination, find_qemu, make_destination
from vmth.qemu.facts import Facts, gather
from vmth.qemu.landing import Land
from vmth.qemu.launch import QemuProcess, check_command, sweep
from vmth.qemu.qmp import Qmp
from vmth.qemu.waiting_memory import WaitingMemory
from vmth.received import ReceiveResult
from vmth.reuse.report import FileReused, reused_lines, reused_of
from vmth.reuse.warm import WarmFile, WarmFiles
from vmth.units import format_size
from vmth.uri import parse_endpoint

__all__ = [
    "Arrival",
    "QemuReceiver",
    "QemuTarget",
    "outcome_lines",
    "outcome_values",
    "receive_qemu",
    "serve",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class QemuTarget:
    """Where guests go: the QEMU whose monitor is at ``qmp``, or one for each guest, started with
    ``command``. Exactly one of the two."""

    qmp: str = ""
    command: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.qmp) == bool(self.command):
            received = "both" if self.qmp else "none"
            raise UsageError(
                f"received {received} of a monitor (--qmp) and a command line (after --), allowed "
                "one of them"
            )


@dataclass(frozen=True, slots=True)
class Arrival:
    """A guest that is here now. ``status`` is QEMU's run state, ``pid`` the process that listens at
    the monitor ``qmp``; ``landing`` where its memory was written, and why there."""

    session_id: str
    peer: str
    qmp: str
    pid: int
    started: bool  #: QEMU was started here; it lives on by itself
    status: str
    was_running: bool
    landing: str
    landing_reason: str
    verified: bool
    verified_scope: str
    digest: str
    memory_bytes: int
    wire_bytes: int
    fallbacks: tuple[str, ...]
    reused: tuple[FileReused, ...] = ()


class QemuReceiver:
    """Listens from the constructor to ``close()``; a context manager. ``wait()`` from one thread,
    ``cancel()`` from any.

    Raises what ``Listener`` raises, UsageError for a target that cannot be used, and RefusedError
    for a QEMU that does not wait for a migration.
    """

    def __init__(
        self,
        uri: str,
        target: QemuTarget,
        options: ReceiveOptions | None = None,
        *,
        land: Land = Land.AUTO,
        warm: WarmFiles | None = None,
    ) -> None:
        """``warm``: files to reuse, open until this is closed."""
        self.cancelled = False
        self._target = target
        self._land = land
        self._options = options or ReceiveOptions()
        self._files = warm.files if warm is not None else []
        if warm is not None:
            self._options = replace(self._options, reuse=warm.sources)
        self._state_dir = self._options.state_dir or default_state_dir()
        endpoint = parse_endpoint(uri, listening=True)
        if target.qmp:
            self._options = replace(self._options, max_sessions=1)
        else:
            check_command(target.command)
        self._waiting: _Waiting | None = None
        self._prepared = threading.Event()
        self._listener = Listener(endpoint, self._make_guest, self._options, find_qemu)
        self.notes = (*self._listener.fallbacks, *(warm.notes if warm is not None else ()))
        try:  # what an earlier receiver left has been quit now
            self.notes += tuple(sweep(self._state_dir))
            if target.qmp:
                self._waiting = _waiting(target.qmp, land)
            self._prepared.set()
        except BaseException:
            self._prepared.set()
            self._listener.close()
            raise

    @property
    def display(self) -> str:
        """Where it listens."""
        return self._listener.endpoint.display

    def wait(self) -> Arrival:
        """The next guest, once its source knows that it is here, or has been answered for
        ``linger_s``. Raises the MigrationError of a session that failed."""
        result = self._next()
        guest = result.guest
        assert isinstance(guest, HeldQemu)
        try:
            if not self._listener.wait_for_release(result.session_id, self._options.linger_s):
                log.warning(
                    "session %s: the guest is here, but its source has not said in %g s that it "
                    "knows: it asks again with vmth recover, and is answered while vmth receive "
                    "listens with this state directory",
                    result.session_id,
                    self._options.linger_s,
                )
            return _arrival(result, guest, self.notes, self._files)
        finally:
            guest.close()

    def cancel(self) -> None:
        """``wait()`` raises CancelledError, or returns a guest that came in that moment."""
        self.cancelled = True
        self._listener.outcomes.put(CancelledError("cancelled by the caller"))

    def close(self) -> None:
        """End sessions whose guest does not run yet; QEMU is quit then. Idempotent."""
        self._listener.close()
        if self._waiting is not None and self._waiting.memory is not None:
            self._waiting.memory.close()

    def __enter__(self) -> QemuReceiver:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _next(self) -> ReceiveResult:
        """One that arrives while the wait is being ended is here all the same, and nowhere else:
        it is taken."""
        try:
            return self._listener.wait_for_guest()
        except (KeyboardInterrupt, CancelledError):
            self._listener.close()
            with contextlib.suppress(queue.Empty):
                while True:
                    outcome = self._listener.outcomes.get_nowait()
                    if isinstance(outcome, ReceiveResult):
                        return outcome
            raise

    def _make_guest(self, incoming: Incoming) -> Guest:
        """On the session's thread."""
        self._prepared.wait()  # the monitor serves one at a time
        if self._target.qmp:
            qmp = Qmp(self._target.qmp)
            waiting = self._waiting
            if waiting is None or waiting.pid != qmp.pid:
                return make_destination(qmp, incoming, self._land)
            guest = make_destination(
                qmp, incoming, self._land, facts=waiting.facts, memory=waiting.memory
            )
            if waiting.memory is not None:
                waiting.memory.close_rest()
            return guest
        process = QemuProcess(self._target.command, self._state_dir)
        try:
            qmp = process.connect()
        except BaseException:
            process.end(0)
            raise
        return make_destination(qmp, incoming, self._land, process)


def receive_qemu(
    uri: str,
    target: QemuTarget,
    options: ReceiveOptions | None = None,
    *,
    land: Land = Land.AUTO,
    on_listening: Callable[[QemuReceiver], None] = lambda _: None,
) -> Arrival:
    """Listen at ``uri``, take in one guest of ``vmth migrate`` and return when it is here. Raises
    as ``QemuReceiver`` and its ``wait()``; a QEMU that had begun to take the guest in is quit then.
    """
    with QemuReceiver(uri, target, options, land=land) as receiver:
        on_listening(receiver)
        return receiver.wait()


def serve(
    receiver: QemuReceiver, *, once: bool, show: Callable[[Arrival | MigrationError], None]
) -> ExitCode:
    """Show every outcome: the first, or all until ``cancel()``. How the last one ended."""
    while True:
        try:
            arrival = receiver.wait()
        except MigrationError as error:
            show(error)
            if once or isinstance(error, CancelledError):
                return error.exit_code
        else:
            show(arrival)
            if once or receiver.cancelled:
                return ExitCode.OK


def outcome_values(outcome: Arrival | MigrationError) -> dict[str, Any]:
    """As the object of ``--json``; every key in every outcome, null where it does not apply."""
    arrival = outcome if isinstance(outcome, Arrival) else None
    error = outcome if isinstance(outcome, MigrationError) else None
    return {
        "verified": bool(arrival and arrival.verified),
        "verified_scope": arrival.verified_scope if arrival else "none",
        "guest": "qemu",
        "landing": arrival.landing if arrival else None,
        "landing_reason": arrival.landing_reason if arrival else None,
        "was_running": arrival.was_running if arrival else None,
        "status": arrival.status if arrival else None,
        "qmp": arrival.qmp if arrival else None,
        "pid": arrival.pid if arrival else None,
        "started": arrival.started if arrival else None,
        "memory_bytes": arrival.memory_bytes if arrival else None,
        "wire_bytes": arrival.wire_bytes if arrival else None,
        "digest_destination": (arrival.digest or None) if arrival else None,
        "fallbacks": list(arrival.fallbacks) if arrival else [],
        "reused": [asdict(file) for file in arrival.reused] if arrival else [],
        "session_id": arrival.session_id if arrival else None,
        "peer": arrival.peer if arrival else None,
        "role": "receive",
        "vmth_version": __version__,
        "source_runs": error.source_runs if error else False,
        "exit_code": int(error.exit_code) if error else 0,
        "error": str(error) if error else None,
    }


def outcome_lines(outcome: Arrival | MigrationError) -> list[str]:
    """The same for people."""
    if isinstance(outcome, MigrationError):
        return [f"failed: {outcome}"]
    proof = f"yes, {outcome.verified_scope}" if outcome.verified else "no: the digest was off"
    size = format_size(outcome.memory_bytes)
    return [
        f"a guest of {size} from {outcome.peer} is here: {outcome.status}",
        f"  landed in  {outcome.landing} ({outcome.landing_reason})",
        f"  verified   {proof}",
        f"  digest     {outcome.digest or '-'}",
        f"  received   {format_size(outcome.wire_bytes)}",
        *(f"  reused     {line}" for line in reused_lines(outcome.reused, outcome.memory_bytes)),
        f"  monitor    {outcome.qmp} (process {outcome.pid})",
        *(f"  note       {note}" for note in outcome.fallbacks),
    ]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """What was found of a QEMU that waits; better now than when a source waits for us."""

    pid: int
    facts: Facts
    memory: WaitingMemory | None  #: None: pages do not land there


def _waiting(path: str, land: Land) -> _Waiting:
    with Qmp(path) as qmp:
        status = qmp.status()
        if status != "inmigrate":
            raise RefusedError(
                f"the QEMU at {path} is {status!r}, allowed 'inmigrate': start it with "
                "-incoming defer"
            )
        facts = gather(qmp)
        return _Waiting(qmp.pid, facts, None if land is Land.STREAM else WaitingMemory(qmp))


def _arrival(
    result: ReceiveResult, guest: HeldQemu, notes: Sequence[str], files: Sequence[WarmFile]
) -> Arrival:
    landed = guest.landing if isinstance(guest, QemuDestination) else None
    try:
        status = guest.qmp.status()
    except VmthError as error:  # it was here, and ran or not as it did before
        status = f"unknown: {error}"
    return Arrival(
        session_id=result.session_id,
        peer=result.peer,
        qmp=guest.qmp.path,
        pid=guest.qmp.pid,
        started=guest.process is not None,
        status=status,
        was_running=result.was_running,
        landing=landed.kind.value if landed else "",
        landing_reason=landed.reason if landed else "",
        verified=result.verified,
        verified_scope=result.verified_scope,
        digest=result.digest,
        memory_bytes=result.memory_bytes,
        wire_bytes=result.wire_bytes,
        fallbacks=(*notes, *result.fallbacks),
        reused=reused_of(files, result.reused, WIRE_PAGE_BYTES),
    )
