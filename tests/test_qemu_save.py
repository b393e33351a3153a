# SPDX-License-Identifier: Apache-2.0
"""The order of a save and what follows a failure, on a QEMU that the test plays."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_qmp import FakeError, FakeQmp, HangUp
from migrating_qemu import stream_of
from qemu_streams import plain

import vmth.qemu.save as save_module
from vmth.errors import (
    CancelledError,
    ExitCode,
    MigrationError,
    NotResumedError,
    RefusedError,
    UsageError,
)
from vmth.qemu import save_guard
from vmth.qemu.image import AtomicFile, Image
from vmth.qemu.save import OnSuccess, SaveOptions, SaveProgress, SaveResult, save
from vmth.qemu.save_report import progress_text, save_lines, save_values

KEEP = SaveOptions(on_success=OnSuccess.KEEP)
SHUT = b"\x00\x01\x00\x04"


class Vm:
    """A QEMU's monitor and its source of a stream. ``status`` moves as QEMU's does."""

    def __init__(self, folder: Path, status: str = "running") -> None:
        self.folder = folder
        self.path = folder / "vm.vmth"
        self.status = status
        self.migration = ""
        self.stream = plain()
        self.closes_early = False
        self.ends_as = ""  #: its state after a migration that failed, if another
        self.fails_after_shut = False
        self.files_at_shut: list[str] = []
        self.files_at_quit: list[str] = []
        self.files_at_cont: list[str] = []
        self.at_shut: Callable[[], object] = lambda: None
        self._threads: list[threading.Thread] = []
        self.fake = FakeQmp(folder / "qmp")
        self.fake.capabilities |= {"xbzrle": True, "compress": False}
        self.fake.answers |= {
            "query-status": lambda _: {"status": self.status},
            "query-migrate": lambda _: {"status": self.migration, "error-desc": "the reason"},
            "query-name": {"name": "guest"},
            "stop": self._stop,
            "cont": self._cont,
            "migrate": self._migrate,
            "migrate_cancel": {},
            "quit": self._quit,
        }

    def commands(self) -> list[str]:
        """Those that change something."""
        changing = ("stop", "cont", "migrate", "migrate_cancel", "quit")
        return [name for name in self.fake.commands() if name in changing]

    def save(self, options: SaveOptions = KEEP, **more: Any) -> SaveResult:
        return save(self.fake.path, self.path, options, **more)

    def as_it_was(self, status: str = "running") -> None:
        """Nothing is left of a save that failed."""
        assert self.status == status
        assert not self.path.exists()
        assert self.fake.capabilities["xbzrle"] and not self.fake.capabilities["return-path"]
        assert self.fake.parameters["max-bandwidth"] == 128 << 20

    def _stop(self, _: Mapping[str, Any]) -> dict[str, Any]:
        self.status = "paused"
        self.fake.emit("STOP")
        return {}

    def _cont(self, _: Mapping[str, Any]) -> dict[str, Any]:
        self.files_at_cont = os.listdir(self.folder)
        self.status = "running"
        self.fake.emit("RESUME")
        return {}

    def _quit(self, _: Mapping[str, Any]) -> None:
        self.files_at_quit = sorted(os.listdir(self.folder))
        raise HangUp

    def _migrate(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        assert self.fake.capabilities["return-path"] and not self.fake.capabilities["xbzrle"]
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(arguments["uri"]).removeprefix("unix:"))
        self.migration = "active"
        thread = threading.Thread(target=self._send, args=(sock, self.status), daemon=True)
        thread.start()
        self._threads.append(thread)
        return {}

    def _send(self, sock: socket.socket, before: str) -> None:
        """QEMU's end of the stream, until it is told SHUT or loses it."""
        returned = b""
        with sock, contextlib.suppress(OSError):
            sock.sendall(self.stream[: 20_000 if self.closes_early else None])
            if not self.closes_early:
                self.status = "finish-migrate"
                while SHUT not in returned and (data := sock.recv(4096)):
                    returned += data
        told = SHUT in returned and not self.fails_after_shut
        if told:
            self.files_at_shut = os.listdir(self.folder)
            self.at_shut()
        # It resumes by itself what it stopped itself.
        self.status = "postmigrate" if told or before != "running" else "running"
        if not told and before == "paused" and self.closes_early:
            self.status = "paused"
        self.status = self.ends_as if self.ends_as and not told else self.status
        self.migration = "completed" if told else "failed"

    def close(self) -> None:
        for thread in self._threads:
            thread.join()
        self.fake.__exit__(None, None, None)


