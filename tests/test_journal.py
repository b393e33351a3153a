# SPDX-License-Identifier: Apache-2.0
"""The journal: what was appended is read back, torn is ignored, damaged is an error, full safe."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmth import journal
from vmth.errors import UsageError
from vmth.journal import FileOps, JournalError, Side, StateDirectory, default_state_dir
from vmth.wire.handover import Record

SESSION = bytes(range(16))
RECEIVER = bytes(range(16, 32))
GOLDEN = Path(__file__).parent / "golden" / "journal.hex"


class SickDisk(FileOps):
    """Fails the n-th call of one kind, and all later ones."""

    def __init__(self, kind: str, at: int, code: int = errno.ENOSPC, short: bool = False) -> None:
        self.kind, self.left, self.code, self.short = kind, at, code, short

    def _maybe_fail(self, kind: str) -> None:
        if kind == self.kind:
            self.left -= 1
            if self.left < 0:
                raise OSError(self.code, os.strerror(self.code))

    def allocate(self, fd: int, length_bytes: int) -> None:
        self._maybe_fail("allocate")
        super().allocate(fd, length_bytes)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        if self.kind == "pwrite" and self.left == 0 and self.short:
            self.left = -1
            return super().pwrite(fd, data[:100], offset)
        self._maybe_fail("pwrite")
        return super().pwrite(fd, data, offset)

    def fsync(self, fd: int) -> None:
        self._maybe_fail("fsync")
        super().fsync(fd)


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    return StateDirectory(tmp_path / "state")


def written(state: StateDirectory) -> Path:
    """A source journal with MIGRATING and GRANTED."""
    with state.create_journal(SESSION, Side.SOURCE) as log:
        log.append(Record.MIGRATING, RECEIVER, {"guest": "vm1"})
        log.append(Record.GRANTED, RECEIVER, {"peer": "tcp:host:4444"})
        return log.path


def test_what_was_appended_is_read_back(state: StateDirectory) -> None:
    written(state)
    with state.open_journal(SESSION, Side.SOURCE) as log:
        assert [entry.record for entry in log.entries] == [Record.MIGRATING, Record.GRANTED]
        assert log.last is not None
        assert log.last.receiver_id == RECEIVER
        assert log.last.sequence == 2
        assert log.last.detail == {"peer": "tcp:host:4444"}
        log.append(Record.RELEASED, RECEIVER)
    assert state.sessions() == [(SESSION, Side.SOURCE)]
    with state.open_journal(SESSION, Side.SOURCE) as log:
        assert log.last is not None and log.last.record is Record.RELEASED
        log.remove()
        log.remove()
    assert state.sessions() == []


def test_a_new_journal_is_empty_and_has_its_space(state: StateDirectory) -> None:
    with state.create_journal(SESSION, Side.DESTINATION) as log:
        assert log.last is None
        assert log.path.stat().st_blocks * 512 >= journal.FILE_BYTES
        assert log.path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(JournalError, match="exists"):
        state.create_journal(SESSION, Side.DESTINATION)
    with pytest.raises(JournalError, match="No such file"):
        state.open_journal(bytes(16), Side.SOURCE)


def test_a_write_torn_at_any_byte_leaves_the_record_before(state: StateDirectory) -> None:
    path = written(state)
    whole = path.read_bytes()
    at = journal.SLOT_BYTES
    for length in range(journal.SLOT_BYTES):
        path.write_bytes((whole[: at + length]).ljust(journal.FILE_BYTES, b"\0"))
        with state.open_journal(SESSION, Side.SOURCE) as log:
            assert log.last is not None
            # From the first byte of the end mark on, everything that counts is there.
            complete = length > journal.SLOT_BYTES - len(journal.END_MARK)
            assert log.last.record is (Record.GRANTED if complete else Record.MIGRATING), length


def test_a_torn_record_is_overwritten_by_the_next(state: StateDirectory) -> None:
    path = written(state)
    path.write_bytes(path.read_bytes()[: journal.SLOT_BYTES + 300])
    with state.open_journal(SESSION, Side.SOURCE) as log:
        log.append(Record.GRANTED, RECEIVER)
    with state.open_journal(SESSION, Side.SOURCE) as log:
        assert [entry.sequence for entry in log.entries] == [1, 2]
        assert log.last is not None and log.last.detail == {}


def test_a_byte_changed_in_any_record_is_never_taken_for_a_torn_write(
    state: StateDirectory,
) -> None:
    path = written(state)
    whole = path.read_bytes()
    for offset in range(2 * journal.SLOT_BYTES):
        changed = bytearray(whole)
        changed[offset] ^= 0x41
        path.write_bytes(changed)
        slot_at = offset // journal.SLOT_BYTES * journal.SLOT_BYTES
        with pytest.raises(JournalError, match=f"damaged record at offset {slot_at}: "):
            state.open_journal(SESSION, Side.SOURCE)


def test_a_missing_earlier_record_is_damage(state: StateDirectory) -> None:
    path = written(state)
    path.write_bytes(bytes(journal.SLOT_BYTES) + path.read_bytes()[journal.SLOT_BYTES :])
    with pytest.raises(JournalError, match=r"\.source: damaged record at offset 0: no end mark"):
        state.open_journal(SESSION, Side.SOURCE)


def test_a_journal_of_another_session_is_damage(state: StateDirectory) -> None:
    path = written(state)
    other = bytes(16)
    path.rename(state.path / f"{other.hex()}.source")
    with pytest.raises(JournalError, match="should be 1, 0000"):
        state.open_journal(other, Side.SOURCE)


def test_a_longer_file_is_damage(state: StateDirectory) -> None:
    path = written(state)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(JournalError, match=f"file of {journal.FILE_BYTES + 1} bytes"):
        state.open_journal(SESSION, Side.SOURCE)


@pytest.mark.parametrize(
    ("ops", "reason"),
    [
        (SickDisk("allocate", 0), "No space left"),
        (SickDisk("fsync", 0, errno.EIO), "Input/output error"),
        (SickDisk("fsync", 1, errno.EIO), "Input/output error"),
    ],
    ids=["no-space", "file-fsync", "directory-fsync"],
)
def test_a_journal_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, ops: SickDisk, reason: str
) -> None:
    StateDirectory(tmp_path).close()
    state = StateDirectory(tmp_path, ops)
    with pytest.raises(JournalError, match=reason):
        state.create_journal(SESSION, Side.SOURCE)
    assert state.sessions() == []


@pytest.mark.parametrize(
    "ops",
    [SickDisk("pwrite", 1), SickDisk("pwrite", 1, short=True), SickDisk("fsync", 3, errno.EIO)],
    ids=["no-space", "short-write", "fsync"],
)
def test_an_append_that_fails_decides_nothing(tmp_path: Path, ops: SickDisk) -> None:
    StateDirectory(tmp_path).close()
    state = StateDirectory(tmp_path, ops)
    with state.create_journal(SESSION, Side.SOURCE) as log:
        log.append(Record.MIGRATING, RECEIVER)
        with pytest.raises(JournalError, match="GRANTED could not be written"):
            log.append(Record.GRANTED, RECEIVER)
        assert log.last is not None and log.last.record is Record.MIGRATING
        ops.kind = "healed"
        log.append(Record.GRANTED, RECEIVER)
    with StateDirectory(tmp_path).open_journal(SESSION, Side.SOURCE) as log:
        assert [entry.sequence for entry in log.entries] == [1, 2]


class Watched(FileOps):
    """What was written where, and what was made durable."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        self.calls.append(("pwrite", offset))
        return super().pwrite(fd, data, offset)

    def fsync(self, fd: int) -> None:
        self.calls.append(("fsync", 0))
        super().fsync(fd)


