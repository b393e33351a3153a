# SPDX-License-Identifier: Apache-2.0
"""Real QEMUs through the relay: precopy, multifd, postcopy, and relays that die at bad moments.

Guests are paused where memory is compared; a busy one proves something only from QEMU 9.0 on.
"""

from __future__ import annotations

import random
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from qemu_process import MEMORY_BYTES, Qemu, fill, walker_rom
from relay_world import relay_process
from waiting import wait_until

from vmth.qemu.relay import Peer, Relay, RelayOptions, RelayReport, report_values
from vmth.qemu.stream import Shut, encode_return_message

pytestmark = pytest.mark.slow

SEED = 20261122
PAGE = 4096
TIMEOUT_S = 60


def content() -> list[tuple[int, bytes]]:
    """8 MiB that do not compress, 4 MiB that do, the rest zero."""
    chance = random.Random(SEED)
    words = b"".join(chance.choice((b"migration ", b"relay ", b"page ")) for _ in range(1 << 19))
    return [(1 << 20, chance.randbytes(8 << 20)), (16 << 20, words[: 4 << 20])]


@contextmanager
def relays(folder: Path, *, two: bool, compress: bool = False) -> Iterator[list[Relay]]:
    """One relay from ``in.sock`` to ``out.sock``, or two with checked frames between them."""
    listen, connect = f"unix:{folder}/in.sock", f"unix:{folder}/out.sock"
    with ExitStack() as stack:
        started: list[Relay] = []

        def start(options: RelayOptions) -> Relay:
            relay = Relay(options)
            stack.callback(end, relay)
            relay.start()
            started.append(relay)
            return relay

        if two:
            far = start(RelayOptions("tcp:127.0.0.1:0", connect, Peer.LISTEN))
            connect = far.endpoint.display
        peer = Peer.CONNECT if two else None
        start(RelayOptions(listen, connect, peer, compress))
        yield started


def end(relay: Relay) -> None:
    relay.break_all("the test is over")
    assert relay.wait(TIMEOUT_S)
    relay.finish()


def reports(started: Sequence[Relay]) -> list[RelayReport]:
    """Of relays that are done by themselves: nothing is left open."""
    found = []
    for relay in reversed(started):
        relay.stop()
        assert relay.wait(TIMEOUT_S)
        found.append(relay.finish())
    return found


def prepare_one(qemu: Qemu, *capabilities: str) -> None:
    qemu.capabilities("events", "return-path", *capabilities)
    qemu.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 34})


def prepare(source: Qemu, destination: Qemu, folder: Path, *capabilities: str) -> None:
    for qemu in (source, destination):
        qemu.capabilities("events", "return-path", *capabilities)
        qemu.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 34})
        if "multifd" in capabilities:
            qemu.execute("migrate-set-parameters", **{"multifd-channels": 3})
    destination.execute("migrate-incoming", uri=f"unix:{folder}/out.sock")


@pytest.mark.parametrize("two", [False, True], ids=["one relay", "two with zstd"])
@pytest.mark.parametrize("multifd", [False, True], ids=["plain", "multifd"])
def test_precopy(tmp_path: Path, two: bool, multifd: bool) -> None:
    with (
        relays(tmp_path, two=two, compress=two) as started,
        Qemu(tmp_path, "SRC") as source,
        Qemu(tmp_path, "DST", "-incoming", "defer") as destination,
    ):
        fill(source.memory, content())
        prepare(source, destination, tmp_path, *(["multifd"] if multifd else []))
        source.execute("migrate", uri=f"unix:{tmp_path}/in.sock")
        source.wait_migrated()
        destination.wait_migrated()
        assert destination.status() == "prelaunch"
        assert destination.memory.read_bytes() == source.memory.read_bytes()
        found = [report_values(report) for report in reports(started)]
    for values in found:
        assert values["exit_code"] == 0 and values["broken_connections"] == 0
        assert values["connections"] == (4 if multifd else 1)
        (migration,) = values["last_migrations"]
        assert migration["faults"] == [] and migration["remarks"] == []
        assert migration["machine"].startswith("pc-q35-") and migration["shut"] == 0
        assert sum(migration["pages"].values()) >= MEMORY_BYTES // PAGE
        assert migration["multifd_channels"] == (3 if multifd else 0)
        assert sorted(migration["connections"]) == list(range(1, values["connections"] + 1))
        assert migration["devices"] > 20
    assert {v["forward_bytes"] for v in found} == {found[0]["forward_bytes"]}
    if two:
        near, far = found
        assert near["wire_sent_bytes"] == far["wire_received_bytes"]
        assert near["wire_received_bytes"] == far["wire_sent_bytes"]
        assert near["wire_sent_bytes"] < near["forward_bytes"] - (2 << 20)


def busy(folder: Path) -> tuple[str, ...]:
    """A guest that writes to its memory for ever."""
    rom = folder / "rom"
    rom.write_bytes(walker_rom())
    return "-bios", str(rom)


