# SPDX-License-Identifier: Apache-2.0
"""A saved VM back into a QEMU that waits for one: ``restore``, and the order in which it is safe.

    check the whole file | will it fit? | memory, each frame checked again | digest of memory right?
    | device state -> QEMU has loaded all, paused | `cont`, if it ran when it was saved

The file is read once before anything is given to QEMU: what is damaged costs no QEMU. Each frame is
checked again as it is sent, and device state, without which a QEMU runs nothing, goes out only when
the digest of all the memory that was sent is right.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from vmth.errors import (
    CancelledError,
    ChannelError,
    MigrationError,
    OptionError,
    RefusedError,
    StreamError,
    VerificationError,
    VmthError,
)
from vmth.qemu.check import Level, compare, raise_if_refused
from vmth.qemu.facts import Facts, gather
from vmth.qemu.image import Frame, FrameDigest, Image, digest_text
from vmth.qemu.image.frames import PAGE, ZERO
from vmth.qemu.incoming import IncomingStream
from vmth.qemu.qmp import Qmp
from vmth.qemu.ram import RUN, BlockTable, Runs
from vmth.qemu.stream import (
    Event,
    PassThrough,
    RamEnd,
    RamPages,
    SectionFinished,
    SectionKind,
    SectionStarted,
    StreamReader,
)

__all__ = ["RestoreOptions", "RestoreProgress", "RestoreResult", "restore"]

PROGRESS_EVERY_S = 0.5
LOOK_S = 0.02
#: Eleven days: poll(2) takes no more than 24.
NO_LIMIT_S = 1e6
QEMU_S = 30.0
ANNOUNCE = {"initial": 50, "max": 550, "rounds": 5, "step": 100}


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """``run``: None: as it was when it was saved. ``timeout_s``: for QEMU to take and to load; 0:
    none. Raises UsageError for a negative one."""

    run: bool | None = None
    workers: int = 0  #: threads that unpack; 0: one a CPU, at most 8
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        if self.timeout_s < 0:
            raise OptionError("timeout_s", f"received {self.timeout_s:g}, allowed 0 and more")


@dataclass(frozen=True, slots=True)
class RestoreProgress:
    phase: str  #: "checking" (bytes of the file) or "loading" (bytes of memory)
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """``running``: the guest runs now."""

    path: str
    machine: str
    memory_bytes: int
    file_bytes: int
    normal_pages: int
    zero_pages: int
    digest: str
    total_ns: int
    verify_ns: int
    running: bool
    status: str
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """Bytes of the file for one of memory."""
        return self.file_bytes / max(1, self.memory_bytes)


def restore(
    path: str | os.PathLike[str],
    qmp_path: str | os.PathLike[str],
    options: RestoreOptions | None = None,
    *,
    on_progress: Callable[[RestoreProgress], None] = lambda _: None,
    cancelled: threading.Event | None = None,
) -> RestoreResult:
    """Load the image ``path`` into the QEMU of the monitor at ``qmp_path``, which was started with
    ``-incoming defer``, and let the guest run if it ran.

    ``cancelled`` may be set from any thread. Raises VerificationError for a damaged file and
    RefusedError for a QEMU that cannot take it, both before that QEMU was touched; CancelledError
    and MigrationError otherwise: nothing runs then, the file is as it was, and a QEMU that was
    given a part of the guest has quit.
    """
    options = options or RestoreOptions()
    with contextlib.ExitStack() as stack:
        try:
            image = stack.enter_context(Image.open(Path(path)))
            qmp = stack.enter_context(Qmp(qmp_path))
            run = _Restore(image, qmp, options, on_progress, cancelled or threading.Event())
            return run.run()
        except StreamError as error:
            raise VerificationError(f"{error}; nothing was restored") from error
        except OSError as error:
            if isinstance(error, VmthError):
                raise
            raise RefusedError(f"{path}: {error.strerror or error}") from error


class _Restore:
    """One restore; one thread."""

    def __init__(
        self,
        image: Image,
        qmp: Qmp,
        options: RestoreOptions,
        on_progress: Callable[[RestoreProgress], None],
        cancelled: threading.Event,
    ) -> None:
        self._image = image
        self._qmp = qmp
        self._options = options
        self._on_progress = on_progress
        self._cancelled = cancelled
        self._workers = options.workers or min(8, os.cpu_count() or 1)
        self._notes: list[str] = []
        self._shown_at = 0.0

    def run(self) -> RestoreResult:
        began = time.monotonic_ns()
        image = self._image
        head = _Head(image)
        self._check_file()
        verify_ns = time.monotonic_ns() - began
        self._check_fits()
        running = image.meta.running if self._options.run is None else self._options.run
        status = self._load(head, running)
        if running:
            status = self._resume()
        end = image.end
        return RestoreResult(
            path=str(image.path),
            machine=image.meta.machine,
            memory_bytes=image.meta.memory_bytes,
            file_bytes=end.file_bytes,
            normal_pages=end.normal_pages,
            zero_pages=end.zero_pages,
            digest=digest_text(end.digest_lo, end.digest_hi, end.digest_pages),
            total_ns=time.monotonic_ns() - began,
            verify_ns=verify_ns,
            running=running,
            status=status,
            notes=tuple(self._notes),
        )

    # ---- before QEMU is touched ----------------------------------------------------------------

    def _check_file(self) -> None:
        total = self._image.end.file_bytes

        def between(done_bytes: int) -> None:
            self._check_cancelled()
            self._show("checking", done_bytes, total)

        self._image.check(between)

    def _check_fits(self) -> None:
        """What the QEMU that saved it was, against what this one is. Raises RefusedError."""
        here = gather(self._qmp)
        try:
            there = msgspec.convert(self._image.meta.facts, Facts)
        except msgspec.ValidationError as error:
            self._notes.append(f"the file's facts cannot be compared with this QEMU: {error}")
            return
        findings = compare(there, here)
        raise_if_refused(findings)
        self._notes += [
            f"{finding.subject}: {finding.detail}"
            for finding in findings
            if finding.level is Level.WARNING
        ]

    # ---- the stream ----------------------------------------------------------------------------

    def _load(self, head: _Head, running: bool) -> str:
        """All of it; QEMU's run state then. A failure ends that QEMU, which has a part of a guest
        and could not take in another."""
        # QEMU before 10.0 aborts when a guest that was loaded so and never resumed moves on.
        timeout_s = self._options.timeout_s or NO_LIMIT_S
        stream = IncomingStream(self._qmp, timeout_s=timeout_s, lock_late=running)
        stream.start()
        try:
            with stream:
                for event in head.events:
                    stream.send(event)
                self._send_memory(stream, head)
                for piece in self._image.state():
                    self._check_cancelled()
                    stream.send_raw(piece)
                status = stream.await_loaded(timeout_s)
        except BaseException:
            self._quit()
            raise
        self._notes += stream.notes
        return status

    def _send_memory(self, stream: IncomingStream, head: _Head) -> None:
        image, digest = self._image, FrameDigest(self._image.page_bytes)
        part = SectionStarted(SectionKind.PART, head.section_id, "ram", 0, 4)
        done_bytes = 0
        for frame, hashes in image.frames(workers=self._workers):
            self._check_cancelled()
            digest.take(frame, hashes)
            if len(frame.runs):
                stream.send(part)
                stream.send(RamPages(head.table, _stream_runs(frame), frame.data.reshape(-1).data))
                stream.send(RamEnd())
                stream.send(SectionFinished(head.section_id))
            done_bytes += frame.npages * image.page_bytes
            self._show("loading", done_bytes, image.meta.memory_bytes)
        digest.compare(image.end)

    # ---- the ends ------------------------------------------------------------------------------

    def _resume(self) -> str:
        """Raises MigrationError when the guest does not run: it is whole there, and paused."""
        try:
            self._qmp.execute("cont")
            began = time.monotonic()
            while (status := self._qmp.status()) != "running":
                if time.monotonic() - began > QEMU_S:
                    raise MigrationError(f"it is {status!r}")
                time.sleep(LOOK_S)
        except MigrationError as error:
            raise MigrationError(
                f"the guest is restored and paused, and could not be resumed: {error}; when that "
                "is mended, give the monitor cont"
            ) from error
        with contextlib.suppress(MigrationError):  # before 4.0 there is no such command
            self._qmp.execute("announce-self", ANNOUNCE)
        return status

    def _quit(self) -> None:
        """It may be gone already: older QEMUs end when a load fails."""
        with contextlib.suppress(ChannelError, MigrationError):
            self._qmp.execute("quit")

    # ---- small things --------------------------------------------------------------------------

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise CancelledError("the restore was cancelled; nothing runs, the file is as it was")

    def _show(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now - self._shown_at >= PROGRESS_EVERY_S:
            self._shown_at = now
            self._on_progress(RestoreProgress(phase, done_bytes, total_bytes))


class _Head:
    """The begin of the saved stream, read again: it must say the same blocks as the file does.
    Raises StreamError."""

    def __init__(self, image: Image) -> None:
        reader = StreamReader()
        reader.feed(image.head)
        self.events: list[Event] = []
        while (event := reader.next_event()) is not None:
            if isinstance(event, PassThrough):
                raise StreamError(f"the stream's begin: {event.reason}")
            self.events.append(event)
        table, section_id = reader.table, reader.ram_section_id
        said = tuple((block.idstr, block.used_length) for block in image.blocks)
        if table is None or section_id is None or reader.position != len(image.head):
            raise StreamError(f"the stream's begin ends within {len(image.head)} bytes")
        listed = tuple(zip(table.names, table.lengths, strict=True))
        if listed != said or table.page_bytes != image.page_bytes:
            raise StreamError(f"the stream's begin lists {listed}, allowed {said}")
        self.table: BlockTable = table
        self.section_id: int = section_id


def _stream_runs(frame: Frame) -> Runs:
    """A frame's runs as a stream's, whose payload is the frame's data."""
    runs = np.zeros(len(frame.runs), dtype=RUN)
    for name in ("page", "npages", "block", "kind"):
        runs[name] = frame.runs[name]
    page_bytes = frame.data.shape[1]
    of_data = frame.runs["kind"] == PAGE
    rows = np.where(of_data, frame.runs["npages"].astype(np.uint64), np.uint64(0))
    runs["at"] = np.where(of_data, (np.cumsum(rows) - rows) * np.uint64(page_bytes), 0)
    runs["stride"] = runs["nbytes"] = np.where(of_data, page_bytes, 0)
    runs["kind"] = np.where(of_data, PAGE, ZERO)
    return runs
