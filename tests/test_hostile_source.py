# SPDX-License-Identifier: Apache-2.0
"""A source that breaks the rules: whatever it says, no guest runs that was not sealed and granted.

Each case speaks to a real listener over a real socket, and ends with a migration that works.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from memory_guest import PAGE, MemoryGuest

import vmth
from vmth.channel.sockets import LinkOptions
from vmth.codec import Codec
from vmth.errors import MigrationError
from vmth.handshake import Incoming, make_offer, read_exactly
from vmth.listener import Listener
from vmth.options import MigrateOptions, ReceiveOptions
from vmth.packet import PacketKind, encode_packet
from vmth.queries import ask_destination
from vmth.source_session import SourceSession
from vmth.uri import parse_endpoint
from vmth.wire.framing import (
    PREAMBLE_REPLY_BYTES,
    FrameDecoder,
    FrameEncoder,
    Preamble,
    PreambleReply,
    PreambleStatus,
)
from vmth.wire.messages import (
    Abort,
    Accept,
    Answer,
    AnswerState,
    DigestRequest,
    DigestSource,
    Grant,
    HashAlgorithm,
    LastBarrier,
    Message,
    Mismatch,
    PackedState,
    Paused,
    Query,
    Refuse,
    RefuseCode,
    Released,
    ReleasedSeen,
    Role,
    Running,
    Seal,
    State,
)

SESSION = bytes(range(16))
NPAGES = 64


class Stage:
    """A listener, and the hostile source's control connection to it."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.guests: list[MemoryGuest] = []
        endpoint = parse_endpoint("tcp:127.0.0.1:0", listening=True)
        options = ReceiveOptions(state_dir=tmp_path / "d", peer_timeout_s=5)
        self.listener = Listener(endpoint, self.make_guest, options)
        self.sock = socket.create_connection(("127.0.0.1", self.listener.endpoint.port), 5)
        self._decoder = FrameDecoder()
        self.sock.sendall(Preamble(Role.CONTROL, SESSION).pack())
        reply = PreambleReply.unpack(read_exactly(self.sock, PREAMBLE_REPLY_BYTES))
        assert reply.status is PreambleStatus.OK

    def make_guest(self, incoming: Incoming) -> MemoryGuest:
        self.guests.append(MemoryGuest(incoming.blocks[0].npages, filled=False))
        return self.guests[-1]

    def offer(self, **changes: Any) -> Message:
        like = MemoryGuest(NPAGES, filled=False)
        offer = make_offer(SESSION, 7, like.blocks, MigrateOptions(), {})
        like.close()
        return msgspec.structs.replace(offer, **changes)

    def say(self, *messages: Message) -> None:
        self.sock.sendall(b"".join(FrameEncoder().encode(message) for message in messages))

    def hear(self) -> Message:
        while (message := self._decoder.next_message()) is None:
            data = self.sock.recv(65536)
            assert data, "the destination closed without a word"
            self._decoder.feed(data)
        return message

    def accepted(self, **changes: Any) -> Accept:
        self.say(self.offer(**changes))
        accept = self.hear()
        assert isinstance(accept, Accept)
        return accept

    def ends(self, match: str) -> None:
        """The session is over with that error, and nothing runs."""
        outcome = self.listener.outcomes.get(timeout=5)
        assert isinstance(outcome, MigrationError)
        assert match in str(outcome)
        assert not any(guest.running for guest in self.guests)
        assert all(guest.released for guest in self.guests)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    before = (threading.active_count(), len(os.listdir("/proc/self/fd")))
    stage = Stage(tmp_path)
    yield stage
    source = MemoryGuest(NPAGES)
    source.resume()
    options = MigrateOptions(state_dir=tmp_path / "s")
    assert vmth.migrate(source, stage.listener.endpoint.display, options).verified
    assert stage.listener.wait_for_guest(5).guest is stage.guests[-1]
    stage.sock.close()
    stage.listener.close()
    for guest in (source, *stage.guests):
        guest.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


BLOCK = {
    "idstr": "ram",
    "used_length": NPAGES * PAGE,
    "max_length": NPAGES * PAGE,
    "gpa": 0,
    "page_size": PAGE,
    "backing_page_size": PAGE,
    "flags": 0,
    "numa_node": -1,
}


def row(**changes: Any) -> Any:
    from vmth.wire.messages import BlockInfo

    return BlockInfo(**{**BLOCK, **changes})