@pytest.mark.parametrize("two", [False, True], ids=["one relay", "two"])
def test_postcopy_requests_go_through_at_once(tmp_path: Path, two: bool) -> None:
    options = busy(tmp_path)
    with (
        relays(tmp_path, two=two) as started,
        Qemu(tmp_path, "SRC", *options, shared=False) as source,
        Qemu(tmp_path, "DST", "-incoming", "defer", *options, shared=False) as destination,
    ):
        try:
            destination.capabilities("postcopy-ram")
        except AssertionError as error:
            pytest.skip(f"no postcopy here (userfaultfd may be for root only): {error}")
        source.capabilities("postcopy-ram")
        prepare(source, destination, tmp_path)
        # So slow that the guest must ask for most of the pages that it writes.
        slow = {"max-bandwidth": 1 << 20, "max-postcopy-bandwidth": 1 << 18}
        source.execute("migrate-set-parameters", **slow)
        source.execute("cont")
        destination.execute("cont")  # as soon as it may
        source.execute("migrate", uri=f"unix:{tmp_path}/in.sock")
        source.wait_status("active")
        source.execute("migrate-start-postcopy")
        source.wait_migrated()
        destination.wait_migrated()
        wait_until(lambda: source.status() == "postmigrate")
        found = [report_values(report) for report in reports(started)]
    for values in found:
        (migration,) = values["last_migrations"]
        assert migration["faults"] == [] and migration["shut"] == 0
        assert migration["page_requests"] > 0
        assert "POSTCOPY_RUN" in migration["commands"]
        assert values["broken_connections"] == 0


@pytest.mark.parametrize("two", [False, True], ids=["one relay", "two"])
def test_relay_killed_within_ram_and_the_next_try_succeeds(tmp_path: Path, two: bool) -> None:
    options = busy(tmp_path)
    onward = f"unix:{tmp_path}/out.sock"
    with ExitStack() as stack, Qemu(tmp_path, "SRC", *options) as source:
        prepare_one(source)
        source.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 20})
        source.execute("cont")
        connect = onward
        arguments: tuple[str, ...]
        peer: tuple[str, ...] = ()
        if two:
            arguments = ("--listen", "tcp:127.0.0.1:0", "--connect", onward, "--peer", "listen")
            _, connect = stack.enter_context(relay_process(*arguments))
            peer = ("--peer", "connect")
        arguments = ("--listen", f"unix:{tmp_path}/in.sock", "--connect", connect, *peer)
        killed, at = stack.enter_context(relay_process(*arguments))
        with Qemu(tmp_path, "DST", "-incoming", "defer", *options, shared=False) as destination:
            prepare_one(destination)
            destination.execute("migrate-incoming", uri=onward)
            source.execute("migrate", uri=at)
            source.wait_pass(1)
            killed.kill()
            source.wait_status("failed")
            wait_until(lambda: source.status() == "running")
        source.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 34})
        _, at = stack.enter_context(relay_process(*arguments))
        with Qemu(tmp_path, "DST", "-incoming", "defer", *options) as destination:
            prepare_one(destination)
            destination.execute("migrate-incoming", uri=onward)
            source.execute("migrate", uri=at)
            source.wait_migrated()
            destination.wait_migrated()
            wait_until(lambda: source.status() == "postmigrate")
            assert destination.status() == "paused"
            if source.version() >= (9, 0):  # before, TCG loses a busy guest's writes
                assert destination.memory.read_bytes() == source.memory.read_bytes()
            destination.execute("cont")
            assert destination.status() == "running"


def carry_but_shut(listener: socket.socket, onward: Path, before_shut: Callable[[], None]) -> None:
    """One connection both ways, but for the destination's last message: ``before_shut`` is called
    when it is there, and nothing is carried after that."""
    source, _ = listener.accept()
    shut = encode_return_message(Shut(0))
    with source, socket.socket(socket.AF_UNIX) as destination:
        destination.connect(str(onward))
        to = {source: destination, destination: source}
        while True:
            for sock in select.select(to, [], [], TIMEOUT_S)[0]:
                data = sock.recv(1 << 20)
                if sock is destination and data.endswith(shut):
                    before_shut()
                    return
                if data:
                    to[sock].sendall(data)
                else:
                    del to[sock]


def test_lost_shut_leaves_the_source_running_and_the_destination_paused(tmp_path: Path) -> None:
    """The relay dies when everything but SHUT was delivered: why the destination needs -S."""
    options = busy(tmp_path)
    with (
        socket.socket(socket.AF_UNIX) as listener,
        ThreadPoolExecutor(1) as pool,
        Qemu(tmp_path, "SRC", *options) as source,
        Qemu(tmp_path, "DST", "-incoming", "defer", *options, shared=False) as destination,
    ):
        listener.bind(str(tmp_path / "middle.sock"))
        listener.listen()
        prepare_one(source)
        prepare_one(destination)
        destination.execute("migrate-incoming", uri=f"unix:{tmp_path}/out.sock")
        source.execute("cont")
        arguments = ("--listen", f"unix:{tmp_path}/in.sock", "--connect")
        with relay_process(*arguments, f"unix:{tmp_path}/middle.sock") as (process, at):
            done = pool.submit(carry_but_shut, listener, tmp_path / "out.sock", process.kill)
            source.execute("migrate", uri=at)
            destination.wait_migrated()
            source.wait_status("failed")
            done.result(TIMEOUT_S)
        # The source goes on by itself; a destination without -S would run by now as well.
        wait_until(lambda: source.status() == "running")
        assert destination.status() == "paused"
