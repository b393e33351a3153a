# SPDX-License-Identifier: Apache-2.0
"""A source QEMU's connections taken in: from a fake source, and from a real QEMU."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import qemu_streams as s
from outgoing_world import FakeSource, LentPages, drain, started
from qemu_process import MEMORY_BYTES, RAM_ID, Qemu, fill
from waiting import wait_until

from vmth.channel.sockets import take_arrived
from vmth.errors import ChannelError, MigrationError, StreamError, UsageError
from vmth.qemu import outgoing, stream_connection
from vmth.qemu import stream as q
from vmth.qemu.outgoing import OutgoingStream


def opaque(events: list[q.Event]) -> bytes:
    return b"".join(bytes(event.data) for event in events if isinstance(event, q.RawBytes))


def pages_of(events: list[q.Event]) -> dict[tuple[str, int], bytes]:
    return {
        (page.idstr, page.page): bytes(page.data)
        for event in events
        if isinstance(event, q.RamPages)
        for page in event.pages()
    }


def test_a_plain_stream_is_complete_with_its_description() -> None:
    with started(FakeSource(s.plain())) as stream:
        events = drain(stream.next_event)
        assert stream.finished
        assert stream.given_out_bytes == len(s.plain()) and stream.unread_bytes == 0
    state = s.plain()[s.plain().index(s.full(7, "timer", s.TRICKY)) :]
    assert opaque(events) == state
    assert pages_of(events)["pc.ram", 6] == s.page_of(103)


def test_more_is_waited_for_as_long_as_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    def take(sock: socket.socket, buffer: memoryview, patience_s: float) -> tuple[int, bool]:
        waited.append(patience_s)
        return take_arrived(sock, buffer, patience_s)

    monkeypatch.setattr(stream_connection, "take_arrived", take)
    with started(FakeSource(s.plain())) as stream:
        while not waited:
            stream.next_event(5)
        assert set(waited) == {stream_connection.PATIENCE_S}
        waited.clear()
        stream.wait_for_more(0.25)
        drain(stream.next_event)
    assert set(waited) <= {0.25}
    with started(FakeSource(s.plain())) as stream:
        stream.wait_for_more(0.25)
        waited.clear()
        drain(stream.next_event)
    assert set(waited) == {0.25}


def test_pings_are_answered_and_shut_is_told() -> None:
    source = FakeSource(s.plain())
    with started(source) as stream:
        drain(stream.next_event)
        stream.shut(0)
        assert source.answered.wait(10)
        reader = q.ReturnPathReader()
        reader.feed(bytes(source.returned))
        assert reader.next_message() == q.Pong(1)
        assert reader.next_message() == q.Shut(0)


def test_state_without_a_description_ends_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "QUIET_S", 0.02)
    whole = s.plain()
    cut = whole[: whole.rindex(b"\x00\x06") + 1]
    with started(FakeSource(cut)) as stream:
        events = drain(stream.next_event, 0.05)
    assert opaque(events).endswith(s.footer(9) + b"\x00")


def test_nothing_is_complete_before_its_last_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "QUIET_S", 0.01)
    with started(FakeSource(s.plain()[:-1])) as stream:
        while stream.next_event(0.05) is not None:
            assert not stream.finished
        assert stream.next_event(0.05) is None


@pytest.mark.parametrize("times", [1, 3, 20])
def test_state_that_is_longer_than_what_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Of any length: whole pieces that end as a description does are among it."""
    monkeypatch.setattr(outgoing, "TAIL_BYTES", 8 << 10)
    monkeypatch.setattr(outgoing, "QUIET_S", 60)
    state = s.full(8, "gpu", (b"{" + os.urandom((8 << 10) - 2) + b"}") * times)
    whole = s.plain()
    at = whole.rindex(b"\x00\x06")
    with started(FakeSource(whole[:at] + state + whole[at:])) as stream:
        events = drain(stream.next_event)
        assert stream.finished
    assert opaque(events).endswith(state + whole[at:])


