# SPDX-License-Identifier: Apache-2.0
"""Whole migrations through a link that damages, cuts or silences one connection at a chosen byte.

Each case ends in one of two ways: the guest moved with proof, or it runs at the source and the
error is ours. Either way nothing is left behind and the next migration works.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from memory_guest import MemoryGuest

import vmth
from vmth.errors import InDoubtError, MigrationError
from vmth.handshake import Incoming
from vmth.listener import Listener
from vmth.options import MigrateOptions, ReceiveOptions
from vmth.uri import parse_endpoint


class Link:
    """A TCP relay on loopback. The ``target``-th connection gets ``fault`` at byte ``offset`` of
    the direction "up" (to the destination) or "down"."""

    def __init__(self, port: int, target: int, direction: str, fault: str, offset: int) -> None:
        self._port = port
        self._case = (target, direction, fault, offset)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.uri = f"tcp:127.0.0.1:{self._server.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        self.struck = False

    def _accept(self) -> None:
        count = 0
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                near.close()
                continue
            self._sockets += [near, far]
            for source, sink, direction in ((near, far, "up"), (far, near, "down")):
                thread = threading.Thread(target=self._pump, args=(source, sink, count, direction))
                self._threads.append(thread)
                thread.start()
            count += 1

    def _pump(self, source: socket.socket, sink: socket.socket, count: int, direction: str) -> None:
        target, where, fault, offset = self._case
        mine = (count, direction) == (target, where)
        done = 0
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(65536)):
                if mine and done <= offset < done + len(data):
                    self.struck = True
                    if fault == "flip":
                        data[offset - done] ^= 0x04
                    else:
                        sink.sendall(data[: offset - done])
                        if fault == "cut":
                            break
                        while source.recv(65536):  # silence: taken and never passed on
                            pass
                        return
                done += len(data)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in self._sockets:
            end.close()


@pytest.fixture
def guests() -> Iterator[list[MemoryGuest]]:
    kept: list[MemoryGuest] = []
    before = (threading.active_count(), len(os.listdir("/proc/self/fd")))
    yield kept
    for guest in kept:
        guest.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


#: Connection 0 is the control connection, 1 and 2 are page channels.
CASES = [
    (target, direction, fault, offset)
    for fault in ("flip", "cut", "silence")
    for target, direction, offsets in (
        (0, "up", (3, 70, 90, 150, 400, 500_000)),
        (0, "down", (3, 20, 40, 70, 130)),
        (1, "up", (3, 66, 68, 100, 130, 150, 200, 5_000, 400_000)),
        (2, "down", (3, 20, 34, 60, 100, 130)),
    )
    for offset in offsets
    if fault != "silence" or offset > 16
]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "direction", "fault", "offset"), CASES)
def test_a_bad_link_never_harms_the_guest(
    guests: list[MemoryGuest],
    tmp_path: Path,
    target: int,
    direction: str,
    fault: str,
    offset: int,
) -> None:
    made: list[MemoryGuest] = []

    def guest(npages: int, filled: bool) -> MemoryGuest:
        guests.append(MemoryGuest(npages, filled=filled, working_set=16))
        return guests[-1]

    def make_guest(incoming: Incoming) -> MemoryGuest:
        made.append(guest(incoming.blocks[0].npages, False))
        return made[-1]

    source = guest(1024, True)
    source.resume()
    # Work is shared: only a channel on its own is sure to carry more than the barriers.
    channels = 1 if target == 1 and offset >= 5_000 else 2
    timeout_s = 0.5 if fault == "silence" else 10.0
    options = MigrateOptions(
        state_dir=tmp_path / "s",
        channels=channels,
        peer_timeout_s=timeout_s,
        query_timeout_s=2.0,
        audit=True,
    )
    receive = ReceiveOptions(state_dir=tmp_path / "d", peer_timeout_s=timeout_s)
    endpoint = parse_endpoint("tcp:127.0.0.1:0", listening=True)
    with Listener(endpoint, make_guest, receive) as listener:
        link = Link(listener.endpoint.port, target, direction, fault, offset)
        try:
            result = vmth.migrate(source, link.uri, options)
        except InDoubtError:
            pytest.fail("queries go through: nothing may stay in doubt")
        except MigrationError as error:
            assert source.running, repr(error)  # noqa: PT017
            assert not source.released
            assert not any(one.running for one in made)
            link.close()
            vmth.migrate(source, listener.endpoint.display, options)
        else:
            assert result.verified
        finally:
            link.close()
        # The control connection never carries so much; and a machine that is busy may be silent
        # itself for longer than the short timeout.
        assert link.struck or offset == 500_000 or fault == "silence"
        assert source.released
        assert [one.running for one in made].count(True) == 1
        there = next(one for one in made if one.running)
        there.pause()
        assert there.counted() == there.total