@pytest.mark.parametrize(
    ("changes", "code", "reason"),
    [
        ({"session_id": bytes(16)[:-1] + b"x"}, RefuseCode.POLICY, "session id"),
        ({"page_size": 65536}, RefuseCode.PAGE_SIZE, "received 65536, allowed 4096"),
        ({"blocks": [row(flags=1 << 20)]}, RefuseCode.BLOCKS, "critical flags"),
        ({"blocks": [row(page_size=8192)]}, RefuseCode.PAGE_SIZE, "8192"),
        ({"blocks": [row(gpa=1 << 32)]}, RefuseCode.BLOCKS, "gpa received 4294967296"),
        ({"blocks": [row(idstr="rom")]}, RefuseCode.BLOCKS, "idstr received rom"),
        ({"blocks": [row(), row(idstr="b")]}, RefuseCode.BLOCKS, "received 2 blocks, ours has 1"),
    ],
)
def test_an_offer_that_cannot_be_taken_is_refused_by_name(
    stage: Stage, changes: dict[str, Any], code: RefuseCode, reason: str
) -> None:
    stage.say(stage.offer(**changes))
    answer = stage.hear()
    assert isinstance(answer, Refuse)
    assert answer.code == code
    assert reason in answer.reason
    stage.ends(reason)


PAUSED = Paused(0, True)
SEAL = Seal(0, 0, 0, 0, 0, 0)
LAST = LastBarrier(1)
#: Nine zeros.
FRAME = Codec().compress(bytes(9), 1, 100) or b""
ASK = DigestRequest(DigestSource.TABLE, 0, 0, NPAGES, 1)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([SEAL], "Seal before Paused"),
        ([Running(1)], "received Running"),
        ([Query(SESSION, bytes(16))], "received Query"),
        ([PAUSED, State("cpu", 1, 5, b"x", True)], "received offset 5, allowed 0"),
        ([PAUSED, State("cpu", 1, 0, b"", False)], "empty piece"),
        (
            [PAUSED, State("cpu", 1, 0, b"x", False), State("gpu", 1, 1, b"x", True)],
            "inside 'cpu'",
        ),
        ([PAUSED, State("cpu", 1, 0, b"x", False), SEAL], "never finished"),
        ([PAUSED, State("cpu", 1, 0, b"x", True), SEAL], "announced (0, 0, 0)"),
        ([DigestRequest(DigestSource.TABLE, 1, 0, 1, 1)], "block 1, allowed 0 to 0"),
        ([DigestRequest(DigestSource.TABLE, 0, 1, NPAGES, 1)], f"allowed up to {NPAGES}"),
        ([PAUSED, DigestRequest(DigestSource.MEMORY, 0, 0, 1, 1)], "audit offered False"),
        ([Abort(1, "changed my mind")], "changed my mind"),
        ([LAST, PAUSED, SEAL, Abort(1, "changed my mind")], "changed my mind"),
        ([LAST, PAUSED, SEAL, SEAL], "Seal while another waits"),
        ([LAST, PAUSED, SEAL, LAST], "LastBarrier while a seal waits"),
        ([LAST, SEAL, Grant(bytes(16))], "received receiver 00000000"),
        ([PAUSED, PackedState("cpu", 1, 0, b"x", 8, True)], "zstd"),
        ([PAUSED, PackedState("cpu", 1, 0, FRAME, 8, True)], "8"),
        ([PAUSED, PackedState("cpu", 1, 5, FRAME, 9, True)], "received offset 5, allowed 0"),
    ],
)
def test_messages_out_of_order_end_the_session(
    stage: Stage, messages: list[Message], match: str
) -> None:
    stage.accepted()
    stage.say(*messages)
    stage.ends(match)


def test_memory_is_hashed_anew_only_while_paused(stage: Stage) -> None:
    stage.accepted(audit=True)
    stage.say(DigestRequest(DigestSource.MEMORY, 0, 0, 1, 1))
    stage.ends("paused False")


@pytest.mark.parametrize(
    ("message", "changes", "name"),
    [
        (LAST, {"features": []}, "LastBarrier, allowed with 'seal-ahead'"),
        (LAST, {"audit": True}, "LastBarrier, allowed with 'seal-ahead'"),
        (LAST, {"hash_algorithm": HashAlgorithm.NONE}, "LastBarrier, allowed with 'seal-ahead'"),
        (
            PackedState("cpu", 1, 0, FRAME, 9, True),
            {"features": []},
            "PackedState, allowed with 'packed-state'",
        ),
    ],
)
def test_what_was_not_agreed_on(
    stage: Stage, message: Message, changes: dict[str, Any], name: str
) -> None:
    stage.accepted(**changes)
    stage.say(PAUSED, message)
    stage.ends(name)


