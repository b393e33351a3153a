# SPDX-License-Identifier: Apache-2.0
"""A source QEMU that writes to one end of our own pair of sockets: how far ahead it may write, and
that its end is noticed although that end is held here too."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import qemu_streams as s
from fake_qmp import FakeQmp
from outgoing_world import FakeSource, drain, started
from qmp_qemu import QmpQemu
from waiting import wait_until

from vmth.channel.sockets import queue_ahead
from vmth.errors import ChannelError, MigrationError
from vmth.qemu import outgoing
from vmth.qemu import stream as q
from vmth.qemu.outgoing import PAIR_NAME, OutgoingStream
from vmth.qemu.qmp import Qmp, QmpError
from vmth.qemu.stream_connection import LEAST_AHEAD_BYTES, MOST_AHEAD_BYTES

SOON_S = 5.0
#: Before pages, and with some of them.
HEAD = s.plain()[: s.plain().index(s.part(b"")[:5])]
PART = s.plain()[: len(HEAD) + 5000]


class Gone(FakeSource):
    """Its monitor goes with it."""

    gone = False

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        if self.gone and command == "query-migrate":
            raise ChannelError("QEMU closed the monitor")
        return super().execute(command, arguments)


@pytest.fixture
def short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "SILENCE_S", 0.02)


@contextlib.contextmanager
def pair() -> Iterator[socket.socket]:
    ours, its = socket.socketpair()
    with ours, its:
        yield its


def contents(events: list[q.Event]) -> list[str]:
    """What the events say; runs depend on how bytes were cut."""
    found = []
    for event in events:
        if isinstance(event, q.RamPages):
            found += [
                f"{page.idstr} {page.page} {bytes(page.data).hex()}" for page in event.pages()
            ]
        elif not isinstance(event, q.RawBytes):
            found.append(repr(event))
    opaque = (bytes(event.data) for event in events if isinstance(event, q.RawBytes))
    return [*found, b"".join(opaque).hex()]


def stored() -> Iterator[q.Event]:
    """The same stream, read from memory."""
    reader = q.StreamReader(opaque_devices=True)
    reader.feed(s.plain())
    reader.feed_eof()
    while (event := reader.next_event()) is not None:
        yield event


def most_bytes(nbytes: int) -> int:
    """That this process may have wait in a socket, of so many."""
    one, other = socket.socketpair()
    with one, other:
        queue_ahead(one, nbytes)
        return one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def first_events(stream: OutgoingStream) -> None:
    """All that PART has."""
    assert stream.next_event(SOON_S) == q.FileHeader(3)
    while stream.unread_bytes:
        stream.next_event(0)


@pytest.mark.parametrize(("takes", "kind"), [(True, "fd:"), (False, "unix:")])
def test_the_stream_is_the_same_by_either_way(takes: bool, kind: str) -> None:
    class Told(FakeSource):
        uri = ""

        def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
            if command == "migrate":
                assert arguments is not None
                Told.uri = arguments["uri"]
            return super().execute(command, arguments)

    with started(source := Told(s.plain(), takes_descriptors=takes)) as stream:
        events = drain(stream.next_event)
        assert stream.given_out_bytes == len(s.plain())
        stream.shut(0)
        source.wait_over()
    assert Told.uri.startswith(kind)
    assert contents(events) == contents(list(stored())) and not source.given


def test_multifd_connects_by_itself() -> None:
    class Unasked(FakeSource):
        def give_descriptor(self, fd: int, name: str) -> bool:
            raise AssertionError("multifd takes no descriptor")

    hellos = [s.multifd_hello(channel) for channel in range(2)]
    with started(Unasked(PART, hellos), 2) as stream:
        first_events(stream)
        assert len(stream.sockets_to_read()) == 3


def test_how_much_may_wait_follows_what_is_taken_at_once() -> None:
    with started(source := FakeSource(PART)) as stream:
        usual = source.queue_bytes()
        stream.limit_read(64 << 20)
        assert usual < source.queue_bytes() == most_bytes(MOST_AHEAD_BYTES)
        stream.limit_read(1 << 20)
        assert source.queue_bytes() == most_bytes(1 << 20)
        stream.limit_read(4096)
        assert source.queue_bytes() == LEAST_AHEAD_BYTES


@pytest.mark.usefixtures("short_silence")
@pytest.mark.parametrize("sent", [HEAD, PART], ids=["before pages", "among pages"])
def test_a_source_that_dies_is_noticed(sent: bytes) -> None:
    source = Gone(sent)
    source.dies_after_sending = True
    with started(source) as stream:
        first_events(stream)
        source.gone = True
        with pytest.raises(ChannelError, match="the source QEMU is gone"):
            drain(stream.next_event, SOON_S)


@pytest.mark.usefixtures("short_silence")
def test_a_source_that_ends_its_migration_without_a_word_is_asked_why() -> None:
    source = FakeSource(PART)
    source.dies_after_sending = True
    with started(source) as stream:
        first_events(stream)
        source.status = {"status": "failed", "error-desc": "not enough tea"}
        with pytest.raises(MigrationError, match="ended its migration: not enough tea"):
            drain(stream.next_event, SOON_S)


@pytest.mark.usefixtures("short_silence")
def test_who_prepares_long_is_waited_for_with_its_queue_in_hand() -> None:
    source = FakeSource(HEAD)
    with started(source) as stream:
        first_events(stream)
        for _ in range(4):
            assert stream.next_event(0.05) is None
        assert source.commands.count("query-migrate") > 1
        stream.limit_read(1 << 20)
        assert source.queue_bytes() == most_bytes(1 << 20), "it was let go of before it was of use"
        source.send_more(s.plain()[len(HEAD) :])
        assert isinstance(drain(stream.next_event)[-1], q.StreamFinished)


@pytest.mark.usefixtures("short_silence")
def test_among_pages_a_silence_ends_the_hold_and_nobody_is_asked() -> None:
    """QEMU may be about to write with its lock held, and would answer when it was read."""
    source = FakeSource(PART)
    with started(source) as stream:
        first_events(stream)
        stream.limit_read(1 << 20)
        assert stream.next_event(0.2) is None
        assert "query-migrate" not in source.commands
        stream.limit_read(1 << 20)
        assert source.queue_bytes() == LEAST_AHEAD_BYTES, "it is held in a silence, or left long"
        source.send_more(s.plain()[len(PART) :])
        assert isinstance(drain(stream.next_event)[-1], q.StreamFinished)


@pytest.mark.usefixtures("short_silence")
def test_pieces_with_pauses_between_them_are_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "SILENCE_S", 0.2)
    source = FakeSource(PART)
    with started(source) as stream:
        first_events(stream)
        for at in range(len(PART), len(PART) + 40, 5):  # longer together than a silence
            assert stream.next_event(0.05) is None
            source.send_more(s.plain()[at : at + 5])
        stream.next_event(0.05)
        stream.limit_read(1 << 20)
        assert source.queue_bytes() == most_bytes(1 << 20)


@pytest.mark.parametrize("why", ["all has come", "somebody else reads"])
def test_nothing_is_held_once(why: str) -> None:
    with started(source := FakeSource(s.plain())) as stream:
        if why == "all has come":
            drain(stream.next_event)
        else:
            assert len(stream.sockets_to_read()) == 1
        before = source.queue_bytes()
        stream.limit_read(1 << 20)
        assert source.queue_bytes() == before


def test_a_descriptor_that_no_migration_took_is_taken_back() -> None:
    class Refusing(FakeSource):
        def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
            if command == "migrate":
                raise QmpError(command, "GenericError", "a device blocks it")
            return super().execute(command, arguments)

    source = Refusing(b"")
    with pytest.raises(QmpError, match="a device blocks it"):
        OutgoingStream(source).start()
    assert source.commands == ["closefd"] and source.given == {}


def test_a_monitor_that_takes_none_says_so(tmp_path: Path) -> None:
    with FakeQmp(tmp_path / "qmp") as fake, Qmp(fake.path) as qmp, pair() as its:
        assert not qmp.give_descriptor(its.fileno(), "some")
        assert fake.commands() == ["getfd"]
        assert qmp.status() == "running"


@pytest.mark.slow
def test_a_real_qemu_is_given_one_and_dies(tmp_path: Path) -> None:
    with QmpQemu(tmp_path, "SRC", memory="64M") as qemu, Qmp(qemu.path) as qmp:
        with pair() as its:
            assert qmp.give_descriptor(its.fileno(), PAIR_NAME)
            assert qmp.execute("closefd", {"fdname": PAIR_NAME}) == {}
            with pytest.raises(QmpError):
                qmp.execute("closefd", {"fdname": PAIR_NAME})
        capabilities = [{"capability": "return-path", "state": True}]
        qmp.execute("migrate-set-capabilities", {"capabilities": capabilities})
        with OutgoingStream(qmp) as stream:
            stream.start()
            with pytest.raises(QmpError):  # the migration has it
                qmp.execute("closefd", {"fdname": PAIR_NAME})
            drain(stream.next_event)
            stream.shut(0)
            wait_until(lambda: qmp.execute("query-migrate")["status"] == "completed")
        qmp.execute("migrate-set-parameters", {"max-bandwidth": 4096})
        qmp.execute("cont")
        with OutgoingStream(qmp) as stream:
            stream.start()
            stream.next_event(SOON_S)
            qemu.kill()
            with pytest.raises((ChannelError, MigrationError)):
                drain(stream.next_event, 60)
