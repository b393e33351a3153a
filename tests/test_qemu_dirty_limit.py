# SPDX-License-Identifier: Apache-2.0
"""A source QEMU's dirty limit: whether it has one, how it is shared out among its vCPUs, and that
it is gone afterwards; on a fake monitor and on real QEMUs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_qmp import FakeError, FakeLimits, FakeQmp, Silence
from hypothesis import given
from hypothesis import strategies as st
from qemu_world import modern_build
from qmp_qemu import QmpQemu
from waiting import wait_until

from vmth.errors import RefusedError
from vmth.policy.interface import OnStall
from vmth.qemu import dirty_limit
from vmth.qemu.dirty_limit import (
    MIB,
    Throttle,
    ThrottleWay,
    VcpuLimits,
    choose_throttle,
    limits_of,
    shares,
)
from vmth.qemu.qmp import Qmp
from vmth.qemu.settings import MigrationSettings, capabilities_of, put_back
from vmth.qemu.steering import Steering

KNOWN = {"auto-converge": False}


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeQmp]:
    with FakeQmp(tmp_path / "qmp") as server:
        server.version = (10, 0, 0)
        yield server


@pytest.fixture
def qmp(fake: FakeQmp) -> Iterator[Qmp]:
    with Qmp(fake.path) as client:
        yield client


@pytest.mark.parametrize(
    ("total", "now", "expected"),
    [
        (100, {0: (0, 0), 1: (0, 0)}, {0: 50, 1: 50}),  # nothing is known yet
        (100, {0: (50, 50), 1: (50, 0)}, {0: 99, 1: 1}),  # one writes
        (100, {0: (50, 45), 1: (50, 20)}, {0: 70, 1: 30}),
        (100, {0: (50, 10), 1: (50, 20)}, {0: 50, 1: 50}),  # none needs more
        (90, {0: (30, 30), 1: (30, 30), 2: (30, 0)}, {0: 44, 1: 44, 2: 1}),
        (1, {0: (0, 0), 1: (0, 0), 2: (0, 0)}, {0: 1, 1: 1, 2: 1}),  # the least that QEMU takes
        (100, {}, {}),
    ],
)
def test_shares(total: int, now: dict[int, tuple[int, int]], expected: dict[int, int]) -> None:
    assert shares(total, now) == expected


@given(
    total=st.integers(1, 100_000),
    now=st.dictionaries(
        st.integers(0, 255), st.tuples(st.integers(0, 10_000), st.integers(0, 20_000)), min_size=1
    ),
)
def test_shares_are_never_more_than_there_is(total: int, now: dict[int, tuple[int, int]]) -> None:
    given_out = shares(total, now)
    assert given_out.keys() == now.keys() and min(given_out.values()) >= 1
    assert sum(given_out.values()) <= max(total, len(now))


def test_a_dirty_limit_is_chosen_where_there_is_one(fake: FakeQmp, qmp: Qmp) -> None:
    limits = FakeLimits(fake, {1: 9})
    chosen = choose_throttle(qmp, KNOWN, OnStall.THROTTLE, auto_converge=False)
    assert chosen == Throttle(ThrottleWay.DIRTY_LIMIT)
    assert limits.limits == {1: 9}  # nobody's was touched
    limits.limits.clear()
    assert choose_throttle(qmp, KNOWN, OnStall.THROTTLE, False).way is ThrottleWay.DIRTY_LIMIT


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ((10, 0, 0), "dirty page limit feature requires KVM"),
        ((8, 1, 5), "QEMU 8.1.5 may crash when its dirty limit ends, 8.2 does not"),
        ((7, 0, 0), "QEMU 7.0.0 does not know it"),
    ],
)
def test_auto_converge_takes_its_place(
    fake: FakeQmp, version: tuple[int, int, int], why: str
) -> None:
    if version > (7, 1):
        FakeLimits(fake, ring=version < (8, 2))
    fake.version = version
    with Qmp(fake.path) as qmp:
        chosen = choose_throttle(qmp, KNOWN, OnStall.THROTTLE, auto_converge=False)
        assert chosen.way is ThrottleWay.AUTO_CONVERGE and why in chosen.why_not_limit
        with pytest.raises(RefusedError, match=why):
            choose_throttle(qmp, {}, OnStall.THROTTLE, auto_converge=False)


@pytest.mark.parametrize("on_stall", [OnStall.PAUSE, OnStall.CANCEL])
def test_nothing_is_asked_where_nobody_throttles(
    fake: FakeQmp, qmp: Qmp, on_stall: OnStall
) -> None:
    FakeLimits(fake)
    assert choose_throttle(qmp, KNOWN, on_stall, False) == Throttle(ThrottleWay.NONE)
    assert choose_throttle(qmp, KNOWN, on_stall, True) == Throttle(ThrottleWay.AUTO_CONVERGE)
    assert fake.commands() == []


def test_limits_follow_who_dirties_and_are_let_go(
    fake: FakeQmp, qmp: Qmp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dirty_limit, "SHARES_ANEW_S", 0.0)
    at_qemu = FakeLimits(fake, {1: 500})
    ours = VcpuLimits(qmp)
    ours.share_anew()
    assert at_qemu.limits == {1: 500}  # nothing is held yet
    ours.hold(100 * MIB + 5)
    at_qemu.rates = {0: 60, 1: 2}
    ours.share_anew()
    assert at_qemu.limits == {0: 97, 1: 3}
    ours.hold(20 * MIB)
    assert at_qemu.limits == {0: 10, 1: 3} or sum(at_qemu.limits.values()) <= 20
    for _ in range(2):
        ours.let_go()
    assert at_qemu.limits == {1: 500}
    assert fake.commands().count("cancel-vcpu-dirty-limit") == 1


def test_orders_reach_qemu_although_it_does_not_hear_at_first(fake: FakeQmp) -> None:
    at_qemu = FakeLimits(fake)
    cancel = fake.answers["cancel-vcpu-dirty-limit"]
    unheard = iter([Silence(), Silence()])

    def busy(arguments: dict[str, int]) -> object:
        for silence in unheard:
            raise silence
        return cancel(arguments)

    fake.answers["cancel-vcpu-dirty-limit"] = busy
    with Qmp(fake.path) as qmp, Steering(qmp, MigrationSettings(qmp)) as helm:
        qmp.timeout_s = 0.05
        helm.hold_dirty_rate(10 * MIB)
        wait_until(lambda: at_qemu.limits == {0: 5, 1: 5})
        helm.hold_dirty_rate(0)
        wait_until(lambda: at_qemu.limits == {})
        helm.check()


def test_a_watchdog_puts_the_limits_back(fake: FakeQmp, qmp: Qmp) -> None:
    at_qemu = FakeLimits(fake, {1: 9})
    settings = MigrationSettings(qmp)
    settings.remember_limits()
    VcpuLimits(qmp).hold(100 * MIB)
    assert at_qemu.limits == {0: 50, 1: 50}
    assert put_back(qmp, json.loads(json.dumps(settings.saved()))) == []
    assert at_qemu.limits == {1: 9}
    at_qemu.limits = {0: 1}
    fake.answers["cancel-vcpu-dirty-limit"] = FakeError("GenericError", "not now")
    assert settings.restore() == ["the vCPUs' dirty limits: not now"]
    assert settings.restore() == []


# ---- the real one --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_qemu_without_kvm_has_auto_converge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMTH_QEMU_SRC", modern_build().program)
    with QmpQemu(tmp_path, "SRC") as qemu, Qmp(qemu.path) as qmp:
        chosen = choose_throttle(qmp, capabilities_of(qmp), OnStall.THROTTLE, False)
        assert chosen.way is ThrottleWay.AUTO_CONVERGE
        assert "dirty-ring-size" in chosen.why_not_limit


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm")
def test_a_real_qemu_holds_each_vcpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMTH_QEMU_SRC", modern_build().program)
    ring = ("-smp", "2")
    with (
        QmpQemu(tmp_path, "SRC", *ring, accel="kvm,dirty-ring-size=4096") as qemu,
        Qmp(qemu.path) as qmp,
    ):
        chosen = choose_throttle(qmp, capabilities_of(qmp), OnStall.THROTTLE, False)
        assert chosen == Throttle(ThrottleWay.DIRTY_LIMIT)
        limits = VcpuLimits(qmp)
        limits.hold(30 * MIB)
        assert limits_of(qmp) == [(0, 15), (1, 15)]
        limits.let_go()
        assert limits_of(qmp) == []
        settings = MigrationSettings(qmp)
        settings.remember_limits()
        limits.hold(MIB)
        assert limits_of(qmp) == [(0, 1), (1, 1)]
        assert settings.restore() == []
        assert limits_of(qmp) == []
