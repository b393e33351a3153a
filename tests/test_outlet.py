# SPDX-License-Identifier: Apache-2.0
"""Output that cannot be written, descriptors that are closed, signals before anything began: none
decides what becomes of a guest, and each ends with a documented code."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vmth.outlet import write_line

VMTH = (sys.executable, "-m", "vmth")
DEMO = (*VMTH, "demo", "--memory", "16MiB", "--guest", "process", "--warm-up", "0s")
LOST = "vmth: warning: the output is lost from here on: "


def run(*command: str, shell_ends: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """``shell_ends``: what a shell writes behind the command, as 2>&-."""
    if shell_ends:
        command = ("sh", "-c", f'exec "$@" {shell_ends}', "sh", *command)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, text=True, check=False, timeout=60, **options)


@pytest.fixture
def state(tmp_path: Path) -> tuple[str, str]:
    return ("--state-dir", str(tmp_path / "state"))


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_full_disk_behind_stdout_does_not_end_a_move(
    state: tuple[str, str], form: tuple[str, ...]
) -> None:
    with open("/dev/full", "w") as full:
        ended = run(*DEMO, *state, *form, stdout=full)
    assert ended.returncode == 0
    assert ended.stderr.count(LOST) == 1
    assert "Traceback" not in ended.stderr
    assert list(Path(state[1]).glob("*.source")) == []


@pytest.mark.parametrize("what", ["version", "probe", "--help"])
def test_a_full_disk_behind_an_answer_is_told(what: str) -> None:
    with open("/dev/full", "w") as full:
        ended = run(*VMTH, what, stdout=full)
    assert "Traceback" not in ended.stderr
    assert "No space left on device" in ended.stderr


def test_a_full_disk_behind_stderr_leaves_the_answer(state: tuple[str, str]) -> None:
    with open("/dev/full", "w") as full:
        ended = run(*DEMO, *state, "--json", stderr=full)
    assert ended.returncode == 0
    assert json.loads(ended.stdout)["verified"]


@pytest.mark.parametrize("closed", ["2>&-", "<&-", "<&- 2>&-"])
def test_closed_descriptors_are_not_taken_for_files(state: tuple[str, str], closed: str) -> None:
    ended = run(*DEMO, *state, "--json", shell_ends=closed)
    assert ended.returncode == 0
    assert json.loads(ended.stdout)["verified"]


def test_a_closed_stdout_is_none(state: tuple[str, str]) -> None:
    ended = run(*DEMO, *state, shell_ends=">&-")
    assert (ended.returncode, ended.stdout) == (0, "")
    assert "Traceback" not in ended.stderr


def test_a_reader_that_goes_away_is_no_loss(state: tuple[str, str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        ended = run(*DEMO, *state, stdout=gone)
    assert (ended.returncode, ended.stderr) == (0, "")


class Failing(io.StringIO):
    """Takes ``good`` lines. It has no descriptor."""

    def __init__(self, good: int, error: Exception) -> None:
        super().__init__()
        self.good, self.error = good, error

    def flush(self) -> None:
        self.good -= 1
        if self.good < 0:
            raise self.error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(5, "Input/output error"), f"{LOST}[Errno 5] Input/output error\n"),
        (ValueError("I/O operation on closed file"), f"{LOST}I/O operation on closed file\n"),
        (BrokenPipeError(), ""),
    ],
)
def test_a_stream_that_fails_is_given_up(
    error: Exception, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = Failing(1, error)
    write_line("first", stream)
    write_line("second", stream)
    assert stream.getvalue().startswith("first\n")
    assert capsys.readouterr().err == told


def test_no_stream_is_written_to() -> None:
    write_line("nobody hears", None)


SIGNALLED = """
import os, signal, sys
from vmth import __main__ as entry
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
hold_back = signal.pthread_sigmask
def then_signal(how, signals):
    before = hold_back(how, signals)
    if how == signal.SIG_BLOCK:
        os.kill(os.getpid(), int(sys.argv.pop()))
    return before
signal.pthread_sigmask = then_signal
entry.main()
"""


@pytest.mark.parametrize(("number", "code", "said"), [(2, 130, "interrupted"), (15, 4, "termin")])
def test_a_signal_while_the_commands_are_imported(number: int, code: int, said: str) -> None:
    ended = run(sys.executable, "-c", SIGNALLED, "version", "--json", str(number))
    assert ended.returncode == code
    assert ended.stderr.startswith(f"vmth: error: {said}") and ended.stderr.count("\n") == 1
    assert json.loads(ended.stdout)["exit_code"] == code


def test_a_name_that_the_encoding_has_not_is_shown_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "t\u00fcr"
    path.write_bytes(b"no stream")
    ended = run(
        *(*VMTH, "inspect", str(path)), env={**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    )
    assert ended.returncode == 6
    assert "t\\xfcr" in ended.stdout
    assert "Traceback" not in ended.stderr
