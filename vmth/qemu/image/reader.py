# SPDX-License-Identifier: Apache-2.0
"""Reads an image: what it holds, all its pages in order, or any one page.

``Image.open`` checks header, META, HEAD, INDEX and END. ``check()`` reads the whole file and
compares every checksum; ``frames()`` does the same for the frames that it gives out. What is wrong
is a StreamError that names the place in the file; nothing of a damaged record is ever given out.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from vmth.errors import StreamError, UsageError
from vmth.qemu.image.codec import Unpacker
from vmth.qemu.image.digest import FrameDigest
from vmth.qemu.image.frames import Frame, Hashes
from vmth.qemu.image.layout import (
    END_BYTES,
    HEADER_BYTES,
    MAX_HEAD_BYTES,
    MAX_STATE_BYTES,
    RECORD_BYTES,
    Codec,
    End,
    Kind,
    RecordHead,
    Seal,
    damaged,
    read_header,
)
from vmth.qemu.image.lookup import PageIndex
from vmth.qemu.image.meta import Meta, SavedBlock, read_meta

__all__ = ["Image"]

DEFAULT_WORKERS = 2
MAX_WORKERS = 64
CACHED_FRAMES = 16


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One frame as a worker read it."""

    checksum: bytes
    frame: Frame
    hashes: Hashes


