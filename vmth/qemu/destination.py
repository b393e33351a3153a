# SPDX-License-Identifier: Apache-2.0
"""A destination QEMU as a ``Guest``: pages land in its memory or its stream, its state is loaded,
and it is resumed once the source has let its guest go.

    make_destination   compare, choose the landing, open the stream: head, ram START; PONG: agreed
    page channels      land in shared memory, or as ram PARTs in the stream
    load_state         ram END, device state as the source's QEMU wrote it; SHUT 0: loaded, paused
    resume             cont
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from vmth.channel.interface import StreamSink
from vmth.errors import (
    ChannelError,
    GuestError,
    RefusedError,
    StreamError,
    VmthError,
)
from vmth.guest import DirtySource, Guest, StateStream
from vmth.handshake import Incoming
from vmth.qemu.check import Level, compare, raise_if_refused
from vmth.qemu.facts import Facts, gather, refreshed
from vmth.qemu.incoming import IncomingStream
from vmth.qemu.landing import LANDING_QUESTIONS, Land, Landing, choose_landing
from vmth.qemu.launch import QemuProcess, process_identity, wait_for_exit
from vmth.qemu.qmp import Qmp, QmpError, UnreadError
from vmth.qemu.stream.devices import run_state_in
from vmth.qemu.stream.events import (
    BlockListed,
    Command,
    CommandCode,
    Configuration,
    ConfigurationField,
    Event,
    FileHeader,
    RamEnd,
    RamSize,
    SectionFinished,
    SectionKind,
    SectionStarted,
)
from vmth.qemu.stream.fields import RAM_VERSION
from vmth.qemu.stream.reader import StreamReader
from vmth.qemu.waiting_memory import WaitingMemory
from vmth.types import RamBlock

__all__ = ["DEVICE_STREAM", "HeldQemu", "QemuDestination", "find_qemu", "make_destination"]

log = logging.getLogger(__name__)

#: The one state stream of a QEMU guest: all bytes behind the end of the ram section.
DEVICE_STREAM = "qemu/devices"
DEVICE_STREAM_VERSION = 1
#: Of the stream that is written here; no section of a source has it.
RAM_SECTION_ID = 0x766D7468

_HEAD_KEY = "qemu.head"
_ACCEPT_S = 30.0  #: for QEMU to agree to the block list
_LOAD_S = 120.0  #: for QEMU to load the device state
_RESUME_S = 30.0  #: for QEMU to answer cont
_RUNS_S = 30.0  #: for a vCPU to run from then on
_QUIT_S = 10.0
_LOOK_S = 0.005
#: Run states of a loaded guest in which no vCPU has run yet. Any other means that it has: a guest
#: may have stopped by itself since (shutdown, panic, an I/O error), and has been here all the same.
_NOT_STARTED = frozenset(
    {"inmigrate", "paused", "prelaunch", "postmigrate", "finish-migrate", "restore-vm"}
)
#: Run states of a source's guest that is to be resumed here; None: its machine does not say.
_LET_RUN = (None, "running", "suspended")
#: As QEMU announces a migrated guest by itself.
_ANNOUNCE = {"initial": 50, "max": 550, "rounds": 5, "step": 100}


class HeldQemu:
    """A QEMU that holds a whole guest: ``Guest``, ``CanTell``, ``CanDescribe`` and ``CanClose``.
    Owns the monitor and, where one was started here, the process as long as it is to be ended."""

    dirty: Sequence[DirtySource] = ()

    def __init__(self, qmp: Qmp, process: QemuProcess | None = None) -> None:
        self.qmp = qmp
        self.process = process
        self._may_have_run = True
        self._ran = False
        self._released = False

    @property
    def blocks(self) -> Sequence[RamBlock]:
        return ()

    def pause(self) -> bool:
        """Stop the vCPUs. True if they ran."""
        if self.qmp.status() in _NOT_STARTED:
            return False
        self.qmp.execute("stop")
        return True

    def resume(self) -> None:
        """Let it run. Raises GuestError with QEMU's reason, for example a disk image whose lock it
        does not get: it is paused then."""
        if self.qmp.lost is not None:
            raise ChannelError(self.qmp.lost)  # no vCPU has run then
        self.qmp.forget_events()
        had_run, self._may_have_run = self._may_have_run, True
        try:
            self.qmp.execute("cont", timeout_s=_RESUME_S)
        except UnreadError:
            self._may_have_run = had_run
            raise
        except QmpError as error:
            raise GuestError(f"QEMU does not resume: {error.description}") from error
        deadline = time.monotonic() + _RUNS_S
        while not self.is_running():
            if time.monotonic() >= deadline:
                raise GuestError(f"QEMU lets no vCPU run {_RUNS_S:g} s after cont")
            time.sleep(_LOOK_S)

    def save_state(self, write: Callable[[StateStream], None]) -> None:
        raise GuestError("a destination QEMU has no state to save: migrate it as a source")

    def load_state(self, streams: Iterable[StateStream]) -> None:
        raise GuestError("this QEMU holds a guest already")

    def release(self) -> None:
        """Quit QEMU and wait until it has ended. Idempotent."""
        if not self._released:
            self._released = True
            _quit(self.qmp, self.process)

    def is_running(self) -> bool:
        """True also for a guest that ran here and stopped since, by itself or by somebody's order:
        the source's copy is not to run then."""
        try:
            if not self._ran:
                resumed = self.qmp.wait_event(lambda event: event.name == "RESUME", 0)
                self._ran = resumed is not None or self.qmp.status() not in _NOT_STARTED
            return self._ran
        except ChannelError:
            if not self._may_have_run:
                return False  # nobody ever let it run, and now it is gone
            raise

    def switchover_threads(self) -> Sequence[int]:
        """The monitor's thread; QEMU's own are left alone."""
        thread = self.qmp.thread_id
        return (thread,) if thread is not None else ()

    def describe(self) -> dict[str, str]:
        process = process_identity(self.qmp.pid)
        return {"kind": "qemu", "qmp": self.qmp.path, "process": process}

    def announce(self) -> None:
        self.qmp.execute("announce-self", _ANNOUNCE)

    def close(self) -> None:
        """Let go of the monitor; QEMU goes on as it is. Idempotent."""
        self.qmp.close()


