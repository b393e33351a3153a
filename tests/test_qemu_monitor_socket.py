# SPDX-License-Identifier: Apache-2.0
"""What a monitor still tells the client before reaches nobody: in pieces of any size, on a fake and
from real QEMUs."""

from __future__ import annotations

import fcntl
import io
import json
import os
import socket
import sys
import termios
import threading
from pathlib import Path

import pytest
from fake_qmp import FakeQmp
from hypothesis import given
from hypothesis import strategies as st
from qmp_qemu import QmpQemu
from waiting import wait_until

from vmth.qemu.monitor_socket import MonitorSocket
from vmth.qemu.qmp import Qmp

PATIENCE_S = 60.0
GREETING = b'{"QMP": {"version": {}, "capabilities": ["oob"]}}\r\n'
NEGOTIATED = b'{"return": {}}\r\n'
REFUSED = b'{"error": {"class": "GenericError", "desc": "no"}}\r\n'
EVENT = b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}\r\n'
ANSWER = b'{"return": {}, "id": "__vmth#00003"}\r\n'
ERROR = b'{"id": 3, "error": {"class": "GenericError", "desc": "no"}}\r\n'

strays = st.lists(st.sampled_from([EVENT, ANSWER, ERROR]), max_size=3).map(b"".join)
#: Ahead of the greeting also what a client without ids was answered.
early = st.lists(st.sampled_from([EVENT, ANSWER, NEGOTIATED, REFUSED]), max_size=3).map(b"".join)


def received(data: bytes, pieces: list[int]) -> list[bytes]:
    """Every piece that ``recv`` gives; ``data`` arrives in pieces of these sizes, then the rest."""
    ours, theirs = socket.socketpair()
    got: list[bytes] = []
    with theirs, MonitorSocket(fileno=ours.detach()) as connection:
        connection.setblocking(False)
        for nbytes in (*pieces, len(data)):
            theirs.sendall(data[:nbytes])
            data = data[nbytes:]
            try:
                while True:
                    got.append(connection.recv(16))
            except BlockingIOError:
                pass
        theirs.close()
        while piece := connection.recv(16):
            got.append(piece)
    return got


@given(
    before=early,
    between=strays,
    refused=st.booleans(),
    after=st.lists(st.sampled_from([EVENT, ANSWER, ERROR, b"{", b"\n"])).map(b"".join),
    pieces=st.lists(st.integers(1, 150), max_size=12),
)
def test_all_but_the_strays_arrives_in_any_pieces(
    before: bytes, between: bytes, refused: bool, after: bytes, pieces: list[int]
) -> None:
    again = REFUSED if refused else b""
    data = before + GREETING + between + again + between + NEGOTIATED + after
    got = received(data, pieces)
    assert b"".join(got) == GREETING + again + NEGOTIATED + after
    assert all(got), "an empty piece is the end to who reads"


@pytest.mark.parametrize(
    "data",
    [
        b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) ",
        b"\x00\xff no line at all",
        b"[" * 100_000 + b"\n",
        b'["event"]\n"id"\n7\n',
    ],
)
def test_what_is_no_monitor_passes_as_it_is(data: bytes) -> None:
    assert b"".join(received(data, [len(data) // 2])) == data


def test_a_line_without_an_end_is_not_collected() -> None:
    ours, theirs = socket.socketpair()
    with theirs, MonitorSocket(fileno=ours.detach()) as connection:
        connection.setblocking(False)
        most = 0
        for _ in range(64):
            theirs.sendall(b"x" * (64 << 10))
            try:
                while True:
                    most = max(most, len(connection.recv(64 << 10)))
            except BlockingIOError:
                pass
        assert 1 << 20 < most < 2 << 20


def test_a_client_after_another_hears_only_its_own(tmp_path: Path) -> None:
    with FakeQmp(tmp_path / "qmp") as fake:
        fake.before = [EVENT.strip(), ANSWER.strip()]
        fake.between = [ERROR.strip(), EVENT.strip()]
        with Qmp(fake.path) as qmp:
            fake.emit("RESUME")
            heard = qmp.wait_event(lambda _: True, PATIENCE_S)
            assert heard is not None and heard.name == "RESUME"
            assert qmp.status() == "running"


@pytest.mark.slow
@pytest.mark.parametrize("side", ["SRC", "DST"])
def test_a_real_qemu_that_still_serves_the_client_before(tmp_path: Path, side: str) -> None:
    nbytes = 1 << 20  # more than the pipe takes: the command is under way until that is closed
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with QmpQemu(tmp_path, side) as qemu, fifo.open("r+b", buffering=0) as pipe:
        with socket.socket(socket.AF_UNIX) as before, before.makefile("rw") as lines:
            before.connect(str(qemu.path))
            for command, arguments in (
                ("qmp_capabilities", {"enable": ["oob"]}),
                ("pmemsave", {"val": 0, "size": nbytes, "filename": str(fifo)}),
            ):
                assert lines.readline()
                lines.write(json.dumps({"execute": command, "arguments": arguments, "id": "1"}))
                lines.flush()
            wait_until(lambda: unread_bytes(pipe) > 0)
        closer = threading.Timer(0.3, pipe.close)  # the command fails, nobody reads any more
        closer.start()
        with Qmp(qemu.path, timeout_s=PATIENCE_S) as qmp:
            assert qmp.status() == "prelaunch"
        closer.join()


def unread_bytes(pipe: io.FileIO) -> int:
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)
