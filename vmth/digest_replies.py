# SPDX-License-Identifier: Apache-2.0
"""Sub-digests that a source asks for at the destination: to find pages to repair, or for an audit.

The peer's numbers are checked here. Used from the session's one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vmth.audit import REQUEST_PAGES, Area, MemoryDigests, pack_digests
from vmth.channel.interface import PageReceiver
from vmth.errors import StreamError
from vmth.guest import Guest
from vmth.memory import MappedBlock
from vmth.options import WIRE_PAGE_BYTES
from vmth.wire.messages import DigestReply, DigestRequest, DigestSource

__all__ = ["DigestReplies"]


@dataclass(frozen=True, slots=True)
class DigestReplies:
    """Of one session; ``audit``: as it was offered."""

    guest: Guest
    receiver: PageReceiver
    memory: Sequence[MappedBlock]
    hash_seed: int
    audit: bool

    def reply(self, request: DigestRequest, paused: bool) -> DigestReply:
        """Raises StreamError for pages that are not there, and for what was not offered."""
        blocks = self.guest.blocks
        if request.block >= len(blocks):
            raise StreamError(
                f"DigestRequest: block {request.block}, allowed 0 to {len(blocks) - 1}"
            )
        npages = blocks[request.block].npages
        end = request.page + request.npages
        if end > npages:
            raise StreamError(f"DigestRequest: pages up to {end}, allowed up to {npages}")
        area = Area(request.block, request.page, request.npages)
        if request.source == DigestSource.MEMORY:
            self._check_audit(request, paused)
            views = [mapped.view for mapped in self.memory]
            memory = MemoryDigests(self.guest, views, WIRE_PAGE_BYTES, self.hash_seed)
            digests = memory.subdigests(area, request.step)
        elif request.step == 1:
            digests = self.receiver.hashes(area.block, area.page, area.npages)
        else:
            digests = self.receiver.subdigests(area.block, area.page, area.npages, request.step)
        return DigestReply(
            request.source, area.block, area.page, area.npages, request.step, pack_digests(digests)
        )

    def _check_audit(self, request: DigestRequest, paused: bool) -> None:
        """Hashing memory anew costs: only what was offered, while paused, in bounded pieces."""
        if not self.audit or not paused:
            raise StreamError(
                f"DigestRequest of memory: audit offered {self.audit}, "
                f"paused {paused}, allowed when both are true"
            )
        if request.npages > REQUEST_PAGES:
            raise StreamError(
                f"DigestRequest of memory: {request.npages} pages, allowed {REQUEST_PAGES}"
            )
