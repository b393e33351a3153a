# SPDX-License-Identifier: Apache-2.0
"""Choosing implementations: four outcomes, and a demand that is never replaced in silence."""

import os
import platform
import subprocess
import sys

import pytest

from vmth import kernels
from vmth._native import _xfer
from vmth.errors import UsageError

#: What an embedder imports is enough for the demand to reach every copy of the kernels.
SHOW_HASH = """
import vmth
from vmth import kernels
from vmth._native import _xfer
print(kernels.selected("hash"), _xfer.selected_kernel("hash"))
"""
NOT_BUILT = "neon" if platform.machine() == "x86_64" else "avx2"


def test_every_family_ends_with_its_scalar_twin() -> None:
    assert set(kernels.kernels()) == {"bitmap", "zero", "hash", "delta", "content"}
    for names in kernels.kernels().values():
        assert names[-1] == "scalar"


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("hash", "sse9", "no implementation of that name"),
        ("hash", NOT_BUILT, "not in this build"),
        ("speed", "scalar", "known are bitmap, zero, hash, delta"),
    ],
)
def test_refusals_say_why_and_change_nothing(family: str, name: str, reason: str) -> None:
    before = {each: kernels.selected(each) for each in kernels.kernels()}
    with pytest.raises(UsageError, match=reason):
        kernels.select(family, name)
    assert before == {each: kernels.selected(each) for each in kernels.kernels()}


def test_unknown_family_has_no_selection() -> None:
    with pytest.raises(UsageError):
        kernels.selected("speed")


def test_select_all_applies_each_part() -> None:
    kernels.select_all("hash=scalar, zero=scalar")
    assert kernels.selected("hash") == kernels.selected("zero") == "scalar"
    assert _xfer.selected_kernel("hash") == _xfer.selected_kernel("zero") == "scalar"
    for family, names in kernels.kernels().items():
        kernels.select(family, names[0])
        assert _xfer.selected_kernel(family) == names[0]
    with pytest.raises(UsageError, match="family=name"):
        kernels.select_all("avx2")


@pytest.mark.parametrize(("family", "name"), [("hash", "sse9"), ("speed", "scalar")])
def test_the_page_channels_refuse_as_well(family: str, name: str) -> None:
    with pytest.raises(_xfer.TransferError, match=family):
        _xfer.select_kernel(family, name)
    with pytest.raises(_xfer.TransferError, match="speed"):
        _xfer.selected_kernel("speed")


def run_with(demand: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SHOW_HASH],
        env={**os.environ, "VMTH_KERNEL": demand},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.slow
def test_the_environment_demands() -> None:
    assert run_with("hash=scalar").stdout == "scalar scalar\n"
    refused = run_with(f"hash={NOT_BUILT}")
    assert refused.returncode != 0 and "not in this build" in refused.stderr
