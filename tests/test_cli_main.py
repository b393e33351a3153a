# SPDX-License-Identifier: Apache-2.0
"""The command line's edges: help, versions, and every kind of bad input, without a traceback."""

from __future__ import annotations

import json
import pickle
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest

from vmth import __version__
from vmth.channel.sockets import LinkOptions
from vmth.cli import cli, main
from vmth.errors import OptionError
from vmth.option_names import OPTIONS, for_users
from vmth.options import MigrateOptions
from vmth.qemu.migrate import QemuMigrateOptions
from vmth.qemu.restore import RestoreOptions
from vmth.reuse.warm import WarmFiles

BAD_INPUT = [
    ("unknown command", ["demon"], "demon"),
    ("unknown option", ["demo", "--memroy", "1GiB"], "--memroy"),
    ("size without a unit that is known", ["demo", "--memory", "3foo"], "3foo"),
    ("rate that may mean bits", ["demo", "--bandwidth", "5Mb/s"], "Mbit/s"),
    ("duration", ["demo", "--downtime-limit", "soon"], "soon"),
    ("no time for the run", ["demo", "--downtime-limit", "0"], "--downtime-limit: received 0"),
    ("phase jump without a rate", ["demo", "--phase-jump", "5s"], "TIME:RATE"),
    ("workload", ["demo", "--workload", "busy"], "zipf"),
    ("guest", ["demo", "--guest", "qemu"], "process"),
    ("dirty source", ["demo", "--dirty-source", "soft-dirty"], "uffd-wp"),
    (
        "dirty source of the other guest",
        ["demo", "--guest", "process", "--dirty-source", "kvm-log"],
        "uffd-wp",
    ),
    ("vcpus", ["demo", "--vcpus", "9"], "1<=x<=8"),
    ("vcpus of a process", ["demo", "--guest", "process", "--vcpus", "2"], "allowed 1"),
    ("digest", ["demo", "--digest", "maybe"], "off"),
    ("audit without a digest", ["demo", "--digest", "off", "--audit"], "audit"),
    ("channels", ["demo", "--channels", "65"], "1 to 64"),
    ("dscp", ["demo", "--dscp", "64"], "0 to 63"),
    ("content that does not add up", ["demo", "--content", "zero=30"], "100"),
    ("content of an unknown kind", ["demo", "--content", "gold=100"], "gold"),
    ("memory that is no page", ["demo", "--memory", "1048577"], "4096"),
    ("working set", ["demo", "--working-set", "4TiB"], "working set"),
    ("seed", ["demo", "--seed", "-1"], "seed"),
    ("scheme", ["demo", "--send", "http://host:80"], "tcp:HOST:PORT"),
    (
        "address of a unix socket",
        ["demo", "--send", "unix:/s", "--bind", "127.0.0.1"],
        "--bind: received 127.0.0.1 for unix:/s, allowed with tcp:HOST:PORT only",
    ),
    (
        "interface of a unix socket",
        ["demo", "--send", "unix:/s", "--interface", "eth0"],
        "--interface: received eth0 for unix:/s",
    ),
    ("address of a descriptor", ["demo", "--send", "fd:9,10", "--bind", "::1"], "::1 for fd:9,10"),
    (
        "address where a guest arrives",
        ["demo", "--receive", "tcp:127.0.0.1:0", "--bind", "127.0.0.1"],
        "--bind: received 127.0.0.1 with --receive",
    ),
    (
        "address of a QEMU's unix socket",
        ["migrate", "--qmp", "/none", "unix:/s", "--bind", "127.0.0.1"],
        "--bind: received 127.0.0.1 for unix:/s",
    ),
    (
        "interface of a QEMU's unix socket",
        ["migrate", "--qmp", "/none", "unix:/s", "--interface", "eth0"],
        "--interface: received eth0 for unix:/s",
    ),
    (
        "address of a relay's unix socket",
        ["relay", "--listen", "tcp:127.0.0.1:0", "--connect", "unix:/s", "--bind", "127.0.0.1"],
        "--bind: received 127.0.0.1 for unix:/s",
    ),
    (
        "interface of a relay's unix socket",
        ["relay", "--listen", "unix:/l", "--connect", "unix:/s", "--interface", "eth0"],
        "--interface: received eth0 for unix:/s",
    ),
    ("form", ["demo", "--forms", "zero,raw"], "--forms: received 'raw', allowed zero, same, dedup"),
    ("level", ["demo", "--zstd-level", "3"], "--zstd-level: received 3, allowed with fixed forms"),
    ("no address", ["demo", "--bind", "ten"], "--bind: received 'ten', allowed IP addresses"),
    (
        "more addresses than channels",
        ["migrate", "--qmp", "/s", "tcp:h:9", "--bind", "127.0.0.1,127.0.0.2"],
        "--bind: received 2 for 1 channels",
    ),
    (
        "address of another host",
        ["demo", "--bind", "192.0.2.1"],
        "--bind: received '192.0.2.1', allowed IP addresses of this host (",
    ),
    (
        "address of another host for a QEMU",
        ["migrate", "--qmp", "/s", "tcp:127.0.0.1:9", "--bind", "192.0.2.1"],
        "--bind: received '192.0.2.1', allowed IP addresses of this host (",
    ),
    (
        "interface that is not here",
        ["demo", "--interface", "none0"],
        "--interface: received 'none0', allowed lo",
    ),
    (
        "memory for indexes",
        ["demo", "--reuse", "/dev/null", "--reuse-memory", "1"],
        "--reuse-memory: received 1, allowed 24 and more",
    ),
    ("port", ["demo", "--send", "tcp:host:0"], "1 to 65535"),
    ("plaintext to another host", ["demo", "--send", "tcp:192.0.2.1:4444"], "--insecure"),
    ("plaintext from other hosts", ["demo", "--receive", "tcp:0.0.0.0:0"], "--insecure"),
    (
        "both directions",
        ["demo", "--send", "tcp:localhost:1", "--receive", "tcp:localhost:1"],
        "one of them",
    ),
    ("state directory", ["recover", "--state-dir", "/nowhere/at/all"], "/nowhere/at/all"),
    ("negative dscp", ["demo", "--dscp", "-1"], "received -1, allowed 0 to 63"),
    (
        "negative dscp of a relay",
        ["relay", "--listen", "unix:/l", "--connect", "unix:/s", "--dscp", "-1"],
        "received -1, allowed 0 to 63",
    ),
    (
        "congestion control that the kernel does not have",
        ["demo", "--congestion-control", "none-such"],
        "--congestion-control: received 'none-such'",
    ),
    (
        "congestion control of a relay",
        [
            "relay",
            "--listen",
            "unix:/l",
            "--connect",
            "tcp:h:9",
            "--congestion-control",
            "none-such",
        ],
        "--congestion-control: received 'none-such'",
    ),
    (
        "congestion control of a unix socket",
        ["relay", "--listen", "unix:/l", "--connect", "unix:/s", "--congestion-control", "reno"],
        "--congestion-control: received reno for unix:/s",
    ),
    ("empty value", ["demo", "--send", ""], "--send: received ''"),
    ("empty assigned value", ["demo", "--forms="], "--forms: received ''"),
    ("empty argument", ["inspect", ""], "an argument: received ''"),
    (
        "memory where a guest arrives",
        ["demo", "--receive", "tcp:127.0.0.1:0", "--memory", "1GiB"],
        "--memory: received 1073741824 with --receive, allowed where the guest leaves",
    ),
    (
        "image where a guest arrives",
        ["demo", "--receive", "tcp:127.0.0.1:0", "--keep-image", "/none"],
        "--keep-image: received /none with --receive",
    ),
    (
        "dirty source of a process",
        ["demo", "--guest", "kvm", "--dirty-source", "uffd-wp"],
        "kvm-log, kvm-ring",
    ),
    ("session", ["recover", "--session", "xyz"], "'xyz', allowed 32 hex digits"),
]


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize(
    ("name", "arguments", "said"), BAD_INPUT, ids=[row[0] for row in BAD_INPUT]
)
def test_bad_input_is_one_clear_error(
    name: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    shown = capsys.readouterr()
    errors = [line for line in (shown.out + shown.err).splitlines() if said in line]
    assert len(errors) == 1, shown
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("name", "arguments", "said"), BAD_INPUT, ids=[row[0] for row in BAD_INPUT]
)
def test_bad_input_is_one_json_object(
    name: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments, "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert said in told["error"] or name == "unknown command"
    assert told["exit_code"] == 2 and told["source_runs"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "Exit codes"),
        (["demo", "--help"], "--downtime-limit"),
        (["probe", "--help"], "dirty sources"),
        (["recover", "--help"], "Ask again"),
        (["--version"], __version__),
        (["version"], "protocol versions 1 to 1"),
    ],
)
def test_help_and_versions(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 0
    assert said in capsys.readouterr().out


def test_version_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["version", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "version": __version__,
        "protocol_version_min": 1,
        "protocol_version_max": 1,
    }


def test_recover_without_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recover", "--state-dir", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"sessions": [], "exit_code": 0}


def test_an_empty_argument_of_another_program_is_its_own_affair(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["receive", "tcp:127.0.0.1:0", "--", "no-such-qemu", "-append", ""]) == 2
    assert "no-such-qemu: not found" in capsys.readouterr().err


@pytest.mark.slow
def test_probe_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["probe", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["kvm"]) == {"usable", "reason"}
    assert told["tracking"]["uffd-wp"]["status"] in ("ok", "absent", "faulty")
    assert set(told["kernels"]) >= {"zero", "hash"}
    assert told["guest"] == ("kvm" if told["kvm"]["usable"] else "process")
    assert run(["probe"]) == 0
    assert "uffd-wp" in capsys.readouterr().out


def test_names_for_users_are_options_of_commands() -> None:
    taken = {
        option
        for command in cli.commands.values()
        for parameter in command.params
        for option in parameter.opts
    }
    known = {
        field.name
        for options in (MigrateOptions, LinkOptions, QemuMigrateOptions, RestoreOptions)
        for field in fields(options)
    } | set(signature(WarmFiles).parameters)
    assert set(OPTIONS.values()) <= taken
    assert set(OPTIONS) <= known
    for field in ("peer_timeout_s", "forms"):
        error = OptionError(field, "received 1")
        assert str(error) == f"{field}: received 1"
        assert pickle.loads(pickle.dumps(error)).problem == "received 1"
        assert for_users(error) == f"{OPTIONS.get(field, field)}: received 1"
