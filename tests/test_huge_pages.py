# SPDX-License-Identifier: Apache-2.0
"""Shared memory that gives huge pages on advice gets them from what lands, and others are written.

Each case has a tmpfs of its own, in a mount namespace that ends with it, so that this machine's
setting for shared memory matters only where it overrides every mount.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vmth.dirty.probe import Status, probe

SETTING = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
CHILD = Path(__file__).with_name("huge_pages_child.py")
NPAGES = 8 * 512


def run(folder: Path, options: str) -> subprocess.CompletedProcess[str]:
    """The child, with a tmpfs of these options at ``folder``."""
    for overriding in ("[deny]", "[force]"):
        if SETTING.exists() and overriding in SETTING.read_text():
            pytest.skip(f"{SETTING} is {overriding}")
    mounted = 'mount -t tmpfs -o "$1" vmth-test "$2" && exec "$3" "$4" "$2"'
    done = subprocess.run(
        [
            *("unshare", "--mount", "sh", "-c", mounted, "sh"),
            *(options, folder, sys.executable, CHILD),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    if "unshare failed" in done.stderr or "mount: " in done.stderr:
        pytest.skip(f"no tmpfs of its own: {done.stderr.strip()}")
    return done


def land(folder: Path, options: str) -> dict[str, Any]:
    done = run(folder, options)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["equal"] and told["digests"] and told["fallbacks"] == []
    return told


@pytest.mark.skipif(
    probe()["pagemap-scan"].status is not Status.OK, reason=probe()["pagemap-scan"].reason
)
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages"
)
def test_memory_that_is_huge_on_advice(tmp_path: Path) -> None:
    told = land(tmp_path, "huge=advise")
    assert told["huge"] >= NPAGES // 2  # all, unless this machine's memory is in pieces
    assert told["written"] <= NPAGES // 4


def test_memory_that_is_not(tmp_path: Path) -> None:
    told = land(tmp_path, "huge=never")
    assert told["huge"] == 0
    assert told["written"] == NPAGES - 100


def test_memory_that_is_too_small(tmp_path: Path) -> None:
    """A copy to a page that the file has no room for would end the process with SIGBUS."""
    done = run(tmp_path, "huge=advise,size=10m")
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in json.loads(done.stdout)["error"]
