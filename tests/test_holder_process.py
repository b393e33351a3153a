# SPDX-License-Identifier: Apache-2.0
"""Holders as processes: movers that are killed, owners that die, nothing left over."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import PATIENCE_S, wait_until

from vmth.errors import GuestError, RefusedError, UsageError
from vmth.guest import StateStream
from vmth.guests import spawn
from vmth.guests.check import check
from vmth.guests.client import HolderGoneError, HolderGuest, reap_left_alone, status_of
from vmth.guests.schedule import Workload
from vmth.guests.spawn import (
    attach,
    available_memory_bytes,
    choose_guest,
    spawn_destination,
    spawn_source,
)

MIB = 1 << 20
CONTENT = "zero=50,random=50"
WORKLOAD = Workload("uniform", 40_960_000, MIB, seed=3)

KINDS = ["process", "kvm"]


def kind_or_skip(kind: str) -> str:
    chosen, reason = choose_guest(None)
    if kind == "kvm" and chosen != "kvm":
        pytest.skip(reason)
    return kind


@contextlib.contextmanager
def source_of(kind: str) -> Iterator[HolderGuest]:
    guest, _ = spawn_source(kind, 4 * MIB, content=CONTENT, workload=WORKLOAD)
    try:
        yield guest
    finally:
        guest.shutdown()


def wait_for_exit(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ready, _, _ = select.select([fd], [], [], PATIENCE_S)
        assert ready, f"process {pid} is still there"
    finally:
        os.close(fd)


def run_some_beats(guest: HolderGuest) -> None:
    beats = guest.beat_report().beats
    wait_until(lambda: guest.beat_report().beats > beats + 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_guest_moves_by_plain_copy_and_loses_nothing(kind: str) -> None:
    with source_of(kind_or_skip(kind)) as source:
        run_some_beats(source)
        assert source.pause()
        with contextlib.closing(spawn_destination(kind, source.blocks)) as destination:
            assert list(destination.blocks) == list(source.blocks)
            for ours, theirs in zip(source.views(), destination.views(), strict=True):
                theirs[:] = ours
            streams: list[StateStream] = []
            source.save_state(streams.append)
            source.hold()
            destination.load_state(streams)
            assert not destination.is_running()
            destination.resume()
            source.release()
            run_some_beats(destination)
            assert destination.pause_at_beat()
            found = check(destination.views()[0])
            assert found.ok, found
            assert destination.beat_report().out_of_order == 0
            pid = destination.status().pid
            destination.shutdown()
            wait_for_exit(pid)


MOVER = """
import signal, sys
from vmth.guests.schedule import Workload
from vmth.guests.spawn import spawn_source
guest, _ = spawn_source(
    {kind!r}, 4 << 20, content="zero=50,random=50",
    workload=Workload("uniform", 40_960_000, 1 << 20, seed=3), owned={owned},
)
{last}
print(guest.socket_path, guest.status().pid, flush=True)
signal.pause()
"""

LAST = [
    # (what the mover did before it was killed, does the guest run afterwards)
    ("pass", True),
    ("guest.dirty[0].start()", True),
    ("guest.pause()", True),
    ("guest.dirty[0].start(); guest.pause(); guest.hold()", False),
]


@contextlib.contextmanager
def killed_mover(kind: str, last: str, owned: bool) -> Iterator[tuple[str, int]]:
    """(socket path, pid) of a holder whose mover, another process, was killed with SIGKILL."""
    code = MOVER.format(kind=kind, last=last, owned=owned)
    environment = {**os.environ, "PYTHONPATH": str(Path(spawn.__file__).parents[2])}
    mover = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    try:
        assert mover.stdout is not None
        path, pid = mover.stdout.readline().split()
    finally:
        mover.kill()
        mover.communicate()
    try:
        yield path.decode(), int(pid)
    finally:
        with contextlib.suppress(GuestError):
            attach(path.decode()).shutdown()
        wait_for_exit(int(pid))
        assert not Path(path.decode()).exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("last", "runs"), LAST)
def test_a_guest_survives_its_killed_mover(kind: str, last: str, runs: bool) -> None:
    with killed_mover(kind_or_skip(kind), last, owned=False) as (path, _):
        with contextlib.closing(attach(path)) as guest:
            assert guest.is_running() == runs
            if not runs:
                guest.resume()
            run_some_beats(guest)
            assert guest.pause_at_beat()
            assert check(guest.views()[0]).ok


@pytest.mark.slow
def test_an_owned_guest_ends_with_its_owner_unless_it_is_held() -> None:
    with killed_mover("process", "pass", owned=True) as (path, pid):
        wait_for_exit(pid)
        with pytest.raises(HolderGoneError):
            status_of(path)
    with killed_mover("process", "guest.pause(); guest.hold()", owned=True) as (path, _):
        assert status_of(path).phase == "held"


@pytest.mark.slow
def test_nothing_is_left_of_a_guest() -> None:
    with source_of("process"):
        pass  # imports and caches are there now
    descriptors = sorted(os.listdir("/proc/self/fd"))
    with source_of("process") as guest:
        pid, path = guest.status().pid, guest.socket_path
        guest.views()
        guest.dirty[0].start()
        guest.dirty[0].stop()
    assert sorted(os.listdir("/proc/self/fd")) == descriptors
    assert not Path(path).parent.exists()
    assert not Path(f"/proc/{pid}").exists()
    assert b"vmth" not in Path("/proc/self/maps").read_bytes().replace(b"vmth/", b"")


@pytest.mark.slow
def test_sigterm_ends_a_holder_cleanly_and_its_death_is_named() -> None:
    with source_of("process") as guest:
        pid = guest.status().pid
        os.kill(pid, signal.SIGTERM)
        wait_for_exit(pid)
        with pytest.raises(HolderGoneError, match="process guest's holder"):
            guest.pause()
        assert not Path(guest.socket_path).parent.exists()


@pytest.mark.slow
def test_ctrl_c_is_not_for_the_guest() -> None:
    with source_of("process") as guest:
        os.kill(guest.status().pid, signal.SIGINT)
        run_some_beats(guest)


@pytest.mark.slow
def test_a_closed_guest_is_waited_for_once_it_ends() -> None:
    guest, _ = spawn_source("process", 4 * MIB, content=CONTENT, workload=WORKLOAD)
    pid, path = guest.status().pid, guest.socket_path
    guest.close()
    attach(path).shutdown()
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    reap_left_alone()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_a_guest_that_cannot_be_made_is_an_error_and_leaves_no_process() -> None:
    before = _children()
    with pytest.raises(UsageError, match="room"):
        spawn_source("process", MIB, workload=Workload(working_set_bytes=MIB))
    reap_left_alone()
    assert _children() == before


def _children() -> set[str]:
    me = os.getpid()
    return set(Path(f"/proc/{me}/task/{me}/children").read_text().split())


@pytest.mark.parametrize(
    ("kind", "nbytes", "source"),
    [("xen", MIB, None), ("process", 1, None), ("process", MIB, "kvm-log"), ("kvm", MIB, "x")],
)
def test_bad_values_are_refused_before_anything_is_spawned(
    kind: str, nbytes: int, source: str | None
) -> None:
    before = _children()
    for make in (spawn_source, spawn_destination):
        with pytest.raises(UsageError):
            make(kind, nbytes, dirty_source=source)
    assert _children() == before


def test_a_guest_larger_than_memory_is_refused() -> None:
    available, _ = available_memory_bytes()
    too_much = available // 4096 * 4096
    for make in (spawn_source, spawn_destination):
        with pytest.raises(RefusedError, match=r"^memory: the guest needs \d+ bytes"):
            make("process", too_much)


CGROUPS = [
    # (name, /proc/self/cgroup, files, bytes available)
    ("none", "", {}, 1000 * 1024),
    ("v2, no limit", "0::/a/b\n", {"a/b/memory.max": "max"}, 1000 * 1024),
    (
        "v2, limit above us",
        "0::/a/b\n",
        {"a/memory.max": "5000", "a/memory.current": "3000", "a/b/memory.max": "max"},
        2000,
    ),
    (
        "v2, page cache can go",
        "0::/a\n",
        {
            "a/memory.max": "5000",
            "a/memory.current": "3000",
            "a/memory.stat": "inactive_file 100\nactive_file 10\n",
        },
        2110,
    ),
    (
        "v1",
        "4:cpu:/x\n3:memory:/a\n",
        {"memory/a/memory.limit_in_bytes": "900", "memory/a/memory.usage_in_bytes": "1000"},
        0,
    ),
]


@pytest.mark.parametrize(("name", "cgroup", "files", "available"), CGROUPS)
def test_memory_that_is_left(
    tmp_path: Path, name: str, cgroup: str, files: dict[str, str], available: int
) -> None:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   1000 kB\n")
    (proc / "self/cgroup").write_text(cgroup)
    for file, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert available_memory_bytes(str(tmp_path))[0] == available


def test_the_guest_that_is_asked_for_is_chosen() -> None:
    assert choose_guest("process") == ("process", "asked for")
    with pytest.raises(UsageError):
        choose_guest("xen")
    kind, reason = choose_guest(None)
    assert kind in KINDS and reason
    if kind == "process":
        with pytest.raises(RefusedError, match="guest kvm"):
            choose_guest("kvm")
