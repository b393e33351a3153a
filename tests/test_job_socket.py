# SPDX-License-Identifier: Apache-2.0
"""A job's socket: what reaches the job, what does not, and whose socket it is."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import wait_until

from vmth import job_socket as module
from vmth.channel.sockets import is_stale
from vmth.errors import OptionError, UsageError
from vmth.job import MOST, JobSession, MigrationJob
from vmth.job_socket import (
    MAX_REQUEST_BYTES,
    THREAD,
    JobReply,
    JobRequest,
    JobSocket,
    _answer,
    ask_job,
)
from vmth.stats import ChannelCounters, FormCounters, JobStats, TransferCounters

STATS = JobStats(
    *("active", 3, 1 << 30, 1 << 20, 1 << 29, 1.5e8, 2.5e4, 4096, 7, 8, 9, 0, 12),
    transfer=TransferCounters(
        wire_bytes=5,
        forms={"zstd": FormCounters(pages=4)},
        channels=(ChannelCounters(0, pages=3, local="127.0.0.1"),),
    ),
)


class FakeJob:
    """Notes what it was told. ``session_id`` and the rest are what ``MigrationJob`` has."""

    session_id = "5e" * 16

    def __init__(self) -> None:
        self.done = False
        self.told: list[Any] = []

    def set(self, **values: int | None) -> None:
        given = {name: value for name, value in values.items() if value is not None}
        if given.get("downtime_limit_ns") == 0:
            raise OptionError("downtime_limit_ns", "received 0, allowed 1 and more")
        if given:
            self.told.append(given)

    def switchover(self) -> None:
        self.told.append("switchover")

    def cancel(self) -> None:
        assert threading.current_thread().name == THREAD
        self.told.append("cancel")

    def stats(self) -> JobStats:
        return STATS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "job"


@pytest.fixture
def job(path: Path) -> Iterator[FakeJob]:
    fake = FakeJob()
    with JobSocket(path) as steered:
        steered.serve(fake)
        yield fake


def sent(path: Path, data: bytes, *, shut: bool = True) -> bytes:
    """All that comes back."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path))
        client.sendall(data)
        if shut:
            client.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := client.recv(1 << 16):
            answer += piece
    return answer


def test_a_look_changes_nothing_and_tells_everything(path: Path, job: FakeJob) -> None:
    reply = ask_job(path, JobRequest())
    assert reply == JobReply(session_id=job.session_id, stats=STATS)
    assert job.told == []


def test_changes_reach_the_job_in_order(path: Path, job: FakeJob) -> None:
    ask_job(path, JobRequest(bandwidth_bps=0, downtime_limit_ns=5, timeout_ns=6))
    ask_job(path, JobRequest(bandwidth_bps=7, switchover=True, cancel=True))
    ask_job(path, JobRequest(timeout_ns=MOST))
    assert job.told == [
        {"bandwidth_bps": 0, "downtime_limit_ns": 5, "timeout_ns": 6},
        {"bandwidth_bps": 7},
        "switchover",
        "cancel",
        {"timeout_ns": MOST},
    ]


def test_a_value_that_is_not_allowed_changes_nothing(path: Path, job: FakeJob) -> None:
    reply = ask_job(path, JobRequest(downtime_limit_ns=0, switchover=True, cancel=True))
    assert reply == JobReply(error="downtime_limit_ns: received 0, allowed 1 and more")
    assert job.told == []


def test_a_job_that_has_ended_says_so(path: Path, job: FakeJob) -> None:
    job.done = True
    assert ask_job(path, JobRequest(cancel=True)) == JobReply(error="the job has ended")
    assert job.told == []