def test_waking_the_disk_changes_nothing(tmp_path: Path) -> None:
    StateDirectory(tmp_path).close()
    ops = Watched()
    with StateDirectory(tmp_path, ops).create_journal(SESSION, Side.SOURCE) as log:
        log.append(Record.MIGRATING, RECEIVER, {"guest": "vm1"})
        before = log.path.read_bytes()
        ops.calls.clear()
        log.write_ns = journal.WORTH_WAKING_NS
        log.wake_disk()
        assert ops.calls == [("pwrite", journal.SLOT_BYTES), ("fsync", 0)]
        assert log.path.read_bytes() == before
        assert log.write_ns == journal.WORTH_WAKING_NS
        log.append(Record.GRANTED, RECEIVER)
    with StateDirectory(tmp_path).open_journal(SESSION, Side.SOURCE) as log:
        assert [entry.record for entry in log.entries] == [Record.MIGRATING, Record.GRANTED]


def test_a_disk_that_takes_long_to_wake_is_left_asleep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StateDirectory(tmp_path).close()
    ops = Watched()
    with StateDirectory(tmp_path, ops).create_journal(SESSION, Side.SOURCE) as log:
        log.append(Record.MIGRATING, RECEIVER)
        ops.calls.clear()
        log.write_ns = 1
        times = iter((0, journal.WORTH_WAKING_NS, 0, journal.WORTH_WAKING_NS + 1))
        monkeypatch.setattr("vmth.journal.time.monotonic_ns", lambda: next(times))
        for _ in range(3):
            log.wake_disk()
        assert [what for what, _ in ops.calls] == ["pwrite", "fsync"] * 2
        monkeypatch.undo()
        log.append(Record.GRANTED, RECEIVER)


