# SPDX-License-Identifier: Apache-2.0
"""What must survive a crash: one journal file a session and side, in a state directory.

A journal is a file of 4096 bytes, allocated when it is created so that a full disk shows before
anything depends on it, with a 512-byte slot for each record:

    offset size
       0     8  magic "VMTHJRN1"
       8     4  sequence number, from 1: the slot's place
      12     2  side: 1 source, 2 destination
      14     2  record (vmth.wire.handover.Record)
      16    16  session id
      32    16  receiver id
      48     8  CLOCK_REALTIME nanoseconds, informative
      56     4  length of the detail
      60     4  CRC-32 of bytes 0 to 59 and the detail
      64   440  detail: a msgpack map of strings, then zeros
     504     8  end mark "1NRJHTMV"

The end mark tells a *torn* record from a *damaged* one. A slot is written front to back and is
acted on only after fsync returned, so one without its end mark was never acted on: the last may be
ignored. Whatever bears an end mark, or its beginning, must be right in every other byte; else
JournalError names the file and the offset, and nobody guesses whether the right to run was given
away.

This file decides nothing; what to write and what a record means is in vmth/wire/handover.py.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import secrets
import stat
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import msgspec

from vmth.errors import UsageError, VmthError
from vmth.wire.handover import Record

__all__ = [
    "Entry",
    "FileOps",
    "Journal",
    "JournalError",
    "Side",
    "StateDirectory",
    "default_state_dir",
    "note_path",
]

MAGIC = b"VMTHJRN1"
END_MARK = MAGIC[::-1]
SLOT_BYTES = 512
SLOTS = 8
FILE_BYTES = SLOT_BYTES * SLOTS
MAX_DETAIL_BYTES = 440
#: What waking the disk may take while a guest runs on; where writes are longer it is left asleep.
WORTH_WAKING_NS = 2_000_000
ID_BYTES = 16

_HEAD = struct.Struct("<8sIHH16s16sQI")
_CRC = struct.Struct("<I")


class JournalError(VmthError):
    """The state directory or a journal cannot be used: no space, no right, in use, or damaged."""


class Side(enum.IntEnum):
    SOURCE = 1
    DESTINATION = 2


_RECORDS = {
    Side.SOURCE: {Record.MIGRATING, Record.GRANTED, Record.RELEASED, Record.KEPT},
    Side.DESTINATION: {Record.RECEIVING, Record.STARTING, Record.RUNNING, Record.ABORTED},
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One journal record as read back or to be appended. ``detail`` is for people and for finding
    the guest again; no decision rests on ``at_ns``."""

    record: Record
    session_id: bytes
    receiver_id: bytes
    side: Side
    sequence: int
    at_ns: int = 0
    detail: Mapping[str, str] = field(default_factory=dict)

    def pack(self) -> bytes:
        """One slot. Raises UsageError for what does not fit."""
        if self.record not in _RECORDS[self.side]:
            allowed = ", ".join(record.name for record in sorted(_RECORDS[self.side]))
            raise UsageError(
                f"{self.side.name.lower()} journal: {self.record.name} given, {allowed} allowed"
            )
        for what, value in (("session id", self.session_id), ("receiver id", self.receiver_id)):
            if len(value) != ID_BYTES:
                raise UsageError(f"journal {what}: {len(value)} bytes given, {ID_BYTES} needed")
        detail = msgspec.msgpack.encode(dict(self.detail))
        if len(detail) > MAX_DETAIL_BYTES:
            raise UsageError(
                f"journal detail: {len(detail)} bytes given, {MAX_DETAIL_BYTES} allowed"
            )
        head = _HEAD.pack(
            MAGIC,
            self.sequence,
            self.side,
            self.record,
            self.session_id,
            self.receiver_id,
            self.at_ns,
            len(detail),
        )
        slot = head + _CRC.pack(zlib.crc32(detail, zlib.crc32(head))) + detail
        return slot.ljust(SLOT_BYTES - len(END_MARK), b"\0") + END_MARK

    @classmethod
    def unpack(cls, slot: bytes) -> Entry:
        """The entry of a slot with an end mark. Raises ValueError saying what is wrong with it."""
        magic, sequence, side, record, session_id, receiver_id, at_ns, length = _HEAD.unpack_from(
            slot
        )
        if magic != MAGIC:
            raise ValueError(f"magic {magic.hex()}, should be {MAGIC.hex()}")
        if length > MAX_DETAIL_BYTES:
            raise ValueError(f"detail of {length} bytes, at most {MAX_DETAIL_BYTES}")
        detail_at = _HEAD.size + _CRC.size
        detail = slot[detail_at : detail_at + length]
        (stored,) = _CRC.unpack_from(slot, _HEAD.size)
        computed = zlib.crc32(detail, zlib.crc32(slot[: _HEAD.size]))
        if stored != computed:
            raise ValueError(f"checksum {stored:#010x}, should be {computed:#010x}")
        if any(slot[detail_at + length : -len(END_MARK)]):
            raise ValueError("bytes between the detail and the end mark")
        end = slot[-len(END_MARK) :].rstrip(b"\0")
        if not END_MARK.startswith(end):
            raise ValueError(f"end mark {end.hex()}, should be {END_MARK.hex()}")
        if record not in _RECORDS[Side(side)]:
            raise ValueError(f"record {record} on side {Side(side).name}")
        return cls(
            Record(record),
            session_id,
            receiver_id,
            Side(side),
            sequence,
            at_ns,
            msgspec.msgpack.decode(detail, type=dict[str, str]),
        )


