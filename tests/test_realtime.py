# SPDX-License-Identifier: Apache-2.0
"""What a paused guest waits for runs before all others, for so long and no longer; where that is
not permitted a migration goes as well, and says so."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from memory_guest import MemoryGuest
from test_session import World

from vmth.cli import cli
from vmth.errors import MigrationError
from vmth.guests.spawn import spawn_source
from vmth.listener import Listener
from vmth.policy.interface import Action, Decision, Forecast, RoundView
from vmth.qemu.migrate import QemuMigrateOptions
from vmth.realtime import LONGEST_NS, NOT_PERMITTED, PRIORITY, Realtime, permitted
from vmth.wire.messages import Mode

needs_permission = pytest.mark.skipif(
    not permitted(), reason=f"not permitted here: {NOT_PERMITTED}"
)
RAISED = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
USUAL = os.SCHED_OTHER


def policy(thread: int = 0) -> int:
    """Of the calling thread, or of this one."""
    return os.sched_getscheduler(thread)


def effective_capabilities() -> int:
    """As a mask, capabilities(7)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    raise AssertionError("/proc/self/status has no CapEff")


def readers() -> list[int]:
    """Policies of the control connections' readers; both ends' are in this process."""
    return [
        policy(thread.native_id)
        for thread in threading.enumerate()
        if thread.name == "vmth-control" and thread.native_id is not None
    ]


def raised_readers(wanted: int) -> int:
    """How many are raised, once they are as many as wanted, or after 5 s."""
    until = time.monotonic() + 5
    while (raised := readers().count(RAISED)) != wanted and time.monotonic() < until:
        time.sleep(0.001)
    return raised