class _RememberedQemu:
    """One that a journal names. Its monitor is held only while something is asked or done. Raises
    GuestError once another QEMU listens at its path."""

    blocks: Sequence[RamBlock] = ()
    dirty: Sequence[DirtySource] = ()

    def __init__(self, path: str, process: str) -> None:
        self._path = path
        self._process = process

    @contextlib.contextmanager
    def _held(self) -> Iterator[HeldQemu]:
        with Qmp(self._path) as qmp:
            if process_identity(qmp.pid) != self._process:
                raise GuestError(f"another QEMU (process {qmp.pid}) is at {self._path} now")
            yield HeldQemu(qmp)

    def is_running(self) -> bool:
        with self._held() as held:
            return held.is_running()

    def pause(self) -> bool:
        with self._held() as held:
            return held.pause()

    def resume(self) -> None:
        with self._held() as held:
            held.resume()

    def save_state(self, write: Callable[[StateStream], None]) -> None:
        raise GuestError("a destination QEMU has no state to save: migrate it as a source")

    def load_state(self, streams: Iterable[StateStream]) -> None:
        raise GuestError("this QEMU holds a guest already")

    def release(self) -> None:
        with self._held() as held:
            held.release()

    def describe(self) -> dict[str, str]:
        return {"kind": "qemu", "qmp": self._path, "process": self._process}


class QemuDestination(HeldQemu):
    """One that takes a guest in: ``CanTakePages``, ``CanNote`` and ``CanAnnounce`` besides. Made by
    ``make_destination``; owns the stream and the landing too."""

    def __init__(
        self,
        qmp: Qmp,
        stream: IncomingStream,
        landing: Landing,
        process: QemuProcess | None,
        notes: Sequence[str],
    ) -> None:
        super().__init__(qmp, process)
        self.landing = landing
        self._stream = stream
        self._notes = tuple(notes)
        self._may_have_run = False

    @property
    def blocks(self) -> Sequence[RamBlock]:
        return self.landing.blocks

    def load_state(self, streams: Iterable[StateStream]) -> None:
        """Raises StreamError for other streams than a QEMU source's, MigrationError with QEMU's
        reason when it does not load them."""
        given = list(streams)
        if [(stream.name, stream.version) for stream in given] != [
            (DEVICE_STREAM, DEVICE_STREAM_VERSION)
        ]:
            names = [f"{stream.name} version {stream.version}" for stream in given]
            raise StreamError(
                f"state streams: received {names}, allowed one {DEVICE_STREAM} version "
                f"{DEVICE_STREAM_VERSION}"
            )
        # QEMU before 10.0 aborts when a guest that got its images late and never ran moves on.
        self._stream.lock_images(late=run_state_in(given[0].data) in _LET_RUN)
        for event in _ram_section(SectionKind.END):
            self._stream.send(event)
        self._stream.send_raw(given[0].data)
        self._stream.await_held(_LOAD_S)
        if self.process is not None:
            self.process.keep()

    def release(self) -> None:
        self._stream.close()
        self.landing.close()
        super().release()

    @property
    def verified_scope(self) -> str:
        return self.landing.verified_scope

    def page_sink(self) -> StreamSink:
        idstrs = tuple(block.idstr for block in self.blocks)
        return StreamSink(self._stream.fd, RAM_SECTION_ID, idstrs)

    def trouble(self) -> Exception | None:
        return self._stream.trouble()

    def announce(self) -> None:
        try:
            super().announce()
        finally:
            self._stream.close()  # which may wait for a disk

    def notes(self) -> Sequence[str]:
        return (*self._notes, *self._stream.notes, *self.landing.notes)

    def close(self) -> None:
        """Let go of the monitor and of the files; QEMU goes on as it is. Idempotent."""
        self._stream.close()
        self.landing.close()
        super().close()


