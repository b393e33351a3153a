# SPDX-License-Identifier: Apache-2.0
"""``vmth demo`` as its users run it: every workload and mode, its exit codes, and its failures."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vmth.api import start_migration
from vmth.cli import main
from vmth.demo.check import check_at_home
from vmth.demo.guests import DepartingGuest
from vmth.demo.mover import DestinationMover
from vmth.demo.settings import ArrivalSettings
from vmth.dirty.probe import Status
from vmth.dirty.probe import probe as probe_tracking
from vmth.errors import MigrationError, VerificationError
from vmth.events import RoundFinished
from vmth.guests.client import status_of
from vmth.guests.kvm_machine import probe as probe_kvm
from vmth.guests.schedule import WORKLOADS, Workload
from vmth.guests.spawn import attach, spawn_source
from vmth.options import MigrateOptions, ReceiveOptions

KEYS = {
    "verified",
    "verified_scope",
    "guest",
    "dirty_source",
    "mode",
    "rounds",
    "total_time_ms",
    "downtime_ms",
    "downtime_parts_ms",
    "heartbeat_gap_ms",
    "heartbeats_lost",
    "memory_bytes",
    "wire_bytes",
    "digest_source",
    "digest_destination",
    "dirty_rate_asked_bps",
    "dirty_rate_reached_bps",
    "fallbacks",
    "seed",
}
ROUND_KEYS = {
    "round",
    "pages",
    "zero_pages",
    "bytes",
    "dirty_pages",
    "duration_ns",
    "bandwidth_bps",
}
#: Never converges: the guest dirties all it has in each round, and pages go whole.
ENDLESS = (
    *("--workload", "always", "--dirty-rate", "200MB/s", "--bandwidth", "60MB/s"),
    *("--forms", "zero"),
)

needs_uffd = pytest.mark.skipif(
    probe_tracking()["uffd-wp"].status is not Status.OK, reason="no userfaultfd WP_ASYNC here"
)
GUESTS = [
    pytest.param("process", marks=needs_uffd),
    pytest.param("kvm", marks=pytest.mark.skipif(not probe_kvm()[0], reason=probe_kvm()[1])),
]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@dataclass
class Run:
    code: int
    told: dict[str, Any]
    stderr: str


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "vmth", "demo", "--json", *options]


def small(*options: str) -> list[str]:
    quick = ("--memory", "64MiB", "--seed", "7", "--warm-up", "100ms", "--run-on", "50ms")
    return command(*quick, "--content", "zero=40,dup=10,random=50", *options)


def run(arguments: list[str]) -> Run:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=240)
    return Run(done.returncode, json.loads(done.stdout), done.stderr)


def assert_moved(done: Run) -> None:
    told = done.told
    assert done.code == 0, (told["error"], done.stderr)
    assert told["error"] is None and told["exit_code"] == 0
    assert told.keys() >= KEYS
    assert all(stats.keys() >= ROUND_KEYS for stats in told["rounds"])
    assert told["memory_bytes"] == 64 << 20
    assert told["heartbeats_lost"] == 0 and told["writes_lost"] == 0
    assert told["writes_checked"] > 0
    assert told["source_runs"] is False
    assert told["downtime_ms"] == pytest.approx(sum(told["downtime_parts_ms"].values()))
    assert sum(stats["bytes"] for stats in told["rounds"]) <= told["wire_bytes"]


@pytest.mark.skipif(not probe_kvm()[0], reason=probe_kvm()[1])
@pytest.mark.parametrize("dirty_source", ["kvm-ring", "kvm-log"])
def test_a_guest_of_several_vcpus_is_throttled_and_moves(dirty_source: str) -> None:
    """Where it is known who dirties, only the first vCPU gives anything up."""
    slow = ("--workload", "sparse", "--working-set", "16MiB", "--dirty-rate", "40MB/s")
    link = ("--bandwidth", "20MB/s", "--forms", "zero", "--downtime-limit", "100ms")
    stall = ("--on-stall", "throttle", "--timeout", "60s")
    done = run(small("--vcpus", "3", "--dirty-source", dirty_source, *slow, *link, *stall))
    assert_moved(done)
    assert done.told["vcpus"] == 3 and len(done.told["other_vcpus_beats_per_s"]) == 2
    assert all(rate > 0 for rate in done.told["other_vcpus_beats_per_s"])
    throttled = [row for row in done.told["throttles"] if row["percent"]]
    assert throttled, done.stderr
    for row in throttled:
        if dirty_source == "kvm-log":
            assert row["vcpu_percents"] == []
        else:
            first, *others = row["vcpu_percents"]
            assert first >= row["percent"] and others == [0, 0]


@pytest.mark.parametrize("guest", GUESTS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_workload_moves_live_and_loses_nothing(guest: str, workload: str) -> None:
    rate = () if workload == "idle" else ("--dirty-rate", "20MB/s", "--working-set", "8MiB")
    done = run(small("--guest", guest, "--workload", workload, "--audit", *rate))
    assert_moved(done)
    assert done.told["verified"] and done.told["verified_scope"] == "memory"
    assert done.told["digest_source"] == done.told["digest_destination"] != ""
    assert done.told["guest"] == guest and done.told["mode"] == "live"
    assert len(done.told["rounds"]) >= 2
    assert done.told["audited"] and done.told["bytes_compared"] == 64 << 20


@pytest.mark.skipif(not probe_kvm()[0], reason=probe_kvm()[1])
def test_kvm_with_the_dirty_ring() -> None:
    done = run(small("--guest", "kvm", "--dirty-source", "kvm-ring", "--audit"))
    assert_moved(done)
    assert done.told["dirty_source"] == "kvm-ring" and done.told["verified"]


@needs_uffd
def test_cold_mode_sends_one_round_of_a_paused_guest() -> None:
    done = run(small("--guest", "process", "--mode", "cold"))
    assert_moved(done)
    assert [stats["round"] for stats in done.told["rounds"]] == [0]
    assert done.told["verified"] and done.told["mode"] == "cold"


@needs_uffd
def test_nothing_is_verified_with_the_digest_off() -> None:
    done = run(small("--guest", "process", "--digest", "off"))
    assert_moved(done)
    assert done.told["verified"] is False and done.told["verified_scope"] == "none"
    assert done.told["digest_source"] is None
    assert any("digest" in what for what in done.told["fallbacks"])


@needs_uffd
def test_a_phase_jump_and_several_channels() -> None:
    jump = ("--phase-jump", "50ms:40MB/s", "--dirty-rate", "4MB/s", "--workload", "uniform")
    done = run(small("--guest", "process", "--channels", "4", *jump))
    assert_moved(done)
    assert done.told["dirty_rate_asked_bps"] == 4_000_000
    assert done.told["dirty_rate_reached_bps"] > 8_000_000


@needs_uffd
def test_a_guest_that_never_converges_runs_on_at_the_source() -> None:
    done = run(small("--guest", "process", *ENDLESS, "--on-stall", "cancel", "--timeout", "3s"))
    assert done.code == 5 == done.told["exit_code"]
    assert done.told["source_runs"] is True and done.told["verified"] is False
    assert done.told["heartbeats_lost"] == 0 and done.told["writes_lost"] == 0
    assert done.told["error"]


class Running:
    """A demonstration that is in its rounds; ``stderr`` is what it has said so far."""

    def __init__(self, arguments: list[str]) -> None:
        self.process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.stderr = ""

    def wait_for(self, text: str) -> None:
        assert self.process.stderr is not None
        while text not in self.stderr:
            line = self.process.stderr.readline()
            assert line, f"it ended without {text!r}: {self.stderr}"
            self.stderr += line

    def end(self) -> Run:
        out, rest = self.process.communicate(timeout=120)
        return Run(self.process.returncode, json.loads(out or "{}"), self.stderr + rest)

    def stop(self) -> None:
        with self.process:
            self.process.kill()

    def pids(self) -> list[int]:
        """Of the processes that it said it had started."""
        return [int(pid) for pid in re.findall(r"\(pid (\d+)\)", self.stderr)]


@pytest.fixture
def endless() -> Iterator[Running]:
    running = Running(small("--guest", "process", *ENDLESS))
    try:
        running.wait_for("round")
        yield running
    finally:
        running.stop()


def assert_gone(pids: list[int]) -> None:
    """Waits for their end: pidfds become readable then."""
    assert pids
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        poll = select.poll()
        poll.register(fd)
        assert poll.poll(30_000), f"process {pid} still runs"
        os.close(fd)


@needs_uffd
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 4)])
def test_a_signal_cancels_and_the_source_guest_runs_on(
    endless: Running, number: signal.Signals, code: int
) -> None:
    endless.process.send_signal(number)
    done = endless.end()
    assert done.code == code == done.told["exit_code"]
    assert done.told["source_runs"] is True
    assert done.told["heartbeats_lost"] == 0 and done.told["writes_lost"] == 0
    assert_gone(endless.pids())


@needs_uffd
def test_no_process_is_left_when_the_demonstration_is_killed(endless: Running) -> None:
    endless.process.kill()
    endless.process.wait()
    assert_gone(endless.pids())


@pytest.fixture
def departing() -> Iterator[DepartingGuest]:
    workload = Workload("sequential", 4_000_000, 8 << 20, seed=7)
    holder, prepared = spawn_source(
        "process", 64 << 20, content="zero=40,random=60", workload=workload
    )
    guest = DepartingGuest(holder, workload, "zero=40,random=60", prepared)
    try:
        yield guest
    finally:
        guest.holder.shutdown()


@needs_uffd
def test_a_destination_that_is_killed_harms_nothing_and_the_next_works(
    departing: DepartingGuest, tmp_path: Path
) -> None:
    def mover(name: str) -> DestinationMover:
        return DestinationMover(
            ArrivalSettings("process", 0), ReceiveOptions(state_dir=tmp_path / name)
        )

    options = MigrateOptions(
        state_dir=tmp_path / "source", bandwidth_bps=1_000_000, guest_info={"kind": "process"}
    )
    with mover("first") as first:
        job = start_migration(departing, first.uri, options)
        next(event for event in job.events() if type(event).__name__ == "RoundStarted")
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(MigrationError) as failed:
            job.wait(60)
        assert failed.value.exit_code == 1 and failed.value.source_runs
    assert departing.is_running()
    with mover("second") as second:
        job = start_migration(
            departing,
            second.uri,
            MigrateOptions(state_dir=tmp_path / "source", guest_info={"kind": "process"}),
        )
        rounds = [event for event in job.events() if isinstance(event, RoundFinished)]
        assert rounds and job.wait(60).verified
        assert second.outcome(60).check.passed


@needs_uffd
def test_a_byte_that_differs_ends_the_migration_and_the_source_guest_runs_on(
    departing: DepartingGuest, tmp_path: Path
) -> None:
    # Compared with another guest's memory, in which the same page holds other bytes.
    block = departing.blocks[0]
    other = os.memfd_create("other")
    os.ftruncate(other, block.used_length)
    os.set_inheritable(other, True)
    os.pwrite(other, b"not the guest's", block.used_length - 4096)
    there = ReceiveOptions(state_dir=tmp_path / "destination")
    with DestinationMover(ArrivalSettings("process", 0), there, [other]) as mover:
        os.close(other)
        job = start_migration(departing, mover.uri, MigrateOptions(state_dir=tmp_path / "source"))
        with pytest.raises(VerificationError, match="byte comparison: page") as failed:
            job.wait(60)
    assert failed.value.exit_code == 6 and failed.value.source_runs
    assert departing.is_running() and check_at_home(departing).passed


#: A source's mover that somebody kills: it becomes the mover of the holder at argv[1].
MOVER = """
import sys
from pathlib import Path
from vmth.api import start_migration
from vmth.cli import main
from vmth.guests.spawn import attach
job = start_migration(
    attach(sys.argv[1]), sys.argv[2], bandwidth_bps=1_000_000, state_dir=Path(sys.argv[3])
)
for event in job.events():
    print(type(event).__name__, flush=True)