@pytest.mark.parametrize("kind", ["pwrite", "fsync"])
def test_a_disk_that_cannot_be_woken_is_nobodys_trouble(tmp_path: Path, kind: str) -> None:
    StateDirectory(tmp_path).close()
    ops = SickDisk("healthy", 0, errno.EIO)
    with StateDirectory(tmp_path, ops).create_journal(SESSION, Side.DESTINATION) as log:
        log.append(Record.RECEIVING, RECEIVER)
        log.write_ns = 1
        ops.kind = kind
        log.wake_disk()
        assert ops.left < 0
        ops.kind = "healed"
        log.append(Record.STARTING, RECEIVER)
    with StateDirectory(tmp_path).open_journal(SESSION, Side.DESTINATION) as log:
        assert [entry.record for entry in log.entries] == [Record.RECEIVING, Record.STARTING]


@pytest.mark.parametrize(
    ("records", "write_ns"),
    [(1, 0), (1, journal.WORTH_WAKING_NS + 1), (journal.SLOTS, 1)],
    ids=["unknown", "slow", "full"],
)
def test_a_disk_is_left_asleep_where_waking_it_does_not_pay(
    tmp_path: Path, records: int, write_ns: int
) -> None:
    StateDirectory(tmp_path).close()
    ops = Watched()
    with StateDirectory(tmp_path, ops).create_journal(SESSION, Side.SOURCE) as log:
        for _ in range(records):
            log.append(Record.MIGRATING, RECEIVER)
        ops.calls.clear()
        log.write_ns = write_ns
        log.wake_disk()
        log.close()
        log.write_ns = 1
        log.wake_disk()  # closed
    assert not ops.calls


def test_append_refuses_what_does_not_belong(state: StateDirectory) -> None:
    with state.create_journal(SESSION, Side.SOURCE) as log:
        with pytest.raises(UsageError, match="STARTING given, MIGRATING, GRANTED"):
            log.append(Record.STARTING, RECEIVER)
        with pytest.raises(UsageError, match="receiver id: 15 bytes given, 16 needed"):
            log.append(Record.GRANTED, RECEIVER[1:])
        with pytest.raises(UsageError, match="440 allowed"):
            log.append(Record.GRANTED, RECEIVER, {"why": "x" * 440})
        assert log.last is None
        for _ in range(journal.SLOTS):
            log.append(Record.GRANTED, RECEIVER)
        with pytest.raises(UsageError, match="record 9 given, 8 allowed"):
            log.append(Record.GRANTED, RECEIVER)
    with pytest.raises(UsageError, match="session id: 3 bytes"):
        state.create_journal(b"abc", Side.SOURCE)


def test_golden_bytes(state: StateDirectory) -> None:
    entry = journal.Entry(
        Record.GRANTED, SESSION, RECEIVER, Side.SOURCE, 2, 1_700_000_000_000_000_000, {"a": "b"}
    )
    golden = bytes.fromhex(GOLDEN.read_text())
    assert entry.pack().hex() == golden.hex()
    assert journal.Entry.unpack(golden) == entry


def test_the_receiver_id_is_made_once(tmp_path: Path) -> None:
    first = StateDirectory(tmp_path / "a").receiver_id
    assert len(first) == 16
    assert StateDirectory(tmp_path / "a").receiver_id == first
    assert StateDirectory(tmp_path / "b").receiver_id != first
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["receiver_id"]
    (tmp_path / "a" / "receiver_id").write_bytes(b"short")
    with pytest.raises(JournalError, match="receiver_id: damaged at offset 0: 5 bytes"):
        StateDirectory(tmp_path / "a")


def test_a_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o770)
    with pytest.raises(JournalError, match="mode 0o770"):
        StateDirectory(tmp_path)


def test_a_state_path_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="Not a directory"):
        StateDirectory(tmp_path / "file" / "state")


OTHER_PROCESS = """
import sys
from vmth.journal import JournalError, Side, StateDirectory
state = StateDirectory(sys.argv[1])
for attempt in (state.lock, lambda: state.open_journal(bytes(range(16)), Side.SOURCE)):
    try:
        attempt()
    except JournalError as error:
        print(error)
"""


def test_locks_hold_against_another_process_and_name_it(state: StateDirectory) -> None:
    written(state)
    with state, state.open_journal(SESSION, Side.SOURCE):
        state.lock()
        state.lock()
        told = subprocess.run(
            [sys.executable, "-c", OTHER_PROCESS, str(state.path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
    assert told[0] == f"{state.path}: in use by process {os.getpid()}"
    assert told[1].endswith(f"{SESSION.hex()}.source: in use by another process")
    with StateDirectory(state.path) as again:
        again.lock()


@pytest.mark.parametrize(
    ("environ", "euid", "expected"),
    [
        ({"VMTH_STATE_DIR": "/x", "XDG_STATE_HOME": "/y"}, 0, "/x"),
        ({"XDG_STATE_HOME": "/y"}, 0, "/var/lib/vmth"),
        ({"XDG_STATE_HOME": "/y"}, 1000, "/y/vmth"),
        ({}, 1000, str(Path.home() / ".local/state/vmth")),
    ],
)
def test_default_state_dir(environ: dict[str, str], euid: int, expected: str) -> None:
    assert str(default_state_dir(environ, euid)) == expected
