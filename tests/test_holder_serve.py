# SPDX-License-Identifier: Apache-2.0
"""A holder in a thread of this process, and movers that come, go and misbehave."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import wait_until

from vmth.errors import GuestError, RefusedError, StreamError, UsageError
from vmth.guest import (
    CanDescribe,
    CanHold,
    CanPeek,
    CanReportPopulated,
    CanTell,
    CanThrottle,
    DirtySource,
    StateStream,
)
from vmth.guests import requests as rq
from vmth.guests.client import HolderConnection, HolderGoneError, HolderGuest, status_of
from vmth.guests.holder import Holder
from vmth.guests.hosted import make_machine
from vmth.guests.machine import Machine
from vmth.guests.memory import GuestMemory
from vmth.guests.process_machine import ProcessMachine
from vmth.guests.schedule import Workload
from vmth.guests.spawn import attach, find
from vmth.types import Bitmaps, new_bitmaps

MIB = 1 << 20
WORKLOAD = Workload("uniform", 40_960_000, 64 << 10, seed=3)


def setup_request(**changes: object) -> rq.Setup:
    values = {
        "protocol": rq.HOLDER_PROTOCOL,
        "kind": "process",
        "dirty_source": "uffd-wp",
        "blocks": [rq.BlockRow("ram", 0, MIB)],
        "owner_pid": 0,
        "linger_s": 60.0,
        "hold_linger_s": 60.0,
    }
    return rq.Setup(**{**values, **changes})  # type: ignore[arg-type]


class Served:
    """A holder, its thread, and the spawner's connection."""

    def __init__(self, **changes: object) -> None:
        factory = changes.pop("factory", make_machine)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection = HolderConnection(ours, "the tested holder")
        holder = Holder(theirs, setup_request(**changes), factory)  # type: ignore[arg-type]
        self.path = holder.socket_path
        self.thread = threading.Thread(target=self._serve, args=(holder,))
        self.thread.start()
        # The answer to Setup has no request of its own here.
        ours.settimeout(60)
        attached = rq.decode_reply(ours.recv(rq.REQUEST_MAX_BYTES))
        assert isinstance(attached, rq.Attached)
        self.guest = HolderGuest(self.connection, attached)

    def _serve(self, holder: Holder) -> None:
        with contextlib.closing(holder):
            holder.serve()

    def end(self) -> None:
        self.guest.close()
        if self.thread.is_alive():
            with contextlib.suppress(HolderGoneError):
                with contextlib.closing(attach(self.path)) as guest:
                    guest.shutdown()
        self.thread.join(60)
        assert not self.thread.is_alive()
        assert not os.path.exists(self.path)


@pytest.fixture
def served() -> Iterator[Served]:
    holder = Served()
    yield holder
    holder.end()


def started(served: Served) -> HolderGuest:
    served.guest.prepare("zero=50,random=50", WORKLOAD)
    served.guest.start()
    return served.guest


def run_some_beats(guest: HolderGuest) -> None:
    beats = guest.beat_report().beats
    wait_until(lambda: guest.beat_report().beats > beats + 1)


def test_it_is_a_guest_with_all_optional_parts(served: Served) -> None:
    guest = served.guest
    for part in (CanHold, CanThrottle, CanReportPopulated, CanTell, CanDescribe):
        assert isinstance(guest, part)
    assert [block.idstr for block in guest.blocks] == ["ram"]
    assert guest.blocks[0].mapping.fd is not None
    assert [source.name for source in guest.dirty] == ["uffd-wp"]  # type: ignore[attr-defined]


def test_life_of_a_guest(served: Served) -> None:
    guest = served.guest
    prepared = guest.prepare("zero=50,random=50", WORKLOAD)
    assert prepared.rate_asked_bps == 40_960_000 and prepared.writes_per_beat == 10
    assert guest.status().phase == "prepared" and not guest.is_running()
    guest.start()
    run_some_beats(guest)
    assert guest.is_running()
    guest.throttle(50)
    guest.throttle(0)
    assert guest.pause() and not guest.pause()
    assert guest.status().phase == "paused" and not guest.is_running()
    streams: list[StateStream] = []
    guest.save_state(streams.append)
    assert [stream.name for stream in streams] == ["vcpu-process"]
    guest.hold()
    assert guest.status().phase == "held"
    guest.resume()
    run_some_beats(guest)
    assert guest.pause_at_beat()
    guest.release()
    guest.release()
    served.thread.join(60)
    with pytest.raises(HolderGoneError):
        guest.pause()
    with pytest.raises(HolderGoneError):
        status_of(served.path)


