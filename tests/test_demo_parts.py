# SPDX-License-Identifier: Apache-2.0
"""The demo's parts without a migration: settings, record, byte comparison, report."""

from __future__ import annotations

import json
import mmap
import os
import sys
from collections.abc import Iterator
from dataclasses import replace

import msgspec
import pytest

from vmth.demo.arrival import Arrival
from vmth.demo.check import GuestCheckReport, beats_missing
from vmth.demo.compare import compare_memories
from vmth.demo.guests import vcpus_of
from vmth.demo.outcome import Outcome
from vmth.demo.record import STREAM_NAME, TravelRecord, from_stream, to_stream
from vmth.demo.report import json_object, summary_lines
from vmth.demo.run import account_for_signal
from vmth.demo.settings import DemoSettings
from vmth.errors import (
    ExitCode,
    GuestError,
    MigrationError,
    NotConvergedError,
    UsageError,
    VerificationError,
)
from vmth.events import RoundFinished
from vmth.guest import StateStream
from vmth.meter import MoverCost, MoverMeter
from vmth.progress import Console, round_line
from vmth.report import form_lines
from vmth.stats import (
    DowntimeParts,
    FormCounters,
    JobStats,
    MigrationResult,
    RoundStats,
    TransferCounters,
)
from vmth.types import Mapping, RamBlock

RECORD = TravelRecord(
    guest="kvm",
    content="zero=100",
    workload="zipf",
    rate_bps=50_000_000,
    working_set_bytes=0,
    seed=2**64 - 1,
    jump=(5_000_000_000, 400_000_000),
    beats=1000,
    last_beat_at_ns=1_000_000_000,
    out_of_order=0,
    running_ns=1_000_000_000,
    rate_reached_bps=49e6,
)
ROUND = RoundStats(
    round=0,
    pages=10,
    normal_pages=6,
    zero_pages=3,
    hole_pages=1,
    bytes=25_000,
    duration_ns=1_000_000,
    bandwidth_bps=25e6,
    dirty_pages=2,
    dirty_rate_bps=8e6,
    expected_downtime_ns=3_000_000,
    delta_pages=2,
    same_pages=5,
    forms={"delta": FormCounters(pages=2), "same": FormCounters(pages=5, tried_pages=11)},
)
RESULT = MigrationResult(
    verified=True,
    verified_scope="memory",
    mode="live",
    rounds=(ROUND,),
    total_ns=5_000_000,
    downtime_ns=21_000_000,
    downtime_parts=DowntimeParts(1_000_000, 2_000_000, 3_000_000, 4_000_000, 5_000_000, 6_000_000),
    memory_bytes=40_960,
    wire_bytes=26_000,
    digest_source="ab" * 16,
    digest_destination="ab" * 16,
    transfer=TransferCounters(normal_pages=6),
    fallbacks=("zerocopy: off",),
    session_id="01" * 16,
)


def arrival(check: GuestCheckReport) -> Arrival:
    return Arrival(
        session_id="01" * 16,
        peer="tcp:127.0.0.1:1",
        guest="kvm",
        guest_reason="it runs",
        was_running=True,
        verified=True,
        verified_scope="memory",
        digest="ab" * 16,
        memory_bytes=40_960,
        wire_bytes=26_000,
        bytes_compared=0,
        heartbeat_gap_ns=20_000_000,
        record=RECORD,
        check=check,
        cost=MoverCost(0.5, 3 << 20, 2 << 20),
        fallbacks=("zerocopy: off",),
    )


GOOD = GuestCheckReport(2000, 0, 24_000, 0, ())


def test_the_record_survives_its_stream() -> None:
    assert from_stream(to_stream(RECORD)) == RECORD
    several = msgspec.structs.replace(RECORD, other_beats=(5, 6))
    assert from_stream(to_stream(several)) == several
    # A destination of an older version takes a guest of one vCPU.
    assert b"other_beats" not in to_stream(RECORD).data


@pytest.mark.parametrize("text", ["", "two", "-1", "1 ", "\u0662", "1" * 10])
def test_a_number_of_vcpus_that_is_none(text: str) -> None:
    assert vcpus_of({}) == 1 and vcpus_of({"vcpus": "8"}) == 8
    with pytest.raises(UsageError, match="allowed a number"):
        vcpus_of({"vcpus": text})


@pytest.mark.parametrize(
    ("name", "stream"),
    [
        ("version", StateStream(STREAM_NAME, 2, to_stream(RECORD).data)),
        ("no JSON", StateStream(STREAM_NAME, 1, b"\xff")),
        ("cut", StateStream(STREAM_NAME, 1, to_stream(RECORD).data[:-1])),
        ("missing field", StateStream(STREAM_NAME, 1, b"{}")),
        ("too long", StateStream(STREAM_NAME, 1, to_stream(RECORD).data + b" " * 4096)),
        (
            "negative",
            StateStream(STREAM_NAME, 1, to_stream(RECORD).data.replace(b"1000,", b"-1000,", 1)),
        ),
    ],
)
def test_a_damaged_record_is_refused(name: str, stream: StateStream) -> None:
    with pytest.raises(GuestError, match=STREAM_NAME):
        from_stream(stream)


