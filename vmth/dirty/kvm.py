# SPDX-License-Identifier: Apache-2.0
"""KVM's own trackers, for the process that created the VM: dirty log and dirty ring.

Both see every write by a vCPU and by KVM on its behalf. Neither sees a write that the VMM makes
through its own mapping, ``pwrite`` to the memory's file, vhost back ends, DMA, or hole punching:
memory that is written in such ways needs another source beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmth._native import _kvm
from vmth.errors import GuestError, UsageError
from vmth.types import Bitmaps, RamBlock, bitmap_words

__all__ = ["KvmDirtyLog", "KvmDirtyRing"]


class _KvmTracker:
    """What the two share. One thread at a time; block i of the table is memory slot i of the VM."""

    _name = ""

    def __init__(self, vm: _kvm.MicroVm, blocks: Sequence[RamBlock]) -> None:
        self._vm = vm
        self._blocks = tuple(blocks)
        self._started = False

    @property
    def mode(self) -> str:
        """How re-arming works: "manual-all-set" (every page counts as dirty at start, rearm arms
        it), "manual" (clean at start, rearm arms), "fetch-clears" (fetch arms, rearm is a no-op),
        "ring"."""
        return self._vm.log_mode

    def start(self) -> None:
        """From its return on every later vCPU write will be reported. UsageError if started
        already, GuestError if KVM refuses: nothing is tracked then."""
        if self._started:
            raise UsageError(f"{self._name} was started already: stop() it first")
        try:
            self._vm.dirty_start()
        except OSError as error:
            raise GuestError(
                f"{self._name} could not start: {error}; nothing is tracked"
            ) from error
        self._started = True

    def fetch(self, bitmaps: Bitmaps) -> None:
        """OR in what was dirtied. UsageError before start() or for bitmaps that do not fit the
        blocks; GuestError if KVM refuses: the set is then incomplete and the job must end."""
        self._check_bitmaps(bitmaps)
        try:
            self._vm.dirty_fetch(bitmaps)
        except OSError as error:
            raise GuestError(f"{self._name} could not be fetched: {error}") from error

    def peek(self, bitmaps: Bitmaps) -> bool:
        """See ``CanPeek``; False in mode "fetch-clears". Errors as of ``fetch``, and nothing is
        lost."""
        self._check_bitmaps(bitmaps)
        try:
            return self._vm.dirty_peek(bitmaps)
        except OSError as error:
            raise GuestError(f"{self._name} could not be looked at: {error}") from error

    def rearm(self, block: int, page: int, npages: int) -> None:
        """Arm pages again, just before they are read. UsageError before start() or outside of the
        block; GuestError if KVM refuses: the pages may go on counting as dirty."""
        self._check_started()
        if not 0 <= block < len(self._blocks):
            raise UsageError(f"block {block} given, {len(self._blocks)} blocks tracked")
        limit = self._blocks[block].npages
        if page < 0 or npages < 0 or page + npages > limit:
            raise UsageError(f"pages {page} + {npages} given, block has {limit}")
        try:
            self._vm.dirty_rearm(block, page, npages)
        except OSError as error:
            raise GuestError(f"{self._name} could not re-arm: {error}") from error

    def stop(self) -> None:
        """End the tracking. Idempotent, allowed without start(). GuestError if KVM refuses; it
        counts as stopped all the same."""
        if not self._started:
            return
        self._started = False
        try:
            self._vm.dirty_stop()
        except OSError as error:
            raise GuestError(f"{self._name} could not be stopped: {error}") from error

    def _check_bitmaps(self, bitmaps: Bitmaps) -> None:
        self._check_started()
        if len(bitmaps) != len(self._blocks):
            raise UsageError(f"{len(bitmaps)} bitmaps given, {len(self._blocks)} blocks tracked")
        for block, bitmap in zip(self._blocks, bitmaps, strict=True):
            if len(bitmap) != bitmap_words(block.npages):
                raise UsageError(
                    f"block {block.idstr}: bitmap of {len(bitmap)} words given, "
                    f"{bitmap_words(block.npages)} wanted"
                )

    def _check_started(self) -> None:
        if not self._started:
            raise UsageError(f"{self._name} is not started")


class KvmDirtyLog(_KvmTracker):
    """KVM_GET_DIRTY_LOG, with KVM_CLEAR_DIRTY_LOG range by range where the kernel has manual
    protect.

    ``rearm`` clears only bits that a fetch has reported, so a write that nobody was told of is
    never dropped, whatever range is re-armed. In mode "manual-all-set" every page counts as
    reported dirty at start(): a page that is not re-armed (a hole that nobody reads, say) is
    reported by each fetch, so round 0 re-arms everything that it covers."""

    _name = "kvm-log"

    def notes(self) -> Sequence[str]:
        if self.mode == "fetch-clears":
            return ["kvm-log: KVM has no manual protect here, each fetch arms everything at once"]
        return []


class KvmDirtyRing(_KvmTracker):
    """The per-vCPU rings of KVM. ``fetch`` kicks the vCPU out of the guest so that its ring is
    complete, harvests it and resets it; the reset re-protects the harvested pages *before* fetch
    hands them out, so they are armed when they are read and ``rearm`` has nothing to do. A full
    ring interrupts only the vCPU that wrote, until its entries have been taken into our bitmap.

    Should the kernel ever overwrite entries (a KVM that emulates looks for a full ring too seldom),
    the next fetch reports every page: ``overflows`` counts that.
    """

    _name = "kvm-ring"

    @property
    def overflows(self) -> int:
        """How often entries were lost and all pages reported instead, since the VM was made."""
        return self._vm.ring_overflows

    def notes(self) -> Sequence[str]:
        if self.overflows:
            return [f"kvm-ring: {self.overflows} overflows, every page was sent again"]
        return []
