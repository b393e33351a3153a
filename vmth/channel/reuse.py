# SPDX-License-Identifier: Apache-2.0
"""What a warm destination reuses: a file with pages, and the index of their contents.

    hashes   | digest | digest | ...      16 bytes a row, ascending by column 0, then column 1
    places   | page   | page   | ...      where row i's content is: a page of the file's page space
    frames   | first page, pages, offset, bytes | ...      where pages of that space are in the file

A digest is ``kernels.content_hash`` of the page with ``key``. A frame whose bytes are its pages
times the page size holds them as they are; any other is one zstd frame of exactly those pages. A
raw file is thus one frame, from page 0 on. Frames rise by first page and do not overlap; the page
space may have holes between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vmth._native import _xfer
from vmth.errors import StreamError, UsageError
from vmth.wire.checks import MAX_REUSE_ENTRIES
from vmth.wire.messages import Message, ReuseFilter, ReusePart

__all__ = [
    "KEY_BYTES",
    "MAX_FRAME_BYTES",
    "MAX_REUSE_PAGES",
    "REUSE",
    "ReuseSource",
    "ReusedFile",
    "TakesFilter",
    "check_sources",
    "filter_messages",
    "hear_filter",
    "native_files",
]

#: The form's name, and the feature's in Offer and Accept.
REUSE = "reuse"

#: Of the content hash (``vmth/content_hash.h``).
KEY_BYTES = 32
#: A packed frame's pages: what is unpacked, and kept, for a single page of it.
MAX_FRAME_BYTES = 1 << 20
#: Contents of all sources of a session, 256 GiB of 4 KiB pages. Each takes 24 bytes of index at the
#: destination, some 2.3 bytes on the wire and 4.5 bytes of memory at the source.
MAX_REUSE_PAGES = MAX_REUSE_ENTRIES

U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class ReuseSource:
    """One file and its index; all sources of a session have one ``key`` and one page size.

    ``fd`` is open for reading and belongs to the owner, who keeps it and the arrays (they may be
    mapped from a file, read-only) until the session that uses them has ended. What the file holds
    is hashed again when it is read: an index that is wrong, or a file that was changed or cut
    behind it, costs time but never a wrong page.

    Raises UsageError for arrays that are not C-contiguous ``uint64`` of these shapes, a page size,
    key or number of pages out of bounds, or frames that are not in order.
    """

    path: str  #: for messages and results
    fd: int
    page_bytes: int
    key: bytes = field(repr=False)
    hashes: U64 = field(repr=False)  #: shape (n, 2)
    places: U64 = field(repr=False)  #: shape (n,)
    frames: U64 = field(repr=False)  #: shape (m, 4): first page, pages, offset, bytes

    def __post_init__(self) -> None:
        n, m = len(self.places), len(self.frames)
        for name, array, shape in (
            ("hashes", self.hashes, (n, 2)),
            ("places", self.places, (n,)),
            ("frames", self.frames, (m, 4)),
        ):
            if array.dtype != np.uint64 or array.shape != shape or not array.flags.c_contiguous:
                raise UsageError(
                    f"{self.path}: {name}: received {array.dtype} of shape {array.shape}, "
                    f"allowed C-contiguous uint64 of shape {shape}"
                )
        size = self.page_bytes
        if not 4096 <= size <= 2 << 20 or size & (size - 1):
            raise UsageError(
                f"{self.path}: page size: received {size}, allowed powers of two from 4096 to "
                f"{2 << 20}"
            )
        if len(self.key) != KEY_BYTES:
            raise UsageError(
                f"{self.path}: key: received {len(self.key)} bytes, allowed {KEY_BYTES}"
            )
        if n > MAX_REUSE_PAGES:
            raise UsageError(f"{self.path}: pages: received {n}, allowed up to {MAX_REUSE_PAGES}")
        self._check_frames()

    def _check_frames(self) -> None:
        first, pages, offset, nbytes = (self.frames[:, column] for column in range(4))
        # Each bounded before it is added to another: no sum wraps.
        in_bounds = (first < 1 << 40) & (pages > 0) & (pages < 1 << 40)
        in_bounds &= (offset < 1 << 62) & (nbytes > 0) & (nbytes < 1 << 62)
        if not in_bounds.all():
            row = int(np.flatnonzero(~in_bounds)[0])
            raise UsageError(f"{self.path}: frame {row}: {self.frames[row].tolist()} out of bounds")
        content = pages * np.uint64(self.page_bytes)
        packed = nbytes != content
        if (nbytes > content).any():
            raise UsageError(f"{self.path}: a frame is longer than its pages")
        if (pages[packed] * np.uint64(self.page_bytes) > MAX_FRAME_BYTES).any():
            raise UsageError(
                f"{self.path}: packed frames: received {int(pages[packed].max())} pages of "
                f"{self.page_bytes}, allowed up to {MAX_FRAME_BYTES} bytes"
            )
        if (first[1:] < (first + pages)[:-1]).any():
            raise UsageError(f"{self.path}: frames overlap or do not rise by first page")


@dataclass(frozen=True, slots=True)
class ReusedFile:
    """What one file gave to an arrival."""

    path: str
    pages: int


class TakesFilter(Protocol):
    """``vmth.channel.pages.NativeSender``."""

    def begin_reuse(self, key: bytes, entries: int) -> None: ...
    def add_reuse(self, base: int, count: int, data: bytes, last: bool) -> None: ...


def check_sources(sources: Sequence[ReuseSource], page_bytes: int) -> None:
    """Whether they fit one session. Raises UsageError."""
    for source in sources:
        if source.page_bytes != page_bytes:
            raise UsageError(
                f"{source.path}: page size: received {source.page_bytes}, allowed {page_bytes}"
            )
        if source.key != sources[0].key:
            raise UsageError(
                f"{source.path}: its index has another key than that of {sources[0].path}; "
                "allowed: one key for all"
            )
    npages = sum(len(source.places) for source in sources)
    if npages > MAX_REUSE_PAGES:
        raise UsageError(f"reuse: received {npages} pages, allowed up to {MAX_REUSE_PAGES}")


def native_files(
    sources: Sequence[ReuseSource],
) -> list[tuple[int, U64, U64, U64]]:
    """As ``vmth._native._xfer`` takes them."""
    return [(source.fd, source.hashes, source.places, source.frames) for source in sources]


def filter_messages(sources: Sequence[ReuseSource]) -> Iterator[Message]:
    """At the destination: what follows an Accept with the feature. ``sources`` is not empty."""
    writer = _xfer.FilterWriter(native_files(sources))
    yield ReuseFilter(sources[0].key, writer.entries)
    last = False
    while not last:
        base, count, data, last = writer.next()
        yield ReusePart(base, count, data, last)


def hear_filter(receive: Callable[[], Message], sender: TakesFilter) -> None:
    """At the source: take what follows an Accept with the feature, and return after the last part.
    Raises StreamError for anything else, and what ``receive`` raises."""
    first = receive()
    if not isinstance(first, ReuseFilter):
        raise StreamError(f"received {type(first).__name__}, allowed ReuseFilter")
    sender.begin_reuse(first.key, first.entries)
    last = False
    while not last:
        part = receive()
        if not isinstance(part, ReusePart):
            raise StreamError(f"received {type(part).__name__}, allowed ReusePart")
        sender.add_reuse(part.base, part.count, part.data, part.last)
        last = part.last