def test_one_line_of_json_each_way_is_all_it_takes(path: Path, job: FakeJob) -> None:
    """What docs/operations.md says to those who do without the command."""
    answer = sent(path, b'{"switchover": true}\n', shut=False)
    assert answer.endswith(b"}\n") and answer.count(b"\n") == 1
    told = json.loads(answer)
    assert told["session_id"] == job.session_id and "error" not in told
    assert told["stats"]["memory_iteration"] == 3
    assert told["stats"]["transfer"]["channels"][0]["local"] == "127.0.0.1"
    assert job.told == ["switchover"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"cancel\n",
        b"[]\n",
        b'{"cancel": 1}\n',
        b'{"bandwidth_bps": 9223372036854775808, "cancel": true}\n',
        b'{"downtime_limit_ns": -1, "cancel": true}\n',
        b'{"bandwidth_bps": "5MB/s", "cancel": true}\n',
        b'{"cancel": true, "halt": true}\n',
        b'{"cancel": true} {"cancel": true}\n',
        b"\xff\xfe\n",
        b"[" * MAX_REQUEST_BYTES,
        b'{"cancel": true}' + b" " * MAX_REQUEST_BYTES + b"\n",
    ],
)
def test_what_is_no_request_is_told_so_and_changes_nothing(
    path: Path, job: FakeJob, data: bytes
) -> None:
    told = json.loads(sent(path, data))
    assert "received" in told["error"] and "allowed one object of bandwidth_bps" in told["error"]
    assert job.told == []
    ask_job(path, JobRequest(switchover=True))
    assert job.told == ["switchover"]


@pytest.mark.parametrize("name", ["bandwidth_bps", "downtime_limit_ns", "timeout_ns"])
def test_a_job_takes_no_more_than_the_core_counts_in(name: str) -> None:
    job = MigrationJob(cast(JobSession, SimpleNamespace(events=queue.Queue(), run=lambda: None)))
    for wrong in (-1, MOST + 1):
        with pytest.raises(OptionError, match=rf"received {wrong}, allowed [01] to {MOST}"):
            job.set(**{name: wrong})


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_no_bytes_make_it_fail(data: bytes) -> None:
    job = FakeJob()
    reply = _answer(job, data)
    assert reply.error or reply.stats is not None


def test_a_client_that_says_nothing_is_let_go(
    path: Path, job: FakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.2)
    with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as gone:
        silent.connect(str(path))
        gone.connect(str(path))
        gone.close()
        ask_job(path, JobRequest(switchover=True))
        silent.settimeout(60)
        assert silent.recv(1) == b""
    assert job.told == ["switchover"]


def test_a_client_that_drips_does_not_hold_others_for_long(
    path: Path, job: FakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.2)
    ended = threading.Event()

    def drip() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            began.set()
            try:
                while not ended.is_set():
                    client.sendall(b" ")
                    time.sleep(0.02)
            except OSError:
                pass

    began = threading.Event()
    thread = threading.Thread(target=drip)
    thread.start()
    assert began.wait(60)
    try:
        ask_job(path, JobRequest(switchover=True), timeout_s=60)
    finally:
        ended.set()
        thread.join()
    assert job.told == ["switchover"]


def test_many_clients_at_once_are_all_served(path: Path, job: FakeJob) -> None:
    threads = [
        threading.Thread(target=ask_job, args=(path, JobRequest(bandwidth_bps=n), 60.0))
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told["bandwidth_bps"] for told in job.told) == list(range(20))


def test_a_client_waits_for_a_place_in_the_queue(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BACKLOG", 0)
    monkeypatch.setattr(module, "PATIENCE_S", 1e6)
    job = FakeJob()
    with JobSocket(path) as steered, contextlib.ExitStack() as waiting:
        steered.serve(job)
        for _ in range(2):
            client = waiting.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(path))
            wait_until(lambda: steered._client is not None)  # the first; the second is the queue
        asking = threading.Thread(target=ask_job, args=(path, JobRequest(switchover=True), 60.0))
        asking.start()
        asking.join(0.1)
        assert asking.is_alive() and job.told == []
        waiting.close()
        asking.join()
    assert job.told == ["switchover"]


def test_it_is_the_owners_alone_and_gone_with_the_job(path: Path) -> None:
    with JobSocket(path) as steered:
        found = path.lstat()
        assert stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600
        steered.serve(FakeJob())
        ask_job(path, JobRequest())
    steered.close()
    assert not path.exists()
    assert not [one for one in threading.enumerate() if one.name == THREAD]


def test_who_asks_before_the_job_has_begun_is_told_so(path: Path) -> None:
    job = FakeJob()
    with JobSocket(path) as steered:
        reply = ask_job(path, JobRequest(switchover=True))
        assert reply == JobReply(error="the job has not begun")
        steered.serve(job)
        assert ask_job(path, JobRequest()).stats == STATS
    assert job.told == []