def test_silence_is_none_while_bytes_wait_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes the events may be held up for long, by a disk for instance."""
    monkeypatch.setattr(outgoing, "QUIET_S", 60)
    whole = s.plain()
    at = whole.rindex(b"\x00\x06") + 1
    source = FakeSource(whole[:at])
    with started(source) as stream:
        wait_until(lambda: stream.next_event(0) is None and stream.given_out_bytes == at)
        source.send_more(whole[at:])
        wait_until(lambda: stream.unread_bytes == len(whole) - at)
        monkeypatch.setattr(outgoing, "QUIET_S", 0)
        assert drain(stream.next_event) and stream.finished
        assert stream.given_out_bytes == len(whole)


@pytest.mark.parametrize(
    ("said", "complete"),
    [
        (b'{"page_size": 4096, "devices": []}', True),
        (b'{"page_size": 4096, "devices": {}}', False),
        (b'{"page_size": 4096, "devices": [}', False),
        (b'{"page_size": 4096}', False),
        (b'{"devices": [' + b"[" * 100_000 + b"]" * 100_000 + b"]}", False),
        (b'["devices"]', False),
        (b"state of a device", False),
    ],
)
def test_only_a_description_completes(
    monkeypatch: pytest.MonkeyPatch, said: bytes, complete: bool
) -> None:
    """Device state may end, where a read ends, as a description begins and with its length."""
    monkeypatch.setattr(outgoing, "QUIET_S", 60)
    whole = s.plain()
    state = whole[: whole.rindex(b"\x00\x06") + 1]
    sent = state + b"\x06" + s.u32(len(said)) + said
    with started(FakeSource(sent)) as stream:

        def settled() -> bool:
            event = stream.next_event(0.05)
            return stream.finished or (event is None and stream.given_out_bytes == len(sent))

        wait_until(settled)
        assert stream.finished == complete


MULTIFD_MAIN = b"".join(
    (
        s.header(),
        s.start(s.block_list() + s.eos()),
        s.part(s.zero(1, "pc.ram") + s.eos()),
        s.end(s.eos()),
        s.full(7, "timer", b"state"),
        b"\x00",
        s.description([("timer", 5)]),
    )
)


def multifd_channel(channel: int, page: int) -> bytes:
    sync = s.multifd_packet(0, flags=1)
    pages = s.multifd_packet(1, [page], [], s.page_of(page))
    return s.multifd_hello(channel) + sync + pages + sync + sync


@pytest.mark.parametrize("main_first", [True, False])
def test_multifd_channels_connect_in_any_order(main_first: bool) -> None:
    channels = [multifd_channel(0, 10), multifd_channel(1, 20)]
    with started(FakeSource(MULTIFD_MAIN, channels, main_first=main_first), 2) as stream:
        events = drain(stream.next_event)
    assert pages_of(events) == {
        ("pc.ram", 1): b"",
        ("pc.ram", 10): s.page_of(10),
        ("pc.ram", 20): s.page_of(20),
    }


def test_a_buffer_is_overwritten_only_when_its_bytes_were_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outgoing, "BUFFER_BYTES", 128 << 10)
    npages = 256
    blocks = [("pc.ram", npages * s.PAGE)]
    parts = b"".join(
        s.part(s.normal(page, "pc.ram") + s.eos()) for _ in range(3) for page in range(npages)
    )
    stream_bytes = b"".join(
        (
            s.header(),
            s.start(s.block_list(blocks) + s.eos()),
            parts,
            s.end(s.eos()),
            s.full(7, "timer", b"state"),
            b"\x00",
            s.description([("timer", 5)]),
        )
    )
    lent = LentPages()
    with started(FakeSource(stream_bytes)) as stream:
        while not isinstance(event := stream.next_event(10), q.StreamFinished):
            assert event is not None
            if isinstance(event, q.RamPages):
                for page in event.pages():
                    lent.lend(page, s.page_of(page.page))
                stream.in_use(lent.check)
        assert 0 < lent.checked < 3 * npages
        lent.check()
    assert lent.checked == 3 * npages


@pytest.mark.parametrize("length", [100, 9000, -3])
def test_a_source_that_ends_early_says_why(length: int) -> None:
    source = FakeSource(s.plain()[:length])
    source.closes_after_sending = True
    with started(source) as stream:
        source.status = {"status": "failed", "error-desc": "not enough tea"}
        with pytest.raises(MigrationError, match="ended its migration: not enough tea"):
            drain(stream.next_event)


@pytest.mark.parametrize(
    ("sent", "fault"), [(b"", "received 0 with a file header"), (b"QEV", "within 0.1 s: no bytes")]
)
def test_a_source_that_says_nothing_is_not_waited_for(sent: bytes, fault: str) -> None:
    source = FakeSource(sent)
    source.closes_after_sending = True
    with pytest.raises((StreamError, ChannelError), match=fault):
        OutgoingStream(source, connect_timeout_s=0.1).start()
    source.close()


def test_a_source_that_does_not_begin_says_why() -> None:
    class Refusing(FakeSource):
        def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
            if command == "migrate":
                self.status = {"status": "failed", "error-desc": "blocked by a device"}
                return {}
            return super().execute(command, arguments)

    with pytest.raises(MigrationError, match="did not begin to migrate: blocked by a device"):
        OutgoingStream(source := Refusing(b"")).start()
    source.close()


def test_after_close_nothing_is_given_out() -> None:
    with started(FakeSource(s.plain()[:2000])) as stream:
        assert stream.next_event(1) == q.FileHeader(3)
        stream.close()
        stream.close()
        with pytest.raises((ChannelError, MigrationError)):
            drain(stream.next_event, 1)


def test_more_channels_than_qemu_has_are_refused() -> None:
    with pytest.raises(UsageError, match="received 256, allowed 0 to 255"):
        OutgoingStream(FakeSource(b""), multifd_channels=256)


class RealSource:
    """``Commands`` of a QEMU of the tests."""

    def __init__(self, qemu: Qemu) -> None:
        self._qemu = qemu

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        return self._qemu.execute(command, **(arguments or {}))

    def give_descriptor(self, fd: int, name: str) -> bool:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("channels", [0, 2])
def test_a_real_qemu_waits_for_shut_and_completes(tmp_path: Path, channels: int) -> None:
    content = random.Random(20260101).randbytes(12 << 20)
    with Qemu(tmp_path, "SRC") as source:
        fill(source.memory, [(1 << 20, content)])
        source.capabilities("events", "return-path", *(["multifd"] if channels else []))
        parameters = {"max-bandwidth": 1 << 34, "multifd-channels": max(1, channels)}
        source.execute("migrate-set-parameters", **parameters)
        with OutgoingStream(RealSource(source), multifd_channels=channels) as stream:
            stream.start()
            events = drain(stream.next_event)
            assert source.execute("query-migrate")["status"] in ("active", "device")
            stream.shut(0)
            source.wait_migrated()
            wait_until(lambda: source.status() == "postmigrate")  # after the event, in its own time
    assert q.description_at_end(opaque(events)) is not None
    arrived = bytearray(MEMORY_BYTES)
    for (idstr, page), data in pages_of(events).items():
        if idstr == RAM_ID:
            arrived[page * s.PAGE : (page + 1) * s.PAGE] = data or bytes(s.PAGE)
    assert bytes(arrived) == source.memory.read_bytes()
