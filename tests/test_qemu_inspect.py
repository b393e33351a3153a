# SPDX-License-Identifier: Apache-2.0
"""``vmth inspect``: what it says about generated streams, sound and damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from qemu_streams import (
    PAGE,
    TRICKY,
    block_list,
    command,
    description,
    end,
    eos,
    flush,
    footer,
    full,
    header,
    multifd_hello,
    multifd_packet,
    page_of,
    plain,
    postcopy,
    start,
    u32,
    zero,
)

from vmth.cli import cli
from vmth.errors import UsageError
from vmth.qemu.inspect import inspect_files, report_lines
from vmth.qemu.inspect_image import inspect_stored


def inspect(tmp_path: Path, *contents: bytes) -> tuple[dict[str, Any], int, list[str]]:
    """The JSON object, the exit code, and the lines for people."""
    paths = []
    for i, content in enumerate(contents):
        paths.append(tmp_path / f"{i}.bin")
        paths[-1].write_bytes(content)
    result = CliRunner().invoke(cli, ["inspect", *map(str, paths), "--json"])
    values: dict[str, Any] = json.loads(result.stdout)
    text = CliRunner().invoke(cli, ["inspect", *map(str, paths)])
    assert text.exit_code == result.exit_code
    return values, result.exit_code, text.stdout.splitlines()


def test_plain(tmp_path: Path) -> None:
    values, code, lines = inspect(tmp_path, plain())
    assert code == 0 and values["faults"] == [] and values["remarks"] == []
    assert values["machine"] == "pc-q35-7.2"
    assert values["pages"] == {"zero": 6, "page": 7}
    assert values["blocks"][0]["pages"] == {"zero": 5, "page": 5}
    assert values["page_payload_bytes"] == 7 * PAGE
    assert values["rounds"] == 2
    assert values["ram_sections"] == 4
    assert values["commands"] == ["OPEN_RETURN_PATH", "PING 1"]
    assert [(row["idstr"], row["bytes"]) for row in values["devices"]] == [
        ("timer", len(TRICKY)),
        ("0000:00:1f.2/ahci", 1000),
    ]
    assert values["hints"] == ["machine type of QEMU 7.2: that version or later"]
    assert any("timer 0" in line for line in lines)


def test_postcopy_and_new_commands(tmp_path: Path) -> None:
    values, code, _ = inspect(tmp_path, postcopy())
    assert code == 0
    assert values["remarks"] == ["no vmdescription at the end"]
    assert "POSTCOPY_RUN" in values["commands"] and values["rounds"] == 1
    data = header() + start(block_list() + eos()) + command(11) + command(40) + end(eos()) + b"\0"
    values, _, _ = inspect(tmp_path, data)
    assert any("SWITCHOVER_START" in hint for hint in values["hints"])
    assert "unknown command 40 of 0 bytes" in values["remarks"]


def test_faults(tmp_path: Path) -> None:
    values, code, lines = inspect(tmp_path, plain()[:3000])
    assert code == 6
    assert "ends within a record" in values["faults"][0]
    assert values["pages"] == {"zero": 5}
    assert lines[-1].startswith("  FAULT: ")
    # A footer that the search finds too early, and what the vmdescription says about it.
    body = b"x" + footer(7) + b"\x03" + u32(2) + b"y"
    data = header() + start(block_list() + eos()) + full(7, "timer", body)
    data += end(eos()) + b"\0" + description([("timer", len(body))])
    values, code, _ = inspect(tmp_path, data)
    assert code == 6
    assert "received 1 bytes up to its footer, the vmdescription says 12" in values["faults"][-1]


def test_passed_through(tmp_path: Path) -> None:
    rest = start(b"unknown", "dirty-bitmap", section_id=9) + bytes(100)
    values, code, _ = inspect(tmp_path, header() + rest)
    assert code == 0
    assert values["passed_through_bytes"] == len(rest)
    assert "iterable section 'dirty-bitmap'" in values["remarks"][-1]


def channels(*, last_sync: bool = True) -> list[bytes]:
    main = header() + start(block_list() + flush() + eos())
    main += end(zero(1, "pc.ram") + flush() + eos()) + b"\0"
    sync = multifd_packet(0, flags=1)
    data = multifd_packet(1, [2, 3], [9], page_of(2) + page_of(3))
    return [
        multifd_hello(0) + sync + data + sync,
        main,
        multifd_hello(1) + sync + (sync if last_sync else b""),
    ]


def test_multifd(tmp_path: Path) -> None:
    values, code, lines = inspect(tmp_path, *channels())
    assert code == 0 and values["faults"] == []
    assert values["file"].endswith("1.bin") and values["flushes"] == 2
    assert values["pages"] == {"zero": 1, "multifd_normal": 2, "multifd_zero": 1}
    first, second = values["channels"]
    assert (first["channel"], first["packets"], first["syncs"]) == (0, 3, 2)
    assert (first["normal_pages"], first["compressions"]) == (2, ["none"])
    assert (second["channel"], second["packets"], second["payload_bytes"]) == (1, 2, 0)
    assert any("channel 1" in line for line in lines)


def test_multifd_faults(tmp_path: Path) -> None:
    values, code, _ = inspect(tmp_path, *channels(last_sync=False))
    assert code == 6
    assert "received 1 synchronisations, the main stream has 2" in values["faults"][0]
    outside = multifd_hello(0) + multifd_packet(1, [64], payload=page_of(1))
    values, code, _ = inspect(tmp_path, channels()[1], outside)
    assert code == 6
    assert "offset 262144 in 'pc.ram', allowed below 262144" in values["faults"][0]


def test_one_main_stream_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "main"
    path.write_bytes(plain())
    with pytest.raises(UsageError, match="received 2 files, allowed 1"):
        inspect_files([path, path])
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    report = inspect_files([empty])
    assert "ends before the end of state" in report.faults[0]
    assert list(report_lines(report))[-1].startswith("  FAULT")


def test_a_pipe_is_refused_before_it_is_read(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    stream = tmp_path / "stream"
    stream.write_bytes(plain())
    for paths in ([pipe], [stream, link], [Path("/dev/null")]):
        with pytest.raises(UsageError, match=f"{paths[-1]} is no file, allowed is one"):
            inspect_stored(paths)
    assert not inspect_stored([stream]).faults