class Sleeper:
    """A thread that does nothing. Context manager."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ended.wait, daemon=True)

    @property
    def id(self) -> int:
        assert self._thread.native_id is not None
        return self._thread.native_id

    def __enter__(self) -> Sleeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


class PolicyGuest(MemoryGuest):
    """Notes at each call its caller's policy, that of the thread that it names, and those of the
    control connections' readers (both ends' are in this process)."""

    def __init__(self, named: Sequence[int] = (), **options: Any) -> None:
        super().__init__(**options)
        self.named = named
        self.seen: dict[str, list[int]] = {}
        self.named_seen: dict[str, list[int]] = {}
        self.readers_seen: dict[str, list[int]] = {}

    def switchover_threads(self) -> Sequence[int]:
        return self.named

    def _called(self, name: str) -> None:
        self.seen.setdefault(name, []).append(policy())
        self.named_seen.setdefault(name, []).extend(policy(thread) for thread in self.named)
        super()._called(name)
        self.readers_seen.setdefault(name, []).extend(readers())


class PolicyWorld(World):
    """``there``: what the destination's guest names; ``here``: the source's."""

    here: Sequence[int] = ()
    there: Sequence[int] = ()

    def guest(self, **options: Any) -> PolicyGuest:
        named = self.there if options.get("filled") is False else self.here
        guest = PolicyGuest(named, **options)
        self.guests.append(guest)
        return guest

    @property
    def arrived(self) -> PolicyGuest:
        guest = self.made[-1]
        assert isinstance(guest, PolicyGuest)
        return guest


@pytest.fixture
def world(tmp_path: Path) -> Iterator[PolicyWorld]:
    world = PolicyWorld(tmp_path)
    yield world
    for listener in world.listeners:
        listener.close()
    for guest in world.guests:
        guest.close()


def running(world: PolicyWorld) -> tuple[PolicyGuest, Listener]:
    source, listener = world.guest(), world.listen()
    source.resume()
    source.seen.clear()
    return source, listener


# -- threads -------------------------------------------------------------------------------------


@needs_permission
def test_threads_are_raised_and_are_again_what_they_were() -> None:
    with (
        Sleeper() as given,
        Sleeper() as named,
        Sleeper() as batch,
        contextlib.ExitStack() as stack,
    ):
        os.sched_setscheduler(batch.id, os.SCHED_BATCH, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, batch.id, 5)
        realtime = Realtime()
        stack.callback(realtime.end)
        realtime.begin(_Named([named.id, batch.id]), given.id, None)
        realtime.begin(_Named([named.id]), given.id)  # a second pause of the same session
        for thread in (0, given.id, named.id, batch.id):
            assert policy(thread) == RAISED
            assert os.sched_getparam(thread).sched_priority == PRIORITY
        with Sleeper() as started:  # a vCPU that resume() makes
            assert policy(started.id) == USUAL
            assert os.getpriority(os.PRIO_PROCESS, started.id) == 0
        realtime.end()
        realtime.end()
        assert [policy(thread) for thread in (0, given.id, named.id)] == 3 * [USUAL]
        assert policy(batch.id) == os.SCHED_BATCH
        assert os.getpriority(os.PRIO_PROCESS, batch.id) == 5
        realtime.begin(None)
        assert policy() == RAISED
        realtime.end()
        assert policy() == USUAL


@needs_permission
def test_a_thread_with_a_realtime_policy_of_its_own_keeps_it() -> None:
    with Sleeper() as other:
        os.sched_setscheduler(other.id, os.SCHED_RR, os.sched_param(7))
        realtime = Realtime()
        realtime.begin(None, other.id)
        assert policy(other.id) == os.SCHED_RR
        realtime.end()
        assert (policy(other.id), os.sched_getparam(other.id).sched_priority) == (os.SCHED_RR, 7)


@needs_permission
def test_a_thread_that_has_ended_is_nobodys_trouble() -> None:
    with Sleeper() as early:
        gone = early.id
    realtime = Realtime()
    with Sleeper() as late:
        realtime.begin(None, gone, late.id)
        assert policy(late.id) == RAISED
    realtime.end()
    assert policy() == USUAL and not realtime.refused


class _Raises:
    def switchover_threads(self) -> Sequence[int]:
        raise OSError("no")


@needs_permission
@pytest.mark.parametrize("named", [None, [-1], [1 << 40], ["7"], [1.5]])
def test_a_guest_that_names_no_threads_loses_only_them(named: Any) -> None:
    with Sleeper() as other:
        guest = _Raises() if named is None else _Named([*named, other.id])
        realtime = Realtime()
        realtime.begin(guest)
        assert policy() == RAISED
        assert policy(other.id) == (USUAL if named is None else RAISED)
        realtime.end()
        assert policy() == policy(other.id) == USUAL and not realtime.refused


@needs_permission
def test_it_ends_after_a_while_whatever_the_other_end_does() -> None:
    now_ns = 0
    realtime = Realtime(clock=lambda: now_ns)
    realtime.begin(None)
    now_ns = LONGEST_NS
    realtime.check_time()
    assert policy() == RAISED
    now_ns += 1
    realtime.check_time()
    assert policy() == USUAL


def test_what_is_not_wanted_is_not_done() -> None:
    realtime = Realtime(wanted=False)
    realtime.begin(None)
    assert policy() == USUAL and not realtime.refused
    assert not realtime.works


def test_whether_it_works_is_tried_and_leaves_nothing_behind() -> None:
    assert Realtime().works == permitted()
    assert policy() == USUAL
    assert not Realtime(refused=True).works


def test_it_does_not_work_where_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = refuse(monkeypatch)
    assert not Realtime().works
    assert asked == [RAISED]


class _Named:
    def __init__(self, threads: Sequence[int]) -> None:
        self._threads = threads

    def switchover_threads(self) -> Sequence[int]:
        return self._threads


# -- without permission --------------------------------------------------------------------------


def refuse(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As the kernel does without CAP_SYS_NICE; the policies that were asked for."""
    asked: list[int] = []

    def sched_setscheduler(thread: int, wanted: int, param: os.sched_param) -> None:
        asked.append(wanted)
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", sched_setscheduler)
    return asked


def test_a_kernel_that_refuses_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = refuse(monkeypatch)
    with Sleeper() as other:
        realtime = Realtime()
        realtime.begin(None, other.id)
        realtime.end()
        realtime.begin(None, other.id)
    assert realtime.refused
    assert asked == [RAISED]


