# SPDX-License-Identifier: Apache-2.0
"""The seal at the source: both digests are compared, differing pages are found and sent again.

Called with the guest paused; talks over the control connection. Nothing here decides to run a
guest. A seal may be said behind the last pages, ahead of their landing:

    source        pages, barrier   state, seal     <- a round trip ->   Sealed
    destination                 pages land ... barrier passed: digests compared
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmth.audit import (
    TABLE_PAGES,
    Area,
    MemoryDigests,
    Pending,
    differing_pages,
    unpack_digests,
)
from vmth.channel.control import ControlConnection
from vmth.channel.interface import Digest, PageSender
from vmth.errors import StreamError, VerificationError
from vmth.rounds import RoundEngine
from vmth.state_streams import StateSummary, StateTeller
from vmth.types import RamBlock
from vmth.wire.messages import (
    DigestReply,
    DigestRequest,
    DigestSource,
    LastBarrier,
    Mismatch,
    Seal,
    Sealed,
)

__all__ = ["MAX_SEAL_REPAIRS", "Sealer", "digest_text"]

MAX_SEAL_REPAIRS = 3
#: More differing pages than this are not damage on the way; something is wrong for good.
MAX_REPAIR_PAGES = 65536


def digest_text(digest: Digest) -> str:
    """32 hex digits."""
    return f"{digest[1]:016x}{digest[0]:016x}"


@dataclass(slots=True)
class Sealer:
    """One seal of one session; ``SealAhead`` of the engine. ``answer_timeout_s`` bounds the wait
    for the answer to a seal, during which the destination loads the guest's state."""

    control: ControlConnection
    sender: PageSender
    blocks: Sequence[RamBlock]
    digest_on: bool
    state: StateTeller  #: says it once
    send_seal: Callable[[Seal], None]
    mismatched: Callable[[], None]  #: told before the repair begins
    check_time: Callable[[], None]  #: raises VerificationError when no time is left to repair
    engine: RoundEngine | None = None  #: known when the first seal is said
    answer_timeout_s: float = 30.0
    _summary: StateSummary | None = None
    _said: Digest | None = None  #: in a seal that was not answered yet

    def stays_paused(self) -> None:
        self.state.say_paused()

    def last_pages_sent(self) -> int:
        self.control.send(LastBarrier(self.sender.barriers()))
        self._say()
        from_ns, to_ns = self.state.said_ns
        return to_ns - from_ns

    def pages_missed(self) -> None:
        reply = self._answer()
        if not isinstance(reply, Mismatch):
            raise StreamError("received Sealed for pages that were missed, allowed Mismatch")
        self.mismatched()

    def run(self, rehash: Callable[[], MemoryDigests] | None) -> Digest:
        """Returns the destination's digest, equal to ours when the digest is on. With ``rehash``
        both ends hash all memory anew first (audit). Raises VerificationError."""
        if rehash is not None:
            self._say_state()
            self._audit(rehash())
        for _ in range(MAX_SEAL_REPAIRS + 1):
            ours = self._said or self._say()
            reply = self._answer()
            theirs = (reply.digest_lo, reply.digest_hi, reply.pages)
            if isinstance(reply, Sealed):
                if theirs != ours:
                    raise StreamError(
                        f"Sealed: received digest {digest_text(theirs)} of {theirs[2]} pages, "
                        f"allowed {digest_text(ours)} of {ours[2]}"
                    )
                return theirs
            self.mismatched()
            self.check_time()
            self._repair()
        raise VerificationError(
            f"digests still differ after {MAX_SEAL_REPAIRS} repairs: source {digest_text(ours)} of "
            f"{ours[2]} pages, destination {digest_text(theirs)} of {theirs[2]} pages"
        )

    def _say(self) -> Digest:
        state = self._say_state()
        ours = self._said = self.sender.digest() if self.digest_on else (0, 0, 0)
        self.send_seal(Seal(*ours, state.streams, state.total_bytes, state.crc32))
        return ours

    def _say_state(self) -> StateSummary:
        self._summary = self._summary or self.state.say()
        return self._summary

    def _answer(self) -> Sealed | Mismatch:
        reply = self.control.receive(self.answer_timeout_s)
        if not isinstance(reply, (Sealed, Mismatch)):
            raise StreamError(f"received {type(reply).__name__}, allowed Sealed or Mismatch")
        self._said = None
        return reply

    def _repair(self) -> None:
        """Find the differing pages by sub-digests of both tables and send them again."""
        by_block: dict[int, list[int]] = {}
        found = 0
        for block, page in differing_pages(
            self.blocks, self._our_table, self._their_table, MAX_REPAIR_PAGES, TABLE_PAGES
        ):
            by_block.setdefault(block, []).append(page)
            found += 1
        if not found:
            raise VerificationError(
                "digests differ although no page does: a running digest is wrong"
            )
        if found >= MAX_REPAIR_PAGES:
            raise VerificationError(f"{found} pages and more differ: too many to repair")
        for block, pages in by_block.items():
            assert self.engine is not None
            self.engine.resend(block, pages)

    def _audit(self, memory: MemoryDigests) -> None:
        def ours(area: Area, step: int) -> npt.NDArray[np.uint64]:
            return memory.subdigests(area, step)

        def theirs(area: Area, step: int) -> Pending:
            return self._ask(DigestSource.MEMORY, area, step)

        wrong = list(differing_pages(self.blocks, ours, theirs, limit=16))
        if wrong:
            block, page = wrong[0]
            raise VerificationError(
                f"audit: {len(wrong)}{'+' if len(wrong) == 16 else ''} pages of the paused guest "
                f"differ from the destination's, the first is page {page} of ramblock "
                f"{self.blocks[block].idstr!r}: a dirty source missed a write"
            )

    def _our_table(self, area: Area, step: int) -> npt.NDArray[np.uint64]:
        if step == 1:
            return self.sender.hashes(area.block, area.page, area.npages)
        return self.sender.subdigests(area.block, area.page, area.npages, step)

    def _their_table(self, area: Area, step: int) -> Pending:
        return self._ask(DigestSource.TABLE, area, step)

    def _ask(self, source: DigestSource, area: Area, step: int) -> Pending:
        """Ask, and return what waits for the answer: both ends compute at the same time."""
        asked = (source, area.block, area.page, area.npages, step)
        self.control.send(DigestRequest(*asked))

        def answer() -> npt.NDArray[np.uint64]:
            # No bound but the peer's liveness: hashing memory anew takes as long as it takes.
            reply = self.control.receive()
            if not isinstance(reply, DigestReply):
                raise StreamError(f"received {type(reply).__name__}, allowed DigestReply")
            answered = (reply.source, reply.block, reply.page, reply.npages, reply.step)
            if asked != answered:
                raise StreamError(f"DigestReply: received {answered}, allowed {asked}")
            return unpack_digests(reply.digests)

        return answer
