# SPDX-License-Identifier: Apache-2.0
"""A whole migration of a source QEMU that is played, into a real listener: what it is told, and how
it is left after every failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import qemu_streams as s
from fake_qmp import FakeError, FakeLimits
from migrating_qemu import HALF, FakeWatchdog, MigratingQemu, TakingGuest, stream_of
from waiting import wait_until

from vmth import source_session
from vmth.channel.pages import NativeSender
from vmth.errors import (
    CancelledError,
    ExitCode,
    MigrationError,
    NotResumedError,
    RefusedError,
    UsageError,
)
from vmth.events import ThrottleChosen
from vmth.guest import StateStream
from vmth.handshake import Incoming
from vmth.job import MigrationJob
from vmth.listener import Listener
from vmth.options import ReceiveOptions
from vmth.policy.interface import Action, Decision, Forecast, OnStall, RoundView
from vmth.progress import Console
from vmth.qemu import migrate
from vmth.qemu import source as source_module
from vmth.qemu.departure import depart, departure_lines, departure_values
from vmth.qemu.destination import DEVICE_STREAM
from vmth.qemu.migrate import QemuMigrateOptions, start_qemu_migration
from vmth.qemu.qmp import Qmp
from vmth.qemu.source import QemuSource, StoppedQemu, find_guest, run_state_in
from vmth.uri import parse_endpoint

SET = "set-vcpu-dirty-limit"


class Scene:
    """A listener whose guests lie in memory; migrations of one played QEMU into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.guests: list[TakingGuest] = []
        self.prepare: Callable[[TakingGuest], None] = lambda guest: None
        self.listener = Listener(
            parse_endpoint(f"unix:{folder / 'link'}", listening=True),
            self._make_guest,
            ReceiveOptions(state_dir=folder / "there"),
        )

    def _make_guest(self, incoming: Incoming) -> TakingGuest:
        guest = TakingGuest(incoming)
        self.guests.append(guest)
        self.prepare(guest)
        return guest

    def options(self, **changes: Any) -> QemuMigrateOptions:
        return replace(QemuMigrateOptions(state_dir=self.folder / "here"), **changes)

    def start(self, qemu: MigratingQemu, **changes: Any) -> MigrationJob:
        uri = self.listener.endpoint.display
        return start_qemu_migration(qemu.path, uri, self.options(**changes))

    def close(self) -> None:
        self.listener.close()
        for guest in self.guests:
            guest.close()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.close()


@pytest.fixture(autouse=True)
def watchdogs(monkeypatch: pytest.MonkeyPatch) -> list[FakeWatchdog]:
    """Instead of processes."""
    kennel = FakeWatchdog()
    monkeypatch.setattr(migrate, "Watchdog", kennel)
    return kennel.made


@pytest.mark.parametrize("was", ["running", "paused"])
def test_a_guest_moves_and_arrives_as_it_was(
    scene: Scene, watchdogs: list[FakeWatchdog], was: str
) -> None:
    with MigratingQemu(scene.folder, was) as qemu:
        result = scene.start(qemu).wait(20)
        assert qemu.status == "gone"
        assert "cont" not in qemu.qmp.commands()
    (guest,) = scene.guests
    assert guest.running is (was == "running")
    assert result.verified and result.verified_scope == "memory"
    assert result.digest_source == result.digest_destination
    assert guest.page(0, 6) == s.page_of(103) and guest.page(1, 0) == s.page_of(100)
    whole = stream_of(was)
    (state,) = guest.streams
    assert state.name == DEVICE_STREAM
    assert state.data == whole[whole.index(s.full(7, "timer", s.TRICKY)) :]
    assert guest.info["qemu.machine"] == "pc-q35-7.2" and guest.info["qemu.page-bits"] == "12"
    assert "qemu.facts.0" in guest.info and "qemu.head" in guest.info
    (dog,) = watchdogs
    assert not dog.alive and dog.order[1]["parameters"]["downtime-limit"] == 300


def test_a_kept_source_is_paused_and_its_settings_are_back(scene: Scene) -> None:
    with MigratingQemu(scene.folder) as qemu:
        scene.start(qemu, on_success="keep").wait(20)
        assert qemu.status == "postmigrate" and qemu.settings_are_back
        assert "quit" not in qemu.qmp.commands()
    assert scene.guests[0].running


