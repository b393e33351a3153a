# SPDX-License-Identifier: Apache-2.0
"""``vmth job`` as its users run it, beside a ``vmth demo`` that goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

VMTH = (sys.executable, "-m", "vmth")
#: 54 MB of what zstd halves: 20 s at the cap that it begins with.
SLOW = (
    *("demo", "--json", "--memory", "64MiB", "--seed", "7"),
    *("--warm-up", "50ms", "--run-on", "50ms", "--workload", "idle"),
    *("--content", "zero=15,files=85", "--bandwidth", "2MB/s"),
)


def job(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = [*VMTH, "job", str(path), *options]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=60)


def told(path: Path, *options: str) -> dict[str, Any]:
    done = job(path, "--json", *options)
    assert done.returncode == 0, done.stderr
    values: dict[str, Any] = json.loads(done.stdout)
    return values


class Demo:
    def __init__(self, process: subprocess.Popen[str], path: Path) -> None:
        self.process, self.path = process, path

    def sends(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()
        done = job(self.path, "--json")  # it may not be there yet, or the guest warms up
        return done.returncode == 0 and json.loads(done.stdout)["transfer"]["acked_bytes"] > 100_000

    def end(self) -> dict[str, Any]:
        stdout, stderr = self.process.communicate(timeout=60)
        values: dict[str, Any] = json.loads(stdout)
        assert values["exit_code"] == self.process.returncode, stderr
        assert not self.path.exists()
        return values


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    path = tmp_path / "job"
    arguments = [*VMTH, *SLOW, "--job-socket", str(path)]
    with started(arguments) as process:
        running = Demo(process, path)
        wait_until(running.sends)
        yield running


@contextmanager
def started(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_cap_is_lifted_and_the_choice_of_forms_follows(demo: Demo) -> None:
    before = told(demo.path)
    assert before["status"] == "active" and before["bandwidth_limit_bps"] == 2_000_000
    assert before["memory_total"] == 64 << 20 and before["memory_iteration"] == 0
    after = told(demo.path, "--bandwidth", "0")
    assert after["bandwidth_limit_bps"] == 0
    assert after["session_id"] == before["session_id"]
    ended = demo.end()
    assert ended["exit_code"] == 0 and ended["verified"]
    assert ended["rounds"][0]["bandwidth_bps"] > 3_000_000, "the cap was kept"
    first = ended["form_decisions"][0]
    assert "zstd" in first["forms"] and "a cap of 2.0 MB/s" in first["reason"]
    assert "cap" not in ended["form_decisions"][-1]["reason"]


def test_other_limits_are_changed_and_shown(demo: Demo) -> None:
    after = told(demo.path, "--downtime-limit", "120ms", "--timeout", "5s")
    assert after["downtime_limit_ns"] == 120_000_000
    assert after["bandwidth_limit_bps"] == 2_000_000, "it was not given"
    shown = job(demo.path)
    assert shown.returncode == 0
    lines = {line[:16].strip(): line[17:] for line in shown.stdout.splitlines()}
    assert lines["session"] == after["session_id"]
    assert lines["status"].startswith("active, ")
    assert lines["rounds"].startswith("0 done, ") and lines["rounds"].endswith(" of 64MiB left")
    assert lines["on the wire"].endswith("cap 2MB/s")
    assert lines["downtime"] == "not known before a round is done, limit 120ms"
    told(demo.path, "--bandwidth", "0")
    assert demo.end()["exit_code"] == 0


def test_a_cancelled_job_leaves_the_guest_here(demo: Demo) -> None:
    told(demo.path, "--cancel")
    ended = demo.end()
    assert ended["exit_code"] == 4 and ended["source_runs"] is True
    assert "cancelled" in ended["error"]
    again = subprocess.run(
        [*VMTH, *SLOW, "--bandwidth", "0", "--job-socket", str(demo.path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert again.returncode == 0, again.stderr


def test_a_switchover_is_asked_for(tmp_path: Path) -> None:
    """Of a guest that otherwise never fits."""
    path = tmp_path / "job"
    busy = ("--workload", "rewrite", "--working-set", "16MiB", "--dirty-rate", "100MB/s")
    link = ("--bandwidth", "40MB/s", "--downtime-limit", "10ms", "--job-socket", str(path))
    with started([*VMTH, *SLOW, *busy, *link]) as process:
        running = Demo(process, path)
        wait_until(lambda: running.sends() and told(path)["memory_iteration"] > 2)
        assert told(path)["downtime_expected_ns"] > 10_000_000
        assert (
            " left, dirtied at " in job(path).stdout and " expected, limit 10ms" in job(path).stdout
        )
        told(path, "--switchover")
        ended = running.end()
    assert ended["exit_code"] == 0 and ended["verified"]
    assert ended["downtime_ms"] > 10


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--bandwidth", "fast"), "fast"),
        (("--bandwidth", "5Mb/s"), "Mb/s"),
        (("--downtime-limit", "-1"), "-1"),
        (("--halt",), "--halt"),
    ],
)
def test_what_is_not_allowed_is_refused_before_anybody_is_asked(
    tmp_path: Path, options: tuple[str, ...], problem: str
) -> None:
    done = job(tmp_path / "none", *options)
    assert done.returncode == 2 and problem in done.stderr
    assert "Traceback" not in done.stderr


def test_where_no_job_is_one_line_says_so(tmp_path: Path) -> None:
    done = job(tmp_path / "none", "--json")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "No such file" in done.stderr
    assert "--job-socket of a migration that goes on" in json.loads(done.stdout)["error"]


def test_a_path_that_is_taken_is_refused_before_a_guest_is_started(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_bytes(b"precious")
    done = subprocess.run(
        [*VMTH, *SLOW, "--job-socket", str(taken)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "in use" in done.stderr
    assert taken.read_bytes() == b"precious"
    receiving = ("demo", "--receive", "tcp:127.0.0.1:0", "--job-socket", str(tmp_path / "job"))
    refused = subprocess.run([*VMTH, *receiving], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "allowed where the guest leaves" in refused.stderr
