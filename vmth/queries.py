# SPDX-License-Identifier: Apache-2.0
"""How a granted source finds out what became of its guest: queries on connections of their own."""

from __future__ import annotations

import logging
import socket
import threading
import time

from vmth.channel.sockets import LinkOptions
from vmth.errors import ChannelError, InDoubtError, MigrationError, StreamError, VmthError
from vmth.handshake import open_connection
from vmth.source_record import SourceRecord
from vmth.uri import Endpoint, Scheme
from vmth.wire.framing import FrameDecoder, FrameEncoder, Preamble
from vmth.wire.handover import SourceEvent, SourceState
from vmth.wire.messages import Abort, Answer, Message, Query, Released, ReleasedSeen, Role

__all__ = ["ask_destination", "settle", "tell_kept", "tell_released"]

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 16
ANSWER_TIMEOUT_S = 5.0
#: Between two queries that brought nothing.
RETRY_S = 0.5


def ask_destination(
    endpoint: Endpoint, options: LinkOptions, session_id: bytes, receiver_id: bytes
) -> Message | None:
    """One query; the answer, or None when the destination cannot be reached now. Fences a session
    that is not starting: afterwards it never runs there."""
    return _exchange(endpoint, options, session_id, Query(session_id, receiver_id))


def tell_released(
    endpoint: Endpoint, options: LinkOptions, session_id: bytes, receiver_id: bytes
) -> Message | None:
    """Say Released on a connection of its own; ReleasedSeen, or None."""
    return _exchange(endpoint, options, session_id, Released())


def tell_kept(endpoint: Endpoint, options: LinkOptions, session_id: bytes, abort: Abort) -> None:
    """Say on a connection of its own that the guest stays here, so that the destination need not
    remember that it will never run it. Tried once: without it only a record stays there."""
    _exchange(endpoint, options, session_id, abort)  # no answer: the destination closes


def _exchange(
    endpoint: Endpoint, options: LinkOptions, session_id: bytes, message: Message
) -> Message | None:
    if endpoint.scheme is Scheme.FD:
        return None  # the descriptors are used up; nobody can be dialed
    try:
        with open_connection(endpoint, options, Preamble(Role.QUERY, session_id), 0) as sock:
            sock.sendall(FrameEncoder().encode(message))
            return _read_answer(sock)
    except (VmthError, OSError) as error:
        log.info("session %s: %s: %s", session_id.hex(), endpoint.display, error)
        return None


def _read_answer(sock: socket.socket) -> Message:
    """Within ANSWER_TIMEOUT_S altogether, however slowly the bytes come."""
    decoder = FrameDecoder()
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while (message := decoder.next_message()) is None:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise ChannelError(f"no whole answer within {ANSWER_TIMEOUT_S:g} s")
        sock.settimeout(left_s)
        data = sock.recv(_READ_BYTES)
        if not data:
            raise ChannelError("the destination closed the query connection")
        decoder.feed(data)
    if not isinstance(message, Answer | ReleasedSeen):
        raise StreamError(f"received {type(message).__name__}, allowed Answer or ReleasedSeen")
    return message


def settle(record: SourceRecord, timeout_s: float) -> None:
    """Ask until it is known where the guest runs. Returns when it runs at the destination; raises
    MigrationError when it runs here again, InDoubtError when the time is up: it is paused then.

    Messages on a lost control connection prove nothing more: only answers by session id count.
    """
    deadline = time.monotonic() + timeout_s
    wait = threading.Event()
    while not _answered(record):
        if time.monotonic() >= deadline:
            record.apply(SourceEvent.GIVE_UP)
            raise InDoubtError(_doubt(record))
        wait.wait(RETRY_S)
        record.apply(SourceEvent.ASK_AGAIN)
    if record.state is SourceState.KEPT:
        raise MigrationError("the destination gave the guest back: it runs here as before")


def _answered(record: SourceRecord) -> bool:
    """Ask once if that is due; True when it is known where the guest runs."""
    answer = record.query() if record.query is not None and record.query_due else None
    record.query_due = False
    if answer is not None:
        record.apply_message(answer)
    return record.state is not SourceState.IN_DOUBT


def _doubt(record: SourceRecord) -> str:
    session = record.session_id.hex()
    return (
        f"session {session} is in doubt. Here: the guest is paused, the right to run was given to "
        f"receiver {record.receiver_id.hex()}. There ({record.peer}): no RUNNING and no ABORTED "
        "was heard. Do not resume it before the other host is known not to run it. Next: "
        f"vmth recover --session {session}"
    )
