# SPDX-License-Identifier: Apache-2.0
"""The destination's side of one session: from the offer to a guest that runs here, or to nothing.

The thread that runs it handles the control messages and alone calls the guest; page channels land
in native threads. What may happen when, and what follows, is decided by the session's record
(``vmth.destination_record``).
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence

from vmth import __version__
from vmth.abort import abort_code
from vmth.channel.control import ControlConnection
from vmth.channel.forms import BASED_FORMS, agreed_forms
from vmth.channel.pages import NativeReceiver
from vmth.channel.reuse import REUSE, ReusedFile, filter_messages
from vmth.channel.watch import IdleRule
from vmth.destination_record import DestinationRecord
from vmth.digest_replies import DigestReplies
from vmth.dirty.populated import maybe_nonzero
from vmth.errors import (
    CancelledError,
    ChannelError,
    GuestError,
    InDoubtError,
    MigrationError,
    RefusedError,
    StreamError,
    VerificationError,
    VmthError,
)
from vmth.guest import CanAnnounce, CanNote, CanTakePages, Guest
from vmth.handshake import (
    HANDED_ON,
    PACKED_STATE,
    SCOPE_STREAM,
    SEAL_AHEAD,
    WIRE_PAGE_BYTES,
    Incoming,
    OfferRefused,
    agreed_scope,
    check_offer,
    common_features,
    compare_blocks,
)
from vmth.memory import MappedBlock, map_blocks
from vmth.options import ReceiveOptions
from vmth.realtime import Realtime
from vmth.received import NOT_REUSED, ReceiveResult, not_found
from vmth.seal import digest_text
from vmth.state_streams import StateCollector
from vmth.wire.framing import Preamble
from vmth.wire.handover import DestinationEvent, DestinationState
from vmth.wire.messages import (
    Abort,
    AbortCode,
    Accept,
    DigestRequest,
    Grant,
    HandedOn,
    HashAlgorithm,
    LastBarrier,
    Message,
    Mismatch,
    Mode,
    Offer,
    PackedState,
    Paused,
    RefuseCode,
    Released,
    RoundDone,
    Seal,
    Sealed,
    State,
)

__all__ = ["DestinationSession"]

log = logging.getLogger(__name__)

#: How long the source's answer to Aborted is waited for; it only lets the record go.
ABORT_TIMEOUT_S = 2.0
#: How long a source's reason is waited for when a page channel has broken.
REASON_TIMEOUT_S = 1.0
#: How long last pages are waited for before it is looked whether the source says something.
LANDING_LOOK_NS = 20_000_000
#: A source that expects no more will pause the guest soon.
PAUSES_SOON_NS = 300_000_000
#: While threads are raised: how often it is looked whether that has lasted long enough.
HURRY_LOOK_S = 1.0

_LOOKS_PER_TIMEOUT = 4

MakeGuest = Callable[[Incoming], Guest]
#: Messages that belong before the seal is answered.
_WHILE_RECEIVING = (Paused, State, PackedState, DigestRequest, LastBarrier, Seal)


class DestinationSession:
    """Made by the listener for a control connection. ``run()`` once; ``attach``, ``check_token``
    and ``cancel`` from any thread. ``make_record`` opens the session's journal."""

    def __init__(
        self,
        sock: socket.socket,
        preamble: Preamble,
        peer: str,
        make_record: Callable[[bytes], DestinationRecord],
        make_guest: MakeGuest,
        options: ReceiveOptions,
    ) -> None:
        self.peer = peer
        self.token = secrets.token_bytes(16)
        self.progress: RoundDone | None = None  #: what the source said last of its rounds
        self._preamble = preamble
        self._make_record = make_record
        self._make_guest = make_guest
        self._options = options
        self._control = ControlConnection(sock, peer_timeout_s=options.peer_timeout_s)
        self._resources = contextlib.ExitStack()
        self._ready = threading.Event()
        self._told = threading.Event()  #: all that goes before the first page channel
        self._ended = threading.Event()
        self._channels_lock = threading.Lock()
        self._claimed: set[int] = set()  #: page channels, by index
        self._attached = 0
        self._handled = 0  #: messages but pings; written by the session's thread
        self._handling = False
        self._state = StateCollector()
        self._digest = ""
        self._scope = "memory"
        self._announce_note: tuple[str, ...] = ()
        self._paused = False
        self._realtime = Realtime(options.realtime)
        self._agreed: Sequence[str] = ()  #: features
        self._last_barrier: int | None = None  #: before whose pages the next seal is not judged
        self._ahead: Seal | None = None  #: the seal that waits
        self._arrived = False  #: the guest runs here, or stays paused as it was: the outcome
        self._record: DestinationRecord | None = None
        self._guest: Guest | None = None
        self._offer: Offer | None = None
        self._receiver: NativeReceiver | None = None
        self._replies: DigestReplies | None = None
        self._memory: list[MappedBlock] = []

    # -- called by the listener's threads ----------------------------------------------------------

    def check_token(self, token: bytes) -> bool:
        return hmac.compare_digest(token, self.token)

    def attach(self, sock: socket.socket, index: int) -> None:
        """A page connection past its preamble, duplicated. Raises ChannelError once the session is
        over, and what the receiver says of the index."""
        if not self._ready.wait(self._options.peer_timeout_s) or self._ended.is_set():
            raise ChannelError("the session takes no page channel any more")
        assert self._receiver is not None
        self._receiver.attach(sock.fileno(), index)
        with self._channels_lock:
            self._attached += 1

    def claim(self, index: int) -> None:
        """A page connection with the right token is about to attach as ``index``. Raises
        StreamError for one that was claimed before or not offered: the session is over then."""
        with self._channels_lock:
            offered = self._offer.channels if self._offer is not None else 0
            if index < offered and index not in self._claimed:
                self._claimed.add(index)
                return
            why = "attached before" if index < offered else f"allowed 0 to {offered - 1}"
        error = StreamError(f"page channel {index}: {why}")
        self._control.interrupt(error)
        raise error

    def cancel(self, reason: str) -> None:
        """End it unless the guest runs or is being started. Any thread, idempotent."""
        self._control.interrupt(CancelledError(reason))

    # -- the session's thread ----------------------------------------------------------------------

    def run(self) -> ReceiveResult:
        """Returns with the guest here: running, or paused as it was. Raises MigrationError, or a
        child of it, after everything was freed that the session took."""
        self._control.start()
        try:
            try:
                self._accept()
                self._serve()
                return self._result()
            except Exception as error:
                raise self._end(error) from error
        finally:
            self._realtime.end()
            self._ended.set()
            self._resources.close()
            if self._record is not None:
                self._record.send = None
                self._record.disown()
            self._control.close()

    def _accept(self) -> None:
        offer = self._control.receive(self._options.peer_timeout_s)
        if not isinstance(offer, Offer):
            raise StreamError(f"received {type(offer).__name__} first, allowed Offer")
        self._offer = offer
        try:
            incoming = check_offer(offer, self._preamble, self._options.max_memory_bytes, self.peer)
            guest = self._guest = self._call_make_guest(incoming)
            compare_blocks(incoming.blocks, guest.blocks)
            self._scope = agreed_scope(guest, offer)
            self._memory = self._resources.enter_context(map_blocks(guest.blocks, writable=True))
            receiver = self._receiver = self._make_receiver(guest, offer)
            seed, audit = offer.hash_seed, offer.audit
            self._replies = DigestReplies(guest, receiver, self._memory, seed, audit)
            record = self._open_record()
        except OfferRefused as refusal:
            self._control.send(refusal.message)
            raise
        self._record = record
        record.own_guest(guest)
        record.before_discard = self._realtime.end  # memory is freed then
        watcher = threading.Thread(target=self._watch_pages, name="vmth-watch", daemon=True)
        watcher.start()
        self._resources.callback(watcher.join)
        self._resources.callback(receiver.cancel, "the session is over")
        self._resources.callback(self._ended.set)
        self._ready.set()
        record.send = self._control.send
        features = self._features(offer)
        if self._scope == "stream":
            features.append(SCOPE_STREAM)
        self._agreed = features
        record.outgoing.accept = Accept(record.receiver_id, self.token, features, __version__)
        record.apply(DestinationEvent.ACCEPT)
        if HANDED_ON in features:
            self._control.send(HandedOn(self._handed_on()))
        if REUSE in features:
            for message in filter_messages(self._options.reuse):
                self._control.send(message)
        self._told.set()

    def _features(self, offer: Offer) -> list[str]:
        """What this release and this guest can take of what is offered. A page can be built only on
        one that is held here: the source must know which are not."""
        handed_on, told = self._handed_on(), HANDED_ON in offer.features
        none_held = len(handed_on) == len(self._memory)
        beyond = [*BASED_FORMS] if none_held or (handed_on and not told) else []
        if not self._options.reuse:
            beyond.append(REUSE)
        features = [name for name in common_features(offer) if name not in beyond]
        return [*features, HANDED_ON] if handed_on and told else features

    def _handed_on(self) -> list[int]:
        return [index for index, area in enumerate(self._memory) if area.hostless]

    def _call_make_guest(self, incoming: Incoming) -> Guest:
        try:
            return self._make_guest(incoming)
        except OfferRefused:
            raise
        except RefusedError as error:
            raise OfferRefused(RefuseCode.MEMORY, str(error)) from error
        except Exception as error:
            raise OfferRefused(
                RefuseCode.GUEST, f"the destination made no guest: {error}"
            ) from error

    def _make_receiver(self, guest: Guest, offer: Offer) -> NativeReceiver:
        try:
            receiver = NativeReceiver(
                self._memory,
                WIRE_PAGE_BYTES,
                hash_seed=offer.hash_seed,
                digest=offer.hash_algorithm != HashAlgorithm.NONE,
                maybe_nonzero=maybe_nonzero(guest),
                channels=offer.channels,
                sink=guest.page_sink() if isinstance(guest, CanTakePages) else None,
                forms=agreed_forms(self._features(offer)),
                reuse=self._options.reuse,
            )
        except (VmthError, OSError, MemoryError) as error:
            raise OfferRefused(RefuseCode.MEMORY, f"the page tables: {error}") from error
        self._resources.callback(receiver.close)
        return receiver

    def _open_record(self) -> DestinationRecord:
        try:
            return self._make_record(self._preamble.session_id)
        except VmthError as error:
            raise OfferRefused(RefuseCode.BUSY, f"the destination's journal: {error}") from error

    def _watch_pages(self) -> None:
        """A broken page channel ends the session although the control connection is fine, and so
        does a source that lives and does nothing, or a program that takes no pages any more."""
        assert self._receiver is not None and self._offer is not None
        options = self._options
        rule = IdleRule(
            self._offer.channels, options.peer_timeout_s, options.idle_timeout_s, time.monotonic()
        )
        look_s = min(options.peer_timeout_s, options.idle_timeout_s) / _LOOKS_PER_TIMEOUT
        trouble: VmthError | None = None
        try:
            all_ended = False
            while (trouble := self._handing_on_failed()) is None and not self._ended.is_set():
                if all_ended:
                    self._ended.wait(look_s)
                else:
                    all_ended = self._receiver.wait(int(look_s * 1e9))
                wire_bytes = self._receiver.counters().wire_bytes
                if not self._told.is_set():
                    rule.not_before(time.monotonic())
                # While a message is handled it is we who are slow: with a state, with a resume().
                busy = time.monotonic_ns() if self._handling else 0
                trouble = rule.judge(
                    time.monotonic(), self._attached, wire_bytes, self._handled, busy
                )
                if trouble is not None:
                    break
        except VmthError as error:
            trouble = self._handing_on_failed() or error
            if trouble is error and isinstance(error, ChannelError):
                self._ended.wait(REASON_TIMEOUT_S)  # a source closes its channels, then says why
        if trouble is not None and not self._ended.is_set():
            self._control.interrupt(trouble)

    def _handing_on_failed(self) -> VmthError | None:
        """What takes the pages knows better why it does not take them."""
        guest = self._guest
        if guest is None or not isinstance(guest, CanTakePages):
            return None
        trouble = guest.trouble()
        if trouble is None or isinstance(trouble, VmthError):
            return trouble
        return GuestError(_text(trouble))

    def _serve(self) -> None:
        """Handle messages until the guest runs here and the source has let it go. Once it runs, an
        ending connection is no failure: queries are answered from the record."""
        while True:
            try:
                self._seal_when_landed()
                while self._realtime.held and not self._control.wait(HURRY_LOOK_S):
                    self._realtime.check_time()
                message = self._control.receive()
                self._handled, self._handling = self._handled + 1, True
                self._realtime.check_time()
                try:
                    self._handle(message)
                finally:
                    self._handling = False
            except VmthError as error:
                if self._arrived:
                    log.info("%s: after the guest had arrived: %s", self.peer, error)
                    return
                raise
            if isinstance(message, Released):
                return

    # -- messages ----------------------------------------------------------------------------------

    def _handle(self, message: Message) -> None:
        assert self._record is not None
        if isinstance(message, _WHILE_RECEIVING):
            self._check_receiving(message)
        if isinstance(message, RoundDone):
            self.progress = message
            if message.expected_downtime_ns <= PAUSES_SOON_NS:
                self._hurry()
            else:
                self._realtime.end()
        elif isinstance(message, Paused):
            self._record.was_running = message.was_running
            self._hurry(paused=True)
            self._paused = True
        elif isinstance(message, State | PackedState):
            if isinstance(message, PackedState) and PACKED_STATE not in self._agreed:
                raise StreamError(f"received PackedState, allowed with {PACKED_STATE!r} agreed on")
            self._state.feed(message)
        elif isinstance(message, LastBarrier):
            self._expect_seal_ahead(message)
        elif isinstance(message, DigestRequest):
            assert self._replies is not None
            self._realtime.end()  # tables are compared, or memory is hashed
            self._control.send(self._replies.reply(message, self._paused))
        elif isinstance(message, Seal):
            if self._ahead is not None:
                raise StreamError("received Seal while another waits, allowed: after its answer")
            if self._last_barrier is None:
                self._seal(message)
            else:
                self._ahead = message
        elif isinstance(message, Grant):
            self._granted(message)
        elif isinstance(message, Released):
            self._record.apply(DestinationEvent.RELEASED)
        elif isinstance(message, Abort):
            self._record.apply(DestinationEvent.PEER_ABORT)
            kind = CancelledError if message.code == AbortCode.CANCELLED else MigrationError
            raise kind(f"the source ended the migration: {message.reason}")
        else:
            raise StreamError(
                f"received {type(message).__name__} in state {self._record.state.value}, allowed: "
                "what a source sends"
            )

    def _hurry(self, paused: bool = False) -> None:
        """Not where all of memory comes, or is hashed, while the guest is paused."""
        assert self._offer is not None and self._record is not None
        if self._offer.mode == Mode.LIVE and not self._offer.audit and not self._paused:
            self._realtime.begin(self._guest, self._control.thread_id, paused=paused)
            if self._realtime.held and not paused:
                self._record.wake_disk()

    def _check_receiving(self, message: Message) -> None:
        """A query on another connection may have ended it meanwhile."""
        assert self._record is not None
        if self._record.state is not DestinationState.RECEIVING:
            raise StreamError(
                f"received {type(message).__name__} in state {self._record.state.value}, allowed: "
                "Grant, Released or Abort"
            )

    def _expect_seal_ahead(self, message: LastBarrier) -> None:
        """Only a digest tells that a page was missed, and an audit comes before its seal."""
        assert self._offer is not None
        if SEAL_AHEAD not in self._agreed or self._offer.audit or not self._digest_on:
            raise StreamError(f"received LastBarrier, allowed with {SEAL_AHEAD!r} agreed on")
        if self._ahead is not None:
            raise StreamError("received LastBarrier while a seal waits, allowed: after its answer")
        self._last_barrier = message.count

    def _seal_when_landed(self) -> None:
        """A seal that came ahead of the last pages: judged when they have landed, unless the source
        says something first. Whether pages come at all is watched as in every round."""
        if self._ahead is None:
            return
        assert self._receiver is not None and self._last_barrier is not None
        try:
            while not self._receiver.wait_barriers(self._last_barrier, LANDING_LOOK_NS):
                self._realtime.check_time()
                if self._control.waits:
                    return
                self._check_receiving(self._ahead)
        except ChannelError as error:
            raise self._handing_on_failed() or error from None
        seal, self._ahead, self._last_barrier = self._ahead, None, None
        self._check_receiving(seal)
        self._handling = True
        try:
            self._seal(seal)
        finally:
            self._handling = False

    def _seal(self, seal: Seal) -> None:
        assert self._guest is not None and self._receiver is not None and self._record is not None
        if not self._paused:
            raise StreamError("received Seal before Paused, allowed: only after it")
        self._state.check(seal)
        ours, expected = (0, 0, 0), 0
        if self._digest_on:
            ours = self._receiver.digest()
            expected = sum(block.npages for block in self._guest.blocks)
        if ours != (seal.digest_lo, seal.digest_hi, seal.pages) or ours[2] != expected:
            self._record.outgoing.mismatch = Mismatch(*ours)
            self._record.apply(DestinationEvent.SEAL_DIFFERS)
            return
        try:
            self._guest.load_state(iter(self._state.streams))
        except VerificationError:
            raise  # a guest that checks more than the digest does
        except Exception as error:
            raise GuestError(f"the destination guest could not load its state: {error}") from error
        self._digest = digest_text(ours) if self._digest_on else ""
        self._record.outgoing.sealed = Sealed(*ours)
        self._record.apply(DestinationEvent.SEAL_EQUAL)

    def _granted(self, grant: Grant) -> None:
        assert self._record is not None and self._receiver is not None
        if grant.receiver_id != self._record.receiver_id:
            raise StreamError(
                f"Grant: received receiver {grant.receiver_id.hex()}, allowed "
                f"{self._record.receiver_id.hex()}"
            )
        sealed = self._record.state is DestinationState.SEALED and self._digest_on
        if sealed and digest_text(self._receiver.digest()) != self._digest:
            raise StreamError("pages have landed after the seal: the proof does not hold any more")
        try:
            self._record.apply(DestinationEvent.GRANT)
        finally:
            self._realtime.end()
            # Released on another connection may have moved the record on already.
            self._arrived = self._record.started_here
        if not self._arrived:
            raise MigrationError(f"the guest does not run here: {self._record.outgoing.reason}")
        self._announce()

    def _announce(self) -> None:
        assert self._record is not None and self._guest is not None
        if self._record.was_running and isinstance(self._guest, CanAnnounce):
            try:
                self._guest.announce()
            except Exception as error:
                self._announce_note = (f"the network was not told of the move: {error}",)

    @property
    def _digest_on(self) -> bool:
        assert self._offer is not None
        return self._offer.hash_algorithm != HashAlgorithm.NONE

    # -- the end -----------------------------------------------------------------------------------

    def _result(self) -> ReceiveResult:
        assert self._guest is not None and self._receiver is not None and self._record is not None
        counters, served = self._receiver.counters(), self._receiver.reused()
        memory_bytes = sum(block.used_length for block in self._guest.blocks)
        asked = counters.forms[REUSE].pages if REUSE in counters.forms else 0
        return ReceiveResult(
            session_id=self._preamble.session_id.hex(),
            guest=self._guest,
            was_running=self._record.was_running,
            verified=self._digest_on,
            verified_scope=self._scope if self._digest_on else "none",
            digest=self._digest,
            peer=self.peer,
            memory_bytes=memory_bytes,
            wire_bytes=counters.wire_bytes,
            fallbacks=(
                *self._receiver.fallbacks(),
                *(self._guest.notes() if isinstance(self._guest, CanNote) else ()),
                *self._announce_note,
                *self._realtime.notes,
                *((NOT_REUSED,) if self._options.reuse and REUSE not in self._agreed else ()),
                *not_found(asked, served, memory_bytes // WIRE_PAGE_BYTES),
            ),
            reused=tuple(
                ReusedFile(source.path, pages)
                for source, pages in zip(self._options.reuse, served, strict=True)
            ),
        )

    def _end(self, error: Exception) -> MigrationError:
        """Discard what has arrived, unless it runs or may run, and say why."""
        outcome = error if isinstance(error, MigrationError) else MigrationError(_text(error))
        record = self._record
        if record is None:
            self._discard_unrecorded(outcome)
            return outcome
        record.outgoing.reason = str(outcome)
        record.outgoing.code = abort_code(error)
        lost = isinstance(error, ChannelError) and self._control.failure is error
        event = DestinationEvent.CONNECTION_LOST if lost else DestinationEvent.FAILURE
        try:
            record.apply(event)
        except Exception as trouble:  # the journal, above all
            outcome = MigrationError(f"{outcome}; and then: {_text(trouble)}")
        if record.may_run:
            return InDoubtError(f"{outcome}; the guest may run here: it was being started")
        record.discard()
        if record.sealed_said and not lost:
            self._hear_abort(record)
        return outcome

    def _hear_abort(self, record: DestinationRecord) -> None:
        """Aborted was said. The source answers that it keeps the guest: then the record may go."""
        deadline = time.monotonic() + ABORT_TIMEOUT_S
        try:
            while record.state is DestinationState.ABORTED:
                message = self._control.receive(max(0.001, deadline - time.monotonic()))
                if isinstance(message, Abort):
                    record.apply(DestinationEvent.PEER_ABORT)
        except VmthError as error:
            log.info("%s: the record stays until the source is heard: %s", self.peer, error)

    def _discard_unrecorded(self, outcome: MigrationError) -> None:
        """Before the record began: nothing is promised."""
        if not isinstance(outcome, OfferRefused):
            with contextlib.suppress(VmthError):
                self._control.send(Abort(AbortCode.FAILED, str(outcome)[:1024]))
        if self._guest is not None:
            try:
                self._guest.release()
            except Exception as error:
                log.error("discarding a guest that was never filled: %s", error)


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, VmthError) else f"{type(error).__name__}: {error}"