def test_what_is_set_for_the_time_of_the_migration(scene: Scene) -> None:
    seen: dict[str, Any] = {}

    def look(guest: TakingGuest) -> None:
        seen.update(qemu.qmp.capabilities | qemu.qmp.parameters)

    scene.prepare = look
    with MigratingQemu(scene.folder) as qemu:
        on = ("postcopy-ram", "postcopy-preempt", "zero-copy-send", "xbzrle")
        qemu.qmp.capabilities |= dict.fromkeys(on, True)
        qemu.qmp.parameters["tls-creds"] = "tls0"
        qemu.before = dict(qemu.qmp.capabilities), dict(qemu.qmp.parameters)
        scene.start(qemu, on_success="keep", auto_converge=True).wait(20)
        assert qemu.settings_are_back
    assert seen["return-path"] and seen["events"] and seen["auto-converge"]
    assert not any(seen[name] for name in (*on, "multifd"))
    assert seen["downtime-limit"] == 1 and seen["tls-creds"] == ""
    assert seen["max-bandwidth"] > 1 << 34


def test_bitmaps_that_stay_behind_are_told(scene: Scene) -> None:
    with MigratingQemu(scene.folder) as qemu:
        qemu.qmp.capabilities["dirty-bitmaps"] = True
        result = scene.start(qemu).wait(20)
    assert any("block dirty bitmaps stay behind" in what for what in result.fallbacks)


def left_as_it_was(qemu: MigratingQemu, watchdogs: list[FakeWatchdog]) -> bool:
    return (
        qemu.status == qemu.was
        and qemu.settings_are_back
        and not any(dog.alive for dog in watchdogs)
    )


@pytest.mark.parametrize("was", ["running", "paused"])
@pytest.mark.parametrize("at", ["make_guest", "load_state"])
def test_a_destination_that_fails_leaves_the_source_as_it_was(
    scene: Scene, watchdogs: list[FakeWatchdog], at: str, was: str
) -> None:
    def prepare(guest: TakingGuest) -> None:
        guest.fails = "no such device"
        if at == "make_guest":
            raise RefusedError("no such device")

    scene.prepare = prepare
    with MigratingQemu(scene.folder, was) as qemu:
        with pytest.raises(MigrationError, match="no such device") as caught:
            scene.start(qemu).wait(20)
        assert caught.value.source_runs
        assert isinstance(caught.value, RefusedError) is (at == "make_guest")
        assert left_as_it_was(qemu, watchdogs)
    assert not any(guest.running for guest in scene.guests)


def test_a_guest_that_was_stopped_meanwhile_is_not_set_running(scene: Scene) -> None:
    """By somebody else, or by an error of its disk. A QEMU before 8.2 forgets that."""
    scene.prepare = lambda guest: setattr(guest, "fails", "no such device")
    with MigratingQemu(scene.folder, stream=stream_of("io-error")) as qemu:
        qemu.was = "postmigrate"
        with pytest.raises(MigrationError, match="no such device"):
            scene.start(qemu).wait(20)
        assert "cont" not in qemu.qmp.commands() and qemu.settings_are_back


def test_a_guest_that_is_stopped_before_its_state_came_is_not_set_running(
    scene: Scene, watchdogs: list[FakeWatchdog]
) -> None:
    """The stream has not told, and a QEMU before 8.2 calls every guest postmigrate by then."""
    with MigratingQemu(scene.folder, stops_after=HALF) as qemu:
        job = scene.start(qemu)
        wait_until(lambda: bool(scene.guests))
        qemu.status, qemu.was = "io-error", "postmigrate"
        qemu.qmp.emit("STOP")
        wait_until(lambda: watchdogs[0].told == [True])
        job.cancel()
        with pytest.raises(CancelledError):
            job.wait(20)
        assert "cont" not in qemu.qmp.commands() and qemu.settings_are_back
        assert qemu.status == "postmigrate" and not watchdogs[0].alive


