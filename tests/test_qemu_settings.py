# SPDX-License-Identifier: Apache-2.0
"""Migration settings: remembered, set and put back, on the fake and on real QEMUs."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_qmp import FakeError, FakeQmp, HangUp
from qmp_qemu import QmpQemu

from vmth.errors import RefusedError, UsageError
from vmth.qemu.cancel import cancel_migration
from vmth.qemu.qmp import Qmp
from vmth.qemu.settings import (
    MigrationSettings,
    capabilities_of,
    is_over,
    migration_status,
    parameters_of,
    put_back,
)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeQmp]:
    with FakeQmp(tmp_path / "qmp") as server:
        yield server


@pytest.fixture
def qmp(fake: FakeQmp) -> Iterator[Qmp]:
    with Qmp(fake.path) as client:
        yield client


def test_settings_are_applied_and_put_back(fake: FakeQmp, qmp: Qmp) -> None:
    before = dict(fake.capabilities), dict(fake.parameters)
    settings = MigrationSettings(qmp)
    assert settings.apply({"events": True, "xbzrle": False}, {"downtime-limit": 1}) == []
    assert fake.capabilities["events"] and fake.parameters["downtime-limit"] == 1
    assert settings.restore() == []
    assert (fake.capabilities, fake.parameters) == before


def test_what_this_qemu_does_not_know_is_left_out_and_named(fake: FakeQmp, qmp: Qmp) -> None:
    unknown = MigrationSettings(qmp).apply(
        {"events": True, "mapped-ram": False}, {"direct-io": True, "downtime-limit": 1}
    )
    assert unknown == ["mapped-ram", "direct-io"]
    assert fake.capabilities["events"] and fake.parameters["downtime-limit"] == 1


def test_only_what_differs_is_set_and_put_back(fake: FakeQmp, qmp: Qmp) -> None:
    settings = MigrationSettings(qmp)
    settings.apply({"xbzrle": False, "events": True}, {"multifd-channels": 2})
    fake.capabilities["xbzrle"] = True  # somebody else's choice, meanwhile
    settings.restore()
    assert fake.capabilities["xbzrle"] and not fake.capabilities["events"]
    assert "migrate-set-parameters" not in fake.commands()


def test_the_value_before_the_first_change_is_what_is_put_back(fake: FakeQmp, qmp: Qmp) -> None:
    settings = MigrationSettings(qmp)
    for limit_ms in (1, 500, 2000):
        settings.apply(parameters={"downtime-limit": limit_ms})
    assert settings.saved() == {"capabilities": {}, "parameters": {"downtime-limit": 300}}
    settings.restore()
    assert fake.parameters["downtime-limit"] == 300


def test_what_is_remembered_is_put_back_by_whoever_was_told_before_the_change(
    fake: FakeQmp, qmp: Qmp
) -> None:
    fake.parameters["avail-switchover-bandwidth"] = 7
    settings = MigrationSettings(qmp)
    settings.remember("avail-switchover-bandwidth", "no-such-parameter")
    saved = settings.saved()  # the watchdog's
    settings.apply(parameters={"avail-switchover-bandwidth": 5_000_000})
    put_back(qmp, saved)
    assert fake.parameters["avail-switchover-bandwidth"] == 7
    assert "no-such-parameter" not in saved["parameters"]


def test_restore_is_idempotent(fake: FakeQmp, qmp: Qmp) -> None:
    settings = MigrationSettings(qmp)
    settings.apply({"events": True})
    settings.restore()
    asked = len(fake.received)
    assert settings.restore() == []
    assert len(fake.received) == asked


def test_a_refused_value_puts_everything_back(fake: FakeQmp, qmp: Qmp) -> None:
    settings = MigrationSettings(qmp)
    settings.apply(parameters={"multifd-channels": 4})
    real = fake._set_parameters

    def refuses(arguments: Mapping[str, Any]) -> Any:
        if arguments.get("downtime-limit", 0) > 2_000_000:
            raise FakeError("GenericError", "expects an integer in the range of 0 to 2000")
        return real(arguments)

    fake.answers["migrate-set-parameters"] = refuses
    with pytest.raises(RefusedError, match="downtime-limit=9999999: expects an integer"):
        settings.apply({"events": True}, {"downtime-limit": 9999999})
    assert not fake.capabilities["events"]
    assert fake.parameters["multifd-channels"] == 2
    assert settings.saved() == {"capabilities": {}, "parameters": {}}


def test_capabilities_wait_for_the_end_of_the_migration(fake: FakeQmp, qmp: Qmp) -> None:
    settings = MigrationSettings(qmp)
    settings.apply({"events": True})
    statuses = iter(["active", "cancelling", "a-status-of-later", "cancelled"])
    fake.answers["query-migrate"] = lambda _: {"status": next(statuses)}
    assert settings.restore() == []
    assert not fake.capabilities["events"]
    assert next(statuses, None) is None


def test_what_cannot_be_put_back_is_told_and_the_rest_is(fake: FakeQmp, qmp: Qmp) -> None:
    settings = MigrationSettings(qmp)
    settings.apply({"events": True}, {"downtime-limit": 1})
    fake.answers["query-migrate"] = {"status": "active"}
    fake.answers["migrate-set-capabilities"] = FakeError("GenericError", "in progress")
    assert settings.restore(timeout_s=0) == [
        "the migration capabilities events=False could not be put back: in progress"
    ]
    assert fake.parameters["downtime-limit"] == 300


def test_a_qemu_that_is_gone_has_nothing_to_put_back(fake: FakeQmp, qmp: Qmp) -> None:
    settings = MigrationSettings(qmp)
    settings.apply({"events": True})
    fake.answers["query-migrate"] = HangUp
    assert settings.restore() == []


def test_saved_settings_survive_json_and_another_client(fake: FakeQmp) -> None:
    with Qmp(fake.path) as first:
        settings = MigrationSettings(first)
        settings.apply({"events": True}, {"downtime-limit": 1, "multifd-compression": "zstd"})
        text = json.dumps(settings.saved())
    with Qmp(fake.path) as second:
        assert put_back(second, json.loads(text)) == []
    assert not fake.capabilities["events"]
    assert fake.parameters["multifd-compression"] == "none"


def test_saved_settings_of_another_shape_are_refused(qmp: Qmp) -> None:
    with pytest.raises(UsageError, match="two objects"):
        put_back(qmp, {"capabilities": ["events"]})


@pytest.mark.parametrize("status", ["active", "setup", "device", "pre-switchover", "new-one"])
def test_statuses_of_a_migration_under_way(status: str) -> None:
    assert not is_over(status)


# ---- the real one --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("side", ["SRC", "DST"])
def test_a_real_qemu_takes_and_gets_back_its_settings(tmp_path: Path, side: str) -> None:
    with QmpQemu(tmp_path, side) as qemu, Qmp(qemu.path) as qmp:
        before = capabilities_of(qmp), parameters_of(qmp)
        settings = MigrationSettings(qmp)
        unknown = settings.apply(
            {"events": True, "return-path": True, "multifd": True, "no-such": True},
            {"downtime-limit": 1, "max-bandwidth": 1 << 40, "multifd-compression": "zstd"},
        )
        assert unknown == ["no-such"]
        assert capabilities_of(qmp)["multifd"] and parameters_of(qmp)["downtime-limit"] == 1
        with pytest.raises(RefusedError, match="downtime"):
            settings.apply(parameters={"downtime-limit": 1 << 40})
        assert (capabilities_of(qmp), parameters_of(qmp)) == before


@pytest.mark.slow
@pytest.mark.parametrize("side", ["SRC", "DST"])
def test_a_real_qemu_gets_them_back_after_a_cancel(tmp_path: Path, side: str) -> None:
    with QmpQemu(tmp_path, side) as qemu, Qmp(qemu.path) as qmp:
        before = capabilities_of(qmp), parameters_of(qmp)
        settings = MigrationSettings(qmp)
        # Slow, so that something is left to send: only then a cancel has an order of its own.
        slow = {"downtime-limit": 1, "max-bandwidth": 1 << 16}
        settings.apply({"events": True, "return-path": True}, slow)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "stream"))
            listener.listen(1)
            qmp.execute("migrate", {"uri": f"unix:{tmp_path / 'stream'}"})
            connection, _ = listener.accept()
            with connection:
                assert qmp.wait_event(lambda event: event.data.get("status") == "active", 60)
                assert cancel_migration(qmp, settings, [connection])
                assert settings.restore() == []
        assert migration_status(qmp) == "cancelled"
        assert (capabilities_of(qmp), parameters_of(qmp)) == before
