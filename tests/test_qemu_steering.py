# SPDX-License-Identifier: Apache-2.0
"""Orders to a source QEMU, and what it tells, on a monitor that answers late, badly or never."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_qmp import FakeError, FakeQmp, HangUp, Silence
from waiting import wait_until

from vmth.errors import RefusedError
from vmth.qemu.qmp import Qmp
from vmth.qemu.settings import MigrationSettings
from vmth.qemu.steering import HELD_DOWNTIME_MS, MAX_DOWNTIME_LIMIT_MS, Steering

MS = 1_000_000


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeQmp]:
    with FakeQmp(tmp_path / "qmp") as server:
        yield server


@pytest.fixture
def steering(fake: FakeQmp) -> Iterator[Steering]:
    with Qmp(fake.path) as qmp, Steering(qmp, MigrationSettings(qmp)) as helm:
        qmp.timeout_s = 0.05
        yield helm


@pytest.mark.parametrize(
    ("limit_ns", "limit_ms"),
    [(250 * MS, 250), (1, 1), (0, MAX_DOWNTIME_LIMIT_MS), (1 << 62, MAX_DOWNTIME_LIMIT_MS)],
)
def test_a_downtime_is_allowed_in_qemus_unit(
    fake: FakeQmp, steering: Steering, limit_ns: int, limit_ms: int
) -> None:
    steering.allow_downtime(limit_ns)
    wait_until(lambda: fake.parameters["downtime-limit"] == limit_ms)
    steering.check()


@pytest.mark.parametrize("limit_ms", [1, 300])
def test_the_room_is_told_as_a_bandwidth(fake: FakeQmp, steering: Steering, limit_ms: int) -> None:
    """QEMU stops where what is left is less than bandwidth x downtime limit."""
    fake.parameters["avail-switchover-bandwidth"] = 0
    steering.allow_downtime(limit_ms * MS, 6_000_000)
    bandwidth = 6_000_000 * 1000 // limit_ms
    wait_until(lambda: fake.parameters["avail-switchover-bandwidth"] == bandwidth)
    assert fake.parameters["downtime-limit"] == limit_ms
    steering.allow_downtime(0)
    wait_until(lambda: fake.parameters["downtime-limit"] == MAX_DOWNTIME_LIMIT_MS)
    assert fake.parameters["avail-switchover-bandwidth"] == 0
    steering.allow_downtime(limit_ms * MS, 6_000_000)
    steering.allow_no_downtime()
    steering.close()
    assert fake.parameters["downtime-limit"] == HELD_DOWNTIME_MS
    assert fake.parameters["avail-switchover-bandwidth"] == 0
    steering.check()


def test_an_order_that_was_not_answered_is_given_again(fake: FakeQmp, steering: Steering) -> None:
    unheard = iter([Silence(), Silence()])

    def busy(arguments: Mapping[str, Any]) -> Any:
        for silence in unheard:
            raise silence
        return fake._set_parameters(arguments)

    fake.answers["migrate-set-parameters"] = busy
    steering.allow_downtime(0)
    wait_until(lambda: fake.parameters["downtime-limit"] == MAX_DOWNTIME_LIMIT_MS)
    steering.check()


def test_an_order_that_is_given_again_does_not_undo_a_later_one(
    fake: FakeQmp, steering: Steering
) -> None:
    fake.parameters["avail-switchover-bandwidth"] = 0
    heard = threading.Event()

    def busy(arguments: Mapping[str, Any]) -> Any:
        if not heard.is_set():
            steering.allow_no_downtime()  # while the first is under way
            heard.set()
            raise Silence
        return fake._set_parameters(arguments)

    fake.answers["migrate-set-parameters"] = busy
    fake.parameters["downtime-limit"] = 7
    steering.allow_downtime(300 * MS, 6_000_000)
    assert heard.wait(60)
    wait_until(lambda: steering._orders.empty())
    steering.close()
    assert fake.parameters["downtime-limit"] == HELD_DOWNTIME_MS
    assert fake.parameters["avail-switchover-bandwidth"] == 0


def test_an_order_to_a_qemu_that_is_gone_is_not_repeated(fake: FakeQmp, steering: Steering) -> None:
    fake.answers["query-migrate-parameters"] = HangUp
    steering.allow_downtime(1)
    wait_until(lambda: steering._qmp.lost is not None)
    steering.close()
    steering.check()
    assert fake.commands() == ["query-migrate-parameters"]


def test_a_refusal_is_told_at_the_next_check(fake: FakeQmp, steering: Steering) -> None:
    fake.answers["migrate-set-parameters"] = FakeError("GenericError", "not now")
    steering.allow_downtime(1)
    steering.close()
    with pytest.raises(RefusedError, match="not now"):
        steering.check()


def test_what_was_not_asked_of_a_stopped_guest_is_asked_when_it_runs_again(
    fake: FakeQmp, steering: Steering
) -> None:
    fake.answers["query-migrate"] = {"status": "active", "ram": {"remaining": 8192}}
    fake.emit("STOP")
    wait_until(lambda: steering.stopped_ns is not None)
    fake.emit("MIGRATION_PASS", **{"pass": 2})
    wait_until(lambda: steering.passes == 2)
    fake.emit("RESUME")
    wait_until(lambda: steering.remaining_bytes == 8192)


def test_passes_stops_and_what_is_left_are_heard(fake: FakeQmp, steering: Steering) -> None:
    fake.answers["query-migrate"] = {
        "status": "active",
        "ram": {"remaining": 4096},
        "cpu-throttle-percentage": 30,
    }
    fake.emit("MIGRATION_PASS", **{"pass": 3})
    wait_until(lambda: (steering.remaining_bytes, steering.throttle_percent) == (4096, 30))
    assert steering.passes == 3 and steering.stopped_ns is None
    fake.emit("STOP")
    wait_until(lambda: steering.stopped_ns is not None)
    fake.emit("MIGRATION_PASS", **{"pass": 4})
    wait_until(lambda: steering.passes == 4)
    steering.allow_downtime(1)
    wait_until(lambda: fake.parameters["downtime-limit"] == 1)
    assert fake.commands().count("query-migrate") == 1  # a stopped guest is not kept waiting
    fake.emit("RESUME")
    wait_until(lambda: steering.stopped_ns is None)


def test_a_pass_that_ended_in_a_stop_asks_nothing(fake: FakeQmp, steering: Steering) -> None:
    """The order waits behind another one until the guest has stopped."""
    entered, go = threading.Event(), threading.Event()

    def slow(arguments: Mapping[str, Any]) -> Any:
        entered.set()
        assert go.wait(10)
        return fake._set_parameters(arguments)

    fake.answers["migrate-set-parameters"] = slow
    steering._qmp.timeout_s = 10
    steering.allow_downtime(1)
    assert entered.wait(10)
    fake.emit("MIGRATION_PASS", **{"pass": 2})
    fake.emit("STOP")
    wait_until(lambda: steering.stopped_ns is not None)
    go.set()
    steering.close()
    assert steering.passes == 2
    assert "query-migrate" not in fake.commands()


def test_a_stop_by_somebody_else_is_told_apart_from_the_migrations_own(fake: FakeQmp) -> None:
    told: list[bool] = []
    state = "running"
    fake.answers["query-status"] = lambda _: {"status": state}
    with (
        Qmp(fake.path) as qmp,
        Steering(qmp, MigrationSettings(qmp), on_stopped_elsewhere=told.append),
    ):

        def happens(event: str, run_state: str) -> None:
            nonlocal state
            state = run_state
            asked = fake.commands().count("query-status")
            fake.emit(event)
            wait_until(lambda: fake.commands().count("query-status") > asked)

        happens("STOP", "finish-migrate")  # the migration's own
        happens("RESUME", "running")
        assert told == []
        happens("STOP", "io-error")
        happens("STOP", "postmigrate")  # stopped for its last pages as well: it stays known
        happens("RESUME", "running")
        happens("STOP", "paused")
        wait_until(lambda: told == [True, False, True])


def test_a_qemu_that_keeps_its_run_state_is_not_asked(fake: FakeQmp, steering: Steering) -> None:
    fake.emit("STOP")
    wait_until(lambda: steering.stopped_ns is not None)
    steering.allow_downtime(MS)
    wait_until(lambda: fake.parameters["downtime-limit"] == 1)
    assert "query-status" not in fake.commands()
