# SPDX-License-Identifier: Apache-2.0
"""The source's side of one session: meet, send rounds, seal, hand over, clean up.

Runs in the job's thread, which alone calls the guest. ``run()`` reads as the migration; the table
in ``vmth.source_record`` decides what may happen when, ``vmth.precopy`` makes the rounds.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from vmth.abort import abort_code
from vmth.audit import MemoryDigests
from vmth.channel.control import ControlConnection
from vmth.channel.forms import agreed_forms
from vmth.channel.pages import FAST_PACKET_BYTES, NativeSender
from vmth.channel.reuse import REUSE, hear_filter
from vmth.channel.sockets import DialError
from vmth.channel.watch import ProgressWatch
from vmth.errors import (
    CancelledError,
    ChannelError,
    GuestError,
    MigrationError,
    NotResumedError,
    RefusedError,
    StreamError,
    UsageError,
    VerificationError,
    VmthError,
)
from vmth.events import (
    Connected,
    Event,
    EventLog,
    FellBack,
    Granted,
    GuestResumed,
    RoundFinished,
    SealMatched,
)
from vmth.form_tuner import FormTuner, tuner_for
from vmth.guest import CanTell, Guest
from vmth.handover_cost import HandoverCosts
from vmth.handshake import (
    PACKED_STATE,
    SEAL_AHEAD,
    WIRE_PAGE_BYTES,
    accepted_scope,
    check_blocks,
    hear_handed_on,
    make_offer,
    open_connection,
    open_page_channels,
)
from vmth.journal import Side, StateDirectory, default_state_dir
from vmth.kept_image import KeptImage
from vmth.memory import MappedBlock, map_blocks
from vmth.options import MigrateOptions
from vmth.policy.standard import StandardPolicy
from vmth.precopy import make_precopy
from vmth.queries import ask_destination, settle, tell_kept, tell_released
from vmth.realtime import Realtime
from vmth.rounds import FinalPass, MakeEngine, RoundEngine, RoundTools
from vmth.seal import Sealer, digest_text
from vmth.source_record import SourceRecord, why_it_ended
from vmth.source_stats import downtime_parts, draft_result, job_stats
from vmth.state_streams import StateTeller, packing_pays
from vmth.stats import JobStats, MigrationResult, TransferCounters
from vmth.tuning import Tuning
from vmth.units import format_duration
from vmth.uri import Endpoint
from vmth.wire.framing import Preamble
from vmth.wire.handover import SourceEvent, SourceState
from vmth.wire.messages import (
    Abort,
    Aborted,
    Accept,
    Message,
    Mode,
    Refuse,
    ReleasedSeen,
    Role,
    RoundDone,
    Seal,
)

__all__ = ["SourceSession"]

log = logging.getLogger(__name__)

#: The destination may have to make a guest: allocate memory, start a process.
ACCEPT_TIMEOUT_S = 60.0
#: How long the last message is waited for; it only lets both records go.
RELEASED_SEEN_TIMEOUT_S = 2.0
REASON_TIMEOUT_S = 1.0


class SourceSession:
    """One migration attempt. ``run()`` once, from one thread; ``cancel``, ``retune`` and ``stats``
    from any. Raises UsageError from the constructor for what is not allowed."""

    def __init__(
        self,
        guest: Guest,
        endpoint: Endpoint,
        options: MigrateOptions,
        clock: Callable[[], int] = time.monotonic_ns,
        *,
        make_engine: MakeEngine = make_precopy,
        features: Sequence[str] = (),
    ) -> None:
        """``make_engine``: what brings the pages; ``features``: what this source offers beyond
        ``handshake.FEATURES``."""
        self.session_id = secrets.token_bytes(16)
        self.events = EventLog()
        self.tuning = Tuning(
            options.bandwidth_bps, options.downtime_limit_ns, options.timeout_ns, options.on_stall
        )
        self._guest = guest
        self._endpoint = endpoint
        self._options = options
        self._clock = clock
        plaintext = options.check_for(endpoint)
        self._fallbacks = [plaintext] if plaintext is not None else []
        self._make_engine = make_engine
        self._features = features
        if make_engine is make_precopy and options.mode is Mode.LIVE and not guest.dirty:
            raise UsageError("the guest has no dirty source; allowed without one: mode cold")
        self._hash_seed = secrets.randbits(64)
        self._resources = contextlib.ExitStack()
        self._control: ControlConnection | None = None
        self._sender: NativeSender | None = None
        self._tuner: FormTuner | None = None
        self._engine: RoundEngine | None = None
        self._sealer: Sealer | None = None
        self._final: FinalPass | None = None
        self._scope = "memory"
        self._agreed: Sequence[str] = ()  #: features
        self._record: SourceRecord | None = None
        self._memory: list[MappedBlock] = []
        self._kept = KeptImage(options.keep_image)
        live = options.mode is Mode.LIVE and not options.audit  # else what is paused takes long
        self._realtime = Realtime(options.realtime and live)
        self._cancelled = ""
        self._peer_gone: VmthError | None = None
        self._peer_abort: Abort | None = None
        self._status = "setup"
        self._started_ns = clock()
        self._running_ns = 0
        self._heard_why = threading.Event()
        self._last_counters = TransferCounters()

    # -- any thread --------------------------------------------------------------------------------

    def cancel(self, reason: str) -> None:
        """Ask for the end. Without effect once the grant is given."""
        self._cancelled = self._cancelled or reason
        self._wake(CancelledError(reason))

    def retune(
        self, bandwidth_bps: int | None, downtime_limit_ns: int | None, timeout_ns: int | None
    ) -> None:
        if bandwidth_bps is not None:
            self.tuning.bandwidth_bps = bandwidth_bps
            if self._sender is not None:
                self._sender.set_bandwidth(bandwidth_bps)
        if downtime_limit_ns is not None:
            self.tuning.downtime_limit_ns = downtime_limit_ns
        if timeout_ns is not None:
            self.tuning.timeout_ns = timeout_ns

    def stats(self) -> JobStats:
        engine, sender = self._engine, self._sender
        counters = self._last_counters
        if sender is not None:
            with contextlib.suppress(VmthError):
                counters = self._last_counters = sender.counters()
        return job_stats(
            self._status,
            sum(block.used_length for block in self._guest.blocks),
            WIRE_PAGE_BYTES,
            self._clock() - self._started_ns,
            counters,
            engine,
            self.tuning,
        )

    # -- the job's thread --------------------------------------------------------------------------

    def run(self) -> MigrationResult:
        """Returns when the guest runs at the destination and is released here. Raises
        MigrationError or a child: but for InDoubtError, NotResumedError the guest is as before."""
        self._started_ns = self._clock()
        try:
            try:
                self._meet()
                final = self._send_rounds()
                return self._hand_over(final)
            except BaseException as error:
                raise self._end(error) from error
        finally:
            self._realtime.end()
            self._resources.close()

    def _meet(self) -> None:
        check_blocks(self._guest.blocks)
        self._resources.enter_context(self._kept)
        where = self._options.state_dir or default_state_dir()
        directory = self._resources.enter_context(StateDirectory(where))
        self._costs = HandoverCosts(directory.path, self._guest, self._endpoint.host)
        memory = self._memory = self._resources.enter_context(map_blocks(self._guest.blocks))
        accept = self._offer()
        self._begin_record(directory, accept)
        assert self._control is not None
        hear = partial(self._control.receive, ACCEPT_TIMEOUT_S)
        sender = self._sender = NativeSender(
            memory,
            WIRE_PAGE_BYTES,
            hash_seed=self._hash_seed,
            digest=self._options.digest,
            zerocopy=self._options.zerocopy,
            forms=agreed_forms(set(accept.features) & set(self._options.forms)),
            dedup_index_bytes=self._options.dedup_index_bytes,
            delta_cache_bytes=self._options.delta_cache_bytes,
            kept_copies_bytes=self._options.kept_copies_bytes,
            fast_packet_bytes=FAST_PACKET_BYTES,
            handed_on=hear_handed_on(hear, accept, len(self._guest.blocks)),
        )
        self._resources.callback(self._close_sender)
        sender.set_bandwidth(self.tuning.bandwidth_bps)
        if REUSE in accept.features:
            hear_filter(hear, sender)
        opened = open_page_channels(
            self._endpoint,
            self._options.link,
            self.session_id,
            accept.token,
            self._options.channels,
        )
        with contextlib.ExitStack() as stack:
            for sock, _ in opened:
                stack.enter_context(sock)
            for index, (sock, trip_ns) in enumerate(opened):
                sender.add_channel(sock.fileno(), index, trip_ns)
        self._resources.enter_context(
            ProgressWatch(sender, self._options.peer_timeout_s, self._peer_lost)
        )
        self._check_wake()
        self._status = "active"
        told = (self._endpoint.display, accept.receiver_id.hex(), self._options.channels)
        self._emit(Connected(self._clock(), *told))
        self._tuner = self._resources.enter_context(
            tuner_for(sender, self._options, accept.features, self.tuning, self._clock, self._emit)
        )
        for what in self._fallbacks:
            self._emit(FellBack(self._clock(), what))

    def _begin_record(self, directory: StateDirectory, accept: Accept) -> None:
        assert self._control is not None
        # Known before the pause too: a guest that is paused by hand stays so after a crash.
        was_running = self._guest.is_running() if isinstance(self._guest, CanTell) else True
        journal = directory.create_journal(self.session_id, Side.SOURCE)
        self._resources.callback(journal.close)
        record = SourceRecord(self.session_id, journal, self._guest, self._endpoint.display)
        record.receiver_id = accept.receiver_id
        record.was_running = was_running
        record.send = self._control.send
        there = (self._endpoint, self._options.link, self.session_id)
        record.query = partial(ask_destination, *there, accept.receiver_id)
        record.tell_released = partial(tell_released, *there, accept.receiver_id)
        record.tell_kept = partial(tell_kept, *there)
        record.before_release = self._before_release
        self._record = record
        try:
            record.apply(SourceEvent.START)
        except VmthError:
            journal.remove()  # nothing was begun
            raise

    def _offer(self) -> Accept:
        options = self._options
        sock = open_connection(
            self._endpoint, options.link, Preamble(Role.CONTROL, self.session_id), 0
        )
        control = self._control = ControlConnection(
            sock,
            peer_timeout_s=options.peer_timeout_s,
            on_failure=self._peer_lost,
            on_message=self._control_message,
        )
        self._resources.callback(control.close)
        control.start()
        self._check_wake()
        told, blocks = dict(options.guest_info), self._guest.blocks
        offer = make_offer(self.session_id, self._hash_seed, blocks, options, told, self._features)
        control.send(offer)
        reply = control.receive(ACCEPT_TIMEOUT_S)
        if isinstance(reply, Refuse):
            raise RefusedError(f"{self._endpoint.display} refused: {reply.reason}")
        if not isinstance(reply, Accept):
            raise StreamError(f"received {type(reply).__name__}, allowed Accept or Refuse")
        self._scope = accepted_scope(offer, reply)
        self._agreed = reply.features
        return reply

    def _send_rounds(self) -> FinalPass:
        record, control = self._record, self._control
        sender = self._sender
        assert sender is not None and record is not None and control is not None

        def packed() -> bool:
            rounds = self._engine.rounds if self._engine is not None else ()
            return PACKED_STATE in self._agreed and packing_pays(sender.counters(), rounds)

        of = (control.send, self._guest, lambda: record.was_running)
        state = StateTeller(*of, packed, self._clock, self._check_wake)
        self._sealer = Sealer(
            control=control,
            sender=sender,
            blocks=self._guest.blocks,
            digest_on=self._options.digest,
            state=state,
            send_seal=self._send_seal,
            mismatched=self._mismatched,
            check_time=self._check_repair,
        )
        tools = RoundTools(
            sender=sender,
            policy=self._options.policy or StandardPolicy(),
            tuning=self.tuning,
            clock=self._clock,
            emit=self._emit,
            page_bytes=WIRE_PAGE_BYTES,
            live=self._options.mode is Mode.LIVE,
            get_ready=self._get_ready,
            pause_guest=self._pause,
            resume_guest=self._resume,
            check=self._check_wake,
            job_started_ns=self._started_ns,
            journal_ns=record.journal_ns,
            seal_ahead=self._sealer if SEAL_AHEAD in self._agreed else None,
            delta_cache_pages=self._options.delta_cache_bytes // WIRE_PAGE_BYTES,
            handover_ns=self._costs.expected_ns(self._realtime.works, record.journal_ns),
        )
        self._engine = self._sealer.engine = self._make_engine(self._guest, tools)
        self._resources.callback(self._stop_tracking)
        return self._engine.run()

    def _get_ready(self) -> None:
        assert self._record is not None and self._control is not None
        if self._realtime.wanted:
            self._record.wake_disk()
        self._realtime.begin(self._guest, self._control.thread_id)

    def _pause(self) -> bool:
        assert self._record is not None and self._control is not None
        self._check_wake()
        self._realtime.begin(self._guest, self._control.thread_id)
        self._record.apply(SourceEvent.PAUSE)
        return self._record.was_running

    def _resume(self) -> None:
        assert self._record is not None
        self._record.apply(SourceEvent.RESUME)
        self._realtime.end()

    def _hand_over(self, final: FinalPass) -> MigrationResult:
        """From the last page to the guest running there: every step is downtime."""
        record, engine = self._record, self._engine
        assert record is not None and engine is not None and self._sealer is not None
        self._status = "switchover"
        self._final = final
        rounds, draft = tuple(engine.rounds), self._draft()  # the destination compares meanwhile
        theirs = self._sealer.run(self._rehash if self._options.audit else None)
        record.apply(SourceEvent.SEALED)
        self._emit(SealMatched(self._clock(), digest_text(theirs)))
        sealed_ns = self._clock()
        if tuple(engine.rounds) != rounds:  # it was repaired
            draft = self._draft()
        self._check_wake()
        record.apply(SourceEvent.GRANT)
        granted_ns = self._clock()
        self._emit(Granted(granted_ns))
        self._await_running()
        parts = downtime_parts(
            final, self._sealer.state.said_ns, sealed_ns, granted_ns, self._running_ns
        )
        self._status = "completed"
        self._let_records_go()
        if final.known_ns:
            self._costs.learn(parts.total_ns - final.known_ns)
        return replace(
            draft,
            digest_destination=digest_text(theirs) if draft.verified else "",
            rounds=tuple(engine.rounds),
            total_ns=self._running_ns - self._started_ns,
            downtime_ns=parts.total_ns,
            downtime_parts=parts,
            kept_image=self._kept.result,
            fallbacks=(*draft.fallbacks, *self._kept.notes),
        )

    def _send_seal(self, seal: Seal) -> None:
        assert self._record is not None
        self._record.seal = seal
        self._record.apply(SourceEvent.SEAL)

    def _mismatched(self) -> None:
        assert self._record is not None
        self._realtime.end()  # tables are compared now
        self._record.apply(SourceEvent.MISMATCH)

    def _check_repair(self) -> None:
        """A repair is downtime: it has the downtime limit, or as long again as the last pages took
        where that was more. In cold mode downtime is accepted."""
        final = self._final
        if self._options.mode is Mode.COLD or final is None:
            return
        paused_ns = final.pause_started_ns
        allowed_ns = max(self.tuning.downtime_limit_ns, 2 * (final.landed_ns - paused_ns))
        if self._clock() - paused_ns > allowed_ns:
            raise VerificationError(
                "the digests differ, and the downtime limit of "
                f"{format_duration(self.tuning.downtime_limit_ns)} leaves no time to repair"
            )

    def _rehash(self) -> MemoryDigests:
        views = [mapped.view for mapped in self._memory]
        return MemoryDigests(self._guest, views, WIRE_PAGE_BYTES, self._hash_seed)

    def _await_running(self) -> None:
        """After the grant: until it is known where the guest runs. Raises what ended it otherwise.
        What the peer says that is no answer buys it no time."""
        record, control = self._record, self._control
        assert record is not None and control is not None
        why = ""
        deadline = time.monotonic() + self._options.peer_timeout_s
        while record.state is SourceState.GRANTED:
            try:
                message = control.receive(max(0.001, deadline - time.monotonic()))
                self._running_ns = self._clock()  # before the clean-up that follows from it
                self._realtime.end()
                if isinstance(message, Aborted):
                    why = f": {message.reason}"
                record.apply_message(message)
            except CancelledError:
                continue  # too late: the right to run is given
            except GuestError:
                raise  # given back, and it cannot be resumed here
            except VmthError as error:
                log.info("after the grant: %s", error)
                record.send = None
                if record.state is SourceState.GRANTED:
                    record.apply(SourceEvent.CONNECTION_LOST)
        self._realtime.end()
        if record.state is SourceState.IN_DOUBT:
            self._running_ns = 0
            settle(record, self._options.query_timeout_s)
        elif record.state is SourceState.KEPT:
            raise MigrationError(f"it runs here as before, the destination gave it back{why}")

    def _let_records_go(self) -> None:
        """Wait a little for ReleasedSeen; without it the record stays and ``vmth recover`` clears
        it. The guest runs at the destination: nothing here may change that outcome."""
        assert self._record is not None and self._control is not None
        try:
            while self._record.state is SourceState.RELEASED and self._record.send is not None:
                message = self._control.receive(RELEASED_SEEN_TIMEOUT_S)
                if isinstance(message, ReleasedSeen):
                    self._record.apply_message(message)
        except VmthError as error:
            log.info("the destination's last word was not heard: %s", error)

    # -- the end -----------------------------------------------------------------------------------

    def _end(self, error: BaseException) -> BaseException:
        """Resume the guest where that is allowed, then find out and say why it ended."""
        record = self._record
        self._status = "failed"
        trouble: GuestError | None = None
        if record is None or record.state is SourceState.NEW:
            self._say_abort(self._outcome(error))
        elif record.state is SourceState.KEPT:
            trouble = error if isinstance(error, GuestError) else None
        elif not record.guest_paused_for_good:
            trouble = self._give_up(record, self._outcome(error))
        may_be_told = isinstance(error, ChannelError) and not isinstance(error, DialError)
        if may_be_told and self._control is not None:
            self._heard_why.wait(REASON_TIMEOUT_S)  # a page channel may break before it is heard
        outcome = self._outcome(error)
        if isinstance(outcome, CancelledError):
            self._status = "cancelled"
        if trouble is not None:
            return NotResumedError(f"{outcome}; and then {trouble}: it is paused here")
        return outcome

    def _give_up(self, record: SourceRecord, outcome: BaseException) -> GuestError | None:
        """Before the grant: the guest runs here as before. Returns why it does not."""
        if self._engine is not None:
            self._engine.let_go()
        self._realtime.end()  # the other end is told, which may take a dial
        paused = record.state is not SourceState.RUNNING
        record.abort_code = abort_code(outcome)
        record.abort_reason = str(outcome)
        try:
            record.apply(SourceEvent.FAILURE)
        except GuestError as trouble:
            return trouble
        if paused:
            self._emit(GuestResumed(self._clock(), str(outcome)))
        return None

    def _say_abort(self, outcome: BaseException) -> None:
        if self._control is not None:
            with contextlib.suppress(VmthError):
                self._control.send(Abort(abort_code(outcome), str(outcome)[:1024]))

    def _outcome(self, error: BaseException) -> BaseException:
        gone, abort = self._peer_gone, self._peer_abort
        return why_it_ended(error, self._record, self._cancelled, gone, abort)

    def _wake(self, error: VmthError) -> None:
        if self._sender is not None:
            self._sender.cancel(str(error))
        if self._control is not None:
            self._control.interrupt(error)

    def _check_wake(self) -> None:
        self._realtime.check_time()
        if self._cancelled:
            raise CancelledError(self._cancelled)
        if self._peer_gone is not None:
            raise self._peer_gone

    def _peer_lost(self, error: VmthError) -> None:
        self._peer_gone = error
        self._heard_why.set()
        if self._sender is not None:
            self._sender.cancel(str(error))

    def _control_message(self, message: Message) -> None:
        if isinstance(message, Abort):
            self._peer_abort = message
            self._heard_why.set()
            self._wake(MigrationError(message.reason))

    def _before_release(self) -> None:
        self._running_ns = self._running_ns or self._clock()
        self._stop_tracking()
        self._kept.write(self._guest, self._memory)

    def _stop_tracking(self) -> None:
        """Once, before the guest is released or when all is over; never changes the outcome."""
        if self._engine is not None:
            try:
                self._engine.close()
            except Exception as error:
                log.error("session %s: stopping the tracking: %s", self.session_id.hex(), error)

    def _close_sender(self) -> None:
        assert self._sender is not None
        if self._status == "completed":
            with contextlib.suppress(VmthError):
                self._sender.finish()
        with contextlib.suppress(VmthError):
            self._last_counters = self._sender.counters()
        self._sender.close()

    def _emit(self, event: Event) -> None:
        self.events.put(event)
        if isinstance(event, RoundFinished) and self._control is not None:
            of = event.stats
            done = RoundDone(of.round, of.pages, of.dirty_pages, of.expected_downtime_ns)
            with contextlib.suppress(VmthError):  # informative; a lost connection shows elsewhere
                self._control.send(done)

    def _draft(self) -> MigrationResult:
        """The result but for its times; made before the grant, after which nothing may fail."""
        assert self._sender is not None and self._engine is not None and self._record is not None
        counters = self._last_counters = self._sender.counters()
        engine, sender = self._engine, self._sender
        notes = (*self._fallbacks, *engine.notes, *sender.fallbacks(), *self._realtime.notes)
        ours = sender.digest() if self._options.digest else None
        return replace(
            draft_result(self._options, self._scope, self._guest, counters, ours, notes),
            form_decisions=tuple(self._tuner.decisions) if self._tuner is not None else (),
            pauses_taken_back_ns=engine.taken_back_ns,
            session_id=self.session_id.hex(),
            receiver_id=self._record.receiver_id.hex(),
            peer={"uri": self._endpoint.display},
        )
