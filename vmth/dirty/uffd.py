# SPDX-License-Identifier: Apache-2.0
"""Dirty pages of this process's own memory: userfaultfd WP_ASYNC with PAGEMAP_SCAN (Linux 6.7)."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vmth._native import _sys
from vmth.dirty import populated
from vmth.dirty.mappings import MappingKind, huge_pages_forbidden, mapping_kind
from vmth.dirty.probe import Finding, Status, probe
from vmth.errors import RefusedError, UsageError
from vmth.types import Bitmap, Bitmaps, BlockFlags, RamBlock, bitmap_words

__all__ = ["UffdWpSource"]


class UffdWpSource:
    """A DirtySource over memory of this process that any of its threads writes (also by system
    calls, also as a KVM guest through this process's mapping).

    ``fetch`` reports and re-arms in one atomic step per page, before the pages are read; ``rearm``
    is therefore a no-op. ``start`` arms everything, notes which private anonymous pages were
    populated (see ``populated``), and costs 8 bytes of page table for each page never touched.

    It does **not** see: writes through another mapping of the same file, ``pwrite`` to it, another
    process (vhost-user), DMA, and hole punches in shared memory (fallocate, MADV_REMOVE): give the
    guest (``Guest.dirty``) a source that knows those, too. A mapping that is unmapped or moved
    while it is tracked is not noticed. Not thread-safe: callbacks come one at a time, writers need
    no lock.
    """

    def __init__(
        self,
        blocks: Sequence[RamBlock],
        addresses: Sequence[int] | None = None,
        *,
        discards_reported: bool = False,
        findings: Callable[[], Mapping[str, Finding]] = probe,
    ) -> None:
        """``addresses``: where each block is mapped by those who write it; needed for blocks whose
        mapping is an fd. ``discards_reported``: another source reports hole punches, so DISCARDABLE
        blocks are accepted where this kernel does not report them. Raises UsageError if an address
        is missing, RefusedError for pages that are not the host's base pages.
        """
        self._blocks = tuple(blocks)
        self._addresses = _addresses(self._blocks, addresses)
        self._discards_reported = discards_reported
        self._findings = findings
        self._tracker: _sys.UffdWp | None = None
        self._populated: list[Bitmap | None] = []

    def start(self) -> None:
        """Register and arm every block. On failure nothing is tracked.

        Raises RefusedError naming what this machine lacks or which kernel fault stands against it,
        UsageError for memory that is not mapped or is tracked by someone else already.
        """
        if self._tracker is not None:
            raise UsageError("the uffd-wp source is started already")
        kinds = [
            mapping_kind(address, block.used_length)
            for block, address in zip(self._blocks, self._addresses, strict=True)
        ]
        findings = self._findings()
        for block, address, kind in zip(self._blocks, self._addresses, kinds, strict=True):
            self._check_block(block, address, kind, findings)
        tracker = _open_tracker()
        try:
            self._populated = [
                _add(tracker, block, address, kind)
                for block, address, kind in zip(self._blocks, self._addresses, kinds, strict=True)
            ]
        except BaseException:
            tracker.close()
            raise
        self._tracker = tracker

    def fetch(self, bitmaps: Bitmaps) -> None:
        """OR in the pages written since they were last fetched (or armed), and arm them again.

        Raises UsageError before start(). After an OSError pages may have been armed again without a
        bit: the caller ends the migration, or treats every page as dirty.
        """
        tracker = self._started()
        for block, address, bitmap in zip(self._blocks, self._addresses, bitmaps, strict=True):
            tracker.fetch(address, block.npages, bitmap)

    def peek(self, bitmaps: Bitmaps) -> bool:
        """See ``CanPeek``. Raises UsageError before start(), and OSError; nothing is lost."""
        tracker = self._started()
        for block, address, bitmap in zip(self._blocks, self._addresses, bitmaps, strict=True):
            tracker.peek(address, block.npages, bitmap)
        return True

    def rearm(self, block: int, page: int, npages: int) -> None:
        """Nothing to do: fetch has armed these pages before anybody reads them."""

    def stop(self) -> None:
        """End the tracking. Idempotent; allowed without start()."""
        if self._tracker is not None:
            self._tracker.close()
        self._tracker = None
        self._populated = []

    def populated(self, block: int, page: int, npages: int, out: Bitmap) -> None:
        """The never-populated rule for a guest that uses this source: see ``CanReportPopulated``.

        Private anonymous memory is answered from what ``start()`` noted when it armed each page: a
        page that was populated later was written, and is fetched. Raises UsageError before start().
        """
        self._started()
        noted = self._populated[block]
        if noted is None:
            populated.populated_bits(self._blocks[block], page, npages, out)
            return
        populated.check_range(self._blocks[block], page, npages, out)
        populated.or_bits(out, noted, page, npages)

    def _started(self) -> _sys.UffdWp:
        if self._tracker is None:
            raise UsageError("the uffd-wp source is not started")
        return self._tracker

    def _check_block(
        self, block: RamBlock, address: int, kind: MappingKind, findings: Mapping[str, Finding]
    ) -> None:
        """Raise for what this block would meet: no memory, or a known fault of this kernel."""
        if kind is MappingKind.UNMAPPED:
            raise UsageError(f"ramblock {block.idstr!r}: {address:#x} is {kind.value}")
        _refuse_if_faulty(block, findings["kernel-writes"], "use another dirty source")
        discardable = BlockFlags.DISCARDABLE in block.flags and not self._discards_reported
        if kind is MappingKind.PRIVATE_ANONYMOUS:
            if discardable:
                _refuse_if_faulty(block, findings["discard-anon"], "use another dirty source")
            huge = findings["discard-anon-thp"]
            if huge.status is Status.FAULTY and not huge_pages_forbidden(
                address, block.used_length
            ):
                _refuse_if_faulty(block, huge, "madvise it NOHUGEPAGE")
        elif discardable:
            shared = findings["discard-shared"]
            _refuse_if_faulty(block, shared, "let another source report the discards")


def _addresses(blocks: Sequence[RamBlock], addresses: Sequence[int] | None) -> tuple[int, ...]:
    """Where each block is, checked; see UffdWpSource.__init__."""
    if addresses is not None and len(addresses) != len(blocks):
        raise UsageError(f"{len(addresses)} addresses for {len(blocks)} ramblocks")
    result = []
    for index, block in enumerate(blocks):
        address = block.mapping.address if addresses is None else addresses[index]
        if address is None:
            raise UsageError(
                f"ramblock {block.idstr!r}: uffd-wp tracks one mapping, and an fd has many: "
                "pass the address that the writers use"
            )
        if address % _sys.PAGE_BYTES or block.used_length % _sys.PAGE_BYTES:
            raise UsageError(
                f"ramblock {block.idstr!r}: {address:#x} or its length {block.used_length:#x} "
                f"is not a multiple of {_sys.PAGE_BYTES}"
            )
        for what, size in (
            ("tracking", block.tracking_page_size),
            ("backing", block.backing_page_size),
        ):
            if size != _sys.PAGE_BYTES:
                raise RefusedError(
                    f"ramblock {block.idstr!r}: uffd-wp tracks pages of {_sys.PAGE_BYTES} bytes, "
                    f"its {what} page has {size}"
                )
        result.append(address)
    return tuple(result)


def _refuse_if_faulty(block: RamBlock, finding: Finding, remedy: str) -> None:
    if finding.status is Status.FAULTY:
        raise RefusedError(f"ramblock {block.idstr!r}: {finding.reason}: {remedy}")


def _open_tracker() -> _sys.UffdWp:
    try:
        return _sys.UffdWp()
    except OSError as error:
        raise RefusedError(f"uffd-wp is not to be had on this machine: {error}") from error


def _add(tracker: _sys.UffdWp, block: RamBlock, address: int, kind: MappingKind) -> Bitmap | None:
    """Track one block; where only the page table knows, the pages populated when it was armed."""
    noted = None
    if kind is MappingKind.PRIVATE_ANONYMOUS:
        noted = np.zeros(bitmap_words(block.npages), dtype=np.uint64)
    try:
        tracker.add(address, block.npages, noted)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            raise RefusedError(f"ramblock {block.idstr!r}: uffd-wp on hugetlb pages") from error
        if error.errno == errno.EBUSY:
            raise UsageError(
                f"ramblock {block.idstr!r}: another userfaultfd has this memory"
            ) from error
        raise
    return noted
