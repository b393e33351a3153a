# SPDX-License-Identifier: Apache-2.0
"""The order of a restore and what follows a failure, into a QEMU that the test plays."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_qmp import FakeError, HangUp
from image_world import PAGES, STATE, meta, records, renumbered, saved
from incoming_world import IncomingWorld
from qemu_streams import plain

import vmth.qemu.restore as restore_module
from vmth.errors import (
    CancelledError,
    ExitCode,
    MigrationError,
    RefusedError,
    StreamError,
    UsageError,
    VerificationError,
)
from vmth.qemu import stream as q
from vmth.qemu.image import Image, ImageWriter
from vmth.qemu.image.intake import Intake, StreamHead
from vmth.qemu.restore import RestoreOptions, RestoreProgress, RestoreResult, restore
from vmth.qemu.save_report import progress_text, restore_lines, restore_values


def image_at(path: Path, **about: Any) -> Path:
    """The generated stream as a save would store it."""
    writers: list[ImageWriter] = []
    with contextlib.ExitStack() as stack, path.open("wb") as file:

        def begin(head: StreamHead) -> ImageWriter:
            said = meta(machine=head.machine, blocks=head.blocks, **about)
            writers.append(stack.enter_context(ImageWriter(file, said, head.data, workers=1)))
            return writers[0]

        reader, intake = q.StreamReader(opaque_devices=True), Intake(begin)
        reader.feed(plain())
        while (event := reader.next_event()) is not None:
            intake.take(event)
        writers[0].finish()
    return path


class Loader:
    """QEMU's end: reads the stream, and says that all is loaded when the state has ended."""

    def __init__(self, folder: Path) -> None:
        self.world = IncomingWorld(folder)
        self.received = bytearray()
        self.loads = True
        self.ended = threading.Event()
        migrate_incoming = self.world.fake.answers["migrate-incoming"]

        def listen(arguments: Any) -> Any:
            answer = migrate_incoming(arguments)
            self._thread.start()
            return answer

        self.world.fake.answers |= {
            "migrate-incoming": listen,
            "announce-self": {},
            "quit": HangUp,
        }
        self.world.qmp.close()
        self._thread = threading.Thread(target=self._load, daemon=True)

    def _load(self) -> None:
        with contextlib.suppress(OSError):
            loader = self.world.loader
            while data := loader.recv(1 << 16):
                self.received += data
                if self.received.endswith(plain()[-200:]):
                    if self.loads:
                        self.world.completes("paused")
                    else:
                        self.world.fails("a section is wrong")
                        break
        self.ended.set()

    def restore(
        self, path: Path, options: RestoreOptions | None = None, **more: Any
    ) -> RestoreResult:
        return restore(path, self.world.fake.path, options, **more)

    def commands(self) -> list[str]:
        changing = ("stop", "cont", "migrate-incoming", "announce-self", "quit")
        return [name for name in self.world.fake.commands() if name in changing]

    def pages(self) -> dict[tuple[str, int], bytes]:
        """What the stream that it read holds."""
        reader = q.StreamReader()
        found: dict[tuple[str, int], bytes] = {}
        reader.feed(bytes(self.received))
        reader.feed_eof()
        while (event := reader.next_event()) is not None:
            if isinstance(event, q.RamPages):
                for page in event.pages():
                    assert (page.idstr, page.page) not in found, "a page came twice"
                    found[page.idstr, page.page] = bytes(page.data)
        return found

    def close(self) -> None:
        self.world.__exit__(None, None, None)
        if self._thread.ident is not None:
            self._thread.join()


@pytest.fixture
def loader(tmp_path: Path) -> Iterator[Loader]:
    played = Loader(tmp_path)
    yield played
    played.close()


def pages_of(stream: bytes) -> dict[tuple[str, int], bytes]:
    reader = q.StreamReader()
    found: dict[tuple[str, int], bytes] = {}
    reader.feed(stream)
    reader.feed_eof()
    while (event := reader.next_event()) is not None:
        if isinstance(event, q.RamPages):
            found |= {(page.idstr, page.page): bytes(page.data) for page in event.pages()}
    return found


def test_the_stream_is_that_of_the_save_with_each_page_once(loader: Loader, tmp_path: Path) -> None:
    result = loader.restore(image_at(tmp_path / "vm"))
    assert loader.pages() == pages_of(plain())
    devices = plain()[plain().index(b"\x04\x00\x00\x00\x07") :]
    assert loader.received.endswith(devices)
    assert result.running and result.status == "running"
    assert loader.commands() == ["stop", "migrate-incoming", "cont", "announce-self"]


def test_a_timeout_of_0_is_none(loader: Loader, tmp_path: Path) -> None:
    assert loader.restore(image_at(tmp_path / "vm"), RestoreOptions(timeout_s=0)).running
    with pytest.raises(UsageError, match="timeout_s: received -1, allowed 0 and more"):
        RestoreOptions(timeout_s=-1)