class Guard:
    """As SaveGuard, without a process."""

    def __init__(self, _qmp: object, path: str, identity: tuple[int, int], **_: bool) -> None:
        self.orders: list[Mapping[str, Any]] = []

    def begin(self, saved: Mapping[str, Any]) -> None:
        self.orders.append(saved)

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vm]:
    monkeypatch.setattr(save_module, "SaveGuard", Guard)
    played = Vm(tmp_path)
    yield played
    played.close()


def test_the_file_has_its_name_after_qemu_is_told_and_before_it_quits(vm: Vm) -> None:
    result = vm.save(SaveOptions())
    assert vm.commands() == ["stop", "migrate", "quit"]
    assert vm.files_at_shut == ["qmp"] and vm.files_at_quit == ["qmp", "vm.vmth"]
    assert result.ran and not result.live and result.on_success == "quit"
    assert (result.normal_pages, result.zero_pages) == (7, 6)
    with Image.open(vm.path) as image:
        image.verify()
        assert image.meta.running and image.meta.name == "guest"
        assert image.meta.qemu_version == "7.2.22" and image.meta.facts["status"] == "running"


def test_a_vm_that_is_kept_has_its_settings_back(vm: Vm) -> None:
    vm.save()
    assert vm.commands() == ["stop", "migrate"] and vm.status == "postmigrate"
    vm.path.unlink()
    vm.as_it_was("postmigrate")


def test_a_vm_that_is_resumed(vm: Vm) -> None:
    result = vm.save(SaveOptions(on_success=OnSuccess.RESUME))
    assert vm.commands() == ["stop", "migrate", "cont"] and vm.status == "running"
    assert vm.files_at_cont == ["qmp"] and vm.path.exists()
    assert result.stopped_ns is not None and result.stopped_ns > 0


def test_a_paused_vm_is_not_stopped_and_not_resumed(vm: Vm) -> None:
    vm.status = "paused"
    for choice in (OnSuccess.RESUME, OnSuccess.KEEP):
        vm.status = "paused"
        result = vm.save(SaveOptions(on_success=choice, live=True, replace=True))
        assert not result.ran and not result.live and result.stopped_ns is None
    assert vm.commands() == ["migrate", "migrate"]
    with Image.open(vm.path) as image:
        assert not image.meta.running


def test_a_live_save_leaves_the_stop_to_qemu(vm: Vm) -> None:
    result = vm.save(SaveOptions(live=True, on_success=OnSuccess.KEEP))
    assert vm.commands() == ["migrate"] and result.live
    with Image.open(vm.path) as image:
        assert image.meta.live and image.meta.running


@pytest.mark.parametrize("choice", OnSuccess)
@pytest.mark.parametrize("state", ["paused", "io-error"])
def test_a_guest_that_was_stopped_meanwhile_is_not_saved_and_left_so(
    vm: Vm, choice: OnSuccess, state: str
) -> None:
    """The file's head says that it ran: it would run again where it is restored."""
    vm.stream, vm.ends_as = stream_of(state), "postmigrate"
    with pytest.raises(MigrationError, match=rf"stopped meanwhile \({state}\), not by this save"):
        vm.save(SaveOptions(live=True, on_success=choice))
    assert vm.commands() == ["migrate"] and not vm.path.exists()
    vm.stream, vm.status = stream_of("running"), "running"
    assert vm.save(SaveOptions(live=True, on_success=OnSuccess.KEEP)).live


def test_a_failed_live_save_leaves_a_guest_that_was_stopped_meanwhile(vm: Vm) -> None:
    vm.ends_as = "paused"
    vm.closes_early = True
    with pytest.raises(MigrationError, match="the reason"):
        vm.save(SaveOptions(live=True))
    assert vm.commands() == ["migrate"] and vm.status == "paused"


def test_a_guest_that_the_save_has_stopped_runs_on_after_a_failure(vm: Vm) -> None:
    vm.stream, vm.fails_after_shut, vm.ends_as = stream_of("paused"), True, "paused"
    with pytest.raises(MigrationError, match="after all was saved"):
        vm.save(SaveOptions(live=True, timeout_ns=1))
    assert vm.commands() == ["migrate", "stop", "cont"]
    vm.as_it_was()


def test_a_site_that_migrates_in_other_ways_is_saved_all_the_same(vm: Vm) -> None:
    on = ("zero-copy-send", "multifd", "postcopy-ram", "postcopy-preempt")
    vm.fake.capabilities |= dict.fromkeys(on, True)
    vm.fake.parameters["tls-creds"] = "tls0"
    seen: dict[str, Any] = {}
    vm.at_shut = lambda: seen.update(vm.fake.capabilities | vm.fake.parameters)
    vm.save()
    assert not any(seen[name] for name in on) and seen["tls-creds"] == ""
    assert all(vm.fake.capabilities[name] for name in on)
    assert vm.fake.parameters["tls-creds"] == "tls0"


