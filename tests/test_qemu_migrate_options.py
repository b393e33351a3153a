# SPDX-License-Identifier: Apache-2.0
"""What is chosen for ``vmth migrate`` reaches the session that carries it out: the command line's
options, and every field that both kinds of options have."""

from __future__ import annotations

import importlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from vmth.channel.sockets import LinkOptions
from vmth.cli import cli
from vmth.options import MigrateOptions
from vmth.policy.interface import OnStall
from vmth.qemu.migrate import QemuMigrateOptions

#: Of every option of a QEMU's migration a value that is not the default.
CHOSEN: dict[str, Any] = {
    "channels": 3,
    "multifd_channels": 2,
    "bandwidth_bps": 1_000_000,
    "downtime_limit_ns": 200_000_000,
    "timeout_ns": 60_000_000_000,
    "on_stall": OnStall.CANCEL,
    "auto_converge": True,
    "on_success": "keep",
    "digest": False,
    "forms": ("zero", "zstd"),
    "fixed_forms": True,
    "zstd_level": 3,
    "dedup_index_bytes": 1 << 20,
    "delta_cache_bytes": 2 << 20,
    "kept_copies_bytes": 3 << 20,
    "zerocopy": False,
    "realtime": False,
    "insecure": True,
    "peer_timeout_s": 3.0,
    "query_timeout_s": 4.0,
    "state_dir": Path("state"),
    "keep_image": Path("image"),
    "link": LinkOptions(dscp=46),
}


def test_the_session_gets_all_that_it_knows() -> None:
    assert CHOSEN.keys() == {field.name for field in fields(QemuMigrateOptions)}
    chosen = QemuMigrateOptions(**CHOSEN)
    session = chosen.session_options()
    common = CHOSEN.keys() & {field.name for field in fields(MigrateOptions)}
    assert len(common) == len(CHOSEN) - 3  # QEMU's own: multifd, auto-converge, on success
    default = QemuMigrateOptions()
    for name in common:
        assert getattr(session, name) == CHOSEN[name], name
        assert getattr(default, name) != CHOSEN[name], name


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--kept-copies", "1MiB"], "kept_copies_bytes", 1 << 20),
        (["--kept-copies", "0"], "kept_copies_bytes", 0),
        (["--dedup-index", "2MiB"], "dedup_index_bytes", 2 << 20),
        (["--delta-cache", "3MiB"], "delta_cache_bytes", 3 << 20),
        ([], "kept_copies_bytes", 64 << 20),
        ([], "delta_cache_bytes", 64 << 20),
        ([], "delta_cache_bytes", QemuMigrateOptions().delta_cache_bytes),
    ],
)
def test_bounds_of_memory_come_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], name: str, value: int
) -> None:
    seen: list[QemuMigrateOptions] = []

    def depart(_qmp: str, _uri: str, options: QemuMigrateOptions, *_rest: object) -> None:
        seen.append(options)
        raise SystemExit(0)

    monkeypatch.setattr(importlib.import_module("vmth.cli.migrate"), "depart", depart)
    result = CliRunner().invoke(cli, ["migrate", "--qmp", "q", "unix:/there", *arguments])
    assert result.exit_code == 0, result.output
    assert [getattr(options, name) for options in seen] == [value]