class FileOps:
    """The calls that can fail for want of space or a sick disk; tests replace them."""

    def allocate(self, fd: int, length_bytes: int) -> None:
        os.posix_fallocate(fd, 0, length_bytes)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)


def _load(path: Path, data: bytes, session_id: bytes, side: Side) -> list[Entry]:
    """The entries of a journal file, without a torn last one."""

    def damaged(slot_index: int, why: str) -> JournalError:
        return JournalError(f"{path}: damaged record at offset {slot_index * SLOT_BYTES}: {why}")

    if len(data) > FILE_BYTES:
        raise damaged(SLOTS, f"file of {len(data)} bytes, at most {FILE_BYTES}")
    data = data.ljust(FILE_BYTES, b"\0")
    entries: list[Entry] = []
    for index in range(SLOTS):
        slot = data[index * SLOT_BYTES : (index + 1) * SLOT_BYTES]
        if not any(slot[-len(END_MARK) :]):
            if any(data[(index + 1) * SLOT_BYTES :]):
                raise damaged(index, "no end mark, and records follow")
            break
        try:
            entry = Entry.unpack(slot)
        except (ValueError, msgspec.DecodeError) as error:
            raise damaged(index, str(error)) from None
        if (entry.sequence, entry.session_id, entry.side) != (index + 1, session_id, side):
            raise damaged(
                index,
                f"sequence {entry.sequence}, session {entry.session_id.hex()}, {entry.side.name}; "
                f"should be {index + 1}, {session_id.hex()}, {side.name}",
            )
        entries.append(entry)
    return entries