def test_a_live_save_that_takes_too_long_stops_the_guest(vm: Vm) -> None:
    options = SaveOptions(live=True, timeout_ns=1, on_success=OnSuccess.KEEP)
    result = vm.save(options)
    assert vm.commands() == ["migrate", "stop"]
    assert "the timeout came" in result.notes[0]


def test_a_vm_in_another_state_is_refused_untouched(vm: Vm) -> None:
    for status in ("inmigrate", "postmigrate", "shutdown", "io-error"):
        vm.status = status
        with pytest.raises(RefusedError, match=f"is '{status}', allowed: running, paused"):
            vm.save()
    vm.status, vm.migration = "running", "active"
    with pytest.raises(RefusedError, match="migration under way"):
        vm.save()
    assert vm.commands() == []
    vm.as_it_was()


def test_a_file_that_exists_is_refused_before_qemu_is_asked(vm: Vm) -> None:
    vm.path.write_bytes(b"old")
    with pytest.raises(RefusedError, match="exists"):
        vm.save()
    assert vm.fake.commands() == [] and vm.path.read_bytes() == b"old"
    vm.save(SaveOptions(replace=True, on_success=OnSuccess.KEEP))
    assert vm.path.read_bytes() != b"old"


def test_options_are_judged_before_qemu_is_stopped(vm: Vm) -> None:
    with pytest.raises(UsageError, match="compression level: received 99"):
        vm.save(SaveOptions(level=99))
    assert "stop" not in vm.commands()
    vm.as_it_was()


# ---- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [False, True])
def test_a_stream_that_is_lost(vm: Vm, live: bool) -> None:
    vm.closes_early = True
    with pytest.raises(MigrationError, match="ended its migration: the reason") as caught:
        vm.save(SaveOptions(live=live))
    assert caught.value.source_runs
    vm.as_it_was()
    assert ("cont" in vm.commands()) is not live


def test_a_paused_vm_whose_stream_is_lost_stays_paused(vm: Vm) -> None:
    vm.status, vm.closes_early = "paused", True
    with pytest.raises(MigrationError):
        vm.save()
    vm.as_it_was("paused")


def test_a_qemu_that_fails_when_it_is_told_that_all_is_saved(vm: Vm) -> None:
    vm.fails_after_shut = True
    with pytest.raises(MigrationError, match="'failed' after all was saved: the reason"):
        vm.save()
    vm.as_it_was()


def test_a_file_that_came_meanwhile(vm: Vm) -> None:
    vm.at_shut = lambda: vm.path.write_bytes(b"another's")
    with pytest.raises(RefusedError, match="exists"):
        vm.save()
    assert vm.path.read_bytes() == b"another's"
    vm.path.unlink()
    vm.as_it_was()


def test_a_full_disk(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_self: AtomicFile, _data: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AtomicFile, "write", full)
    with pytest.raises(MigrationError, match=r"vm\.vmth: No space left on device; there is no"):
        vm.save()
    vm.as_it_was()