def test_a_query_while_the_seal_waits_fences_the_guest(stage: Stage) -> None:
    """The session ends at once, and the fenced guest is not given a state."""
    accept = stage.accepted()
    stage.say(LAST, PAUSED, SEAL)
    endpoint = stage.listener.endpoint
    answer = ask_destination(endpoint, LinkOptions(), SESSION, accept.receiver_id)
    assert isinstance(answer, Answer) and answer.state == AnswerState.ABORTED
    stage.ends("")  # whichever is first: the query says it, or the seal's turn comes
    assert "load_state" not in stage.guests[-1].calls


def test_channels_that_end_before_the_barrier_of_a_seal(stage: Stage) -> None:
    accept = stage.accepted()
    address = ("127.0.0.1", stage.listener.endpoint.port)
    with socket.create_connection(address, 5) as pages:
        pages.sendall(Preamble(Role.PAGE, SESSION, 0, accept.token).pack())
        read_exactly(pages, PREAMBLE_REPLY_BYTES)
        pages.sendall(encode_packet(PacketKind.END, 1, checksum_seed=7))
        stage.say(LAST, PAUSED, SEAL)
        stage.ends("ended before barrier 1")


def test_a_grant_while_the_seal_waits_starts_nothing(stage: Stage) -> None:
    accept = stage.accepted()
    stage.say(LAST, PAUSED, SEAL, Grant(accept.receiver_id))
    stage.ends("handover in state receiving")


def test_a_source_that_is_lost_while_its_seal_waits(stage: Stage) -> None:
    stage.accepted()
    stage.say(LAST, PAUSED, SEAL)
    stage.sock.close()
    stage.ends("closed the control connection")


def test_a_page_channel_that_is_lost_while_the_seal_waits(stage: Stage) -> None:
    accept = stage.accepted()
    address = ("127.0.0.1", stage.listener.endpoint.port)
    with socket.create_connection(address, 5) as pages:
        pages.sendall(Preamble(Role.PAGE, SESSION, 0, accept.token).pack())
        read_exactly(pages, PREAMBLE_REPLY_BYTES)
        stage.say(LAST, PAUSED, SEAL)
    stage.ends("without END")


def test_a_grant_without_a_seal_starts_nothing(stage: Stage) -> None:
    accept = stage.accepted()
    stage.say(Grant(accept.receiver_id))
    stage.ends("handover in state receiving")


def test_a_grant_for_another_receiver_starts_nothing(stage: Stage) -> None:
    stage.accepted()
    stage.say(Grant(bytes(16)))
    stage.ends("received receiver 00000000")


def test_a_seal_over_missing_pages_is_a_mismatch_and_never_runs(stage: Stage) -> None:
    stage.accepted()
    stage.say(PAUSED, SEAL)
    answer = stage.hear()
    assert isinstance(answer, Mismatch)
    assert answer.pages == 0
    stage.sock.close()
    stage.ends("closed the control connection")


def test_released_before_anything_ran_frees_nothing_twice(stage: Stage) -> None:
    stage.accepted()
    stage.say(Released())
    stage.ends("handover in state receiving")


def test_something_else_than_an_offer_first(stage: Stage) -> None:
    stage.say(ReleasedSeen())
    stage.ends("allowed Offer")


def test_pages_that_land_after_the_seal_are_found_at_the_grant(
    stage: Stage, tmp_path: Path
) -> None:
    """The seal was good, then a page changes on the way to the grant: it must not run."""
    stage.say(Abort(1, "only to end this stage's own session"))
    stage.listener.outcomes.get(timeout=5)
    source = MemoryGuest(NPAGES, writing=False)
    source.resume()
    jobs: list[vmth.MigrationJob] = []
    ready = threading.Event()

    def sneak() -> None:
        ready.wait(5)
        session = jobs[0]._session
        assert isinstance(session, SourceSession)
        sender = session._sender
        assert sender is not None
        source.views[0][:8] = 99
        sender.send(0, 0, 1, np.array([1], dtype=np.uint64), 9)
        sender.barrier(9)

    source.on_call["hold"] = sneak
    options = MigrateOptions(state_dir=tmp_path / "s")
    jobs.append(vmth.start_migration(source, stage.listener.endpoint.display, options))
    ready.set()
    with pytest.raises(MigrationError, match="landed after the seal"):
        jobs[0].wait(10)
    assert source.running
    assert not stage.guests[-1].running
    assert isinstance(stage.listener.outcomes.get(timeout=5), MigrationError)
    source.close()