class Journal:
    """One session's journal, open and locked (flock) by this process. Not thread-safe.

    Obtained from ``StateDirectory.create_journal()`` or ``.open_journal()``.
    """

    def __init__(
        self,
        path: Path,
        fd: int,
        session_id: bytes,
        side: Side,
        entries: list[Entry],
        ops: FileOps,
        write_ns: int = 0,
    ) -> None:
        self.path = path
        self.session_id = session_id
        self.side = side
        self.write_ns = write_ns  #: the least that making something durable took; 0: not known
        self._left_asleep = False
        self._fd = fd
        self._removed = False
        self._entries = entries
        self._ops = ops

    @property
    def last(self) -> Entry | None:
        """The record that counts; None in a journal whose creation or first write was torn."""
        return self._entries[-1] if self._entries else None

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All of them, oldest first."""
        return tuple(self._entries)

    def append(
        self, record: Record, receiver_id: bytes, detail: Mapping[str, str] | None = None
    ) -> Entry:
        """Write a record and fsync it; when this returns it may be acted on.

        Raises JournalError when it could not be made durable: ``last`` is then what it was, nothing
        may be acted on, and the next append takes the same slot. UsageError for a record of the
        other side, a detail over 440 bytes, or a full journal.
        """
        if len(self._entries) == SLOTS:
            raise UsageError(f"{self.path}: record {SLOTS + 1} given, {SLOTS} allowed")
        sequence = len(self._entries) + 1
        entry = Entry(
            record,
            self.session_id,
            receiver_id,
            self.side,
            sequence,
            time.time_ns(),
            dict(detail or {}),
        )
        offset = (sequence - 1) * SLOT_BYTES
        slot = entry.pack()
        began_ns = time.monotonic_ns()
        try:
            written = self._ops.pwrite(self._fd, slot, offset)
            if written != len(slot):
                raise OSError(f"{written} of {len(slot)} bytes were written")
            self._ops.fsync(self._fd)
        except OSError as error:
            # Whether it reached the disk is not known. Make it unlikely; the tables do not need it.
            with contextlib.suppress(OSError):
                self._ops.pwrite(self._fd, bytes(SLOT_BYTES), offset)
                self._ops.fsync(self._fd)
            raise JournalError(
                f"{self.path}: {record.name} could not be written: {error}"
            ) from error
        took_ns = time.monotonic_ns() - began_ns
        self.write_ns = min(self.write_ns or took_ns, took_ns)
        self._entries.append(entry)
        return entry

    def wake_disk(self) -> None:
        """Write and fsync without changing anything: a disk that has rested takes longer for the
        first write than for the next. Nothing where writes are not known to be short, nor ever
        again once waking it was not. Never raises, and says nothing of whether the next record can
        be written."""
        index = len(self._entries)
        if self._fd < 0 or index == SLOTS or self._left_asleep:
            return
        if not 0 < self.write_ns <= WORTH_WAKING_NS:
            return
        began_ns = time.monotonic_ns()
        with contextlib.suppress(OSError):
            self._ops.pwrite(self._fd, bytes(SLOT_BYTES), index * SLOT_BYTES)
            self._ops.fsync(self._fd)
        self._left_asleep = time.monotonic_ns() - began_ns > WORTH_WAKING_NS

    def remove(self) -> None:
        """Forget the session: delete the file, durably, and close. Also after ``close()``, for an
        owner who knows that nobody has opened it since. Idempotent. JournalError if that cannot be
        made durable; the file may then be gone or not."""
        if not self._removed:
            with _as_journal_error(self.path):
                self.path.unlink(missing_ok=True)
                if self.side is Side.SOURCE:
                    note_path(self.path.parent, self.session_id).unlink(missing_ok=True)
                _fsync_directory(self.path.parent, self._ops)
            self._removed = True
            self.close()

    def close(self) -> None:
        """Let go of the file and its lock; the records stay, none can be appended. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()


def _fsync_directory(path: Path, ops: FileOps) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        ops.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _as_journal_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror or error}") from error


