# SPDX-License-Identifier: Apache-2.0
"""After a crash of the source's mover: read its journals, ask the destinations, carry out the
answers.

A guest in a process of its own outlives its mover. What may be done with it stands in the journal:
before the grant it may always run here again; after it, only the destination's answer decides. A
destination's journals are read by its ``Listener`` when that starts again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vmth.channel.sockets import LinkOptions
from vmth.errors import GuestError, InDoubtError, MigrationError, VmthError
from vmth.guest import CanClose, DirtySource, Guest, StateStream
from vmth.journal import Entry, Journal, Side, StateDirectory, default_state_dir
from vmth.queries import ask_destination, settle, tell_kept, tell_released
from vmth.source_record import SourceRecord
from vmth.types import RamBlock
from vmth.uri import parse_endpoint
from vmth.wire.handover import SourceEvent, SourceState, source_state_after_restart
from vmth.wire.messages import Abort, AbortCode

__all__ = ["Recovered", "recover"]

#: Find a guest from the journal's detail (``CanDescribe.describe()``, keys prefixed "guest.");
#: closed afterwards where it has a ``close()``.
#: None only when it is known to be gone; it raises when that cannot be known.
FindGuest = Callable[[Mapping[str, str]], Guest | None]


@dataclass(frozen=True, slots=True)
class Recovered:
    """What became of one session. ``state`` is a SourceState's value; ``in_doubt`` means that an
    operator must decide; ``note`` says it in a sentence."""

    session_id: str
    peer: str
    state: str
    in_doubt: bool
    note: str


def recover(
    find_guest: FindGuest,
    *,
    state_dir: Path | None = None,
    session_id: str | None = None,
    timeout_s: float = 10.0,
    link: LinkOptions | None = None,
) -> list[Recovered]:
    """Settle every source session of the state directory (or the one named) that no living mover
    owns. Each destination is asked for at most ``timeout_s``. Raises JournalError for an unusable
    directory; a damaged journal is reported in its session's note and left alone."""
    done: list[Recovered] = []
    with StateDirectory(state_dir or default_state_dir()) as directory:
        for found, side in directory.sessions():
            if side is not Side.SOURCE or session_id not in (None, found.hex()):
                continue
            try:
                done.append(_recover_one(directory, found, find_guest, timeout_s, link))
            except Exception as error:  # one session's trouble is not the others'
                done.append(Recovered(found.hex(), "", "unknown", True, f"not settled: {error}"))
    return done


def _recover_one(
    directory: StateDirectory,
    session_id: bytes,
    find_guest: FindGuest,
    timeout_s: float,
    link: LinkOptions | None,
) -> Recovered:
    try:
        journal = directory.open_journal(session_id, Side.SOURCE)
    except VmthError as error:
        return Recovered(session_id.hex(), "", "unknown", False, str(error))
    with journal:
        last = journal.last
        if last is None:
            journal.remove()
            return Recovered(session_id.hex(), "", "new", False, "it never began; record removed")
        return _settle_one(journal, last, find_guest, timeout_s, link or LinkOptions())


def _settle_one(
    journal: Journal, last: Entry, find_guest: FindGuest, timeout_s: float, link: LinkOptions
) -> Recovered:
    guest = find_guest(last.detail)
    try:
        return _settle_guest(journal, last, guest or _LostGuest(), timeout_s, link)
    finally:
        if guest is not None and isinstance(guest, CanClose):
            guest.close()


def _settle_guest(
    journal: Journal, last: Entry, guest: Guest, timeout_s: float, link: LinkOptions
) -> Recovered:
    peer = last.detail.get("peer", "")
    record = SourceRecord(
        last.session_id, journal, guest, peer, source_state_after_restart(last.record)
    )
    record.receiver_id = last.receiver_id
    record.was_running = last.detail.get("was_running") != "0"
    endpoint = parse_endpoint(peer)
    asked = (endpoint, link, last.session_id, last.receiver_id)
    record.query = lambda: ask_destination(*asked)
    record.tell_released = lambda: tell_released(*asked)
    note = ""
    try:
        record.apply(SourceEvent.RESTARTED)
        if record.state is SourceState.IN_DOUBT:
            settle(record, timeout_s)
    except (InDoubtError, GuestError) as error:
        note = str(error)  # the record stays
    except MigrationError:
        pass  # settled: the guest came back, which _NOTES says
    if record.state is SourceState.KEPT and not note:
        tell_kept(endpoint, link, last.session_id, Abort(AbortCode.FAILED, "recovered"))
    return Recovered(
        last.session_id.hex(),
        peer,
        record.state.value,
        record.state is SourceState.IN_DOUBT or bool(note),
        note or (_LOST if isinstance(guest, _LostGuest) else "") or _NOTES.get(record.state, ""),
    )


_NOTES = {
    SourceState.KEPT: "the guest runs here; record removed",
    SourceState.RELEASED: "the guest runs at the destination and was freed here; the destination "
    "has not confirmed yet",
    SourceState.DONE: "the guest runs at the destination and was freed here; record removed",
}


_LOST = "the source guest is gone with its process; record removed"


class _LostGuest:
    """Stands for a guest whose process is gone: nothing can be done with it any more."""

    blocks: tuple[RamBlock, ...] = ()
    dirty: tuple[DirtySource, ...] = ()

    def pause(self) -> bool:
        return False

    def resume(self) -> None:
        """There is nothing left to run."""

    def save_state(self, write: Callable[[StateStream], None]) -> None:
        raise GuestError("the source guest was not found")

    def load_state(self, streams: Iterable[StateStream]) -> None:
        raise GuestError("the source guest was not found")

    def release(self) -> None:
        """Nothing is left to free."""
