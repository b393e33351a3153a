# SPDX-License-Identifier: Apache-2.0
"""The relay as a whole: many connections in order, what it understands, how it begins and ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import qemu_streams as qs
from relay_world import TIMEOUT_S, read_to_break, read_to_end, relay_process

from vmth.errors import ChannelError, ExitCode, UsageError
from vmth.qemu.relay import Peer, Relay, RelayOptions, RelayReport, report_lines, report_values
from vmth.qemu.relay import frames as f
from vmth.qemu.relay.link import Direction
from vmth.qemu.relay.migration import role_of
from vmth.qemu.relay.observe import BACKLOG_BYTES, Observer
from vmth.qemu.stream import PageRequest, Pong, Shut, encode_return_message

PEERS = pytest.mark.parametrize("two", [False, True], ids=["one", "two"])


class World:
    """A destination's listening socket, one relay to it or two, and what they said."""

    def __init__(self, folder: Path, listener: socket.socket) -> None:
        self.folder = folder
        self.listener = listener
        self.relays: list[Relay] = []
        self.lines: list[str] = []

    def start(self, **options: Any) -> Relay:
        relay = Relay(RelayOptions(**options), self.lines.append)
        self.relays.append(relay)
        relay.start()
        return relay

    def carry(self, *, two: bool, once: bool = False, compress: bool = False) -> None:
        connect = f"unix:{self.folder}/out"
        peer = None
        if two:
            far = self.start(listen="tcp:127.0.0.1:0", connect=connect, peer=Peer.LISTEN, once=once)
            connect, peer = far.endpoint.display, Peer.CONNECT
        self.start(
            listen=f"unix:{self.folder}/in",
            connect=connect,
            peer=peer,
            once=once,
            compress=compress,
        )

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(TIMEOUT_S)
        sock.connect(f"{self.folder}/in")
        return sock

    def accept(self) -> socket.socket:
        sock, _ = self.listener.accept()
        sock.settimeout(TIMEOUT_S)
        return sock

    def pair(self) -> tuple[socket.socket, socket.socket]:
        source = self.connect()
        return source, self.accept()

    def reports(self) -> list[RelayReport]:
        found = []
        for relay in reversed(self.relays):
            relay.stop()
            assert relay.wait(TIMEOUT_S)
            found.append(relay.finish())
        return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with listening(tmp_path / "out") as listener:
        made = World(tmp_path, listener)
        yield made
        for relay in made.relays:
            relay.break_all("the test is over")
            assert relay.wait(TIMEOUT_S)
            relay.finish()


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        listener.settimeout(TIMEOUT_S)
        yield listener


def migrate(
    world: World, stream: bytes, back: bytes, *channels: bytes
) -> tuple[bytes, bytes, list[bytes]]:
    """All connections of one migration; what arrived at either side, main first."""
    pairs = [world.pair() for _ in range(1 + len(channels))]
    for (source, _), data in zip(pairs, (stream, *channels), strict=True):
        source.sendall(data)
        source.shutdown(socket.SHUT_WR)
    arrived = [read_to_end(destination) for _, destination in pairs]
    pairs[0][1].sendall(back)
    for _, destination in pairs:
        destination.close()
    answers = [read_to_end(source) for source, _ in pairs]
    for source, _ in pairs:
        source.close()
    return arrived[0], answers[0], arrived[1:]


ANSWER = b"".join(
    encode_return_message(message)
    for message in (Pong(1), PageRequest(0, 4096, "pc.ram"), PageRequest(4096, 4096, None), Shut(0))
)