def test_a_cancel_leaves_the_source_as_it_was(scene: Scene, watchdogs: list[FakeWatchdog]) -> None:
    with MigratingQemu(scene.folder, stops_after=HALF) as qemu:
        job = scene.start(qemu)
        wait_until(lambda: bool(scene.guests))
        job.cancel()
        with pytest.raises(CancelledError):
            job.wait(20)
        assert left_as_it_was(qemu, watchdogs)
        assert qemu.migration == "cancelled"


def test_a_cancel_that_qemu_does_not_hear_leaves_the_source_as_it_was(
    scene: Scene, watchdogs: list[FakeWatchdog]
) -> None:
    with MigratingQemu(scene.folder, stops_after=HALF) as qemu:
        qemu.qmp.answers["migrate_cancel"] = FakeError("GenericError", "not now")
        job = scene.start(qemu)
        wait_until(lambda: bool(scene.guests))
        job.cancel()
        with pytest.raises(CancelledError):
            job.wait(20)
        assert left_as_it_was(qemu, watchdogs)
        assert qemu.migration == "failed"


def test_a_cancel_while_the_guest_is_stopped(
    scene: Scene, watchdogs: list[FakeWatchdog], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = QemuSource.save_state

    def cancel_and_save(self: QemuSource, write: Callable[[StateStream], None]) -> None:
        job.cancel()
        save(self, write)

    monkeypatch.setattr(QemuSource, "save_state", cancel_and_save)
    with MigratingQemu(scene.folder) as qemu:
        job = scene.start(qemu)
        with pytest.raises(CancelledError):
            job.wait(20)
        assert left_as_it_was(qemu, watchdogs)
        assert qemu.migration == "cancelled"


def test_a_source_that_gives_up_says_why_and_is_as_it_was(
    scene: Scene, watchdogs: list[FakeWatchdog]
) -> None:
    with MigratingQemu(scene.folder, stops_after=HALF) as qemu:
        job = scene.start(qemu)
        wait_until(lambda: bool(scene.guests))
        qemu.qmp.answers["query-migrate"] = {"status": "failed", "error-desc": "no more tea"}
        qemu._source.close()
        with pytest.raises(MigrationError, match="ended its migration: no more tea"):
            job.wait(20)
        assert left_as_it_was(qemu, watchdogs)


def test_a_source_that_does_not_complete_is_resumed(
    scene: Scene, watchdogs: list[FakeWatchdog]
) -> None:
    with MigratingQemu(scene.folder, says_failed=True) as qemu:
        with pytest.raises(MigrationError, match="migration is 'failed' at its end"):
            scene.start(qemu).wait(20)
        assert left_as_it_was(qemu, watchdogs)
    assert not scene.guests[0].running and scene.guests[0].released


def test_a_journal_that_cannot_be_written_resumes_a_source_that_has_completed(
    scene: Scene, watchdogs: list[FakeWatchdog], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = QemuSource.hold

    def hold_and_fail(self: QemuSource) -> None:
        hold(self)
        raise OSError("the disk is full")

    monkeypatch.setattr(QemuSource, "hold", hold_and_fail)
    with MigratingQemu(scene.folder) as qemu:
        with pytest.raises(MigrationError, match="the disk is full"):
            scene.start(qemu).wait(20)
        assert qemu.migration == "completed" and qemu.qmp.commands().count("cont") == 1
        assert left_as_it_was(qemu, watchdogs)


def test_a_source_that_cannot_be_resumed_is_told_with_the_way_out(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: QemuSource) -> None:
        hold(self)
        raise OSError("the disk is full")

    hold = QemuSource.hold
    monkeypatch.setattr(QemuSource, "hold", fail)
    with MigratingQemu(scene.folder) as qemu:
        qemu.cont_fails = 'Failed to get "write" lock'
        with pytest.raises(NotResumedError, match=r"disk is full.*write.*takes cont") as caught:
            scene.start(qemu).wait(20)
        assert not caught.value.source_runs
        assert caught.value.exit_code is ExitCode.IN_DOUBT


def test_a_source_qemu_that_dies_takes_its_guest_along(scene: Scene) -> None:
    with MigratingQemu(scene.folder, stops_after=HALF) as qemu:
        job = scene.start(qemu)
        wait_until(lambda: bool(scene.guests))
        qemu.qmp.hang_up()
        qemu._source.close()
        with pytest.raises(NotResumedError, match="is gone with its guest"):
            job.wait(20)
    assert not scene.guests[0].running


@pytest.mark.parametrize(
    ("answers", "fault"),
    [
        ({"query-migrate": {"status": "active"}}, "active"),
        ({"query-status": {"status": "inmigrate"}}, "inmigrate"),
        ({"query-migrate": {"blocked-reasons": ["9p is mounted"]}}, "9p is mounted"),
    ],
)
def test_a_source_that_cannot_migrate_is_refused_untouched(
    scene: Scene, watchdogs: list[FakeWatchdog], answers: Mapping[str, Any], fault: str
) -> None:
    with MigratingQemu(scene.folder) as qemu:
        qemu.qmp.answers |= answers
        with pytest.raises(RefusedError, match=fault):
            scene.start(qemu)
        assert qemu.settings_are_back and watchdogs == []
        assert not {"migrate", "migrate-set-capabilities"} & set(qemu.qmp.commands())


def test_qemus_refusal_is_told_in_its_words(scene: Scene, watchdogs: list[FakeWatchdog]) -> None:
    with MigratingQemu(scene.folder) as qemu:
        qemu.qmp.answers["migrate"] = FakeError("GenericError", "VFIO cannot")
        with pytest.raises(MigrationError, match="VFIO cannot"):
            scene.start(qemu).wait(20)
        assert left_as_it_was(qemu, watchdogs)
    assert scene.guests == []


def test_multifd_that_a_source_does_not_know_is_refused(
    scene: Scene, watchdogs: list[FakeWatchdog]
) -> None:
    with MigratingQemu(scene.folder) as qemu:
        del qemu.qmp.capabilities["multifd"]
        qemu.before = dict(qemu.qmp.capabilities), dict(qemu.qmp.parameters)
        with pytest.raises(RefusedError, match="does not know multifd"):
            scene.start(qemu, multifd_channels=2).wait(20)
        assert left_as_it_was(qemu, watchdogs)


EARLY = s.header() + s.full(3, "virtio-mem", b"early") + s.start(s.block_list() + s.eos())
BITMAPS = s.header() + s.start(b"", "dirty-bitmap", 1, 9)
WIDE = s.header("virt", ("target-page-bits", s.u32(14))) + s.start(s.block_list() + s.eos())


@pytest.mark.parametrize(
    ("stream", "fault"),
    [(EARLY, "as virtio-mem does"), (BITMAPS, "'dirty-bitmap'"), (WIDE, "16384 bytes")],
)
def test_a_guest_that_cannot_be_carried_is_refused_and_runs_on(
    scene: Scene, watchdogs: list[FakeWatchdog], stream: bytes, fault: str
) -> None:
    with MigratingQemu(scene.folder, stream=stream) as qemu:
        with pytest.raises(RefusedError, match=fault):
            scene.start(qemu).wait(20)
        assert left_as_it_was(qemu, watchdogs)
    assert scene.guests == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"on_success": "burn"}, "received 'burn', allowed quit, keep"),
        ({"multifd_channels": 300}, "received 300, allowed 0 to 255"),
        ({"channels": 0}, "channels: received 0"),
        ({"downtime_limit_ns": 0}, "downtime_limit_ns: received 0"),
    ],
)
def test_options_are_checked_where_they_are_made(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        QemuMigrateOptions(**changes)


def test_a_throttle_is_a_dirty_limit_where_qemu_has_one(
    scene: Scene, watchdogs: list[FakeWatchdog]
) -> None:
    seen: dict[str, Any] = {}
    scene.prepare = lambda guest: seen.update(qemu.qmp.capabilities)
    with MigratingQemu(scene.folder) as qemu:
        limits = FakeLimits(qemu.qmp, {0: 7})
        qemu.qmp.capabilities["dirty-limit"] = True
        qemu.before = dict(qemu.qmp.capabilities), dict(qemu.qmp.parameters)
        job = scene.start(qemu, on_stall=OnStall.THROTTLE, on_success="keep")
        result = job.wait(20)
        assert qemu.settings_are_back and limits.limits == {0: 7}
    assert not seen["dirty-limit"] and not seen["auto-converge"]  # commands set the limits
    ways = [event.way for event in job.events() if isinstance(event, ThrottleChosen)]
    assert ways == ["dirty-limit"]
    assert not any("throttle" in what for what in result.fallbacks)
    assert watchdogs[0].order[1]["dirty-limits"] == [(0, 7)]


class LimitingPolicy:
    """Holds the guest to 50 MiB/s after each round."""

    def decide(self, view: RoundView) -> Decision:
        return Decision(Action.THROTTLE, "limits", Forecast(0, 0, 0, 0), dirty_limit_bps=50 << 20)

    def recheck(self, view: RoundView, forecast: Forecast) -> Decision:
        raise AssertionError("QEMU has stopped its guest for good")


@pytest.mark.parametrize("how", ["seal", "load_state", "success"])
def test_a_limited_guest_is_let_go(scene: Scene, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Also where the digests differ, and QEMU sends no page again."""
    monkeypatch.setattr(source_session, "StandardPolicy", LimitingPolicy)
    if how == "seal":
        digest = NativeSender.digest
        monkeypatch.setattr(
            NativeSender, "digest", lambda self: (digest(self)[0] ^ 1, *digest(self)[1:])
        )
    elif how == "load_state":
        scene.prepare = lambda guest: setattr(guest, "fails", "no such device")
    whole = stream_of("running")
    at = whole.index(s.end(s.normal(5, "pc.ram", 102))[:64])  # where the last section begins
    again = s.part(s.normal(9, "pc.ram", 55) + s.eos())  # two passes more
    with MigratingQemu(scene.folder, stream=whole[:at] + 2 * again + whole[at:]) as qemu:
        limits = FakeLimits(qemu.qmp)
        job = scene.start(qemu, on_stall=OnStall.THROTTLE, on_success="keep")
        if how == "success":
            job.wait(20)
        else:
            with pytest.raises(MigrationError):
                job.wait(20)
        set_to = [at["dirty-rate"] for name, at in qemu.qmp.received if name == SET and at]
        assert max(set_to) == 25
        assert limits.limits == {} and qemu.settings_are_back
        assert qemu.status == ("postmigrate" if how == "success" else "running")


def test_a_throttle_is_auto_converge_where_qemu_has_no_dirty_limit(scene: Scene) -> None:
    seen: dict[str, Any] = {}
    scene.prepare = lambda guest: seen.update(qemu.qmp.capabilities)
    with MigratingQemu(scene.folder) as qemu:
        FakeLimits(qemu.qmp, ring=False)
        result = scene.start(qemu, on_stall=OnStall.THROTTLE).wait(20)
    assert seen["auto-converge"]
    (told,) = [what for what in result.fallbacks if "auto-converge" in what]
    assert "no dirty limit: dirty page limit feature requires KVM" in told


def test_auto_converge_by_name_asks_for_no_dirty_limit(scene: Scene) -> None:
    with MigratingQemu(scene.folder) as qemu:
        FakeLimits(qemu.qmp)
        result = scene.start(qemu, on_stall=OnStall.THROTTLE, auto_converge=True).wait(20)
        assert not any("dirty-limit" in name for name in qemu.qmp.commands())
    assert not any("auto-converge" in what for what in result.fallbacks)


def test_a_qemu_that_cannot_throttle_is_refused_untouched(scene: Scene) -> None:
    with MigratingQemu(scene.folder) as qemu:
        del qemu.qmp.capabilities["auto-converge"]
        qemu.before = dict(qemu.qmp.capabilities), dict(qemu.qmp.parameters)
        with pytest.raises(RefusedError, match=r"received throttle.*7\.2\.22 does not know it"):
            scene.start(qemu, on_stall=OnStall.THROTTLE)
        assert qemu.settings_are_back


def test_the_run_state_is_read_from_the_state() -> None:
    assert run_state_in(stream_of("paused")) == "paused"
    assert run_state_in(stream_of("running")) == "running"
    assert run_state_in(s.plain()) is None
    assert run_state_in(b"\x0bglobalstate") is None


class TestRecovery:
    def detail(self, qmp: Qmp, **changes: str) -> dict[str, str]:
        described = StoppedQemu(qmp).describe() | changes
        return {f"guest.{key}": value for key, value in described.items()}

    def test_a_completed_source_is_resumed_by_cont(self, tmp_path: Path) -> None:
        with MigratingQemu(tmp_path) as qemu:
            qemu.status, qemu.migration = "postmigrate", "completed"
            with Qmp(qemu.path) as qmp:
                detail = self.detail(qmp)
            guest = find_guest(detail)
            assert isinstance(guest, StoppedQemu) and not guest.is_running()
            guest.resume()
            assert guest.is_running()
            guest.close()

    def test_a_guest_that_somebody_else_stopped_stays_so(self, tmp_path: Path) -> None:
        with MigratingQemu(tmp_path) as qemu, Qmp(qemu.path) as qmp:
            qemu.status, qemu.migration = "paused", "failed"
            StoppedQemu(qmp).resume()
            assert qemu.status == "paused" and "cont" not in qemu.qmp.commands()

    def test_a_migration_that_does_not_notice_its_end_is_cancelled(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(source_module, "NOTICES_S", 0.02)

        def cancel(_: object) -> dict[str, Any]:
            qemu.migration, qemu.status = "cancelled", "running"
            return {}

        with MigratingQemu(tmp_path) as qemu, Qmp(qemu.path) as qmp:
            qemu.status, qemu.migration = "finish-migrate", "pre-switchover"
            qemu.qmp.answers["migrate_cancel"] = cancel
            StoppedQemu(qmp).resume()
            assert qemu.qmp.commands().count("migrate_cancel") == 1

    def test_another_qemu_in_its_place_is_let_alone(self, tmp_path: Path) -> None:
        with MigratingQemu(tmp_path) as qemu:
            with Qmp(qemu.path) as qmp:
                detail = self.detail(qmp, process="1 17")
            assert find_guest(detail) is None

    def test_a_qemu_that_is_gone_is_known_to_be(self, tmp_path: Path) -> None:
        gone = {"guest.kind": "qemu", "guest.qmp": str(tmp_path / "gone")}
        assert find_guest(gone) is None

    def test_a_kept_source_is_not_quit(self, tmp_path: Path) -> None:
        with MigratingQemu(tmp_path) as qemu, Qmp(qemu.path) as qmp:
            StoppedQemu(qmp, "keep").release()
            assert "quit" not in qemu.qmp.commands()
            StoppedQemu(qmp).release()
            assert qemu.status == "gone"


class Pane:
    """A stream that keeps what is said."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...
    def isatty(self) -> bool:
        return False


def test_what_the_command_says_at_the_end(scene: Scene) -> None:
    pane = Pane()
    with MigratingQemu(scene.folder) as qemu:
        departure = depart(
            qemu.path,
            scene.listener.endpoint.display,
            scene.options(),
            Console(pane),  # type: ignore[arg-type]
        )
    told = departure_values(departure)
    assert told["verified"] and told["exit_code"] == 0 and told["source_runs"] is False
    assert told["downtime_ms"] > 0 and told["movers"]["source"]["cpu_seconds"] > 0
    lines = departure_lines(departure)
    assert "verified         yes, memory" in lines and "source QEMU      was quit" in lines
    assert any(line.startswith("pages  ") and " zero" in line for line in lines)
    assert "guest paused at the source" in pane.text


def test_what_the_command_says_after_a_failure(scene: Scene) -> None:
    scene.prepare = lambda guest: setattr(guest, "fails", "no such device")
    with MigratingQemu(scene.folder) as qemu:
        departure = depart(
            qemu.path,
            scene.listener.endpoint.display,
            scene.options(),
            Console(Pane()),  # type: ignore[arg-type]
        )
    told = departure_values(departure)
    assert told.keys() == departure_values(departure).keys()
    assert told["source_runs"] is True and told["exit_code"] == 1 and not told["verified"]
    assert "source guest     is here as before" in departure_lines(departure)