"""


@needs_uffd
def test_recover_clears_up_after_a_source_mover_that_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = Workload("sequential", 4_000_000, 8 << 20, seed=7)
    holder, _ = spawn_source(
        "process", 64 << 20, content="zero=40,random=60", workload=workload, owned=False
    )
    path = holder.socket_path
    holder.close()
    try:
        there = ReceiveOptions(state_dir=tmp_path / "destination")
        with DestinationMover(ArrivalSettings("process", 0), there) as destination:
            arguments = [sys.executable, "-c", MOVER, path, destination.uri, str(tmp_path / "here")]
            with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as mover:
                assert mover.stdout is not None
                while mover.stdout.readline().strip() != "RoundStarted":
                    assert mover.poll() is None
                mover.kill()
        with pytest.raises(SystemExit) as end:
            main(["recover", "--state-dir", str(tmp_path / "here"), "--json"])
        told = json.loads(capsys.readouterr().out)
        assert end.value.code == 0, told
        assert [session["state"] for session in told["sessions"]] == ["kept"]
        assert status_of(path).running
    finally:
        attach(path).shutdown()


@needs_uffd
def test_a_second_signal_ends_everything_at_once(endless: Running) -> None:
    endless.process.send_signal(signal.SIGINT)
    endless.process.send_signal(signal.SIGTERM)
    endless.process.communicate()
    assert endless.process.returncode == 130
    assert_gone(endless.pids())


@needs_uffd
def test_a_source_guest_is_checked_where_it_runs(departing: DepartingGuest) -> None:
    report = check_at_home(departing)
    assert report.passed and report.writes_checked > 0


@needs_uffd
def test_two_processes_send_and_receive() -> None:
    receiver = Running(command("--receive", "tcp:127.0.0.1:0", "--run-on", "50ms"))
    try:
        receiver.wait_for("listening at")
        uri = re.search(r"listening at (\S+)", receiver.stderr)
        assert uri is not None
        sent = run(small("--guest", "process", "--send", uri[1], "--channels", "2"))
        received = receiver.end()
    finally:
        receiver.stop()
    assert sent.code == 0 and sent.told["verified"], sent.stderr
    assert received.code == 0 and received.told["verified"], received.stderr
    assert received.told["digest_destination"] == sent.told["digest_source"]
    assert received.told["heartbeats_lost"] == 0 and received.told["writes_lost"] == 0
    assert received.told["heartbeat_gap_ms"] > 0
    assert received.told["seed"] == 7 and received.told["workload"] == "zipf"
    assert any("CLOCK_REALTIME" in note for note in received.told["notes"])


@needs_uffd
def test_a_wrong_peer_is_named_and_the_source_guest_runs_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def speak_http() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=speak_http)
        thread.start()
        port = server.getsockname()[1]
        done = run(small("--guest", "process", "--send", f"tcp:127.0.0.1:{port}"))
        thread.join()
    assert done.code == 3 == done.told["exit_code"], done.stderr
    assert "not a vmth destination" in done.told["error"]
    assert done.told["source_runs"] is True


def test_a_busy_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = run(command("--receive", f"tcp:127.0.0.1:{port}"))
    assert done.code == 1
    assert "Address already in use" in done.told["error"] and str(port) in done.told["error"]
    assert "Traceback" not in done.stderr


@needs_uffd
def test_nobody_listening_leaves_the_source_guest_running() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    done = run(small("--guest", "process", "--send", f"tcp:127.0.0.1:{port}"))
    assert done.code == 1 and done.told["source_runs"] is True
    assert f"127.0.0.1:{port}" in done.told["error"]


def test_an_interrupt_while_memory_is_filled_ends_at_once() -> None:
    running = Running(command("--guest", "process", "--memory", "1GiB", "--content", "random=100"))
    try:
        running.wait_for("filling its memory")
        running.process.send_signal(signal.SIGINT)
        done = running.end()
    finally:
        running.stop()
    assert done.code == 130 == done.told["exit_code"]
    assert done.told["error"] == "interrupted" and "Traceback" not in done.stderr