@PEERS
def test_a_migration_is_carried_and_understood(world: World, two: bool) -> None:
    world.carry(two=two, compress=two)
    channel = qs.multifd_hello(1) + qs.multifd_packet(
        1, [1, 2], [5], qs.page_of(1) + qs.page_of(2), flags=1
    )
    arrived, answer, (through,) = migrate(world, qs.plain(), ANSWER, channel)
    assert (arrived, answer, through) == (qs.plain(), ANSWER, channel)
    for report in world.reports():
        values = report_values(report)
        (migration,) = values["last_migrations"]
        assert migration["machine"] == "pc-q35-7.2"
        assert migration["ram_bytes"] == sum(length for _, length in qs.BLOCKS)
        assert migration["blocks"][0]["pages"] == {"zero": 5, "page": 5}
        assert migration["pages"]["multifd_normal"] == 2 and migration["pages"]["multifd_zero"] == 1
        assert migration["multifd_channels"] == 1 and migration["compressions"] == ["none"]
        assert migration["rounds"] >= 2 and migration["devices"] == 2
        assert (migration["shut"], migration["page_requests"]) == (0, 2)
        assert migration["remarks"] == [] and migration["faults"] == []
        assert [c["role"] for c in values["last_connections"]] in (
            ["main", "multifd"],
            ["multifd", "main"],
        )
        assert values["forward_bytes"] == len(qs.plain()) + len(channel)
        assert values["backward_bytes"] == len(ANSWER)
        assert report.exit_code is ExitCode.OK
        assert "0 broken" not in "\n".join(report_lines(report))
    assert any("pc-q35-7.2, loaded" in line for line in world.lines)


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        (b"some other protocol" * 99, "is of no known kind"),
        (b"\x08\x00\x0a\x00\x07\x06pc.ram", "resumes a postcopy"),
        (b"QEVM\0\0\0\3\7\0\0\0\4q35x\x7e and then nonsense", "carried unread from there on"),
        (qs.plain()[:3000], "carried unread from there on"),
        (b"QE", "is of no known kind"),
        (qs.multifd_hello(0) + b"\xff" * 5000, "carried unread from there on"),
        (qs.header() + qs.start(b"\0" * 99, "dirty-bitmap", 1), "passed through"),
    ],
)
def test_what_is_not_understood_is_carried_and_said(world: World, stream: bytes, said: str) -> None:
    world.carry(two=False)
    arrived, answer, _ = migrate(world, stream, b"\xff\xff nonsense")
    assert (arrived, answer) == (stream, b"\xff\xff nonsense")
    (report,) = world.reports()
    (migration,) = report_values(report)["last_migrations"]
    assert any(said in text for text in migration["remarks"] + migration["faults"])
    assert report.exit_code is ExitCode.OK


@PEERS
def test_connections_go_on_in_the_order_of_their_arrival(world: World, two: bool) -> None:
    """QEMU up to 7.2 takes the first one for the main connection."""
    world.carry(two=two)
    sources = [world.connect() for _ in range(8)]
    for number, source in enumerate(sources):
        source.sendall(bytes([number]))
    destinations = [world.accept() for _ in sources]
    assert [sock.recv(1)[0] for sock in destinations] == list(range(8))
    for sock in (*sources, *destinations):
        sock.close()
    assert [report.connections for report in world.reports()] == [8] * len(world.relays)


@PEERS
def test_a_destination_that_is_not_there(world: World, two: bool) -> None:
    world.listener.close()
    os.unlink(world.folder / "out")
    world.carry(two=two, once=True)
    with world.connect() as source:
        assert read_to_break(source) == b""
    for report in world.reports():
        assert report.exit_code is ExitCode.FAILED
        (connection,) = report.named_connections
        assert "cannot connect to unix:" in connection.reason


def test_once_ends_when_a_migration_has_ended(world: World) -> None:
    world.carry(two=False, once=True)
    source, destination = world.pair()  # a probe of the port: no migration
    source.close()
    assert read_to_end(destination) == b""
    destination.close()
    migrate(world, qs.plain(), ANSWER)
    (relay,) = world.relays
    assert relay.wait(TIMEOUT_S)
    report = relay.finish()
    assert (report.connections, report.migrations) == (2, 1)
    assert not (world.folder / "in").exists()


def test_stop_lets_open_connections_end(world: World) -> None:
    world.carry(two=False)
    source, destination = world.pair()
    source.sendall(b"before")
    (relay,) = world.relays
    assert relay.stop() == 1
    source.sendall(b" and after")
    source.close()
    assert read_to_end(destination) == b"before and after"
    assert not relay.wait(0)
    destination.close()
    assert relay.wait(TIMEOUT_S)
    assert relay.finish().exit_code is ExitCode.OK


@PEERS
def test_break_all_resets_both_sides_and_says_so(world: World, two: bool) -> None:
    world.carry(two=two)
    source, destination = world.pair()
    source.sendall(b"begin")
    assert destination.recv(100) == b"begin"
    world.relays[-1].break_all("asked to", interrupted=True)
    assert read_to_break(destination) == b"" == read_to_break(source)
    first, *others = world.reports()
    assert first.exit_code is ExitCode.INTERRUPTED
    assert first.named_connections[0].reason == "asked to"
    for other in others:
        assert other.named_connections[0].reason.endswith("the other relay says: asked to")
    for sock in (source, destination):
        sock.close()


