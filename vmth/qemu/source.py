# SPDX-License-Identifier: Apache-2.0
"""A source QEMU as a ``Guest``: its pages and state come out of its stream, it stops by itself, and
it stays stopped until it is known where the guest runs.

    open        migrate into our socket; the block list is the block table
    the rounds  vmth/qemu/stream_pass.py
    hold        SHUT 0 -> completed (postmigrate): from then on only ``cont`` resumes it here
    resume      before hold: let go of the stream, QEMU resumes its guest; after it: cont
    release     quit, or keep it paused
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from vmth.errors import ChannelError, GuestError, MigrationError, RefusedError
from vmth.guest import DirtySource, Guest, StateStream
from vmth.guests.spawn import find as find_held_guest
from vmth.memory import Memory
from vmth.qemu.cancel import cancel_migration
from vmth.qemu.destination import DEVICE_STREAM, DEVICE_STREAM_VERSION
from vmth.qemu.dirty_limit import ThrottleWay
from vmth.qemu.guest_memory import read_guest_memory
from vmth.qemu.launch import process_identity
from vmth.qemu.outgoing import OutgoingStream
from vmth.qemu.qmp import Qmp, QmpError, QmpEvent
from vmth.qemu.settings import MigrationSettings, is_over, migration_status
from vmth.qemu.steering import OWN_STOPS, RUNS, Helm
from vmth.qemu.stream import (
    BlockListed,
    Configuration,
    ConfigurationField,
    DeviceState,
    FileHeader,
    PassThrough,
    RamSize,
    StreamWriter,
    run_state_in,
)
from vmth.qemu.stream_pass import StreamPass
from vmth.rounds import RoundTools
from vmth.types import Gpa, RamBlock
from vmth.types import Mapping as BlockMapping

__all__ = ["QemuSource", "StoppedQemu", "find_guest", "run_state_in"]

log = logging.getLogger(__name__)

HEAD_S = 30.0
#: For QEMU to report its end of the migration once it was told SHUT.
HOLD_S = 30.0
RESUME_S = 30.0
#: A QEMU that has not noticed the end of its stream by then is told.
NOTICES_S = 5.0
QUIT_S = 10.0
LOOK_S = 0.005
MAX_ENTRY_BYTES = 1024


class StoppedQemu:
    """A source QEMU as a recovery finds it: ``Guest``, ``CanTell``, ``CanDescribe``, ``CanClose``.
    Owns the monitor."""

    dirty: Sequence[DirtySource] = ()
    blocks: Sequence[RamBlock] = ()

    def __init__(self, qmp: Qmp, on_success: str = "quit") -> None:
        self.qmp = qmp
        self.on_success = on_success
        self.left_stopped = False  #: somebody else has stopped the guest, and it stays so
        self._released = False

    def pause(self) -> bool:
        raise GuestError("a migration of this QEMU is over: it is not paused for another")

    def resume(self) -> None:
        """See that the guest runs here: QEMU resumes it by itself when its migration has failed,
        and needs to be told when that was completed. A guest that somebody else stopped meanwhile
        is left so. Raises GuestError with the command that an operator may give; it is paused
        then."""
        begun = time.monotonic()
        cancelled = False
        try:
            while (status := self.qmp.status()) not in RUNS:
                waited_s = time.monotonic() - begun
                over = is_over(migration_status(self.qmp))
                if over and (self.left_stopped or status not in OWN_STOPS):
                    log.warning("%s: the guest was stopped by somebody else", self.qmp.path)
                    return
                if waited_s > RESUME_S:
                    raise GuestError(
                        f"QEMU is {status!r} after {RESUME_S:g} s; its monitor {self.qmp.path} "
                        "takes cont"
                    )
                if status == "postmigrate" and over:
                    self.qmp.execute("cont", timeout_s=RESUME_S)
                elif not over and waited_s > NOTICES_S and not cancelled:
                    self.qmp.execute("migrate_cancel")
                    cancelled = True
                time.sleep(LOOK_S)
        except QmpError as error:
            raise GuestError(
                f"QEMU does not resume: {error.description}; its monitor {self.qmp.path} takes cont"
            ) from error

    def save_state(self, write: Callable[[StateStream], None]) -> None:
        raise GuestError("the migration of this QEMU is over: its state went with it")

    def load_state(self, streams: Iterable[StateStream]) -> None:
        raise GuestError("a source QEMU takes no state in")

    def release(self) -> None:
        """The guest runs elsewhere. Idempotent."""
        if self._released or self.on_success != "quit":
            return
        self._released = True
        with contextlib.suppress(ChannelError):  # it has ended by itself
            self.qmp.execute("quit")
        deadline = time.monotonic() + QUIT_S
        while self.qmp.lost is None:
            if time.monotonic() > deadline:
                raise GuestError(f"QEMU has not ended {QUIT_S:g} s after quit")
            time.sleep(LOOK_S)

    def is_running(self) -> bool:
        return self.qmp.status() in RUNS

    def switchover_threads(self) -> Sequence[int]:
        """The monitor's thread; QEMU's own are left alone."""
        thread = self.qmp.thread_id
        return (thread,) if thread is not None else ()

    def describe(self) -> dict[str, str]:
        return {
            "kind": "qemu",
            "qmp": self.qmp.path,
            "process": process_identity(self.qmp.pid),
            "on-success": self.on_success,
        }

    def close(self) -> None:
        """Let go of the monitor; QEMU goes on as it is. Idempotent."""
        self.qmp.close()


class QemuSource(StoppedQemu):
    """One whose guest is being moved: ``CanHold`` and ``CanReadMemory`` besides. ``open()``
    before the session begins; the session's thread calls all but ``close`` and ``cancel``."""

    def __init__(
        self,
        qmp: Qmp,
        settings: MigrationSettings,
        on_success: str = "quit",
        *,
        multifd_channels: int = 0,
        throttle: ThrottleWay = ThrottleWay.NONE,
    ) -> None:
        super().__init__(qmp, on_success)
        self._settings = settings
        self._cancelled = False
        self.was_running = qmp.status() in RUNS
        self._stream = OutgoingStream(qmp, multifd_channels=multifd_channels)
        self._throttle = throttle
        self._pass: StreamPass | None = None
        self._held = False
        self._state: bytes | None = None  #: complete once the guest was paused
        self._head = b""
        self._machine = ""
        self._page_bits = 12

    def open(self) -> None:
        """Begin QEMU's migration and read up to the block list. Raises RefusedError for a guest
        that cannot be carried, MigrationError with QEMU's reason."""
        self._stream.start(_user_of(self.qmp.pid))
        writer = StreamWriter()
        listed: list[BlockListed] = []
        to_list_bytes: int | None = None
        deadline = time.monotonic() + HEAD_S
        while to_list_bytes is None or sum(block.used_length for block in listed) < to_list_bytes:
            event = self._stream.next_event(deadline - time.monotonic())
            match event:
                case None:
                    raise ChannelError(f"the source QEMU sent no block list within {HEAD_S:g} s")
                case FileHeader() | Configuration() | ConfigurationField():
                    self._head += writer.send(event)
                    self._note_head(event)
                case RamSize():
                    to_list_bytes = event.total_bytes
                case BlockListed():
                    listed.append(event)
                case PassThrough():
                    raise RefusedError(f"what this guest sends cannot be moved: {event.reason}")
                case DeviceState():
                    raise RefusedError(
                        "a device of this guest sends state before its memory, as virtio-mem does: "
                        "that cannot be moved yet"
                    )
        self.blocks = [
            RamBlock(block.idstr, block.used_length, Gpa(0), BlockMapping()) for block in listed
        ]

    def _note_head(self, event: FileHeader | Configuration | ConfigurationField) -> None:
        if isinstance(event, Configuration):
            self._machine = event.machine
        elif isinstance(event, ConfigurationField) and event.name == "target-page-bits":
            self._page_bits = int.from_bytes(event.body, "big")
        if self._page_bits != 12:
            raise RefusedError(f"target pages of {1 << self._page_bits} bytes: allowed 4096")

    def entries(self) -> dict[str, str]:
        """For the offer: what the destination makes its stream's head of."""
        entries = {
            "kind": "qemu",
            "qemu.machine": self._machine,
            "qemu.page-bits": str(self._page_bits),
            "qemu.head": base64.b64encode(self._head).decode(),
        }
        for name, text in entries.items():
            if len(text.encode()) > MAX_ENTRY_BYTES:
                raise RefusedError(f"{name}: {len(text)} characters, allowed {MAX_ENTRY_BYTES}")
        return entries

    def make_engine(self, tools: RoundTools, helm: Helm) -> StreamPass:
        self._pass = StreamPass(self, tools, self._stream, helm, throttle=self._throttle)
        return self._pass

    def pause(self) -> bool:
        """QEMU has stopped its guest and sent all; was it running until then?"""
        assert self._pass is not None
        self._state = state_bytes = self._pass.state.copy()
        state = run_state_in(state_bytes)
        if state is not None:  # somebody may have stopped it meanwhile: it is not to run again
            self.was_running = state in RUNS
        return self.was_running

    def save_state(self, write: Callable[[StateStream], None]) -> None:
        assert self._state is not None
        write(StateStream(DEVICE_STREAM, DEVICE_STREAM_VERSION, self._state))

    def hold(self) -> None:
        """The destination holds all: QEMU is told, and from its ``completed`` on does not resume
        its guest by itself. Raises MigrationError if QEMU says something else."""
        self.qmp.forget_events()  # of an earlier migration; this one cannot end before it is told
        self._stream.shut(0)
        self._held = True
        deadline = time.monotonic() + HOLD_S
        ended = self.qmp.wait_event(_is_end, HOLD_S)
        if ended is None:
            raise MigrationError(f"the source QEMU does not complete within {HOLD_S:g} s")
        if ended.data["status"] == "completed":  # asking as well would be downtime
            return
        while (status := migration_status(self.qmp)) != "completed":
            if is_over(status) or time.monotonic() > deadline:
                raise MigrationError(f"the source QEMU's migration is {status!r} at its end")
            time.sleep(LOOK_S)

    def read_memory(
        self, blocks: Sequence[int], take: Callable[[int, int, Memory], None]
    ) -> list[str]:
        return read_guest_memory(self.qmp, self.blocks, blocks, take)

    def cancel(self) -> None:
        """If the guest stays here, that is because somebody wanted it so: QEMU is to call its
        migration cancelled. Any thread."""
        self._cancelled = True

    def _let_go(self) -> None:
        """Of the stream, by which QEMU's migration ends if it has not."""
        sockets = self._stream.sockets_to_read() if self._cancelled and not self._held else []
        if sockets:
            stopped = self._pass is not None and self._pass.guest_stopped
            cancel_migration(self.qmp, self._settings, sockets, stopped=stopped)
        self._stream.close()

    def resume(self) -> None:
        self._let_go()
        super().resume()

    def is_running(self) -> bool:
        """When its migration began: QEMU may not answer now."""
        return self.was_running

    def give_up(self) -> None:
        """Whatever happened before the grant: QEMU is as it was before its migration. Raises
        GuestError if it does not run again although it ran."""
        self._let_go()
        if self.was_running:
            super().resume()
            return
        deadline = time.monotonic() + RESUME_S
        while not is_over(migration_status(self.qmp)) and time.monotonic() < deadline:
            time.sleep(LOOK_S)

    def close(self) -> None:
        self._stream.close()
        super().close()


def find_guest(detail: Mapping[str, str]) -> Guest | None:
    """For ``vmth recover``: the guest of a journal, a QEMU or one in a holder. None when it is
    known to be gone; raises when that cannot be known."""
    if detail.get("guest.kind") != "qemu":
        return find_held_guest(detail)
    path = detail.get("guest.qmp", "")
    if not _listens(path):
        return None
    qmp = Qmp(path)
    if detail.get("guest.process", "") not in ("", process_identity(qmp.pid)):
        qmp.close()  # another QEMU has taken the place of ours
        return None
    return StoppedQemu(qmp, detail.get("guest.on-success", "quit"))


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
    return True


def _is_end(event: QmpEvent) -> bool:
    return event.name == "MIGRATION" and event.data.get("status") in ("completed", "failed")


def _user_of(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None