def test_a_disk_that_keeps_other_bytes(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    write = AtomicFile.write

    def wrong(self: AtomicFile, data: bytes | memoryview) -> None:
        write(self, bytes(data).replace(b"timer", b"tinder"[:5]))

    monkeypatch.setattr(AtomicFile, "write", wrong)
    with pytest.raises(MigrationError, match="does not read back as it was written"):
        vm.save(SaveOptions(level=0))
    vm.as_it_was()


def test_a_cancelled_save(vm: Vm) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(CancelledError) as caught:
        vm.save(cancelled=cancelled)
    assert caught.value.exit_code is ExitCode.CANCELLED
    vm.as_it_was()
    assert vm.commands() == ["stop", "migrate", "cont"]


def test_a_guest_that_cannot_be_resumed(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_guard, "GIVES_UP_S", 0.05)
    vm.closes_early = True
    vm.fake.answers["cont"] = FakeError("GenericError", "the disk is locked")
    with pytest.raises(
        NotResumedError, match=r"could not be resumed.*the disk is locked"
    ) as caught:
        vm.save()
    assert caught.value.exit_code is ExitCode.IN_DOUBT and not vm.path.exists()


def test_a_snapshot_whose_guest_cannot_be_resumed(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_guard, "GIVES_UP_S", 0.05)
    vm.fake.answers["cont"] = FakeError("GenericError", "the disk is locked")
    with pytest.raises(NotResumedError, match="the disk is locked"):
        vm.save(SaveOptions(on_success=OnSuccess.RESUME))
    assert not vm.path.exists()


def test_a_snapshot_that_the_disk_does_not_keep(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(_self: AtomicFile) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(AtomicFile, "sync", sync)
    with pytest.raises(MigrationError, match="Input/output error; there is no file"):
        vm.save(SaveOptions(on_success=OnSuccess.RESUME))
    vm.as_it_was()
    assert vm.commands() == ["stop", "migrate", "cont"]


def test_a_qemu_that_does_not_quit(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_module, "QEMU_S", 0.05)
    vm.fake.answers["quit"] = {}
    with pytest.raises(NotResumedError, match=r"vm\.vmth is whole, but its QEMU has not quit"):
        vm.save(SaveOptions())
    with Image.open(vm.path) as image:
        image.verify()


def test_a_qemu_that_is_gone(vm: Vm) -> None:
    vm.fake.answers["stop"] = HangUp
    with pytest.raises(MigrationError, match="the VM was not saved") as caught:
        vm.save()
    assert not caught.value.source_runs and not vm.path.exists()


# ---- the guard ---------------------------------------------------------------------------------


def order_of(vm: Vm, **changes: Any) -> dict[str, Any]:
    status = vm.path.stat() if vm.path.exists() else None
    return {
        "qmp": str(vm.fake.path),
        "path": str(vm.path),
        "identity": [status.st_dev, status.st_ino] if status else [1, 2],
        "ran": True,
        "resume": False,
        "saved": {"capabilities": {"xbzrle": True}, "parameters": {"downtime-limit": 77}},
        **changes,
    }


@pytest.mark.parametrize("status", ["paused", "postmigrate", "running"])
def test_the_guard_resumes_what_a_killed_save_stopped(vm: Vm, status: str) -> None:
    vm.status, vm.migration = status, "failed"
    vm.fake.capabilities["xbzrle"] = False
    assert save_guard.act(order_of(vm)) == "there is no file, and the guest is 'running'"
    assert vm.commands() == (["cont"] if status != "running" else [])
    assert vm.fake.capabilities["xbzrle"] and vm.fake.parameters["downtime-limit"] == 77


def test_the_guard_leaves_a_guest_paused_whose_file_is_whole(vm: Vm) -> None:
    vm.path.write_bytes(b"saved")
    vm.status, vm.migration = "postmigrate", "completed"
    assert "the file is whole, and the guest is 'postmigrate'" in save_guard.act(order_of(vm))
    assert vm.commands() == []
    save_guard.act(order_of(vm, resume=True))
    assert vm.commands() == ["cont"]


def test_the_guard_knows_another_file_of_that_name(vm: Vm) -> None:
    vm.path.write_bytes(b"another's")
    vm.status, vm.migration = "postmigrate", "completed"
    save_guard.act(order_of(vm, identity=[1, 2]))
    assert vm.status == "running"


def test_the_guard_leaves_a_guest_that_was_paused(vm: Vm) -> None:
    vm.status, vm.migration = "paused", "failed"
    save_guard.act(order_of(vm, ran=False))
    assert vm.commands() == []


def test_the_guard_cancels_a_migration_that_does_not_end(
    vm: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_guard, "NOTICES_S", 0.0)
    vm.status, vm.migration = "paused", "pre-switchover"

    def cancel(_: object) -> dict[str, Any]:
        vm.migration = "cancelled"
        return {}

    vm.fake.answers["migrate_cancel"] = cancel
    save_guard.act(order_of(vm))
    assert vm.commands() == ["migrate_cancel", "cont"]


# ---- what is said ------------------------------------------------------------------------------


def test_what_is_said(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_module, "PROGRESS_EVERY_S", 0.0)
    told: list[SaveProgress] = []
    result = vm.save(on_progress=told.append)
    assert told and progress_text(told[-1]).endswith("guest paused")
    values = save_values(result, None, ExitCode.OK)
    assert values["verified"] and values["exit_code"] == 0 and values["source_runs"] is False
    assert values["total_ms"] > 0 and "total_ns" not in values and values["error"] is None
    lines = save_lines(result)
    assert any("quit it before the file is restored" in line for line in lines)
    failed = save_values(None, MigrationError("why"), ExitCode.FAILED)
    assert failed.keys() == values.keys()
    assert failed["error"] == "why" and failed["source_runs"] and not failed["verified"]
