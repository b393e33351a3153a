# SPDX-License-Identifier: Apache-2.0
"""Several dirty sources as one: a page is dirty if any of them says so."""

from __future__ import annotations

from collections.abc import Sequence

from vmth.errors import UsageError
from vmth.guest import CanNote, CanPeek, DirtySource
from vmth.types import Bitmaps

__all__ = ["CombinedDirtySource"]


class CombinedDirtySource:
    """The OR of ``sources`` over one block table: KVM's log and a vhost back end's, for instance.

    Sees what any of them sees. They are called in order, from the caller's thread.
    """

    def __init__(self, sources: Sequence[DirtySource]) -> None:
        """Raises UsageError without any source: it would report that nothing is ever written."""
        if not sources:
            raise UsageError("a live migration needs at least one dirty source")
        self._sources = tuple(sources)

    def start(self) -> None:
        """Start all. If one raises, those that had started are stopped, and it is raised."""
        started: list[DirtySource] = []
        try:
            for source in self._sources:
                source.start()
                started.append(source)
        except BaseException as error:
            for source in reversed(started):
                try:
                    source.stop()
                except Exception as stop_error:
                    error.add_note(f"and a source did not stop: {stop_error!r}")
            raise

    def fetch(self, bitmaps: Bitmaps) -> None:
        """OR in what each reports. If one raises, what others had reported is in ``bitmaps``."""
        for source in self._sources:
            source.fetch(bitmaps)

    def peek(self, bitmaps: Bitmaps) -> bool:
        """OR in what each reports; False where not all of them can be looked at."""
        peeking = [source for source in self._sources if isinstance(source, CanPeek)]
        return len(peeking) == len(self._sources) and all(
            source.peek(bitmaps) for source in peeking
        )

    def rearm(self, block: int, page: int, npages: int) -> None:
        """Re-arm in all. If one raises, the pages may not be read as if they were armed."""
        for source in self._sources:
            source.rearm(block, page, npages)

    def notes(self) -> Sequence[str]:
        """Those of all sources."""
        noting = [source for source in self._sources if isinstance(source, CanNote)]
        return [note for source in noting for note in source.notes()]

    def stop(self) -> None:
        """Stop all, even if one raises; the first error is raised, others are its notes."""
        first: Exception | None = None
        for source in self._sources:
            try:
                source.stop()
            except Exception as error:
                if first is None:
                    first = error
                else:
                    first.add_note(f"and another source did not stop: {error!r}")
        if first is not None:
            raise first