def test_a_peer_that_is_no_relay_is_named(world: World) -> None:
    """QEMU connects where a relay should, and a relay connects where QEMU listens."""
    far = world.start(
        listen="tcp:127.0.0.1:0", connect=f"unix:{world.folder}/out", peer=Peer.LISTEN
    )
    with socket.create_connection((far.endpoint.host, far.endpoint.port)) as qemu:
        qemu.sendall(qs.plain())
        assert read_to_break(qemu) == b""
    near = world.start(
        listen=f"unix:{world.folder}/in", connect=f"unix:{world.folder}/out", peer=Peer.CONNECT
    )
    source, destination = world.pair()
    destination.sendall(bytes(64))
    assert read_to_break(source) == b""
    reports = [relay_report(relay) for relay in (far, near)]
    for report in reports:
        assert "is the other end a vmth relay with --peer?" in report.named_connections[0].reason
    for sock in (source, destination):
        sock.close()


def relay_report(relay: Relay) -> RelayReport:
    relay.stop()
    assert relay.wait(TIMEOUT_S)
    return relay.finish()


def test_compression_that_the_other_relay_cannot_read_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for by name: it is not left out in silence."""
    world.start(listen=f"unix:{world.folder}/x", connect=f"unix:{world.folder}/out")
    near = world.start(
        listen=f"unix:{world.folder}/in",
        connect=f"unix:{world.folder}/out",
        peer=Peer.CONNECT,
        compress=True,
    )
    source, peer = world.pair()
    hello = f.decode_hello(peer.recv(64, socket.MSG_WAITALL), f.HelloRole.CONNECTING)
    answer = f.Hello(
        f.HelloRole.LISTENING, f.HelloStatus.GO_ON, 1, 1, 0, bytes(16), hello.token, 1, 0
    )
    peer.sendall(f.encode_hello(answer))
    assert read_to_break(source) == b""
    assert "the other relay cannot read them" in relay_report(near).named_connections[0].reason
    for sock in (source, peer):
        sock.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"listen": "fd:3"}, "a relay's URI may be tcp: or unix:"),
        ({"connect": "fd:3"}, "a relay's URI may be tcp: or unix:"),
        ({"listen": "tcp:0.0.0.0:0"}, "allow that with --insecure"),
        ({"connect": "tcp:192.0.2.1:4444"}, "allow that with --insecure"),
        ({"compress": True}, "--peer connect|listen"),
        ({"connect": "tcp:127.0.0.1:0"}, "allowed: 1 to 65535"),
        ({"listen": "nowhere"}, "has no scheme"),
    ],
)
def test_options_are_checked(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("|", r"\|")):
        Relay(
            RelayOptions(**{"listen": f"unix:{tmp_path}/in", "connect": "tcp:[::1]:1", **options})
        )


def test_plaintext_is_reported(tmp_path: Path) -> None:
    relay = Relay(RelayOptions(f"unix:{tmp_path}/in", "tcp:192.0.2.1:4444", insecure=True))
    relay.start()
    assert relay_report(relay).fallbacks == ["plaintext: tcp:192.0.2.1:4444 is not encrypted"]


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    with listening(tmp_path / "in"), pytest.raises(ChannelError, match="cannot listen on unix:"):
        Relay(RelayOptions(f"unix:{tmp_path}/in", "tcp:[::1]:1"))


def test_damage_between_relays_is_an_own_exit_code(world: World) -> None:
    far = world.start(
        listen="tcp:127.0.0.1:0", connect=f"unix:{world.folder}/out", peer=Peer.LISTEN
    )
    token = 99
    with socket.create_connection((far.endpoint.host, far.endpoint.port)) as peer:
        hello = f.Hello(
            f.HelloRole.CONNECTING, f.HelloStatus.GO_ON, 1, 1, 0, bytes(16), token, 1, 0
        )
        peer.sendall(f.encode_hello(hello))
        peer.recv(64, socket.MSG_WAITALL)
        destination = world.accept()
        writer = f.FrameWriter(f.frame_seed(token, f.HelloRole.CONNECTING))
        damaged = bytearray(b"".join(map(bytes, writer.data(qs.plain()))))
        damaged[-1] ^= 1
        peer.sendall(damaged)
        assert read_to_break(destination) == b""
        assert b"is damaged" in read_to_break(peer)
    report = relay_report(far)
    assert report.exit_code is ExitCode.VERIFICATION_FAILED
    assert any("frame 0: the payload of" in line for line in world.lines)
    destination.close()


# ---- observing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "role"),
    [
        (b"", "empty"),
        (b"Q", None),
        (b"QEV", None),
        (b"QEVM", "main"),
        (b"\x11\x22\x33", None),
        (b"\x11\x22\x33\x44rest", "multifd"),
        (b"\x08", "recovery"),
        (b"QEMU", "other"),
        (b"\0\0\0\0", "other"),
    ],
)
def test_roles(head: bytes, role: str | None) -> None:
    assert role_of(head) == role


def test_an_observer_that_does_not_keep_up_is_left_behind() -> None:
    """Its queue stays bounded, and the report says from where on it saw nothing."""
    ended: list[Any] = []
    observer = Observer(ended.append)
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        assert go_on.wait(TIMEOUT_S)

    watch = observer.watch(1, None)
    watch.carried(Direction.FORWARD, qs.plain()[:9000])
    observer.put(hold)
    assert held.wait(TIMEOUT_S)
    for _ in range(2 * BACKLOG_BYTES // (1 << 20)):
        watch.carried(Direction.FORWARD, bytes(1 << 20))
    assert watch.waiting_bytes <= BACKLOG_BYTES
    go_on.set()
    watch.flush()
    observer.put(lambda: observer.left(watch))
    assert observer.close(TIMEOUT_S)
    (notes,) = ended
    assert notes.stream.machine == "pc-q35-7.2"
    assert any("did not keep up" in text for text in notes.remarks)


def notes_of(*steps: Callable[[Observer], None]) -> list[Any]:
    ended: list[Any] = []
    observer = Observer(ended.append)
    for step in steps:
        step(observer)
    assert observer.close(TIMEOUT_S)
    return ended


def test_connections_of_one_source_belong_together() -> None:
    """By the process that connected; channels may come first (8.0 and later)."""

    def connections(observer: Observer) -> None:
        watches = [observer.watch(number, key) for number, key in ((1, "a"), (2, "b"), (3, "a"))]
        for watch, head in zip(
            watches, (qs.multifd_hello(0), qs.header(), qs.header()), strict=True
        ):
            watch.carried(Direction.FORWARD, head)
        for watch in watches:
            watch.flush()
            observer.put(partial(observer.left, watch))

    assert sorted(sorted(notes.connections) for notes in notes_of(connections)) == [[1, 3], [2]]


def test_a_connection_that_may_belong_to_several_says_so() -> None:
    def connections(observer: Observer) -> None:
        watches = [observer.watch(number, None) for number in (1, 2, 3)]
        for watch, head in zip(
            watches, (qs.header(), qs.header(), qs.multifd_hello(0)), strict=True
        ):
            watch.carried(Direction.FORWARD, head)
        for watch in watches:
            observer.put(partial(observer.left, watch))

    found = notes_of(connections)
    assert sorted(notes.connections for notes in found) == [[1], [2], [3]]
    assert any("may belong to any of 2" in text for notes in found for text in notes.remarks)


# ---- the command -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_first_signal_drains_and_the_second_breaks(tmp_path: Path) -> None:
    with (
        listening(tmp_path / "out") as listener,
        relay_process("--listen", "tcp:127.0.0.1:0", "--connect", f"unix:{tmp_path}/out") as (
            process,
            at,
        ),
    ):
        source = socket.create_connection(("127.0.0.1", int(at.rpartition(":")[2])))
        destination, _ = listener.accept()
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert "carried to their end" in process.stderr.readline()
        source.sendall(b"still carried")
        assert destination.recv(100) == b"still carried"
        process.send_signal(signal.SIGINT)
        assert read_to_break(source) == b""
        stdout, _ = process.communicate(timeout=TIMEOUT_S)
        values = json.loads(stdout)
        assert process.returncode == values["exit_code"] == 130
        assert values["broken_connections"] == 1
        for sock in (source, destination):
            sock.close()


@pytest.mark.slow
def test_a_signal_ends_an_idle_relay_cleanly(tmp_path: Path) -> None:
    path = tmp_path / "in"
    with relay_process("--listen", f"unix:{path}", "--connect", "unix:/nowhere") as (process, _):
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0 and "Traceback" not in stderr
        assert json.loads(stdout)["connections"] == 0
        assert not path.exists()