class Image:
    """An open image file. Methods may be called from several threads; iterators belong to one.

    Memory: 16 bytes a run of the index; ``read_page``, and ``frames`` of a file in which pages come
    twice, add 4 bytes a page of the VM.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        self._size = os.fstat(fd).st_size
        self._mine = threading.local()
        self._lock = threading.Lock()
        self._cache: dict[int, Frame] = {}
        self._checksums: list[bytes] = []
        self.version = read_header(self._pread(HEADER_BYTES, 0))
        self.end = self._read_end()
        self.meta, self.head, self._pages_offset = self._read_begin()
        self._first_sequence = len(self._checksums)
        self.index = self._read_index()

    @classmethod
    def open(cls, path: Path | str) -> Image:
        """Raises OSError, UsageError if it is no regular file, StreamError if it is no image, is
        damaged, or was not finished."""
        path = Path(path)
        # Opening a pipe would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UsageError(f"{path}: allowed is a regular file")
            return cls(path, fd)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, StreamError):
                raise StreamError(f"{path}: {error}") from None
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Image:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ---- what it holds -------------------------------------------------------------------------

    @property
    def blocks(self) -> tuple[SavedBlock, ...]:
        """The ramblocks; a block's number is its place here."""
        return self.meta.blocks

    @property
    def page_bytes(self) -> int:
        return self.meta.page_bytes

    def read_page(self, block: int, page: int) -> bytes | None:
        """The content of page ``page`` of block number ``block``; None if the image does not hold
        it. Reads the page's frame only; the last frames are kept.

        Raises UsageError for a page that the VM has not, StreamError for a damaged frame.
        """
        if not 0 <= block < len(self.blocks) or not 0 <= page < self.meta.npages(block):
            raise UsageError(
                f"page {page} of block {block}: allowed are {len(self.blocks)} blocks and the "
                "pages that they have"
            )
        number = self.index.newest(block, page)
        if number is None:
            return None
        frame = self._cached(number)
        for of_block, first, npages, row in frame.each_run():
            if of_block == block and first <= page < first + npages:
                if row < 0:
                    return bytes(self.page_bytes)
                return bytes(frame.data[row + page - first])
        raise AssertionError("a frame's runs are those of the index")

    def fileno(self) -> int:
        """Its own, until ``close()``."""
        return self._fd

    def data_places(self) -> npt.NDArray[np.uint64]:
        """For a reader of one's own: ``PageIndex.data_places``."""
        return self.index.data_places()

    def load_frame(self, number: int) -> Frame:
        """A frame as it stands in the file, checked: pages that a later one has again are in it.
        Raises StreamError."""
        return self._load_frame(number).frame

    def pages(self) -> Iterator[tuple[int, int, memoryview | None]]:
        """(block, page, content) of every page, each once, in the order of the file; None is a page
        of zeros. For a whole guest ``frames()`` is much faster."""
        for frame, _ in self.frames():
            for block, first, npages, row in frame.each_run():
                for i in range(npages):
                    content = None if row < 0 else memoryview(frame.data[row + i])
                    yield block, first + i, content

    def state(self) -> Iterator[bytes]:
        """The stream behind the last pages, in pieces, checked."""
        sequence, at = self._first_sequence + self.end.frames, self.end.state_offset
        nbytes = 0
        while at < self.end.index_offset:
            where = f"record at {at}"
            head, payload = self._record(at, self.end.index_offset, sequence, Kind.STATE)
            nbytes += head.content_bytes
            if nbytes > MAX_STATE_BYTES:
                damaged(where, "bytes of the state", nbytes, f"at most {MAX_STATE_BYTES}")
            yield bytes(self._unpacker.unpack(head.codec, payload, head.content_bytes, where))
            at += head.size_bytes
            sequence += 1

    # ---- all of it -----------------------------------------------------------------------------

    def check(self, between: Callable[[int], None] = lambda _: None) -> None:
        """Read the whole file and compare every record's checksum, number and place. StreamError.

        What this does not do is unpack: ``frames()`` and ``verify()`` do. ``between`` is called
        between records with the bytes that were read so far, and may raise.
        """
        digest = hashlib.sha256()
        at, sequence = HEADER_BYTES, 0
        ends = self._size - END_BYTES
        while at < ends:
            between(at)
            head, _ = self._record(at, ends, sequence, self._kind_at(at))
            digest.update(head.checksum)
            at += head.size_bytes
            sequence += 1
        self._compare_records(digest.digest(), sequence)

    def frames(self, *, workers: int = DEFAULT_WORKERS) -> Iterator[tuple[Frame, Hashes]]:
        """Each frame and the hashes of its data pages, in the order of the file, checked against
        its checksum and the index; pages that a later frame has again are left out."""
        if not 1 <= workers <= MAX_WORKERS:
            raise UsageError(f"workers: received {workers}, allowed 1 to {MAX_WORKERS}")
        with ThreadPoolExecutor(workers, thread_name_prefix="vmth-unpack") as pool:
            flying: deque[Future[_Loaded]] = deque()
            try:
                for number in range(self.end.frames):
                    flying.append(pool.submit(self._load_frame, number))
                    if len(flying) > 4 * workers:
                        yield self._newest_of(number + 1 - len(flying), flying.popleft().result())
                while flying:
                    yield self._newest_of(self.end.frames - len(flying), flying.popleft().result())
            finally:
                pool.shutdown(cancel_futures=True)

    def verify(
        self, *, workers: int = DEFAULT_WORKERS, between: Callable[[], None] = lambda: None
    ) -> None:
        """``check()``, and unpack every page and compare the digest of memory. StreamError."""
        self.check(lambda _: between())
        digest = FrameDigest(self.page_bytes)
        for frame, hashes in self.frames(workers=workers):
            between()
            digest.take(frame, hashes)
        digest.compare(self.end)

    # ---- reading -------------------------------------------------------------------------------

    @property
    def _seal(self) -> Seal:
        """This thread's."""
        mine = self._mine
        if not hasattr(mine, "seal"):
            mine.seal, mine.unpacker = Seal(), Unpacker()
        seal: Seal = mine.seal
        return seal

    @property
    def _unpacker(self) -> Unpacker:
        assert self._seal is not None
        unpacker: Unpacker = self._mine.unpacker
        return unpacker

    def _pread(self, nbytes: int, at: int) -> bytes:
        return os.pread(self._fd, nbytes, at)

    def _record(
        self, at: int, limit: int, sequence: int, kind: Kind
    ) -> tuple[RecordHead, memoryview]:
        """The record at ``at``, whole before ``limit``. The payload is in this thread's buffer:
        valid until its next call."""
        where = f"record at {at}"
        head = RecordHead.unpack(self._pread(RECORD_BYTES, at), where)
        if head.size_bytes > limit - at:
            damaged(where, "bytes of the record", head.size_bytes, f"at most {limit - at}")
        seal = self._seal
        got = os.preadv(self._fd, [seal.room[: head.size_bytes]], at)
        head, payload = seal.check(got, where)
        if head.sequence != sequence:
            damaged(where, "record number", head.sequence, sequence)
        if head.kind is not kind:
            damaged(where, "record kind", head.kind.name, kind.name)
        return head, payload

    def _kind_at(self, at: int) -> Kind:
        if at >= self.end.index_offset:
            return Kind.INDEX
        if at >= self.end.state_offset:
            return Kind.STATE
        if at >= self._pages_offset:
            return Kind.PAGES
        return Kind.META if at == HEADER_BYTES else Kind.HEAD

    def _read_end(self) -> End:
        at = self._size - END_BYTES
        where = f"record at {at}"
        if at < HEADER_BYTES + RECORD_BYTES:
            damaged(
                "image", "bytes", self._size, f"at least {HEADER_BYTES + RECORD_BYTES + END_BYTES}"
            )
        seal = self._seal
        try:
            head, payload = seal.check(os.preadv(self._fd, [seal.room[:END_BYTES]], at), where)
        except StreamError as error:
            raise StreamError(f"the file does not end as an image does: {error}") from None
        if head.kind is not Kind.END:
            damaged(where, "record kind", head.kind.name, Kind.END.name)
        end = End.unpack(payload, where)
        if end.file_bytes != self._size:
            damaged(where, "bytes of the file", self._size, end.file_bytes)
        if head.sequence + 1 != end.records:
            damaged(where, "record number", head.sequence, end.records - 1)
        return end

    def _read_begin(self) -> tuple[Meta, bytes, int]:
        """(META, the stream's head, where the first frame is)"""
        at, limit = HEADER_BYTES, self.end.state_offset
        head, payload = self._record(at, limit, 0, Kind.META)
        content = self._unpacker.unpack(head.codec, payload, head.content_bytes, f"record at {at}")
        meta = read_meta(content, f"record at {at}")
        self._checksums.append(head.checksum)
        at += head.size_bytes
        parts, nbytes = [], 0
        while at < limit:
            kind = RecordHead.unpack(self._pread(RECORD_BYTES, at), f"record at {at}").kind
            if kind is not Kind.HEAD:
                break
            head, payload = self._record(at, limit, len(self._checksums), Kind.HEAD)
            nbytes += head.content_bytes
            if nbytes > MAX_HEAD_BYTES:
                damaged(f"record at {at}", "bytes of the head", nbytes, f"at most {MAX_HEAD_BYTES}")
            parts.append(
                bytes(self._unpacker.unpack(head.codec, payload, head.content_bytes, f"{at}"))
            )
            self._checksums.append(head.checksum)
            at += head.size_bytes
        return meta, b"".join(parts), at

    def _read_index(self) -> PageIndex:
        index = PageIndex(self.meta, self._size)
        at, limit = self.end.index_offset, self._size - END_BYTES
        # The records of the state lie before: their number follows from the end.
        heads = []
        while at < limit:
            head = RecordHead.unpack(self._pread(RECORD_BYTES, at), f"record at {at}")
            heads.append(at)
            at += head.size_bytes
        sequence = self.end.records - 1 - len(heads)
        for at in heads:
            head, payload = self._record(at, limit, sequence, Kind.INDEX)
            content = self._unpacker.unpack(
                head.codec, payload, head.content_bytes, f"record at {at}"
            )
            index.add(memoryview(content), f"record at {at}")
            sequence += 1
        index.finish(self.end, self._pages_offset)
        return index

    def _load_frame(self, number: int) -> _Loaded:
        """In a worker."""
        at, nbytes = self.index.place(number)
        where = f"record at {at}"
        head, payload = self._record(at, at + nbytes, self._first_sequence + number, Kind.PAGES)
        if head.size_bytes != nbytes:
            damaged(where, "bytes of the record", head.size_bytes, nbytes)
        listed = self.index.listed(number)
        frame = Frame.unpack(head, payload, listed, self.page_bytes, self._unpacker, where)
        if head.codec is Codec.RAW:  # it lies in this thread's buffer
            frame = Frame(frame.runs, frame.data.copy())
        return _Loaded(head.checksum, frame, frame.hashes())

    def _newest_of(self, number: int, loaded: _Loaded) -> tuple[Frame, Hashes]:
        if self.end.superseded_pages == 0:
            return loaded.frame, loaded.hashes
        return self.index.newest_of(number, loaded.frame, loaded.hashes)

    def _cached(self, number: int) -> Frame:
        with self._lock:
            frame = self._cache.get(number)
        if frame is None:
            frame = self._load_frame(number).frame
            with self._lock:
                if len(self._cache) >= CACHED_FRAMES:
                    del self._cache[next(iter(self._cache))]
                self._cache[number] = frame
        return frame

    def _compare_records(self, digest: bytes, records: int) -> None:
        if records + 1 != self.end.records:
            damaged("image", "records", records + 1, self.end.records)
        if digest[:16] != self.end.records_digest:
            damaged(
                "image",
                "digest of all records",
                digest[:16].hex(),
                self.end.records_digest.hex(),
            )