def test_a_moved_guest_is_asked_whether_it_runs() -> None:
    source, destination = Served(), Served()
    try:
        guest = started(source)
        run_some_beats(guest)
        guest.pause()
        for ours, theirs in zip(guest.views(), destination.guest.views(), strict=True):
            theirs[:] = ours
        streams: list[StateStream] = []
        guest.save_state(streams.append)
        arrived = destination.guest
        arrived.load_state(streams)
        # Its mover dies now: it may not start by itself, and says that it never ran.
        arrived.close()
        again = find({"guest.socket": destination.path})
        assert again is not None
        with contextlib.closing(again):
            assert not again.is_running() and again.status().phase == "loaded"
            again.resume()
            run_some_beats(again)
            assert again.is_running()
            again.pause()
            with pytest.raises(GuestError, match="ran here"):
                again.is_running()
    finally:
        source.end()
        destination.end()
    assert find({"guest.socket": destination.path}) is None
    assert find({}) is None


def pause_and_hold(guest: HolderGuest) -> None:
    guest.pause()
    guest.hold()


PHASES: list[tuple[str, Callable[[HolderGuest], object], bool]] = [
    # (what the mover did last, does the guest run after its death)
    ("running", lambda guest: None, True),
    ("tracking", lambda guest: guest.dirty[0].start(), True),
    ("throttled", lambda guest: guest.throttle(99), True),
    ("paused", lambda guest: guest.pause(), True),
    ("paused at a beat", lambda guest: guest.pause_at_beat(), True),
    ("held", pause_and_hold, False),
]


@pytest.mark.parametrize(("name", "last", "runs"), PHASES)
def test_guest_survives_its_mover(
    served: Served, name: str, last: Callable[[HolderGuest], object], runs: bool
) -> None:
    last(started(served))
    served.guest.close()
    with contextlib.closing(attach(served.path)) as guest:
        assert guest.is_running() == runs
        assert guest.status().phase == ("running" if runs else "held")
        if not runs:
            guest.resume()
        run_some_beats(guest)
        source = guest.dirty[0]
        source.start()  # nobody tracks any more
        source.stop()


def test_a_prepared_guest_is_not_started_by_a_vanishing_mover(served: Served) -> None:
    served.guest.prepare("zero=100", WORKLOAD)
    served.guest.close()
    with contextlib.closing(attach(served.path)) as guest:
        assert guest.status().phase == "prepared" and not guest.status().ever_ran


def test_a_second_mover_is_told_that_it_is_busy_and_may_ask(served: Served) -> None:
    started(served)
    with pytest.raises(GuestError, match="has a mover already"):
        attach(served.path)
    assert status_of(served.path).mover_attached
    connection = HolderConnection.open(served.path)
    with contextlib.closing(connection):
        with pytest.raises(UsageError, match="attach first"):
            connection.ask(rq.Pause(), rq.Was)
        assert connection.ask(rq.Status(), rq.StatusReport)[0].running
        newer = rq.HOLDER_PROTOCOL + 1
        with pytest.raises(RefusedError, match=f"protocol {newer}: this holder speaks {newer - 1}"):
            connection.ask(rq.Attach(newer), rq.Attached)
    assert served.guest.is_running()


WRONG: list[tuple[str, Callable[[HolderGuest], object]]] = [
    ("cannot start", lambda guest: guest.start()),
    ("cannot resume", lambda guest: guest.resume()),
    ("cannot hold", lambda guest: guest.hold()),
    ("cannot save", lambda guest: guest.save_state(lambda stream: None)),
    ("cannot pause at a beat", lambda guest: guest.pause_at_beat()),
    ("throttle", lambda guest: guest.throttle(100)),
    ("adds up", lambda guest: guest.prepare("zero=1", WORKLOAD)),
    ("working set", lambda guest: guest.prepare("zero=100", Workload(working_set_bytes=MIB))),
]


@pytest.mark.parametrize(("text", "ask"), WRONG)
def test_what_the_phase_does_not_allow_changes_nothing(
    served: Served, text: str, ask: Callable[[HolderGuest], object]
) -> None:
    with pytest.raises(UsageError, match=text):
        ask(served.guest)
    assert served.guest.status().phase == "empty"
    assert not served.guest.pause()


