# SPDX-License-Identifier: Apache-2.0
"""What a source knows of one session: the grant is decided here, and what became of it is found
out.

It drives the source's table of ``vmth.wire.handover`` and executes its actions in order. A running
session and a recovery after a crash use the same class; only the job's thread calls it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from vmth.abort import abort_error
from vmth.channel.sockets import DialError
from vmth.errors import (
    CancelledError,
    ChannelError,
    GuestError,
    InDoubtError,
    MigrationError,
    UsageError,
    VmthError,
)
from vmth.guest import CanDescribe, CanHold, Guest
from vmth.journal import Journal
from vmth.wire.handover import (
    Action,
    SourceEvent,
    SourceState,
    source_event,
    source_handover,
)
from vmth.wire.messages import (
    Abort,
    AbortCode,
    Grant,
    Message,
    Released,
    Seal,
)

__all__ = ["SourceRecord", "why_it_ended"]

log = logging.getLogger(__name__)


class SourceRecord:
    """One thread. ``send`` reaches the control connection while there is one; ``query`` asks the
    destination on a connection of its own and returns its answer, or None when it cannot be
    reached; ``tell_released`` does the same for the last message."""

    def __init__(
        self,
        session_id: bytes,
        journal: Journal,
        guest: Guest,
        peer: str,
        state: SourceState = SourceState.NEW,
    ) -> None:
        self.session_id = session_id
        self.receiver_id = bytes(16)
        self.peer = peer
        self.was_running = True
        self.seal: Seal | None = None
        self.abort_code = AbortCode.FAILED
        self.abort_reason = "the source failed"
        self.send: Callable[[Message], None] | None = None
        self.query: Callable[[], Message | None] | None = None
        self.tell_released: Callable[[], Message | None] | None = None
        self.tell_kept: Callable[[Abort], None] | None = None
        self.before_release: Callable[[], None] | None = None  #: must not raise
        self.query_due = False
        self._journal = journal
        self._guest = guest
        self._handover = source_handover(state)

    @property
    def state(self) -> SourceState:
        return self._handover.state

    @property
    def journal_ns(self) -> int:
        """The least that making something durable took here; 0: not known."""
        return self._journal.write_ns

    def wake_disk(self) -> None:
        """Soon something is to be made durable while the guest is paused. Never raises."""
        self._journal.wake_disk()

    @property
    def guest_paused_for_good(self) -> bool:
        """Granted, and not known what became of it: the guest must stay as it is."""
        return self.state in (SourceState.GRANTED, SourceState.IN_DOUBT)

    def apply(self, event: SourceEvent) -> None:
        """Take a transition and carry it out. The first action that raises ends the row; a journal
        or hold() that does so takes the transition back as well. Only what the guest's resume()
        raises waits, as GuestError, until the remaining actions were carried out."""
        trouble: GuestError | None = None
        for action in self._handover.on(event):
            if trouble is not None and action is Action.FORGET_RECORD:
                continue  # kept, so that a recovery tries to resume it again
            try:
                self._do(action)
            except GuestError as error:
                if action is not Action.RESUME_GUEST:
                    raise
                trouble = error
        if trouble is not None:
            if event is SourceEvent.RESUME:
                self._handover.undo()  # it is paused still
            raise trouble

    def apply_message(self, message: Message) -> None:
        """The same for a message of the destination's that concerns the handover."""
        event = source_event(message, self.session_id, self.receiver_id)
        if event is not None:
            self.apply(event)

    # -- actions -----------------------------------------------------------------------------------

    def _do(self, action: Action) -> None:
        if action.record is not None or action is Action.HOLD_GUEST:
            try:
                if action.record is not None:
                    self._journal.append(action.record, self.receiver_id, self._detail())
                elif isinstance(self._guest, CanHold):
                    self._guest.hold()
            except BaseException:
                self._handover.undo()
                raise
        elif action is Action.PAUSE_GUEST:
            self.was_running = self._guest.pause()
        elif action is Action.RESUME_GUEST:
            self._resume()
        elif action is Action.RELEASE_GUEST:
            self._release()
        elif action is Action.FORGET_RECORD:
            self._forget()
        elif action is Action.QUERY_PEER:
            self.query_due = True
        elif action is Action.TELL_OPERATOR:
            log.error("session %s is in doubt: the guest stays paused here", self.session_id.hex())
        elif action is Action.SEND_RELEASED:
            self._tell_released()
        elif action is Action.SEND_ABORT:
            self._tell_kept()
        else:
            self._tell(self._message(action))

    def _resume(self) -> None:
        if not self.was_running:
            return
        try:
            self._guest.resume()
        except Exception as error:
            raise GuestError(f"the source guest could not be resumed: {error}") from error

    def _forget(self) -> None:
        try:
            self._journal.remove()
        except VmthError as error:  # the outcome stands; a recovery finds the record once more
            log.error("session %s: its record stays: %s", self.session_id.hex(), error)

    def _release(self) -> None:
        if self.before_release is not None:
            self.before_release()
        try:
            self._guest.release()
        except Exception as error:  # it runs at the destination all the same; something may leak
            log.error("session %s: freeing the guest: %s", self.session_id.hex(), error)

    def _message(self, action: Action) -> Message | None:
        if action is Action.SEND_SEAL:
            return self.seal
        if action is Action.SEND_GRANT:
            return Grant(self.receiver_id)
        raise AssertionError(f"no message for {action}")

    def _tell(self, message: Message | None) -> bool:
        """Over the control connection; True if it took the message."""
        if self.send is None or message is None:
            return False
        try:
            self.send(message)
        except VmthError as error:  # a lost message: the tables are safe against it
            log.info("session %s: %s not sent: %s", self.session_id.hex(), message, error)
            return False
        return True

    def _tell_kept(self) -> None:
        """Without a control connection, on one of its own. Before the seal that is not needed: a
        destination that has not said Sealed forgets by itself."""
        abort = Abort(self.abort_code, self.abort_reason[:1024])
        if not self._tell(abort) and self.seal is not None and self.tell_kept is not None:
            self.tell_kept(abort)

    def _tell_released(self) -> None:
        """Over the control connection; without one, on a connection of its own."""
        if self.send is not None:
            self._tell(Released())
        elif self.tell_released is not None:
            seen = self.tell_released()
            if seen is not None:
                self.apply_message(seen)

    def _detail(self) -> dict[str, str]:
        detail = {
            "was_running": str(int(self.was_running)),
            "peer": self.peer,
        }
        if isinstance(self._guest, CanDescribe):
            detail |= {f"guest.{key}": value for key, value in self._guest.describe().items()}
        return detail


def why_it_ended(
    error: BaseException,
    record: SourceRecord | None,
    cancelled: str,
    peer_gone: VmthError | None,
    peer_abort: Abort | None,
) -> BaseException:
    """Whose fault it was: a cancel or the peer's end shows first as a broken page channel."""
    if record is not None and record.guest_paused_for_good:
        if isinstance(error, InDoubtError):
            return error
        return InDoubtError(f"after the grant: {error}")
    if cancelled:
        return CancelledError(cancelled)
    if isinstance(error, DialError):
        return MigrationError(str(error))
    if peer_abort is not None:
        return abort_error(peer_abort)
    if peer_gone is not None and isinstance(error, (ChannelError, CancelledError)):
        return MigrationError(str(peer_gone))
    if isinstance(error, (MigrationError, UsageError, KeyboardInterrupt, SystemExit)):
        return error
    return MigrationError(str(error) if isinstance(error, VmthError) else repr(error))
