# SPDX-License-Identifier: Apache-2.0
"""The example of docs/embedding.md runs, proves what it says, and is as short as it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from vmth.dirty.probe import Status
from vmth.dirty.probe import probe as probe_tracking

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "own_guest.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_guest", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_own_guest_has_under_100_lines() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 100


def test_the_guide_shows_the_example() -> None:
    assert "examples/own_guest.py" in (ROOT / "docs" / "embedding.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(
    probe_tracking()["uffd-wp"].status is not Status.OK, reason="no userfaultfd WP_ASYNC here"
)
def test_the_own_guest_moves_and_keeps_every_count(tmp_path: Path) -> None:
    example = load()
    result, guest = example.move(tmp_path)
    try:
        assert result.verified and result.audited and result.verified_scope == "memory"
        guest.pause()
        assert guest.count > 0
        assert int(guest.memory[:: example.PAGE // 8].sum()) == guest.count
    finally:
        guest.release()