@pytest.fixture
def memories() -> Iterator[tuple[int, int]]:
    fds = [os.memfd_create("one"), os.memfd_create("other")]
    for fd in fds:
        os.ftruncate(fd, 16 << 20)
        os.pwrite(fd, b"same", 5 << 20)
    yield fds[0], fds[1]
    for fd in fds:
        os.close(fd)


def block(nbytes: int = 16 << 20) -> RamBlock:
    return RamBlock("ram", nbytes, 0, Mapping(fd=0))


def test_equal_memories_compare_equal_and_stay_holes(memories: tuple[int, int]) -> None:
    ours, theirs = memories
    before = os.fstat(ours).st_blocks
    assert compare_memories([block()], [ours], [theirs]) == 16 << 20
    assert os.fstat(ours).st_blocks == before


def test_zeros_that_were_written_equal_a_hole(memories: tuple[int, int]) -> None:
    ours, theirs = memories
    os.pwrite(ours, bytes(8192), 9 << 20)
    assert compare_memories([block()], [ours], [theirs]) == 16 << 20


@pytest.mark.parametrize("at", [0, 4095, 4096, (4 << 20) - 1, 4 << 20, 7_654_321, (16 << 20) - 1])
def test_one_byte_that_differs_is_found_by_page(memories: tuple[int, int], at: int) -> None:
    ours, theirs = memories
    os.pwrite(theirs, b"\1", at)
    with pytest.raises(VerificationError, match=rf"page {at // 4096} of ramblock 'ram'"):
        compare_memories([block()], [ours], [theirs])


