# SPDX-License-Identifier: Apache-2.0
"""The destination's listener: routes connections to sessions, and answers for those of the past.

One accept thread; a short-lived thread reads each connection's preamble (at most MAX_UNKNOWN at
once, so that silent strangers cannot exhaust it); each session has a thread of its own. The state
directory is locked: one process answers for its destinations.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from vmth.channel.sockets import ListeningSocket, fd_sockets, set_link_options
from vmth.destination_record import DestinationRecord
from vmth.destination_session import DestinationSession, MakeGuest, ReceiveResult
from vmth.errors import ChannelError, MigrationError, StreamError, VmthError, let_frames_go
from vmth.guest import Guest
from vmth.handshake import read_preamble
from vmth.journal import Side, StateDirectory, default_state_dir
from vmth.options import ReceiveOptions, check_plaintext
from vmth.uri import Endpoint, Scheme, parse_endpoint
from vmth.wire.framing import (
    FrameDecoder,
    FrameEncoder,
    Preamble,
    PreambleError,
    PreambleReply,
    PreambleStatus,
)
from vmth.wire.handover import (
    DestinationEvent,
    DestinationState,
    Record,
    destination_state_after_restart,
)
from vmth.wire.messages import (
    PROTOCOL_VERSION,
    Answer,
    AnswerState,
    Message,
    Query,
    Released,
    ReleasedSeen,
    Role,
)

__all__ = ["FindGuest", "Listener"]

log = logging.getLogger(__name__)

#: Connections whose preamble has not arrived yet.
MAX_UNKNOWN = 64
PREAMBLE_TIMEOUT_S = 5.0
_READ_BYTES = 1 << 16

#: After a restart: find the guest of a session that was starting or ran, from its journal's detail.
FindGuest = Callable[[str, Mapping[str, str]], Guest | None]


class Listener:
    """Serves migrations until ``close()``. Context manager; every method from any thread.

    ``outcomes`` brings a ReceiveResult or a MigrationError for each session that ends. Raises
    ChannelError when the endpoint cannot be listened on, UsageError when plaintext is not allowed
    there, JournalError when the state directory is in use or damaged.
    """

    def __init__(
        self,
        endpoint: Endpoint | str,
        make_guest: MakeGuest,
        options: ReceiveOptions | None = None,
        find_guest: FindGuest | None = None,
    ) -> None:
        if isinstance(endpoint, str):
            endpoint = parse_endpoint(endpoint, listening=True)
        self._options = options or ReceiveOptions()
        self._make_guest = make_guest
        self._find_guest = find_guest
        plaintext = check_plaintext(endpoint, self._options.insecure)
        self.fallbacks: tuple[str, ...] = (plaintext,) if plaintext is not None else ()
        self.outcomes: queue.SimpleQueue[ReceiveResult | MigrationError] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._sessions: dict[bytes, DestinationSession] = {}
        self._records: dict[bytes, DestinationRecord] = {}
        self._threads: set[threading.Thread] = set()
        self._unknown = threading.BoundedSemaphore(MAX_UNKNOWN)
        self._closing = False
        self._resources = contextlib.ExitStack()
        try:
            self._directory = self._resources.enter_context(
                StateDirectory(self._options.state_dir or default_state_dir())
            )
            self._directory.lock()
            self._load_records()
            self._socket: ListeningSocket | None = None
            self.endpoint = endpoint
            if endpoint.scheme is Scheme.FD:
                for sock in fd_sockets(endpoint):
                    self._spawn(self._serve, sock, endpoint.display)
            else:
                self._socket = ListeningSocket(endpoint, self._options.link)
                self.endpoint = self._socket.endpoint
                self._spawn(self._accept_loop)
        except BaseException:
            self._resources.close()
            raise

    @property
    def receiver_id(self) -> str:
        return self._directory.receiver_id.hex()

    def wait_for_guest(self, timeout_s: float | None = None) -> ReceiveResult:
        """The next session's guest. Raises its MigrationError, or TimeoutError."""
        try:
            outcome = self.outcomes.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"no migration ended within {timeout_s:g} s") from None
        if isinstance(outcome, MigrationError):
            raise outcome
        return outcome

    def states(self) -> dict[str, str]:
        """Session id to state, of every session that is known here."""
        with self._lock:
            return {key.hex(): record.state.value for key, record in self._records.items()}

    def close(self) -> None:
        """Stop listening; sessions whose guest does not run yet are ended. Idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            sessions = list(self._sessions.values())
        if self._socket is not None:
            self._socket.close()
        for session in sessions:
            session.cancel("the destination is shutting down")
        while True:
            with self._lock:
                waiting = [t for t in self._threads if t is not threading.current_thread()]
            if not waiting:
                break
            for thread in waiting:
                thread.join()
        for record in self._records.values():
            record.close()
        self._resources.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- after a restart ---------------------------------------------------------------------------

    def _load_records(self) -> None:
        for session_id, side in self._directory.sessions():
            if side is not Side.DESTINATION:
                continue
            journal = self._directory.open_journal(session_id, side)
            last = journal.last
            if last is None:
                journal.remove()  # creation was torn: nothing was ever promised
                continue
            record = DestinationRecord(
                session_id,
                self._directory.receiver_id,
                journal,
                destination_state_after_restart(last.record),
            )
            record.was_running = last.detail.get("was_running") != "0"
            if self._find_guest is not None and last.record in (Record.STARTING, Record.RUNNING):
                record.guest = self._find_guest(session_id.hex(), last.detail)
            self._records[session_id] = record
            record.apply(DestinationEvent.RESTARTED)

    # -- connections -------------------------------------------------------------------------------

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        def run() -> None:
            try:
                target(*args)
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name="vmth-listen", daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def _accept_loop(self) -> None:
        assert self._socket is not None
        while True:
            try:
                sock, peer = self._socket.accept()
            except OSError as error:
                if self._closing:
                    return
                log.warning("accept on %s: %s", self.endpoint.display, error)
                time.sleep(0.05)  # out of descriptors, for example: do not spin
                continue
            if self._unknown.acquire(blocking=False):
                self._spawn(self._serve_counted, sock, peer)
            else:
                sock.close()

    def _serve_counted(self, sock: socket.socket, peer: str) -> None:
        self._serve(sock, peer, self._unknown.release)

    def _serve(
        self, sock: socket.socket, peer: str, known: Callable[[], None] = lambda: None
    ) -> None:
        """One connection, in a thread of its own. ``known`` is called when the preamble was
        read."""
        try:
            try:
                preamble = read_preamble(sock, PREAMBLE_TIMEOUT_S)
            except PreambleError as error:
                log.info("%s: %s", peer, error)
                sock.sendall(PreambleReply(error.status).pack())
                sock.close()
                return
            finally:
                known()
            set_link_options(sock, self._options.link)
            if preamble.role is Role.CONTROL:
                self._serve_control(sock, preamble, peer)
            elif preamble.role is Role.PAGE:
                self._serve_page(sock, preamble)
            elif preamble.role is Role.QUERY:
                self._serve_query(sock, preamble)
            else:
                _refuse(sock, PreambleStatus.ROLE)
        except (VmthError, OSError) as error:
            log.info("%s: %s", peer, error)
            sock.close()

    def _serve_control(self, sock: socket.socket, preamble: Preamble, peer: str) -> None:
        with self._lock:
            known = preamble.session_id in self._records or preamble.session_id in self._sessions
            if known or self._closing or len(self._sessions) >= self._options.max_sessions:
                session = None
            else:
                session = DestinationSession(
                    sock, preamble, peer, self._make_record, self._make_guest, self._options
                )
                self._sessions[preamble.session_id] = session
        if session is None:
            _refuse(sock, PreambleStatus.BUSY)
            return
        sock.sendall(PreambleReply(PreambleStatus.OK, PROTOCOL_VERSION).pack())
        outcome: ReceiveResult | MigrationError
        try:
            outcome = session.run()
        except MigrationError as error:
            let_frames_go(error)
            outcome = error
        with self._lock:
            del self._sessions[preamble.session_id]
            record = self._records.get(preamble.session_id)
            if record is not None and record.state is DestinationState.NO_RECORD:
                del self._records[preamble.session_id]
                record.close()
        self.outcomes.put(outcome)

    def _make_record(self, session_id: bytes) -> DestinationRecord:
        journal = self._directory.create_journal(session_id, Side.DESTINATION)
        record = DestinationRecord(session_id, self._directory.receiver_id, journal)
        with self._lock:
            self._records[session_id] = record
        return record

    def _serve_page(self, sock: socket.socket, preamble: Preamble) -> None:
        with self._lock:
            session = self._sessions.get(preamble.session_id)
        if session is None:
            _refuse(sock, PreambleStatus.UNKNOWN_SESSION)
        elif not session.check_token(preamble.token):
            _refuse(sock, PreambleStatus.BAD_TOKEN)
        else:
            with sock:
                sock.sendall(PreambleReply(PreambleStatus.OK, PROTOCOL_VERSION).pack())
                session.attach(sock, preamble.channel)

    def _serve_query(self, sock: socket.socket, preamble: Preamble) -> None:
        with sock:
            sock.sendall(PreambleReply(PreambleStatus.OK, PROTOCOL_VERSION).pack())
            encoder, decoder = FrameEncoder(), FrameDecoder()

            def reply(message: Message) -> None:
                try:
                    sock.sendall(encoder.encode(message))
                except OSError as error:
                    raise ChannelError(f"query connection: {error}") from error

            while True:
                data = sock.recv(_READ_BYTES)
                if not data:
                    return
                decoder.feed(data)
                while (message := decoder.next_message()) is not None:
                    self._answer(preamble.session_id, message, reply)

    def _answer(
        self, session_id: bytes, message: Message, reply: Callable[[Message], None]
    ) -> None:
        with self._lock:
            record = self._records.get(session_id)
        if isinstance(message, Query) and message.session_id == session_id:
            if record is None:
                receiver_id = self._directory.receiver_id
                reply(Answer(session_id, receiver_id, AnswerState.UNKNOWN, "no record here"))
            else:
                record.answer(message, reply)
                self._end_session(session_id, record)
        elif isinstance(message, Released):
            if record is None:
                reply(ReleasedSeen())
            else:
                record.apply(DestinationEvent.RELEASED, reply)
                self._forget(session_id, record)
        else:
            raise StreamError(f"received {type(message).__name__}, allowed Query or Released")

    def _end_session(self, session_id: bytes, record: DestinationRecord) -> None:
        """A query may have fenced a session that is still going on: it is over then."""
        if record.state is DestinationState.ABORTED:
            with self._lock:
                session = self._sessions.get(session_id)
            if session is not None:
                session.cancel("the source asked on another connection: this session is over")

    def _forget(self, session_id: bytes, record: DestinationRecord) -> None:
        if record.state is DestinationState.NO_RECORD:
            with self._lock:
                if session_id not in self._sessions and session_id in self._records:
                    del self._records[session_id]
                    record.close()


def _refuse(sock: socket.socket, status: PreambleStatus) -> None:
    with sock:
        sock.sendall(PreambleReply(status).pack())
