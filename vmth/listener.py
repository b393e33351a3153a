# SPDX-License-Identifier: Apache-2.0
"""The destination's listener: routes connections to sessions, and answers for those of the past.

One accept thread; a short-lived thread reads each connection's preamble and answers its queries (at
most MAX_UNKNOWN at once and STRANGER_TIMEOUT_S each, so that strangers cannot exhaust it); each
session has a thread of its own. The state directory is locked: one process answers for its
destinations.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType

from vmth.channel.sockets import ListeningSocket, fd_sockets, set_link_options
from vmth.destination_record import DestinationRecord
from vmth.destination_session import DestinationSession, MakeGuest
from vmth.errors import ChannelError, MigrationError, StreamError, VmthError, let_frames_go
from vmth.guest import Guest
from vmth.handshake import read_preamble, receive_before
from vmth.journal import Side, StateDirectory, default_state_dir
from vmth.options import ReceiveOptions, check_plaintext
from vmth.received import ReceiveResult
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
    destination_state_after_restart,
)
from vmth.wire.messages import (
    PROTOCOL_VERSION,
    Abort,
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

#: Connections of nobody's session: their preamble has not arrived yet, or they query.
MAX_UNKNOWN = 64
#: What such a connection has for its preamble, and again for its queries, however it dribbles.
STRANGER_TIMEOUT_S = 5.0
#: All that a query connection may say: two messages of some ten bytes and an Abort with its reason.
MAX_QUERY_BYTES = 8192
_REPLY_TIMEOUT_S = 1.0

#: After a restart: find the guest of a session from its journal's detail: one that was starting is
#: asked whether it runs, one that will never run here is released. None: gone, or not to be asked.
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
        self._forgotten = threading.Condition(self._lock)
        self._sessions: dict[bytes, DestinationSession] = {}
        self._records: dict[bytes, DestinationRecord] = {}
        self._threads: set[threading.Thread] = set()
        self._strangers: set[socket.socket] = set()
        self._unknown = threading.BoundedSemaphore(MAX_UNKNOWN)
        self._closing = False
        self._resources = contextlib.ExitStack()
        self._socket: ListeningSocket | None = None
        try:
            self._directory = self._resources.enter_context(
                StateDirectory(self._options.state_dir or default_state_dir())
            )
            self._directory.lock()
            self._load_records()
            self.endpoint = endpoint
            if endpoint.scheme is Scheme.FD:
                self._adopt(fd_sockets(endpoint))
            else:
                self._socket = ListeningSocket(endpoint, self._options.link)
                self.endpoint = self._socket.endpoint
                self._spawn(self._accept_loop)
        except BaseException:
            self.close()
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

    def wait_for_release(self, session_id: str, timeout_s: float) -> bool:
        """Answer the source until it has said that it freed its guest, or gave this one up. False
        when the time is up: its queries would find nobody after ``close()``."""
        key = bytes.fromhex(session_id)
        with self._forgotten:
            return self._forgotten.wait_for(lambda: key not in self._records, timeout_s)

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
            for sock in self._strangers:
                with contextlib.suppress(OSError):  # the peer was faster
                    sock.shutdown(socket.SHUT_RDWR)
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
            record = self._records[session_id] = DestinationRecord(
                session_id,
                self._directory.receiver_id,
                journal,
                destination_state_after_restart(last.record),
            )
            record.was_running = last.detail.get("was_running") != "0"
            if self._find_guest is not None:
                record.guest = self._find_guest(session_id.hex(), last.detail)
            record.apply(DestinationEvent.RESTARTED)

    # -- connections -------------------------------------------------------------------------------

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        """Raises RuntimeError when the system starts no thread."""

        def run() -> None:
            try:
                target(*args)
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name="vmth-listen", daemon=True)
        with self._lock:  # close() joins what it finds in the set: nothing that was not started
            thread.start()
            self._threads.add(thread)

    def _accept_loop(self) -> None:
        assert self._socket is not None
        while True:
            try:
                self._accept_one(self._socket)
            except Exception as error:  # whatever a connection brings, the next one is served
                if self._closing:
                    return
                log.warning("accept on %s: %s", self.endpoint.display, error)
                time.sleep(0.05)  # out of descriptors, for example: do not spin

    def _accept_one(self, listening: ListeningSocket) -> None:
        sock, peer = listening.accept()
        if not self._unknown.acquire(blocking=False):
            log.info("%s: refused, %d connections are unknown already", peer, MAX_UNKNOWN)
            _refuse(sock, PreambleStatus.BUSY)
            return
        try:
            self._spawn(self._serve, sock, peer, STRANGER_TIMEOUT_S, self._unknown.release)
        except BaseException:
            self._unknown.release()
            sock.close()
            raise

    def _adopt(self, sockets: list[socket.socket]) -> None:
        """Connected sockets that the caller passed. Their peer may begin whenever it likes, and its
        page channels begin only after a guest was made: no deadline for a preamble."""
        with contextlib.ExitStack() as unserved:
            for sock in sockets:
                unserved.callback(sock.close)
            for sock in sockets:
                self._spawn(self._serve, sock, self.endpoint.display, math.inf)
            unserved.pop_all()

    def _serve(
        self,
        sock: socket.socket,
        peer: str,
        timeout_s: float,
        known: Callable[[], None] = lambda: None,
    ) -> None:
        """One connection, in a thread of its own. ``known`` is called once it is a session's, or
        over."""
        try:
            with contextlib.ExitStack() as stranger:
                stranger.callback(known)
                stranger.enter_context(self._ended_by_close(sock))
                preamble = self._meet(sock, timeout_s)
                if preamble.role is Role.QUERY:
                    self._serve_query(sock, preamble.session_id)
                    return
            if preamble.role is Role.CONTROL:
                self._serve_control(sock, preamble, peer)
            elif preamble.role is Role.PAGE:
                self._serve_page(sock, preamble)
            else:
                _refuse(sock, PreambleStatus.ROLE)
        except (VmthError, OSError) as error:
            log.info("%s: %s", peer, error)
        except Exception:
            log.exception("%s: a connection failed", peer)
        finally:
            sock.close()

    @contextlib.contextmanager
    def _ended_by_close(self, sock: socket.socket) -> Iterator[None]:
        with self._lock:
            if self._closing:
                raise ChannelError("the listener is closing")
            self._strangers.add(sock)
        try:
            yield
        finally:
            with self._lock:
                self._strangers.discard(sock)

    def _meet(self, sock: socket.socket, timeout_s: float) -> Preamble:
        try:
            preamble = read_preamble(sock, time.monotonic() + timeout_s)
        except PreambleError as error:
            _refuse(sock, error.status)
            raise
        sock.settimeout(STRANGER_TIMEOUT_S)
        set_link_options(sock, self._options.link)
        return preamble

    def _serve_control(self, sock: socket.socket, preamble: Preamble, peer: str) -> None:
        session_id = preamble.session_id
        with self._lock:
            known = session_id in self._records or session_id in self._sessions
            full = (
                len(self._sessions) >= self._options.max_sessions
                or len(self._records) >= self._options.max_records
            )
            if known or full or self._closing:
                session = None
            else:
                session = self._sessions[session_id] = DestinationSession(
                    sock, preamble, peer, self._make_record, self._make_guest, self._options
                )
        if session is None:
            _refuse(sock, PreambleStatus.BUSY)
            return
        outcome: ReceiveResult | MigrationError = MigrationError(f"{peer}: the session was ended")
        try:
            sock.sendall(PreambleReply(PreambleStatus.OK, PROTOCOL_VERSION).pack())
            outcome = session.run()
        except MigrationError as error:
            let_frames_go(error)
            outcome = error
        except Exception as error:
            let_frames_go(error)
            outcome = MigrationError(f"{peer}: the session failed: {error}")
            log.info("%s: the session failed: %s", peer, error)
        finally:
            with self._lock:
                del self._sessions[session_id]
                record = self._records.get(session_id)
            if record is not None:
                self._forget(session_id, record)
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
            try:
                session.claim(preamble.channel)
            except StreamError:
                _refuse(sock, PreambleStatus.MALFORMED)
                raise
            sock.sendall(PreambleReply(PreambleStatus.OK, PROTOCOL_VERSION).pack())
            session.attach(sock, preamble.channel)

    def _serve_query(self, sock: socket.socket, session_id: bytes) -> None:
        deadline_s = time.monotonic() + STRANGER_TIMEOUT_S
        sock.sendall(PreambleReply(PreambleStatus.OK, PROTOCOL_VERSION).pack())
        encoder, decoder = FrameEncoder(), FrameDecoder()

        def reply(message: Message) -> None:
            # The record may have been busy for long, with a resume(): that is not the peer's fault.
            sock.settimeout(max(_REPLY_TIMEOUT_S, deadline_s - time.monotonic()))
            try:
                sock.sendall(encoder.encode(message))
            except OSError as error:
                raise ChannelError(f"query connection: {error}") from error

        left_bytes = MAX_QUERY_BYTES
        while data := receive_before(sock, left_bytes, deadline_s):
            decoder.feed(data)
            while (message := decoder.next_message()) is not None:
                if isinstance(message, Abort):
                    self._give_back(session_id)
                    return  # closing is the answer
                self._answer(session_id, message, reply)
            left_bytes -= len(data)
            if not left_bytes:
                raise StreamError(f"query connection: received {MAX_QUERY_BYTES} bytes and more")

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
            raise StreamError(
                f"received {type(message).__name__}, allowed Query, Released or Abort"
            )

    def _give_back(self, session_id: bytes) -> None:
        """The source keeps the guest: what was remembered for its queries may go."""
        with self._lock:
            record = self._records.get(session_id)
        if record is not None:
            record.apply(DestinationEvent.PEER_ABORT)
            self._end_session(session_id, record)
            self._forget(session_id, record)

    def _end_session(self, session_id: bytes, record: DestinationRecord) -> None:
        """A query may have fenced a session that is still going on: it is over then."""
        if record.state in (DestinationState.ABORTED, DestinationState.NO_RECORD):
            with self._lock:
                session = self._sessions.get(session_id)
            if session is not None:
                session.cancel("the source asked on another connection: this session is over")

    def _forget(self, session_id: bytes, record: DestinationRecord) -> None:
        """Let a record go that the table has ended, unless its session goes on, or somebody is
        being told so: whoever tells calls this as well, and until then nobody may close."""
        if record.over:
            with self._lock:
                if session_id in self._sessions or self._records.get(session_id) is not record:
                    return
                del self._records[session_id]
                self._forgotten.notify_all()
            record.close()


def _refuse(sock: socket.socket, status: PreambleStatus) -> None:
    with sock, contextlib.suppress(OSError):  # a peer that is gone needs no answer
        sock.sendall(PreambleReply(status).pack())