@pytest.mark.parametrize(
    "streams",
    [
        [],
        [StateStream("vcpu-kvm", 1, b"")],
        [StateStream("vcpu-process", 1, b"")],
        [StateStream("vcpu-process", 2, b"x" * 100)],
    ],
)
def test_a_state_that_is_none_leaves_the_guest_empty(
    served: Served, streams: list[StateStream]
) -> None:
    with pytest.raises((GuestError, StreamError)):
        served.guest.load_state(streams)
    assert served.guest.status().phase == "empty"


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_an_error(data: bytes) -> None:
    for decode in (rq.decode_request, rq.decode_reply):
        with contextlib.suppress(GuestError):
            decode(data)


def test_bytes_that_are_no_request_get_an_error_not_death(served: Served) -> None:
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with raw:
        raw.settimeout(60)
        raw.connect(served.path)
        for data in (b"\xc1", b"x" * 100_000, rq.encode(rq.Pause())[:-1], b"\x81\xa4type\xa1x"):
            raw.send(data)
            assert isinstance(rq.decode_reply(raw.recv(1 << 20)), rq.Failed)
    wide = rq.encode(rq.DirtyRearm(1, 2, 3)).replace(b"\x03", b"\xff")
    with pytest.raises(GuestError):
        rq.decode_request(wide)
    assert served.guest.status().phase == "empty"


def test_a_silent_holder_is_a_timeout_and_stays_one() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, contextlib.closing(HolderConnection(ours, "holder 7")) as connection:
        with pytest.raises(HolderGoneError, match="holder 7 did not answer Pause"):
            connection.ask(rq.Pause(), rq.Was, timeout_s=0.01)
        with pytest.raises(HolderGoneError, match="did not answer Pause"):
            connection.ask(rq.Pause(), rq.Was)


def test_a_dead_holder_is_named() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    with contextlib.closing(HolderConnection(ours, "holder 7")) as connection:
        with pytest.raises(HolderGoneError, match="holder 7 is gone"):
            connection.ask(rq.Pause(), rq.Was)


def test_a_wrong_answer_is_an_error_and_its_descriptors_are_closed() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, contextlib.closing(HolderConnection(ours, "holder 7")) as connection:
        before = len(os.listdir("/proc/self/fd"))
        for reply in (rq.Ack(), rq.Was(True)):
            socket.send_fds(theirs, [rq.encode(reply)], [theirs.fileno()])
            with pytest.raises(GuestError):
                connection.ask(rq.Pause(), rq.Was)
        assert len(os.listdir("/proc/self/fd")) == before