class StateDirectory:
    """A directory, private to one user, with the receiver id and the journals of all sessions.

    Sources of any number of processes may share one: each journal is locked by the process that has
    it open. Only one process at a time may answer for its destinations: it holds ``lock()``.
    Creating one makes the directory and the receiver id; raises JournalError when that fails, or
    for a directory that others may write. Not thread-safe.
    """

    def __init__(self, path: str | os.PathLike[str], ops: FileOps | None = None) -> None:
        self.path = Path(path)
        self._ops = ops or FileOps()
        self._lock_fd = -1
        with _as_journal_error(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise JournalError(f"{self.path}: no directory, which a state directory must be")
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.path.stat()
            if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise JournalError(
                    f"{self.path}: owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):#o}; "
                    f"should be owner {os.geteuid()} and writable by nobody else"
                )
            self.receiver_id = self._receiver_id()

    def _receiver_id(self) -> bytes:
        """Made once, with the directory; two processes that race for it end with the same one."""
        path = self.path / "receiver_id"
        if not path.exists():
            fresh = self.path / f"receiver_id.{secrets.token_hex(8)}"
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                self._ops.pwrite(fd, secrets.token_bytes(ID_BYTES), 0)
                self._ops.fsync(fd)
                with contextlib.suppress(FileExistsError):
                    os.link(fresh, path)
            finally:
                os.close(fd)
                fresh.unlink()
            _fsync_directory(self.path, self._ops)
        receiver_id = path.read_bytes()
        if len(receiver_id) != ID_BYTES or not any(receiver_id):
            raise JournalError(
                f"{path}: damaged at offset 0: {len(receiver_id)} bytes, not {ID_BYTES} random ones"
            )
        return receiver_id

    def lock(self) -> None:
        """Become the one process that answers for this directory's destinations, until close().
        Idempotent. Raises JournalError that names the process which has it."""
        if self._lock_fd >= 0:
            return
        path = self.path / "lock"
        with _as_journal_error(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(fd)
                raise JournalError(f"{self.path}: in use by process {holder}") from None
            self._lock_fd = fd
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Let go of the lock. Idempotent; open journals stay open."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> StateDirectory:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def sessions(self) -> list[tuple[bytes, Side]]:
        """Every session that has a journal here, in no particular order of time."""
        found = []
        for side in Side:
            for path in sorted(self.path.glob(f"*.{side.name.lower()}")):
                with contextlib.suppress(ValueError):
                    session_id = bytes.fromhex(path.stem)
                    if len(session_id) == ID_BYTES:
                        found.append((session_id, side))
        return found

    def create_journal(self, session_id: bytes, side: Side) -> Journal:
        """A new, empty, durable journal with room for all its records. Raises JournalError when the
        session has one already, and when the disk is full: nothing is left behind then."""
        path = self._journal_path(session_id, side)
        with _as_journal_error(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._ops.allocate(fd, FILE_BYTES)
                began_ns = time.monotonic_ns()
                self._ops.fsync(fd)
                write_ns = time.monotonic_ns() - began_ns
                _fsync_directory(self.path, self._ops)
            except BaseException:
                path.unlink(missing_ok=True)
                os.close(fd)
                raise
        return Journal(path, fd, session_id, side, [], self._ops, write_ns)

    def open_journal(self, session_id: bytes, side: Side) -> Journal:
        """An existing one. Raises JournalError when there is none, when another process has it open
        (its mover lives), and for a damaged record."""
        path = self._journal_path(session_id, side)
        with _as_journal_error(path):
            fd = os.open(path, os.O_RDWR)
            try:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise JournalError(f"{path}: in use by another process") from None
                entries = _load(path, os.pread(fd, FILE_BYTES + 1, 0), session_id, side)
            except BaseException:
                os.close(fd)
                raise
        return Journal(path, fd, session_id, side, entries, self._ops)

    def _journal_path(self, session_id: bytes, side: Side) -> Path:
        if len(session_id) != ID_BYTES:
            raise UsageError(f"session id: {len(session_id)} bytes given, {ID_BYTES} needed")
        return self.path / f"{session_id.hex()}.{side.name.lower()}"


def note_path(state_dir: Path, session_id: bytes) -> Path:
    """Beside a source's journal: what an operator was told about the session, in words. It goes
    with the journal."""
    return state_dir / f"{session_id.hex()}.note"


def default_state_dir(environ: Mapping[str, str] | None = None, euid: int | None = None) -> Path:
    """$VMTH_STATE_DIR; else /var/lib/vmth for root; else vmth under $XDG_STATE_HOME or
    ~/.local/state."""
    environ = os.environ if environ is None else environ
    if environ.get("VMTH_STATE_DIR"):
        return Path(environ["VMTH_STATE_DIR"])
    if (os.geteuid() if euid is None else euid) == 0:
        return Path("/var/lib/vmth")
    if environ.get("XDG_STATE_HOME"):
        return Path(environ["XDG_STATE_HOME"]) / "vmth"
    return Path.home() / ".local" / "state" / "vmth"
