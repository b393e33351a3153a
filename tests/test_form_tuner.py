# SPDX-License-Identifier: Apache-2.0
"""The tuner between a sender's counters and its forms, on a sender that only counts."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from waiting import wait_until

from vmth import form_tuner
from vmth.channel.forms import FORM_NAMES, forms_mask
from vmth.errors import ChannelError, UsageError
from vmth.form_tuner import (
    FIRST_INTERVAL_NS,
    FIRST_INTERVALS,
    GLANCE_NS,
    INTERVAL_NS,
    FormTuner,
    idle_seconds,
    tuner_for,
)
from vmth.options import ALL_FORMS, MigrateOptions
from vmth.policy.forms import FormChoice, FormChooser, FormsView
from vmth.stats import ChannelCounters, FormDecision, TransferCounters
from vmth.tuning import Tuning
from vmth.worker_share import WorkerShare

SECOND_NS = 1_000_000_000


class CountingSender:
    def __init__(self) -> None:
        self.now = TransferCounters()
        self.set: list[tuple[int, int]] = []

    def counters(self) -> TransferCounters:
        return self.now

    def set_forms(self, mask: int, zstd_level: int = 1) -> None:
        self.set.append((mask, zstd_level))

    def send(self, pages: int, cpu_ns: int, wire_bytes: int) -> None:
        self.now = replace(
            self.now,
            normal_pages=self.now.normal_pages + pages,
            cpu_ns=self.now.cpu_ns + cpu_ns * pages,
            wire_bytes=self.now.wire_bytes + wire_bytes * pages,
            acked_bytes=self.now.acked_bytes + wire_bytes * pages,
        )


class World:
    def __init__(
        self,
        fixed_level: int | None = None,
        *,
        idle_cores: int = 2,
        share: Callable[[], float] | None = None,
    ) -> None:
        self.sender = CountingSender()
        self.now_ns = 0
        self.cap_bps = 0
        self.told: list[FormDecision] = []
        self.tuner = FormTuner(
            self.sender,
            ALL_FORMS,
            page_bytes=4096,
            workers=2,
            limit_bps=lambda: self.cap_bps,
            clock=lambda: self.now_ns,
            emit=self.told.append,
            fixed_level=fixed_level,
            idle=lambda: idle_cores * self.now_ns / 1e9,
            share=share,
        )

    def interval(self, link_bps: float) -> None:
        """A tenth of a second in which raw pages fill the link."""
        self.now_ns += SECOND_NS // 10
        self.sender.send(int(link_bps / 10 / 4160), 900, 4160)
        self.tuner.look()


def test_a_slow_link_turns_compression_on_and_says_why() -> None:
    world = World()
    for _ in range(
        2
    ):  # of the first one alone, which may be the connection's start, little is made
        world.interval(12.5e6)
    mask, level = world.sender.set[-1]
    assert mask & forms_mask(["zstd"]) and level >= 1
    assert world.told == world.tuner.decisions
    assert "us of CPU" in world.told[-1].reason and world.told[-1].after_ns > 0


@pytest.mark.parametrize(
    ("before_ms", "after_ms", "carrying"),
    [(0, 0, 1.0), (0, 25, 0.25), (40, 40, 0.0), (40, 240, 1.0)],  # 0 at last: TCP does not tell
)
def test_the_time_in_which_the_link_carried_something_is_told(
    before_ms: int, after_ms: int, carrying: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[FormsView] = []
    choose = FormChooser.choose

    def watched(chooser: FormChooser, view: FormsView) -> FormChoice:
        seen.append(view)
        return choose(chooser, view)

    monkeypatch.setattr(FormChooser, "choose", watched)
    world = World()
    for told_ms in (before_ms, after_ms):
        ns = told_ms * 1_000_000
        world.sender.now = replace(world.sender.now, carrying_ns=ns, starved_ns=ns // 2)
        world.interval(12.5e6)
    assert seen[-1].carrying == carrying
    assert seen[-1].starved == (after_ms - before_ms) / 200


def test_after_a_cap_was_lifted_it_looks_sooner() -> None:
    world = World()
    world.cap_bps = 12_500_000
    for _ in range(4):
        world.interval(12.5e6)
    assert world.tuner.next_interval_ns(FIRST_INTERVALS) == INTERVAL_NS
    assert world.tuner.next_interval_ns(FIRST_INTERVALS - 1) == FIRST_INTERVAL_NS
    world.cap_bps = 0
    world.interval(12.5e6)
    assert world.tuner.next_interval_ns(FIRST_INTERVALS) == FIRST_INTERVAL_NS
    for _ in range(8):
        world.interval(12.5e6)
    assert world.tuner.next_interval_ns(FIRST_INTERVALS) == INTERVAL_NS


def test_a_glance_at_the_link_is_told_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FormTuner, "_run", lambda tuner: None)
    world = World()
    with world.tuner:
        assert world.told[0].forms == ("zero",) and "glance" in world.told[0].reason
        assert world.tuner.next_interval_ns(0) == GLANCE_NS
        world.interval(125e6)
        assert "reuse" in world.told[1].forms and len(world.told) == 2
        assert world.tuner.next_interval_ns(1) == FIRST_INTERVAL_NS


def test_a_cap_is_heeded_before_anything_is_measured() -> None:
    world = World()
    world.cap_bps = 12_500_000
    with world.tuner:
        mask, _ = world.sender.set[0]
        assert mask & forms_mask(["zstd"])
        assert "12.5 MB/s" in world.told[0].reason


def test_a_choice_that_stays_is_told_once() -> None:
    world = World()
    for _ in range(50):
        world.interval(12.5e6)
    # What is measured keeps being raw: the world does not care what was chosen.
    assert len(world.told) == len(world.sender.set) <= 10


def test_windows_that_grow_are_told_to_the_chooser(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    told: list[bool] = []
    choose = FormChooser.choose

    def noted(chooser: FormChooser, view: FormsView) -> FormChoice:
        told.append(view.opening)
        return choose(chooser, view)

    monkeypatch.setattr(FormChooser, "choose", noted)
    one, other, unused = (ChannelCounters(i, wire_bytes=1) for i in range(3))
    for first, second in ((True, True), (True, False), (False, True), (False, False), (True, True)):
        channels = (
            replace(one, opening=first),
            replace(other, opening=second),
            replace(unused, wire_bytes=0),
        )
        world.sender.now = replace(world.sender.now, channels=channels)
        world.interval(12.5e6)
    assert told == [True, False, False, False, True]


@pytest.mark.parametrize("pages", [1, 20])
def test_on_a_very_slow_link_an_interval_has_pages_enough(
    pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """25 ms would never have the pages that teach something; and some is looked at all the same."""
    monkeypatch.setattr(form_tuner, "FIRST_INTERVAL_NS", 100_000)
    monkeypatch.setattr(form_tuner, "INTERVAL_NS", 100_000)
    world = World()
    looked: list[int] = []
    counters = world.sender.counters

    def counted() -> TransferCounters:
        world.now_ns += 25_000_000
        world.sender.send(pages, 900, 4160)
        return counters()

    world.sender.counters = counted  # type: ignore[method-assign]
    look = world.tuner.look

    def noted() -> FormChoice:
        looked.append(world.now_ns)
        return look()

    world.tuner.look = noted  # type: ignore[method-assign]
    with world.tuner:
        wait_until(lambda: len(looked) > 4)
    apart = [later - sooner for sooner, later in pairwise(looked)]
    assert min(apart) >= 100_000_000 and max(apart) <= 400_000_000


def test_a_machine_without_an_idle_core_does_not_compress() -> None:
    world = World(idle_cores=0)
    for _ in range(20):
        world.interval(100e6)
    assert all(mask & forms_mask(["zstd"]) == 0 for mask, _ in world.sender.set)


def test_cores_that_are_had_when_wanted_are_told_to_the_chooser() -> None:
    world = World(idle_cores=0, share=lambda: 0.8)
    for _ in range(20):
        world.interval(100e6)
    assert any(mask & forms_mask(["zstd"]) for mask, _ in world.sender.set)
    assert any("1.6 cores are had when wanted" in told.reason for told in world.told)


def schedstat(tasks: Path, task: int, name: str, ran_ns: int, waited_ns: int) -> None:
    folder = tasks / str(task)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comm").write_text(f"{name}\n")
    (folder / "schedstat").write_text(f"{ran_ns} {waited_ns} 17\n")


def test_the_share_is_that_of_the_workers_since_the_last_look(tmp_path: Path) -> None:
    tasks = tmp_path / "task"
    share = WorkerShare(tasks=str(tasks))
    assert share.share() == 0.0  # no such kernel
    schedstat(tasks, 1, "python", 900_000_000, 0)
    schedstat(tasks, 2, "vmth-send-0", 30_000_000, 10_000_000)
    schedstat(tasks, 3, "vmth-send-1", 30_000_000, 10_000_000)
    assert share.share() == 0.75
    schedstat(tasks, 2, "vmth-send-0", 31_000_000, 10_500_000)
    assert share.share() == 0.0  # they wanted hardly anything
    schedstat(tasks, 2, "vmth-send-0", 41_000_000, 40_500_000)
    shutil.rmtree(tasks / "3")
    assert share.share() == 0.25
    shutil.rmtree(tasks / "2")
    assert share.share() == 0.0


def test_a_thread_that_wants_a_core_is_seen() -> None:
    def spin() -> None:
        until = time.thread_time_ns() + 30_000_000
        while time.thread_time_ns() < until:
            pass

    share = WorkerShare(prefix=_comm())
    share.share()
    spin()
    assert 0 < share.share() <= 1


def _comm() -> str:
    return Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text().strip()


def test_idle_seconds_are_those_of_the_cores_that_may_be_used(tmp_path: Path) -> None:
    mine = sorted(os.sched_getaffinity(0))
    rows = ["cpu  1 1 1 9000 9000 1", *(f"cpu{cpu} 1 7 1 300 20 1" for cpu in [*mine, 99_999])]
    stat = tmp_path / "stat"
    stat.write_text("\n".join([*rows, "intr 5"]) + "\n")
    assert idle_seconds(str(stat)) == len(mine) * 327 / os.sysconf("SC_CLK_TCK")


def test_fixed_forms_are_set_once_and_no_thread_looks() -> None:
    world = World(fixed_level=3)
    with world.tuner:
        pass
    assert world.sender.set == [(forms_mask(FORM_NAMES), 3)]
    assert [row.zstd_level for row in world.told] == [3]


def test_the_thread_ends_with_the_context_and_when_the_sender_has_failed() -> None:
    world = World()

    def fail() -> TransferCounters:
        raise ChannelError("gone")

    world.sender.counters = fail  # type: ignore[method-assign]
    with world.tuner:
        wait_until(lambda: all(thread.name != "vmth-forms" for thread in threading.enumerate()))


def test_without_the_digest_only_what_needs_no_hash_is_allowed() -> None:
    options = MigrateOptions(digest=False, fixed_forms=True, zstd_level=2)
    sender = CountingSender()
    tuning = Tuning(0, 1, 0, options.on_stall)
    with tuner_for(sender, options, FORM_NAMES, tuning, lambda: 0, lambda _: None):
        pass
    assert sender.set == [(forms_mask(["zstd"]), 2)]


@pytest.mark.parametrize(
    "changes",
    [{"forms": ("gzip",)}, {"zstd_level": 3}, {"fixed_forms": True, "zstd_level": 40}],
)
def test_what_is_not_allowed_is_named(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"received .*(allowed|belongs)"):
        MigrateOptions(**changes)  # type: ignore[arg-type]
