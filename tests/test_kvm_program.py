# SPDX-License-Identifier: Apache-2.0
"""The walker's committed machine code is what its assembler source says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from vmth._native import _kvm
from vmth.guests.machine import CODE_GPA, SCHEDULE_GPA

SOURCE = Path(__file__).parent.parent / "csrc" / "guest" / "walker_program.S"


def test_code_fits_between_its_gpa_and_the_schedule() -> None:
    assert 0 < len(_kvm.walker_code()) <= SCHEDULE_GPA - CODE_GPA


@pytest.mark.skipif(
    not (shutil.which("as") and shutil.which("objcopy")), reason="no GNU as and objcopy here"
)
def test_committed_bytes_are_the_assembled_source(tmp_path: Path) -> None:
    if not SOURCE.exists():
        pytest.skip("the assembler source is not beside the tests")
    made = tmp_path / "walker.o"
    assembled = subprocess.run(
        ["as", "--32", "-o", str(made), str(SOURCE)], capture_output=True, text=True
    )
    if "unrecognized option" in assembled.stderr:
        pytest.skip("this assembler is not one for x86")
    assert assembled.returncode == 0, assembled.stderr
    code = tmp_path / "walker.bin"
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(made), str(code)], check=True)
    table = code.read_bytes()
    assert _kvm.walker_code() == table, ", ".join(f"0x{byte:02x}" for byte in table)
