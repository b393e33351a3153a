# SPDX-License-Identifier: Apache-2.0
"""What a destination tells of a guest that arrived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vmth.channel.reuse import ReusedFile
from vmth.guest import Guest

__all__ = ["NOT_REUSED", "ReceiveResult", "not_found"]

NOT_REUSED = "reuse: the source did not agree to it, so no file was looked into"
#: A fingerprint is there by chance once in 65536 pages (docs/page-forms.md); four times as many
#: are not chance.
_BY_CHANCE = 4 / 65536
#: Nor are so many of a small guest.
_FEW = 16


@dataclass(frozen=True, slots=True)
class ReceiveResult:
    """A guest that arrived. ``verified``: its memory's digest equalled the source's before it
    ran."""

    session_id: str
    guest: Guest
    was_running: bool  #: and so runs now; a guest that was paused at the source stays paused
    verified: bool
    verified_scope: str
    digest: str
    peer: str
    memory_bytes: int
    wire_bytes: int
    fallbacks: tuple[str, ...] = ()  #: what was slower than asked at this end
    reused: tuple[ReusedFile, ...] = ()  #: what each file of ``ReceiveOptions.reuse`` gave


def not_found(asked_pages: int, served: Sequence[int], memory_pages: int) -> tuple[str, ...]:
    """A note where files did not have what their indexes say: they were changed or cut while in
    use, or cannot be read. ``asked_pages`` were to come from them, ``served`` came from each."""
    missed = asked_pages - sum(served)
    if missed <= max(_FEW, _BY_CHANCE * memory_pages):
        return ()
    note = (
        f"reuse: {missed} of {asked_pages} pages were not in the files as their indexes say, and "
        "were sent again: a file was changed, or cannot be read"
    )
    return (note,)