def test_memory_that_ends_early_is_an_error(memories: tuple[int, int]) -> None:
    ours, theirs = memories
    os.ftruncate(theirs, 6 << 20)
    with pytest.raises(OSError, match="memory ends at"):
        compare_memories([block()], [ours], [theirs])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"guest": "qemu"}, "kvm, process"),
        ({"dirty_source": "magic"}, "uffd-wp"),
        ({"guest": "process", "dirty_source": "kvm-ring"}, "uffd-wp"),
        ({"vcpus": 9}, "1 to 8"),
        ({"vcpus": 0}, "received 0"),
        ({"guest": "process", "vcpus": 2}, "allowed 1"),
        ({"content": "zero=1"}, "100"),
        ({"memory_bytes": 5}, "memory"),
        ({"workload": "busy"}, "zipf"),
        ({"warm_up_ns": -1}, "0 to a day"),
    ],
)
def test_settings_that_are_not_allowed(given: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        DemoSettings(**given)  # type: ignore[arg-type]


def test_always_is_unpaced_unless_asked() -> None:
    assert DemoSettings(workload="always").guest_workload().rate_bps == 0
    assert DemoSettings(workload="always", dirty_rate_bps=8192).guest_workload().rate_bps == 8192
    assert DemoSettings(workload="zipf").guest_workload().rate_bps == 50_000_000


def moved(check: GuestCheckReport = GOOD) -> Outcome:
    outcome = Outcome("local", DemoSettings(seed=7), "kvm", "it runs", "kvm-log")
    outcome.result, outcome.arrival, outcome.record = RESULT, arrival(check), RECORD
    outcome.source_runs = False
    outcome.source_cost = MoverCost(0.25, 5 << 20, 4 << 20)
    return outcome


def test_a_good_end_is_told_completely() -> None:
    told = json.loads(json.dumps(json_object(moved())))
    assert told["verified"] is True and told["verified_scope"] == "memory"
    assert told["downtime_ms"] == 21 == sum(told["downtime_parts_ms"].values())
    assert told["heartbeat_gap_ms"] == 20 and told["heartbeats_lost"] == 0
    assert told["fallbacks"] == ["zerocopy: off"]
    assert told["movers"]["destination"]["peak_memory_bytes"] == 3 << 20
    first = told["rounds"][0]
    assert (first["zero_pages"], first["delta_pages"], first["same_pages"]) == (3, 2, 5)
    assert first["forms"]["same"]["pages"] == 5 and first["forms"]["same"]["tried_pages"] == 11
    text = "\n".join(summary_lines(moved()))
    for said in ("verified         yes, memory", "2000 heartbeats, none lost", "ab" * 16, "21ms"):
        assert said in text


def test_a_lost_write_is_never_verified() -> None:
    outcome = moved(GuestCheckReport(2000, 0, 24_000, 3, ("3 writes lost",)))
    outcome.fail(VerificationError("after the move: 3 writes lost"))
    told = json_object(outcome)
    assert told["verified"] is False and told["verified_scope"] == "none"
    assert told["exit_code"] == 6 and told["writes_lost"] == 3
    assert "verified         yes" not in "\n".join(summary_lines(outcome))


def test_a_failure_has_every_key_of_a_success() -> None:
    outcome = Outcome("local", DemoSettings(seed=7))
    outcome.rounds.append(ROUND)
    outcome.fail(NotConvergedError("dirty rate too high"))
    outcome.fail(UsageError("a later one"))
    outcome.source_runs = True
    told = json_object(outcome)
    assert told.keys() == json_object(moved()).keys()
    assert told["error"] == "dirty rate too high"
    assert told["exit_code"] == ExitCode.NOT_CONVERGED and told["source_runs"] is True
    assert told["rounds"][0]["round"] == 0 and told["downtime_ms"] is None
    assert "runs here" in "\n".join(summary_lines(outcome))


def test_the_forms_that_pages_took_are_one_line() -> None:
    forms = {
        "same": FormCounters(pages=5),
        "zstd": FormCounters(pages=70, tried_pages=90, content_bytes=286_720, wire_bytes=2048),
        "delta": FormCounters(tried_pages=3),
    }
    transfer = TransferCounters(normal_pages=12, zero_pages=3, forms=forms)
    (line,) = form_lines(replace(RESULT, transfer=transfer))
    assert line.split(maxsplit=1) == ["pages", "12 as they are, 3 zero, 70 zstd in 2KiB, 5 same"]
    assert form_lines(replace(RESULT, transfer=TransferCounters())) == []
    outcome = moved()
    outcome.result = replace(RESULT, transfer=transfer)
    assert line in summary_lines(outcome)


def test_a_round_is_one_line() -> None:
    line = round_line(ROUND)
    assert line.split() == ["0", "10", "6", "3", "1", "7", "24.4KiB", "25MB/s", "2", "8MB/s", "3ms"]


def test_a_mover_is_metered() -> None:
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # not the heap: what others gave back is there
    with mmap.mmap(-1, 16 << 20, private) as kept, MoverMeter() as meter:
        kept.write(b"\1" * len(kept))
    assert meter.cost.peak_memory_bytes >= meter.cost.start_memory_bytes + (8 << 20)
    assert meter.cost.cpu_seconds > 0


def test_lines_stand_above_the_live_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    ours, theirs = os.openpty()
    stats = JobStats("active", 1, 1 << 20, 0, 1 << 20, 1e6, 0.0, 4096, 1, 1, 1, 0, 0)
    with os.fdopen(theirs, "w") as terminal, os.fdopen(ours, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        console = Console(terminal)
        with console.live(lambda: stats):
            console.say("a line [that] stands")
        console.say("and another")
        terminal.flush()
        written = b""
        while not written.endswith(b"and another\r\n"):  # a read may return a part
            written += screen.read(65536)
    shown = written.decode()
    assert "migration" in shown and "a line [that] stands" in shown


def test_without_a_terminal_there_are_only_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(sys.stdout)
    with console.live(lambda: pytest.fail("nobody looks")):
        console.show(RoundFinished(0, ROUND, None))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["round", "pages", "normal"]
    assert lines[1] == round_line(ROUND)


@pytest.mark.parametrize(
    ("error", "in_doubt", "signalled", "code"),
    [
        ("cancelled", False, ExitCode.INTERRUPTED, 130),
        ("cancelled", False, ExitCode.CANCELLED, 4),
        ("nobody knows", True, ExitCode.INTERRUPTED, 7),
        ("", False, ExitCode.INTERRUPTED, 0),
        ("failed", False, None, 1),
    ],
)
def test_what_a_signal_means_for_the_exit_code(
    error: str, in_doubt: bool, signalled: ExitCode | None, code: int
) -> None:
    outcome = Outcome("local", in_doubt=in_doubt)
    if error:
        outcome.fail(MigrationError(error), ExitCode.IN_DOUBT if in_doubt else None)
    account_for_signal(outcome, signalled)
    assert outcome.exit_code == code


@pytest.mark.parametrize(
    ("kind", "seen", "in_memory", "missing"),
    [
        ("kvm", 7, 7, 0),
        ("kvm", 7, 8, 0),  # paused between the count and its OUT
        ("kvm", 7, 9, 2),
        ("kvm", 7, 6, 1),  # an old page
        ("process", 7, 7, 0),
        ("process", 7, 8, 1),
    ],
)
def test_a_beat_that_is_on_its_way_is_not_lost(
    kind: str, seen: int, in_memory: int, missing: int
) -> None:
    assert beats_missing(kind, seen, in_memory) == missing
