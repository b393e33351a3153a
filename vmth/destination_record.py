# SPDX-License-Identifier: Apache-2.0
"""What a destination knows of one session, and the one place where it decides to run.

It drives the destination's table of ``vmth.wire.handover`` and executes its actions in order:
journal, guest, messages. The session thread and query connections both come here; the lock makes a
grant and a query exclude each other. After a restart the listener makes records from the journals
that it finds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from vmth.errors import VmthError
from vmth.guest import CanDescribe, CanTell, Guest
from vmth.journal import Journal
from vmth.wire.handover import (
    Action,
    DestinationEvent,
    DestinationState,
    destination_handover,
    query_event,
)
from vmth.wire.messages import (
    Abort,
    AbortCode,
    Aborted,
    Accept,
    Answer,
    AnswerState,
    Message,
    Mismatch,
    Query,
    ReleasedSeen,
    Running,
    Sealed,
)

__all__ = ["DestinationRecord", "Outgoing"]

log = logging.getLogger(__name__)

Send = Callable[[Message], None]
_Unsent = tuple[Action, Send, Message]

#: No row of these states appends to the journal.
_SETTLED = (DestinationState.ABORTED, DestinationState.RUNNING, DestinationState.IN_DOUBT)


@dataclass(slots=True)
class Outgoing:
    """Messages that the table may ask for, filled in by the session before it feeds the event."""

    accept: Accept | None = None
    sealed: Sealed | None = None
    mismatch: Mismatch | None = None
    reason: str = "the session failed"
    code: AbortCode = AbortCode.FAILED


class DestinationRecord:
    """Thread-safe. ``journal`` is this session's; the guest is handed in with the acceptance, or
    found again after a restart."""

    def __init__(
        self,
        session_id: bytes,
        receiver_id: bytes,
        journal: Journal,
        state: DestinationState = DestinationState.NO_RECORD,
    ) -> None:
        self.session_id = session_id
        self.receiver_id = receiver_id
        self.outgoing = Outgoing()
        self.was_running = True
        self.guest: Guest | None = None
        self.send: Send | None = None  #: to the control connection, while there is one
        #: Called by the guest's own thread; must not raise
        self.before_discard: Callable[[], None] | None = None
        self._journal = journal
        self._handover = destination_handover(state)
        self._lock = threading.RLock()
        self._owner: threading.Thread | None = None
        self._discard_due = False
        self._telling = 0  #: transitions whose messages are being sent
        #: A grant may have been given, as far as one knows here; a restart cannot tell
        self.sealed_said = state is not DestinationState.NO_RECORD
        #: RUNNING was reached in this process: the guest is nobody's to discard any more
        self.started_here = False

    @property
    def state(self) -> DestinationState:
        return self._handover.state

    @property
    def over(self) -> bool:
        """Nothing is remembered, and everybody who is to be told has been."""
        # In this order, and not under the lock, which is held while a guest is resumed.
        return self.state is DestinationState.NO_RECORD and not self._telling

    @property
    def runs_here(self) -> bool:
        return self.state is DestinationState.RUNNING

    def wake_disk(self) -> None:
        """Soon something is to be made durable while the guest is paused. Never raises."""
        with self._lock:
            self._journal.wake_disk()

    def apply(self, event: DestinationEvent, reply: Send | None = None) -> None:
        """Take a transition and carry it out. ``reply`` is the connection that brought the event.
        Raises StreamError for an event of the peer's that the state does not allow, and what a
        journal write raised after taking the transition back."""
        unsent: list[_Unsent] = []
        try:
            with self._lock:
                self._telling += 1
                self._carry_out(event, reply, unsent)
                if self.state in _SETTLED:
                    self._journal.close()  # nothing is appended now; remove() works all the same
        finally:
            # Not under the lock: a peer that does not read holds up nobody but itself.
            try:
                for action, send, message in unsent:
                    self._tell(action, send, message)
            finally:
                with self._lock:
                    self._telling -= 1

    def _carry_out(
        self, event: DestinationEvent, reply: Send | None, unsent: list[_Unsent]
    ) -> None:
        for action in self._handover.on(event):
            message = self._message(action)
            self.sealed_said = self.sealed_said or action is Action.SEND_SEALED
            if message is not None:
                to = reply or (None if action.name.startswith("ANSWER_") else self.send)
                if to is not None:
                    unsent.append((action, to, message))
                continue
            outcome = self._do(action)
            self.started_here = self.started_here or self.runs_here
            if outcome is not None:
                self._carry_out(outcome, reply, unsent)

    def own_guest(self, guest: Guest) -> None:
        """From now on the calling thread alone calls the guest, until ``disown()``."""
        with self._lock:
            self.guest = guest
            self._owner = threading.current_thread()

    @property
    def may_run(self) -> bool:
        """A vCPU runs here, or may: whatever else fails, the guest is not to be discarded."""
        return self.started_here or self.state in (
            DestinationState.STARTING,
            DestinationState.ASKING,
            DestinationState.RUNNING,
            DestinationState.IN_DOUBT,
        )

    def discard(self) -> None:
        """Free a guest that will never run here. Idempotent."""
        with self._lock:
            if not self.may_run:
                self._discard()

    def disown(self) -> None:
        """The session thread ends: carry out a discard that a query decided meanwhile. Where Sealed
        was never said no grant can have been given: a fence is then as good as the source's Abort,
        and nothing needs to be remembered."""
        with self._lock:
            self._owner = None
            if self._discard_due:
                self._discard_due = False
                self._discard()
            unneeded = self.state is DestinationState.ABORTED and not self.sealed_said
        if unneeded:
            self.apply(DestinationEvent.PEER_ABORT)

    def close(self) -> None:
        """Let the journal's file go; its records stay. Idempotent."""
        with self._lock:
            self._journal.close()

    def answer(self, query: Query, reply: Send) -> None:
        """A query connection asks. Fences a session that is not starting."""
        self.apply(query_event(query, self.receiver_id), reply)

    # -- actions -----------------------------------------------------------------------------------

    def _do(self, action: Action) -> DestinationEvent | None:
        if action.record is not None:
            try:
                self._journal.append(action.record, self.receiver_id, self._detail())
            except BaseException:
                self._handover.undo()
                raise
            return None
        if action is Action.RESUME_GUEST:
            return self._resume()
        if action is Action.ASK_GUEST:
            return self._ask()
        if action is Action.DISCARD_GUEST:
            self._discard()
        elif action is Action.FORGET_RECORD:
            self._forget()
        elif action is Action.TELL_OPERATOR:
            log.error(
                "session %s is in doubt: its guest was being started here and cannot be asked; the "
                "source stays paused until an operator decides",
                self.session_id.hex(),
            )
        else:
            raise AssertionError(f"nothing done for {action}")
        return None

    def _forget(self) -> None:
        try:
            self._journal.remove()
        except VmthError as error:  # the outcome stands; a restart finds the record once more
            log.error("session %s: its record stays: %s", self.session_id.hex(), error)

    def _resume(self) -> DestinationEvent:
        assert self.guest is not None
        if not self.was_running:
            return DestinationEvent.RESUME_OK  # it arrives paused, as it was
        try:
            self.guest.resume()
        except Exception as error:
            log.error("session %s: resume() raised: %s", self.session_id.hex(), error)
            self.outgoing.reason = f"the destination guest could not be resumed: {error}"
            ran = self._ask()
            if ran is DestinationEvent.GUEST_DOES_NOT_RUN:
                return DestinationEvent.RESUME_FAILED
            return DestinationEvent.GUEST_UNKNOWN
        return DestinationEvent.RESUME_OK

    def _ask(self) -> DestinationEvent:
        guest = self.guest
        if guest is None or not isinstance(guest, CanTell):
            return DestinationEvent.GUEST_UNKNOWN
        try:
            running = guest.is_running()
        except Exception as error:
            log.error("session %s: the guest cannot be asked: %s", self.session_id.hex(), error)
            return DestinationEvent.GUEST_UNKNOWN
        if running:
            return DestinationEvent.GUEST_RUNS
        return DestinationEvent.GUEST_DOES_NOT_RUN

    def _discard(self) -> None:
        if self.guest is None:
            return
        if self._owner not in (None, threading.current_thread()):
            self._discard_due = True  # it may be busy with the guest; the state says it never runs
            return
        if self.before_discard is not None and self._owner is not None:
            self.before_discard()
        try:
            self.guest.release()
        except Exception as error:  # it will never run all the same; what it held may leak
            log.error("session %s: discarding the guest: %s", self.session_id.hex(), error)
        self.guest = None

    def _message(self, action: Action) -> Message | None:
        """What an action sends; None for one that sends nothing."""
        outgoing = self.outgoing
        reason = outgoing.reason[:1024]
        if action is Action.SEND_ACCEPT:
            return _filled_in(outgoing.accept)
        if action is Action.SEND_SEALED:
            return _filled_in(outgoing.sealed)
        if action is Action.SEND_MISMATCH:
            return _filled_in(outgoing.mismatch)
        if action is Action.SEND_RUNNING:
            return Running(time.time_ns())
        if action is Action.SEND_ABORTED:
            return Aborted(self.receiver_id, reason)
        if action is Action.SEND_RELEASED_SEEN:
            return ReleasedSeen()
        if action is Action.SEND_ABORT:
            return Abort(outgoing.code, reason)
        if action.name.startswith("ANSWER_"):
            state = AnswerState[action.name.removeprefix("ANSWER_")]
            return Answer(self.session_id, self.receiver_id, state, reason)
        return None

    def _tell(self, action: Action, send: Send, message: Message) -> None:
        try:
            send(message)
        except VmthError as error:  # a lost message: the tables are safe against it
            log.info("session %s: '%s' failed: %s", self.session_id.hex(), action.value, error)

    def _detail(self) -> dict[str, str]:
        detail = {"was_running": str(int(self.was_running))}
        guest = self.guest
        if guest is not None and isinstance(guest, CanDescribe):
            detail |= {f"guest.{key}": value for key, value in guest.describe().items()}
        return detail


def _filled_in(message: Message | None) -> Message:
    assert message is not None, "the session fills it in before it feeds the event"
    return message