class _ScriptedSource:
    """A dirty source that reports what a test put there and notes what it was asked."""

    def __init__(self) -> None:
        self.dirty: list[int] = []
        self.calls: list[object] = []

    def start(self) -> None:
        self.calls.append("start")

    def fetch(self, bitmaps: Bitmaps) -> None:
        for page in self.dirty:
            bitmaps[0][page // 64] |= np.uint64(1 << page % 64)

    def rearm(self, block: int, page: int, npages: int) -> None:
        self.calls.append((block, page, npages))

    def stop(self) -> None:
        self.calls.append("stop")


class _PeekableSource(_ScriptedSource):
    def peek(self, bitmaps: Bitmaps) -> bool:
        self.fetch(bitmaps)
        return True


class _ScriptedMachine(ProcessMachine):
    def __init__(self, memory: GuestMemory, source: _ScriptedSource) -> None:
        super().__init__(memory)
        self._scripted = source

    def dirty_source(self, name: str) -> DirtySource:
        if name == "broken":
            raise GuestError("no dirty source today")
        return self._scripted


def scripted(name: str, source: _ScriptedSource | None = None) -> tuple[Served, _ScriptedSource]:
    source = source or _ScriptedSource()

    def factory(kind: str, memory: GuestMemory, dirty_source: str, vcpus: int) -> Machine:
        return _ScriptedMachine(memory, source)

    return Served(factory=factory, dirty_source=name), source


def test_dirty_pages_come_through_shared_bitmaps() -> None:
    served, script = scripted("kvm-log")
    try:
        source = served.guest.dirty[0]
        bitmaps = new_bitmaps(served.guest.blocks)
        source.start()
        script.dirty = [0, 65, 255]
        bitmaps[0][0] = np.uint64(2)
        source.fetch(bitmaps)
        assert bitmaps[0].tolist() == [3, 2, 0, 1 << 63]
        script.dirty = []
        again = new_bitmaps(served.guest.blocks)
        source.fetch(again)
        assert not again[0].any()
        source.rearm(0, 8, 16)
        for wrong in ((1, 0, 1), (0, 255, 2)):
            with pytest.raises(UsageError):
                source.rearm(*wrong)
        with pytest.raises(UsageError, match="already on"):
            served.guest.dirty[0].start()
        source.stop()
        source.stop()
        assert script.calls == ["start", (0, 8, 16), "stop"]
        with pytest.raises(GuestError, match="not on"):
            source.rearm(0, 0, 1)
    finally:
        served.end()


def test_a_look_at_dirty_pages_leaves_nothing_in_the_shared_bitmaps() -> None:
    served, script = scripted("kvm-log", _PeekableSource())
    try:
        source = served.guest.dirty[0]
        assert isinstance(source, CanPeek)
        source.start()
        script.dirty = [0, 65]
        for _ in range(2):
            bitmaps = new_bitmaps(served.guest.blocks)
            assert source.peek(bitmaps)
            assert bitmaps[0].tolist() == [1, 2, 0, 0]
        script.dirty = [255]
        fetched = new_bitmaps(served.guest.blocks)
        source.fetch(fetched)
        assert fetched[0].tolist() == [0, 0, 0, 1 << 63]
    finally:
        served.end()


def test_a_source_that_cannot_be_looked_at_says_so() -> None:
    served, script = scripted("kvm-log")
    try:
        source = served.guest.dirty[0]
        assert isinstance(source, CanPeek)
        source.start()
        script.dirty = [0]
        assert not source.peek(new_bitmaps(served.guest.blocks))
    finally:
        served.end()


def test_a_source_whose_fetch_rearms_is_not_asked_to() -> None:
    served, script = scripted("uffd-wp")
    try:
        source = served.guest.dirty[0]
        source.start()
        source.rearm(0, 0, 1)
        assert script.calls == ["start"]
        served.guest.close()  # tracking ends with the mover
        with contextlib.closing(attach(served.path)):
            assert script.calls == ["start", "stop"]
    finally:
        served.end()


def test_tracking_ends_quietly_with_its_holder() -> None:
    served, script = scripted("uffd-wp")
    try:
        source = served.guest.dirty[0]
        source.start()
        served.guest.shutdown()
        served.thread.join(60)
        source.stop()
        assert script.calls == ["start", "stop"]
        with pytest.raises(HolderGoneError):
            source.fetch(new_bitmaps(served.guest.blocks))
    finally:
        served.end()


def test_a_source_that_cannot_start_leaves_the_guest_usable() -> None:
    served, _ = scripted("broken")
    try:
        with pytest.raises(GuestError, match="no dirty source today"):
            served.guest.dirty[0].start()
        assert served.guest.status().phase == "empty"
    finally:
        served.end()


def test_populated_pages_are_what_was_written(served: Served) -> None:
    guest = served.guest
    for page in (0, 3, 4, 63, 64, 130, 255):
        guest.views()[0][page * 4096] = 1
    for first, count in ((0, 256), (3, 1), (60, 10), (131, 100)):
        (bitmap,) = new_bitmaps(guest.blocks)
        guest.populated(0, first, count, bitmap)
        found = np.flatnonzero(np.unpackbits(bitmap.view(np.uint8), bitorder="little")).tolist()
        assert found == [p for p in (0, 3, 4, 63, 64, 130, 255) if first <= p < first + count]


def test_an_unheld_guest_ends_with_its_lease() -> None:
    served = Served(linger_s=0.0)
    started(served)
    served.guest.close()
    served.thread.join(60)
    served.end()


def test_a_held_guest_waits_beyond_the_lease_of_others() -> None:
    served = Served(linger_s=0.0, hold_linger_s=60.0)
    guest = started(served)
    guest.pause()
    guest.hold()
    guest.close()
    with contextlib.closing(attach(served.path)) as again:
        assert again.status().phase == "held"
    served.end()


def test_an_owner_that_is_gone_already_ends_the_holder() -> None:
    served = Served(owner_pid=2**22 - 1)  # no process has the largest pid of all
    served.guest.close()
    served.thread.join(60)
    served.end()