@needs_permission
def test_a_flag_that_cannot_be_taken_back_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """With RLIMIT_RTPRIO alone a thread may go back, but not lose SCHED_RESET_ON_FORK."""
    real = os.sched_setscheduler

    def without_capability(thread: int, wanted: int, param: os.sched_param) -> None:
        if policy(thread) & os.SCHED_RESET_ON_FORK > wanted & os.SCHED_RESET_ON_FORK:
            raise PermissionError(1, "Operation not permitted")
        real(thread, wanted, param)

    monkeypatch.setattr(os, "sched_setscheduler", without_capability)
    with Sleeper() as other:
        realtime = Realtime()
        realtime.begin(None, other.id)
        realtime.end()
        assert policy(other.id) == USUAL | os.SCHED_RESET_ON_FORK
        realtime.begin(None, other.id)
        assert policy(other.id) == RAISED
        realtime.end()
    real(0, USUAL, os.sched_param(0))


def test_a_migration_that_may_not_says_so(
    world: PolicyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch)
    source, listener = running(world)
    result = world.migrate(source, listener)
    assert result.verified and NOT_PERMITTED in result.fallbacks
    assert NOT_PERMITTED in listener.wait_for_guest(5).fallbacks
    assert source.seen["pause"] == [USUAL]


SYS_NICE, SETPCAP = 1 << 23, 1 << 8