def make_destination(
    qmp: Qmp,
    incoming: Incoming,
    land: Land,
    process: QemuProcess | None = None,
    facts: Facts | None = None,
    memory: WaitingMemory | None = None,
) -> QemuDestination:
    """Prepare the QEMU behind ``qmp`` for the guest that a source offers; takes both over.
    ``facts`` and ``memory``: of that QEMU since it waits, which saves time while a source waits.
    Raises RefusedError: a ``process`` was ended then, another QEMU is as it was, or was quit if it
    had begun to take the migration in."""
    begun = False

    def give_back() -> None:
        if begun or process is not None:
            try:
                _quit(qmp, process)
            except VmthError as error:
                log.error("%s", error)
        qmp.close()

    with contextlib.ExitStack() as undo:
        undo.callback(give_back)
        if facts is not None:
            qmp.ask_ahead(("query-status", None), *LANDING_QUESTIONS)
        head = source_head(incoming.guest)
        source = Facts.from_entries(incoming.guest)
        notes = _compare(qmp, source, facts)
        made = () if memory is None else (memory.find,)
        landing = choose_landing(qmp, incoming.blocks, land, *made)
        undo.callback(landing.close)
        lock_late = source is None or source.status in _LET_RUN
        stream = IncomingStream(
            qmp, log=process.last_words if process else None, lock_late=lock_late
        )
        undo.callback(stream.close)
        try:
            stream.start()
            begun = True
            for event in (*head, *_ram_start(incoming.blocks)):
                stream.send(event)
            stream.await_taken(_ACCEPT_S)
        except RefusedError:
            raise
        except VmthError as error:
            raise RefusedError(str(error)) from error
        undo.pop_all()
    return QemuDestination(qmp, stream, landing, process, notes)


def source_head(entries: Mapping[str, str]) -> list[Event]:
    """The beginning of the stream for the destination, made of the source's own ("qemu.head" of an
    offer). Raises RefusedError when there is none, or for one that is no such thing."""
    if _HEAD_KEY not in entries:
        raise RefusedError("the source is no QEMU: its offer has no qemu.head; use vmth migrate")
    reader = StreamReader()
    events: list[Event] = []
    try:
        reader.feed(base64.b64decode(entries[_HEAD_KEY], validate=True))
        while (event := reader.next_event()) is not None:
            events.append(event)
    except (binascii.Error, StreamError) as error:
        raise RefusedError(f"the head of the source's stream: {error}") from error
    kept = [event for event in events if _belongs_to_head(event)]
    if not kept or not isinstance(kept[0], FileHeader):
        raise RefusedError(f"the head of the source's stream: received {events}, allowed a header")
    return [*kept, Command(CommandCode.OPEN_RETURN_PATH, b"")]


def _belongs_to_head(event: Event) -> bool:
    """What the two QEMUs must agree on; not what a capability of the source's adds."""
    if isinstance(event, ConfigurationField):
        return event.name != "capabilities"
    return isinstance(event, FileHeader | Configuration)


def _ram_start(blocks: Sequence[RamBlock]) -> list[Event]:
    started, *rest = _ram_section(SectionKind.START)
    return [
        started,
        RamSize(sum(block.used_length for block in blocks)),
        *(BlockListed(block.idstr, block.used_length) for block in blocks),
        *rest,
    ]


def _ram_section(kind: SectionKind) -> list[Event]:
    return [
        SectionStarted(kind, RAM_SECTION_ID, "ram", 0, RAM_VERSION),
        RamEnd(),
        SectionFinished(RAM_SECTION_ID),
    ]


def _compare(qmp: Qmp, source: Facts | None, facts: Facts | None) -> list[str]:
    """The warnings. Raises RefusedError for what cannot work."""
    if source is None:
        return ["the source told nothing of its QEMU: the two were not compared"]
    findings = compare(source, gather(qmp) if facts is None else refreshed(qmp, facts))
    raise_if_refused(findings)
    return [
        f"{finding.subject}: {finding.detail}"
        for finding in findings
        if finding.level is Level.WARNING
    ]


def find_qemu(session_id: str, detail: Mapping[str, str]) -> Guest | None:
    """After a restart of the listener: the guest of a journal, if that very QEMU still lives."""
    path, process = detail.get("guest.qmp", ""), detail.get("guest.process", "")
    pid = process.partition(" ")[0]
    if not pid.isdigit() or process_identity(int(pid)) != process:
        log.info("session %s: its QEMU is gone", session_id)
        return None
    return _RememberedQemu(path, process)


def _quit(qmp: Qmp, process: QemuProcess | None) -> None:
    """End QEMU and wait for it. Raises GuestError for one that cannot be ended."""
    pid = qmp.pid
    try:
        with contextlib.suppress(VmthError):  # it may have ended by itself
            qmp.execute("quit")
    finally:
        qmp.close()
        if process is not None:
            process.end(_QUIT_S)
        elif not wait_for_exit(pid, _QUIT_S):
            raise GuestError(f"QEMU (process {pid}) has not ended within {_QUIT_S:g} s of quit")