@pytest.mark.parametrize(
    ("was", "asked", "runs"),
    [(True, None, True), (False, None, False), (True, False, False), (False, True, True)],
)
def test_whether_it_runs(
    loader: Loader, tmp_path: Path, was: bool, asked: bool | None, runs: bool
) -> None:
    path = image_at(tmp_path / "vm", running=was)
    result = loader.restore(path, RestoreOptions(run=asked))
    assert result.running is runs and ("cont" in loader.commands()) is runs
    switched = [
        row["state"]
        for name, given in loader.world.fake.received
        if name == "migrate-set-capabilities"
        for row in given["capabilities"]
        if row["capability"] == "late-block-activate"
    ]
    # A guest that stays paused has its image locks from the begin.
    assert switched[:1] == ([True] if runs else [])


def damaged(path: Path) -> Path:
    raw = bytearray(path.read_bytes())
    raw[next(record.at for record in records(bytes(raw)) if record.kind == PAGES) + 60] ^= 1
    path.write_bytes(raw)
    return path


def test_a_damaged_file_never_reaches_qemu(loader: Loader, tmp_path: Path) -> None:
    path = damaged(image_at(tmp_path / "vm"))
    with pytest.raises(VerificationError, match=r"checksum.*nothing was restored") as caught:
        loader.restore(path)
    assert caught.value.exit_code is ExitCode.VERIFICATION_FAILED
    assert loader.commands() == []


def test_a_file_that_is_damaged_while_it_is_loaded(
    loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checks passed before: device state does not go out, and that QEMU ends."""
    path = image_at(tmp_path / "vm")

    def check_then_change(self: Image, _between: object) -> None:
        damaged(path)

    monkeypatch.setattr(Image, "check", check_then_change)
    with pytest.raises(VerificationError, match="checksum"):
        loader.restore(path)
    assert loader.commands() == ["stop", "migrate-incoming", "quit"]
    assert b"timer" not in loader.received


def test_memory_that_is_not_what_was_saved(loader: Loader, tmp_path: Path) -> None:
    """All checksums fit, the digest of memory does not."""
    path = image_at(tmp_path / "vm")
    parts = records(path.read_bytes())
    end = bytearray(parts[-1].payload)
    end[60] ^= 1
    parts[-1].payload = bytes(end)
    path.write_bytes(renumbered(path.read_bytes(), parts))
    with pytest.raises(VerificationError, match="digest of memory"):
        loader.restore(path)
    assert loader.commands()[-1] == "quit" and b"timer" not in loader.received


def test_a_head_that_lists_other_blocks(loader: Loader, tmp_path: Path) -> None:
    for head in (b"", b"QEVM\0\0\0\3", plain()[:200].replace(b"pc.ram", b"qc.ram"), b"garbage"):
        with pytest.raises((VerificationError, StreamError), match="nothing was restored"):
            loader.restore(saved(tmp_path / "vm", head=head))
    assert loader.commands() == []
    assert STATE


def test_a_qemu_that_waits_for_nothing_is_refused_untouched(loader: Loader, tmp_path: Path) -> None:
    loader.world.status = "running"
    with pytest.raises(RefusedError, match="allowed 'inmigrate'"):
        loader.restore(image_at(tmp_path / "vm"))
    assert loader.commands() == []


def test_a_qemu_that_does_not_load_it(loader: Loader, tmp_path: Path) -> None:
    loader.loads = False
    with pytest.raises(MigrationError, match="a section is wrong"):
        loader.restore(image_at(tmp_path / "vm"))
    assert loader.commands()[-1] == "quit"


def test_a_guest_that_cannot_be_resumed(loader: Loader, tmp_path: Path) -> None:
    loader.world.fake.answers["cont"] = FakeError("GenericError", "the disk is locked")
    with pytest.raises(MigrationError, match=r"restored and paused.*the disk is locked"):
        loader.restore(image_at(tmp_path / "vm"))
    assert "quit" not in loader.commands()


def test_a_cancelled_restore(loader: Loader, tmp_path: Path) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(CancelledError, match="nothing runs"):
        loader.restore(image_at(tmp_path / "vm"), cancelled=cancelled)
    assert loader.commands() == []


def test_a_restore_that_is_cancelled_amid_memory(loader: Loader, tmp_path: Path) -> None:
    cancelled = threading.Event()
    seen: list[RestoreProgress] = []

    def on_progress(progress: RestoreProgress) -> None:
        seen.append(progress)
        if progress.phase == "loading":
            cancelled.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore_module, "PROGRESS_EVERY_S", 0.0)
        with pytest.raises(CancelledError):
            loader.restore(image_at(tmp_path / "vm"), on_progress=on_progress, cancelled=cancelled)
    assert loader.commands()[-1] == "quit"
    assert [progress_text(row).split(":")[0] for row in seen][-1] == "loading"


def test_what_is_said(loader: Loader, tmp_path: Path) -> None:
    result = loader.restore(image_at(tmp_path / "vm"), RestoreOptions(run=False))
    values = restore_values(result, None, ExitCode.OK)
    assert values["verified"] and not values["running"] and values["verify_ms"] > 0
    assert any("give the monitor cont" in line for line in restore_lines(result))
    failed = restore_values(None, MigrationError("why"), ExitCode.FAILED)
    assert failed.keys() == values.keys() and failed["error"] == "why"