@pytest.mark.skipif(
    effective_capabilities() & SYS_NICE != 0 and effective_capabilities() & SETPCAP == 0,
    reason="CAP_SYS_NICE cannot be given up here: that needs CAP_SETPCAP",
)
def test_a_process_without_the_capability_finds_out() -> None:
    without = ("setpriv", "--bounding-set", "-sys_nice", "--inh-caps", "-sys_nice")
    told = subprocess.run(
        [
            *(without if effective_capabilities() & SYS_NICE else ()),
            *("prlimit", "--rtprio=0:0"),
            *(sys.executable, "-c", "from vmth.realtime import permitted; print(permitted())"),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    assert told.stdout == "False\n"


# -- sessions ------------------------------------------------------------------------------------


@needs_permission
def test_both_ends_hurry_while_the_guest_is_paused(world: PolicyWorld) -> None:
    with Sleeper() as here, Sleeper() as there:
        world.here, world.there = [here.id], [there.id]
        source, listener = running(world)
        result = world.migrate(source, listener)
        listener.wait_for_guest(5)
        for calls in (source.seen, source.named_seen):
            assert {name: calls[name] for name in ("pause", "save_state", "hold", "release")} == {
                "pause": [RAISED],
                "save_state": [RAISED],
                "hold": [RAISED],
                "release": [USUAL],
            }
        for calls in (world.arrived.seen, world.arrived.named_seen):
            assert calls["load_state"] == calls["resume"] == [RAISED]
        assert source.readers_seen["pause"].count(RAISED) >= 1  # ours
        assert world.arrived.readers_seen["resume"] == [RAISED, RAISED]
        assert source.readers_seen["release"].count(RAISED) <= 1
        assert policy(here.id) == policy(there.id) == USUAL
        assert NOT_PERMITTED not in result.fallbacks


class Expecting:
    """Expects a downtime of so many ms after each round, the last of which is switched over after;
    ``seen``: of how many control connections the reader was raised, once it was so many."""

    def __init__(self, *rounds: tuple[int, int]) -> None:
        self.seen: list[int] = []
        self._rounds = deque(rounds)

    def decide(self, view: RoundView) -> Decision:
        expected_ms, raised = self._rounds.popleft()
        self.seen.append(raised_readers(raised))
        action = Action.CONTINUE if self._rounds else Action.SWITCH_OVER
        return Decision(action, "as told", Forecast(expected_ms * 1_000_000, 0, 0, 0))

    def recheck(self, view: RoundView, forecast: Forecast) -> Decision:
        return Decision(Action.SWITCH_OVER, "as told", forecast)


@needs_permission
@pytest.mark.parametrize(("last_ms", "at_pause"), [(301, 1), (300, 2)])
def test_the_destination_hurries_when_the_pause_is_near(
    world: PolicyWorld, last_ms: int, at_pause: int
) -> None:
    """From what it is told of a round on, which is before the pause."""
    seen: list[int] = []
    source, listener = running(world)
    rounds = [(1_000, 0), (10, 0), (20, 1), (5_000, 1), (last_ms, 0)]
    chosen = Expecting(*rounds)
    if at_pause == 2:
        source.on_call["pause"] = lambda: seen.append(raised_readers(2))
    world.migrate(source, listener, policy=chosen)
    world.check_moved(source, listener)
    assert chosen.seen == [raised for _, raised in rounds]
    assert source.readers_seen["pause"].count(RAISED) == at_pause
    assert world.arrived.seen["load_state"] == [RAISED]


@needs_permission
@pytest.mark.parametrize(
    ("options", "here", "there"),
    [
        ({"realtime": False}, USUAL, RAISED),
        # All of memory comes, or is hashed, while the guest is paused: no matter of moments.
        ({"mode": Mode.COLD}, USUAL, USUAL),
        ({"audit": True}, USUAL, USUAL),
    ],
)
def test_who_does_not_hurry(
    world: PolicyWorld, options: dict[str, Any], here: int, there: int
) -> None:
    source, listener = running(world)
    world.migrate(source, listener, **options)
    assert source.seen["save_state"] == [here]
    assert world.arrived.seen["resume"] == [there]


@needs_permission
def test_a_destination_may_be_told_not_to(world: PolicyWorld) -> None:
    source, listener = world.guest(), world.listen(realtime=False)
    source.resume()
    world.migrate(source, listener)
    assert source.seen["save_state"] == [RAISED]
    assert world.arrived.seen["resume"] == [USUAL]


@needs_permission
def test_a_source_that_keeps_talking_does_not_keep_the_destination_so(
    world: PolicyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmth.realtime.LONGEST_NS", 0)  # the next message comes too late
    source, listener = running(world)
    world.migrate(source, listener)
    assert source.seen["pause"] == [RAISED]
    assert source.seen["save_state"] == world.arrived.seen["resume"] == [USUAL]


@needs_permission
def test_a_source_that_falls_silent_does_not_keep_the_destination_so(
    world: PolicyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmth.realtime.LONGEST_NS", 1_000_000_000)
    monkeypatch.setattr("vmth.destination_session.HURRY_LOOK_S", 0.05)
    seen: list[int] = []
    source, listener = running(world)
    source.on_call["save_state"] = lambda: seen.extend((raised_readers(2), raised_readers(1)))
    world.migrate(source, listener)
    world.check_moved(source, listener)
    assert seen == [2, 1]


class TakenBackOnce:
    """Switches over after the first round, thinks better of it, and switches over after the next;
    ``seen``: the policy at each decision."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self._pauses = 0

    def decide(self, view: RoundView) -> Decision:
        self.seen.append(policy())
        return Decision(Action.SWITCH_OVER, "now", Forecast(0, 0, 0, 0))

    def recheck(self, view: RoundView, forecast: Forecast) -> Decision:
        self.seen.append(policy())
        self._pauses += 1
        action = Action.CONTINUE if self._pauses == 1 else Action.SWITCH_OVER
        return Decision(action, "it has grown", Forecast(0, 0, 0, 0))


@needs_permission
def test_a_pause_that_is_taken_back_ends_it(world: PolicyWorld) -> None:
    source, listener = running(world)
    chosen = TakenBackOnce()
    world.migrate(source, listener, policy=chosen)
    world.check_moved(source, listener)
    assert chosen.seen == [USUAL, RAISED, USUAL, RAISED]


@needs_permission
@pytest.mark.parametrize("where", ["save_state", "load_state", "resume"])
def test_a_failure_while_paused_ends_it_at_both_ends(world: PolicyWorld, where: str) -> None:
    with Sleeper() as here, Sleeper() as there:
        world.here, world.there = [here.id], [there.id]
        source, listener = running(world)
        trouble = RuntimeError("broken")
        if where == "save_state":
            source.fail[where] = trouble
        else:
            world.prepare = lambda guest: guest.fail.update({where: trouble})
        with pytest.raises(MigrationError, match="broken"):
            world.migrate(source, listener)
        with contextlib.suppress(MigrationError):
            listener.wait_for_guest(5)
        world.check_stayed(source)
        assert policy(here.id) == policy(there.id) == USUAL
        # What came is freed, which takes long: at no such priority, whoever does it.
        assert world.arrived.seen["release"] == world.arrived.named_seen["release"] == [USUAL]
        world.prepare = lambda guest: None
        source.seen.clear()
        world.migrate(source, listener)
        world.check_moved(source, listener)
        assert source.seen["save_state"] == [RAISED]


@needs_permission
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callback_that_ends_its_thread_leaves_nobody_raised(world: PolicyWorld) -> None:
    with Sleeper() as there:
        world.there = [there.id]
        source, listener = running(world)
        world.prepare = lambda guest: guest.on_call.update({"load_state": sys.exit})
        with pytest.raises(MigrationError):
            world.migrate(source, listener)
        listener.close()  # joins the session's thread
        assert policy(there.id) == USUAL
        world.prepare = lambda guest: None
        world.migrate(source, world.listen())
        world.check_moved(source, world.listeners[-1])


@needs_permission
def test_the_holder_of_a_shipped_guest_is_raised_and_its_vcpus_are_not() -> None:
    with contextlib.ExitStack() as stack:
        guest, _ = spawn_source("process", 16 << 20)
        stack.callback(guest.release)
        (holder,) = guest.switchover_threads()
        realtime = Realtime()
        realtime.begin(guest)
        try:
            assert policy(holder) == RAISED
            others = {int(name) for name in os.listdir(f"/proc/{holder}/task")} - {holder}
            assert others and all(policy(thread) == USUAL for thread in others)
        finally:
            realtime.end()
        assert policy(holder) == USUAL


# -- the command line ----------------------------------------------------------------------------


def realtime_of(monkeypatch: pytest.MonkeyPatch, module: str, name: str, *arguments: str) -> Any:
    """``realtime`` of the options with which the command calls ``name``."""
    seen: list[Any] = []

    def called(*given: Any, **_: object) -> None:
        seen.extend(getattr(value, "migrate", value) for value in given)
        raise SystemExit(0)

    monkeypatch.setattr(importlib.import_module(module), name, called)
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    (told,) = (value.realtime for value in seen if hasattr(value, "realtime"))
    return told


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("vmth.cli.demo", "run_local", ["demo"]),
        ("vmth.cli.demo", "run_send", ["demo", "--send", "tcp:127.0.0.1:1"]),
        ("vmth.cli.demo", "run_receive", ["demo", "--receive", "tcp:127.0.0.1:1"]),
        ("vmth.cli.migrate", "depart", ["migrate", "--qmp", "q", "unix:/there"]),
        ("vmth.cli.receive", "QemuReceiver", ["receive", "--qmp", "q", "unix:/here"]),
    ],
)
def test_every_end_has_the_option(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, arguments: list[str]
) -> None:
    for given, expected in ((), True), (("--realtime", "off"), False), (("--realtime", "on"), True):
        assert realtime_of(monkeypatch, module, name, *arguments, *given) is expected


def test_the_session_of_a_qemu_and_the_other_mover_of_a_demo_are_told() -> None:
    for realtime in (True, False):
        assert QemuMigrateOptions(realtime=realtime).session_options().realtime is realtime
    told = CliRunner().invoke(
        cli, ["demo", "--memory", "16MiB", "--guest", "process", "--realtime", "off", "--json"]
    )
    assert told.exit_code == 0, told.output
    assert not any("real-time" in text for text in json.loads(told.stdout)["fallbacks"])


def test_a_probe_tells_whether_it_is_permitted() -> None:
    told = CliRunner().invoke(cli, ["probe", "--json"])
    assert json.loads(told.stdout)["realtime"] is permitted()