def test_a_request_whose_sender_has_gone_changes_nothing(path: Path, job: FakeJob) -> None:
    with socket.socket(socket.AF_UNIX) as holds, socket.socket(socket.AF_UNIX) as leaves:
        holds.connect(str(path))  # is served first
        leaves.connect(str(path))
        leaves.sendall(b'{"cancel": true}\n')
        leaves.close()
        holds.sendall(b'{"switchover": true}\n')
        holds.settimeout(60)
        assert b"session_id" in holds.recv(1 << 16)
    ask_job(path, JobRequest(bandwidth_bps=1))
    assert job.told == ["switchover", {"bandwidth_bps": 1}]


def test_a_job_that_fails_leaves_the_next_one_served(
    path: Path, job: FakeJob, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> JobStats:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(job, "stats", fails)
        with pytest.raises(UsageError, match="received b''"):
            ask_job(path, JobRequest(switchover=True))
    assert ask_job(path, JobRequest()).stats == STATS
    assert "a request was not answered" in caplog.text


def test_a_client_that_says_nothing_does_not_hold_up_the_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 1e6)
    steered = JobSocket(path)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(path))
        wait_until(lambda: steered._client is not None)
        steered.close()
        assert not path.exists()


def test_what_a_dead_process_left_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen(1)
    with JobSocket(path) as steered:
        steered.serve(FakeJob())
        assert ask_job(path, JobRequest()).stats == STATS


def test_what_stands_there_stays(path: Path, tmp_path: Path) -> None:
    with JobSocket(path):
        with pytest.raises(UsageError, match="in use; allowed: a path for a new unix socket"):
            JobSocket(path)
        assert path.exists()
    path.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(path)
    for taken in (path, tmp_path / "link", tmp_path):
        with pytest.raises(UsageError, match="in use"):
            JobSocket(taken)
    assert path.read_bytes() == b"precious"
    for wrong, why in ((tmp_path / "no" / "job", "No such file"), (Path("x" * 300), "too long")):
        with pytest.raises(UsageError, match=why):
            JobSocket(wrong)


def test_a_path_may_be_long(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    with JobSocket(deep / "job") as steered:
        steered.serve(FakeJob())
        assert ask_job(deep / "job", JobRequest()).stats == STATS
    assert list(deep.iterdir()) == []


def test_of_many_that_want_a_dead_ones_place_one_gets_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    got: list[JobSocket] = []
    refused: list[UsageError] = []

    def want() -> None:
        try:
            got.append(JobSocket(path))
        except UsageError as error:
            refused.append(error)

    inside: list[int] = []

    def slowly(path: str) -> bool:
        inside.append(1)
        time.sleep(0.02)
        assert len(inside) == 1, "two look at it at once"
        inside.pop()
        return is_stale(path)

    monkeypatch.setattr(module, "is_stale", slowly)
    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)
    got[0].serve(FakeJob())
    assert ask_job(path, JobRequest()).stats == STATS
    got[0].close()


def test_another_ones_socket_at_that_path_is_not_taken_away(path: Path) -> None:
    with JobSocket(path):
        os.unlink(path)
        path.write_bytes(b"precious")
    assert path.read_bytes() == b"precious"


def test_where_nothing_listens_the_reason_is_told(path: Path) -> None:
    allowed = "allowed: the --job-socket of a migration that goes on"
    with pytest.raises(UsageError, match=f"No such file.*{allowed}"):
        ask_job(path, JobRequest())
    path.write_bytes(b"")
    with pytest.raises(UsageError, match=f"refused; {allowed}"):
        ask_job(path, JobRequest())
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(4)
        with pytest.raises(UsageError, match=f"no answer within 0.05s; {allowed}"):
            ask_job(path, JobRequest(), timeout_s=0.05)
        other.accept()[0].close()  # the one before

        def greet() -> None:
            with other.accept()[0] as client:
                assert client.recv(1 << 16)  # or who asks cannot send
                client.sendall(b"hello\n")

        answering = threading.Thread(target=greet)
        answering.start()
        with pytest.raises(UsageError, match="received b'hello'"):
            ask_job(path, JobRequest(), timeout_s=60)
        answering.join()
