# SPDX-License-Identifier: Apache-2.0
"""A running or paused VM to an image file: ``save``, and the order in which it is safe.

    check, prepare | stop the guest  | stream -> image, all of it | disk has it, and it reads back
                   | (--live: later) |                            |
    SHUT 0 -> QEMU completed, paused | the file gets its name | QEMU quits, stays paused, or resumes

Until the file has its name any failure, the death of this process included, ends with the VM as it
was and no file: QEMU is told SHUT last, and a guard process resumes a guest that only we stopped.
From then on the file is the VM, and the guest here is not resumed. A snapshot (``RESUME``) is taken
in another order: the guest runs on before the disk has the file.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from vmth import __version__
from vmth.errors import (
    CancelledError,
    ChannelError,
    MigrationError,
    NotResumedError,
    RefusedError,
    StreamError,
    VmthError,
)
from vmth.qemu.facts import Facts, gather
from vmth.qemu.image import (
    DEFAULT_LEVEL,
    AtomicFile,
    End,
    Image,
    ImageWriter,
    Meta,
    WriterStats,
    check_level,
    digest_text,
)
from vmth.qemu.image.intake import Intake, StreamHead
from vmth.qemu.outgoing import FIRST_READ_BYTES, OutgoingStream
from vmth.qemu.qmp import Qmp, QmpEvent
from vmth.qemu.save_guard import SaveGuard, put_vm_back
from vmth.qemu.settings import (
    MigrationSettings,
    capabilities_of,
    is_over,
    migration_status,
    parameters_of,
)
from vmth.qemu.steering import RUNS
from vmth.qemu.stream import StreamFinished

__all__ = ["OnSuccess", "SaveOptions", "SaveProgress", "SaveResult", "save"]

#: A stream that holds each page as it is, and nothing that an image cannot hold.
CAPABILITIES = {
    "return-path": True,
    "events": True,
    "auto-converge": False,
    "background-snapshot": False,
    "compress": False,
    "mapped-ram": False,
    "multifd": False,
    "pause-before-switchover": False,
    "postcopy-preempt": False,
    "postcopy-ram": False,
    "release-ram": False,
    "x-colo": False,
    "x-ignore-shared": False,
    "xbzrle": False,
    "zero-copy-send": False,
}
UNBOUNDED_BPS = 1 << 40
MAY_BE_SAVED = ("running", "paused", "prelaunch")
#: A live pass must have fewer than this share of the pages of the one before, or the guest stops.
SHRINKS = 0.75
EVENT_WAIT_S = 0.2
PROGRESS_EVERY_S = 0.5
QEMU_S = 30.0
NIL_UUID = "00000000-0000-0000-0000-000000000000"
LOOK_S = 0.02


class OnSuccess(enum.Enum):
    """What becomes of the VM here when the file holds it."""

    QUIT = "quit"  #: its QEMU ends, as after virsh save
    KEEP = "keep"  #: it stays, paused; `cont` would resume it
    RESUME = "resume"  #: it runs on, if it ran: the file is a snapshot of memory and devices


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """``bandwidth_bps`` 0: no cap; ``timeout_ns`` 0: none. The latter bounds the live passes: then
    the guest is stopped and the rest is saved. ``downtime_limit_ns`` is for live passes too."""

    live: bool = False
    on_success: OnSuccess = OnSuccess.QUIT
    replace: bool = False
    level: int = DEFAULT_LEVEL
    workers: int = 0  #: threads that compress; 0: one a CPU, at most 8
    bandwidth_bps: int = 0
    downtime_limit_ns: int = 300_000_000
    timeout_ns: int = 0


@dataclass(frozen=True, slots=True)
class SaveProgress:
    """Now and then while memory is saved."""

    passes: int
    memory_bytes: int
    stats: WriterStats
    guest_stopped: bool


@dataclass(frozen=True, slots=True)
class SaveResult:
    """``ran``: the guest ran when the save began, which the file says too. ``stopped_ns``: for how
    long it did not run here; None while it does not."""

    path: str
    machine: str
    memory_bytes: int
    file_bytes: int
    normal_pages: int
    zero_pages: int
    superseded_pages: int
    digest: str
    passes: int
    total_ns: int
    verify_ns: int
    stopped_ns: int | None
    ran: bool
    live: bool
    on_success: str
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """Bytes of the file for one of memory."""
        return self.file_bytes / max(1, self.memory_bytes)


def save(
    qmp_path: str | os.PathLike[str],
    path: str | os.PathLike[str],
    options: SaveOptions | None = None,
    *,
    on_progress: Callable[[SaveProgress], None] = lambda _: None,
    cancelled: threading.Event | None = None,
) -> SaveResult:
    """Save the VM of the monitor at ``qmp_path`` into ``path``. Returns when the file is whole, on
    the disk, and was read back.

    ``cancelled`` may be set from any thread. Raises RefusedError before anything is touched,
    CancelledError, MigrationError and its other children, and OSError of the disk; there is no file
    then, and the VM is as it was before. NotResumedError: it is not; an operator must look.
    """
    options = options or SaveOptions()
    target = Path(os.path.abspath(path))
    check_level(options.level)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(AtomicFile(target, replace=options.replace))
            qmp = stack.enter_context(Qmp(qmp_path))
            run = _Save(qmp, file, options, on_progress, cancelled or threading.Event())
            return run.run()
        except OSError as error:
            if isinstance(error, VmthError):
                raise
            raise MigrationError(
                f"{target}: {error.strerror or error}; there is no file, and the VM is as it was"
            ) from error


class _Save:
    """One save; one thread."""

    def __init__(
        self,
        qmp: Qmp,
        file: AtomicFile,
        options: SaveOptions,
        on_progress: Callable[[SaveProgress], None],
        cancelled: threading.Event,
    ) -> None:
        self._qmp = qmp
        self._file = file
        self._options = options
        self._on_progress = on_progress
        self._cancelled = cancelled
        self._settings = MigrationSettings(qmp)
        self._notes: list[str] = []
        self._ran = False
        self._ordered = False  #: the stop of its guest
        self._facts: Facts
        self._passes = _Passes()
        self._meta: Meta | None = None
        self._writer: ImageWriter | None = None
        self._shown_at = 0.0

    def run(self) -> SaveResult:
        began = time.monotonic_ns()
        self._ran = self._check_may_be_saved()
        resume = self._options.on_success is OnSuccess.RESUME
        with SaveGuard(
            self._qmp, str(self._file.path), self._file.identity, ran=self._ran, resume=resume
        ) as guard:
            self._facts = gather(self._qmp)
            with contextlib.ExitStack() as stack:
                try:
                    end, verify_ns = self._save(guard, stack)
                except BaseException as error:
                    stack.close()  # the stream: QEMU gives up its migration
                    self._back(error)
                    raise
            self._finish()
        assert self._meta is not None
        return SaveResult(
            path=str(self._file.path),
            machine=self._meta.machine,
            memory_bytes=self._meta.memory_bytes,
            file_bytes=end.file_bytes,
            normal_pages=end.normal_pages,
            zero_pages=end.zero_pages,
            superseded_pages=end.superseded_pages,
            digest=digest_text(end.digest_lo, end.digest_hi, end.digest_pages),
            passes=self._passes.number,
            total_ns=time.monotonic_ns() - began,
            verify_ns=verify_ns,
            stopped_ns=self._stopped_ns(),
            ran=self._ran,
            live=self._meta.live,
            on_success=self._options.on_success.value,
            notes=tuple(self._notes),
        )

    # ---- the order -----------------------------------------------------------------------------

    def _check_may_be_saved(self) -> bool:
        """Does the guest run? RefusedError for a VM in another state than running or paused."""
        status = self._qmp.status()
        if status not in MAY_BE_SAVED:
            raise RefusedError(
                f"the VM at {self._qmp.path} is {status!r}, allowed: {', '.join(MAY_BE_SAVED)}"
                + (": QEMU lets it move again only after cont" if status == "postmigrate" else "")
            )
        migration = migration_status(self._qmp)
        if not is_over(migration):
            raise RefusedError(
                f"the VM at {self._qmp.path} has a migration under way ({migration}): wait for it "
                "or cancel it"
            )
        return status == "running"

    def _save(self, guard: SaveGuard, stack: contextlib.ExitStack) -> tuple[End, int]:
        """Everything up to the file's name. What raises leaves the VM to ``_back``."""
        options = self._options
        self._apply_settings(guard)
        stack.callback(self._qmp.on_event(self._passes.take))
        if self._ran and not options.live:
            self._ordered = True
            self._qmp.execute("stop")
        stream = stack.enter_context(OutgoingStream(self._qmp))
        stream.start(_uid_of(self._qmp.pid))
        stream.limit_read(FIRST_READ_BYTES)  # a file takes them soon, whatever the link
        self._take_all(stream, stack)
        assert self._writer is not None
        end = self._writer.finish()
        if options.on_success is OnSuccess.RESUME:
            # A snapshot: the guest need not wait for the disk, it runs on whatever becomes of it.
            self._complete(stream)
            self._resume()
        self._file.sync()
        verify_ns = self._read_back()
        if options.on_success is not OnSuccess.RESUME:
            self._complete(stream)
        self._file.publish()
        return end, verify_ns

    def _apply_settings(self, guard: SaveGuard) -> None:
        """The guard is told first what is there."""
        options = self._options
        wanted = {
            "max-bandwidth": options.bandwidth_bps or UNBOUNDED_BPS,
            "downtime-limit": max(1, options.downtime_limit_ns // 1_000_000),
            "tls-creds": "",  # or QEMU speaks TLS on our own socket too
        }
        have, values = capabilities_of(self._qmp), parameters_of(self._qmp)
        guard.begin(
            {
                "capabilities": {name: have[name] for name in CAPABILITIES if name in have},
                "parameters": {name: values[name] for name in wanted if name in values},
            }
        )
        unknown = self._settings.apply(CAPABILITIES, wanted)
        missing = {name for name, state in CAPABILITIES.items() if state} & {*unknown}
        if missing:
            raise RefusedError(f"this QEMU has no {', '.join(sorted(missing))}: 2.10 or later has")

    def _take_all(self, stream: OutgoingStream, stack: contextlib.ExitStack) -> None:
        """The whole stream into the image; live passes end here."""
        intake = Intake(lambda head: stack.enter_context(self._begin_image(head)))
        deadline = self._options.timeout_ns and time.monotonic_ns() + self._options.timeout_ns
        while True:
            self._check_cancelled()
            event = stream.next_event(EVENT_WAIT_S)
            if isinstance(event, StreamFinished):
                self._check_who_stopped(intake.run_state)
                return
            if event is not None:
                intake.take(event)
            self._show()
            if self._ran and self._options.live and not self._passes.stopped_at_ns:
                late = bool(deadline) and time.monotonic_ns() > deadline
                if late or not self._passes.shrink(self._stored_pages()):
                    self._stop_live("the timeout came" if late else "passes did not get shorter")

    def _check_who_stopped(self, run_state: str | None) -> None:
        """A guest that somebody else has stopped meanwhile, or that an error of its disk has, stays
        so. The file's head says that it ran."""
        if self._ran and not self._ordered and run_state is not None and run_state not in RUNS:
            self._ran = False
            raise MigrationError(
                f"the guest was stopped meanwhile ({run_state}), not by this save: it is left so, "
                "and was not saved"
            )

    def _stopped_by_another(self) -> bool:
        """QEMU calls those that it stopped itself by other names."""
        own = ("finish-migrate", "postmigrate", *RUNS)
        return not self._ordered and self._qmp.status() not in own

    def _stop_live(self, why: str) -> None:
        self._ordered = True
        self._qmp.execute("stop")
        self._passes.stopped()
        self._notes.append(f"the guest was stopped before the last pages: {why}")

    def _begin_image(self, head: StreamHead) -> ImageWriter:
        options, facts = self._options, self._facts
        self._meta = Meta(
            machine=head.machine,
            qemu_version=".".join(map(str, self._qmp.version)),
            vmth_version=__version__,
            created_unix_ns=time.time_ns(),
            uuid="" if facts.uuid == NIL_UUID else facts.uuid,
            name=str(self._qmp.execute("query-name").get("name", "")),
            running=self._ran,
            live=options.live and self._ran,
            page_bytes=head.page_bytes,
            blocks=head.blocks,
            facts=msgspec.to_builtins(facts),
        )
        workers = options.workers or min(8, os.cpu_count() or 1)
        self._writer = ImageWriter(
            self._file, self._meta, head.data, level=options.level, workers=workers
        )
        return self._writer

    def _read_back(self) -> int:
        """Is the file what it must be? How long the look took. Raises MigrationError."""
        began = time.monotonic_ns()
        try:
            with Image.open(self._file.readable) as image:
                image.verify(between=self._check_cancelled)
        except StreamError as error:
            raise MigrationError(
                f"the image does not read back as it was written: {error}"
            ) from error
        return time.monotonic_ns() - began

    def _complete(self, stream: OutgoingStream) -> None:
        """Tell QEMU that all has arrived; it then holds the guest for good."""
        stream.shut(0)
        began = time.monotonic()
        while (status := migration_status(self._qmp)) != "completed":
            if is_over(status) or time.monotonic() - began > QEMU_S:
                reason = self._qmp.execute("query-migrate").get("error-desc", "no reason given")
                raise MigrationError(f"QEMU ended with {status!r} after all was saved: {reason}")
            time.sleep(LOOK_S)

    def _resume(self) -> None:
        if self._ran:
            put_vm_back(self._qmp, {}, run=True)
            self._passes.resumed()

    # ---- the ends ------------------------------------------------------------------------------

    def _back(self, failure: BaseException) -> None:
        """After a failure: the VM as it was. Raises NotResumedError if that could not be done, and
        MigrationError if QEMU is gone."""
        if self._file.published and self._options.on_success is not OnSuccess.RESUME:
            raise NotResumedError(
                f"{failure}; {self._file.path} is whole all the same, and the guest is paused "
                "here: give the monitor quit, or remove the file and give cont"
            ) from failure
        try:
            self._notes += put_vm_back(
                self._qmp,
                self._settings.saved(),
                run=self._ran,
                unless=self._stopped_by_another,
            )
        except ChannelError as error:
            gone = MigrationError(f"{error}; the VM was not saved")
            gone.source_runs = False
            raise gone from error

    def _finish(self) -> None:
        """The file holds the VM."""
        self._notes += self._settings.restore()
        if self._options.on_success is OnSuccess.QUIT:
            try:
                self._quit()
            except VmthError as error:
                raise NotResumedError(
                    f"{self._file.path} is whole, but its QEMU has not quit: {error}"
                ) from error

    def _quit(self) -> None:
        with contextlib.suppress(ChannelError):  # it may close before it answers
            self._qmp.execute("quit")
        began = time.monotonic()
        while self._qmp.lost is None:
            if time.monotonic() - began > QEMU_S:
                raise MigrationError(f"QEMU has not quit within {QEMU_S:g} s")
            time.sleep(LOOK_S)

    # ---- small things --------------------------------------------------------------------------

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise CancelledError("the save was cancelled; the VM is as it was")

    def _stored_pages(self) -> int:
        stats = self._writer.stats if self._writer is not None else WriterStats()
        return stats.normal_pages + stats.zero_pages

    def _show(self) -> None:
        now = time.monotonic()
        if self._writer is None or self._meta is None or now - self._shown_at < PROGRESS_EVERY_S:
            return
        self._shown_at = now
        self._on_progress(
            SaveProgress(
                self._passes.number,
                self._meta.memory_bytes,
                self._writer.stats,
                bool(self._passes.stopped_at_ns),
            )
        )

    def _stopped_ns(self) -> int | None:
        passes = self._passes
        if not passes.stopped_at_ns or not passes.resumed_at_ns:
            return None
        return passes.resumed_at_ns - passes.stopped_at_ns


class _Passes:
    """QEMU's passes over memory, by its events and by the pages that were stored. ``take`` runs on
    the monitor's thread, the rest on the save's."""

    def __init__(self) -> None:
        self.number = 0
        self.stopped_at_ns = 0
        self.resumed_at_ns = 0
        self._looked_at = 0
        self._stored: list[int] = []

    def take(self, event: QmpEvent) -> None:
        if event.name == "MIGRATION_PASS":
            self.number = int(event.data.get("pass", self.number + 1))
        elif event.name == "STOP" and not self.stopped_at_ns:
            self.stopped_at_ns = time.monotonic_ns()
        elif event.name == "RESUME" and self.stopped_at_ns:
            self.resumed_at_ns = time.monotonic_ns()

    def stopped(self) -> None:
        """The guest is stopped; the event that says so may still be on its way."""
        self.stopped_at_ns = self.stopped_at_ns or time.monotonic_ns()

    def resumed(self) -> None:
        """The guest runs again; the event that says so may still be on its way."""
        self.resumed_at_ns = self.resumed_at_ns or time.monotonic_ns()

    def shrink(self, stored_pages: int) -> bool:
        """Are passes getting shorter, by the pages that were stored so far?"""
        if self.number != self._looked_at:
            self._looked_at = self.number
            self._stored.append(stored_pages)
        sizes = [after - before for before, after in itertools.pairwise([0, *self._stored])]
        # The first pass begins with the first event, so nothing is stored before it.
        return len(sizes) < 4 or sizes[-1] < SHRINKS * sizes[-2]


def _uid_of(pid: int) -> int | None:
    """As whom a process runs; None where that cannot be seen."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None
