# SPDX-License-Identifier: Apache-2.0
"""Writes an image, front to back: pages as they come, packed by several threads, kept in order.

    pages() -> FrameBuilder -> [worker: hash, pack, seal] ... -> sink, in order -> index, digest

What is in flight is bounded: ``pages()`` waits for the oldest frame when enough are on their way.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol

import numpy as np

from vmth.errors import RefusedError, UsageError
from vmth.qemu.image.codec import DEFAULT_LEVEL, Packer
from vmth.qemu.image.digest import DigestTable
from vmth.qemu.image.frames import Frame, FrameBuilder, Hashes, Runs16
from vmth.qemu.image.layout import (
    END_BYTES,
    INDEX_FRAME,
    INDEX_HEAD,
    MAX_CONTENT_BYTES,
    MAX_HEAD_BYTES,
    MAX_STATE_BYTES,
    End,
    Kind,
    RecordHead,
    Seal,
    header_bytes,
)
from vmth.qemu.image.meta import Meta, write_meta
from vmth.qemu.ram import Runs

__all__ = ["ImageWriter", "Sink", "WriterStats"]

MAX_WORKERS = 64


class Sink(Protocol):
    """Where the bytes go."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Write all of it, or raise OSError."""


@dataclass(frozen=True, slots=True)
class WriterStats:
    """So far; pages and bytes of frames that are on their way are not counted yet."""

    file_bytes: int = 0
    frames: int = 0
    normal_pages: int = 0  #: as stored: a page that came twice counts twice
    zero_pages: int = 0
    normal_bytes: int = 0  #: of the normal pages, unpacked
    packed_bytes: int = 0  #: the same as they lie in the file
    superseded_pages: int = 0


@dataclass(frozen=True, slots=True)
class _Packed:
    """A frame's record, made by a worker."""

    frame: Frame
    record: bytes
    hashes: Hashes


class ImageWriter:
    """``pages()``, then ``state()``, then ``finish()``. One thread calls.

    Leaving the context ends the workers; what was written is an image only after ``finish()``.
    Errors: RefusedError for a VM that the format cannot hold, OSError of the sink, UsageError for
    options. After an error nothing more may be written.
    """

    def __init__(
        self,
        sink: Sink,
        meta: Meta,
        head: bytes,
        *,
        level: int = DEFAULT_LEVEL,
        workers: int = 2,
    ) -> None:
        if not 1 <= workers <= MAX_WORKERS:
            raise UsageError(f"workers: received {workers}, allowed 1 to {MAX_WORKERS}")
        described = write_meta(meta)
        self._sink = sink
        self._level = level
        self._packer, self._seal = Packer(level), Seal()
        self._mine = threading.local()
        self._sequence = 0
        self._records_digest = hashlib.sha256()
        self._builder = FrameBuilder(meta.page_bytes)
        self._table = DigestTable(meta)
        self._page_bytes = meta.page_bytes
        self._flying: deque[Future[_Packed]] = deque()
        self._cap = 4 * workers
        self._index = _Index(self._packer)
        self._state_part = bytearray()
        self._state_bytes = 0
        self._state_offset: int | None = None
        self.stats = WriterStats()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="vmth-pack")
        try:
            self._put(header_bytes())
            self._record(Kind.META, described, packed=False)
            if len(head) > MAX_HEAD_BYTES:
                raise RefusedError(f"stream's head: {len(head)} bytes, allowed {MAX_HEAD_BYTES}")
            for at in range(0, len(head), MAX_CONTENT_BYTES):
                self._record(Kind.HEAD, head[at : at + MAX_CONTENT_BYTES])
        except BaseException:
            self.close()
            raise

    def pages(self, runs: Runs, data: memoryview) -> None:
        """Runs as a stream's RamPages has them; both are copied before this returns."""
        if self._state_offset is not None:
            raise UsageError("pages behind the state: allowed before it")
        for frame in self._builder.add(runs, data):
            self._submit(frame)

    def state(self, data: bytes | bytearray | memoryview) -> None:
        """More of the stream behind the last pages: after the first call no pages may come."""
        self._end_pages()
        self._state_bytes += len(data)
        if self._state_bytes > MAX_STATE_BYTES:
            raise RefusedError(
                f"device state of {self._state_bytes} bytes, allowed {MAX_STATE_BYTES}"
            )
        self._state_part += data
        while len(self._state_part) >= MAX_CONTENT_BYTES:
            self._record(Kind.STATE, bytes(self._state_part[:MAX_CONTENT_BYTES]))
            del self._state_part[:MAX_CONTENT_BYTES]

    def finish(self) -> End:
        """Everything that is left: frames on their way, state, index, END."""
        self._end_pages()
        if self._state_part:
            self._record(Kind.STATE, bytes(self._state_part))
        index_offset = self.stats.file_bytes
        for head, packed in self._index.records():
            self._record_of(head, packed)
        return self._end(index_offset)

    def close(self) -> None:
        """End the workers; idempotent."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._flying.clear()

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _end_pages(self) -> None:
        if self._state_offset is not None:
            return
        for frame in self._builder.flush():
            self._submit(frame)
        while self._flying:
            self._land()
        self._state_offset = self.stats.file_bytes

    # ---- frames --------------------------------------------------------------------------------

    def _submit(self, frame: Frame) -> None:
        while len(self._flying) >= self._cap or (self._flying and self._flying[0].done()):
            self._land()
        self._flying.append(self._pool.submit(self._pack, frame, self._sequence))
        self._sequence += 1

    def _pack(self, frame: Frame, sequence: int) -> _Packed:
        """In a worker."""
        mine = self._mine
        if not hasattr(mine, "packer"):
            mine.packer, mine.seal = Packer(self._level), Seal()
        record = bytes(frame.record(sequence, mine.packer, mine.seal))
        return _Packed(frame, record, frame.hashes())

    def _land(self) -> None:
        """Write the oldest frame that is on its way."""
        packed = self._flying.popleft().result()
        frame = packed.frame
        offset = self.stats.file_bytes
        self._put(packed.record)
        self._records_digest.update(RecordHead.unpack(packed.record, "").checksum)
        self._index.add(offset, frame)
        self._table.take(frame, packed.hashes)
        normal = len(frame.data)
        self.stats = replace(
            self.stats,
            frames=self.stats.frames + 1,
            normal_pages=self.stats.normal_pages + normal,
            zero_pages=self.stats.zero_pages + frame.npages - normal,
            normal_bytes=self.stats.normal_bytes + normal * self._page_bytes,
            packed_bytes=self.stats.packed_bytes + len(packed.record),
            superseded_pages=self._table.superseded_pages,
        )

    # ---- records -------------------------------------------------------------------------------

    def _put(self, data: bytes | memoryview) -> None:
        self._sink.write(data)
        self.stats = replace(self.stats, file_bytes=self.stats.file_bytes + len(data))

    def _record(self, kind: Kind, content: bytes, *, packed: bool = True) -> None:
        codec, payload = (self._packer if packed else Packer(0)).pack(content)
        self._record_of(RecordHead(kind, codec, 0, len(payload), len(content)), payload)

    def _record_of(self, head: RecordHead, payload: bytes | memoryview) -> None:
        record = self._seal.make(replace(head, sequence=self._sequence), payload)
        self._sequence += 1
        self._put(record)
        self._records_digest.update(RecordHead.unpack(record, "").checksum)

    def _end(self, index_offset: int) -> End:
        assert self._state_offset is not None
        lo, hi, pages = self._table.digest()
        stats = self.stats
        end = End(
            records=self._sequence + 1,
            frames=stats.frames,
            state_offset=self._state_offset,
            index_offset=index_offset,
            normal_pages=stats.normal_pages,
            zero_pages=stats.zero_pages,
            superseded_pages=stats.superseded_pages,
            digest_lo=lo,
            digest_hi=hi,
            digest_pages=pages,
            records_digest=self._records_digest.digest()[:16],
            file_bytes=stats.file_bytes + END_BYTES,
        )
        self._record(Kind.END, end.pack(), packed=False)
        return end


class _Index:
    """Where each frame is and which pages it holds; kept packed until the end of the file."""

    def __init__(self, packer: Packer) -> None:
        self._packer = packer
        self._frames: list[tuple[int, int, int]] = []
        self._runs: list[Runs16] = []
        self._nbytes = INDEX_HEAD.size
        self._packed: list[tuple[RecordHead, bytes]] = []

    def add(self, offset: int, frame: Frame) -> None:
        nbytes = INDEX_FRAME.itemsize + frame.runs.nbytes
        if self._nbytes + nbytes > MAX_CONTENT_BYTES:
            self._cut()
        self._frames.append((offset, len(frame.runs), len(frame.data)))
        self._runs.append(frame.runs)
        self._nbytes += nbytes

    def records(self) -> list[tuple[RecordHead, bytes]]:
        if self._frames:
            self._cut()
        return self._packed

    def _cut(self) -> None:
        runs = np.concatenate(self._runs)
        frames = np.array(self._frames, dtype=INDEX_FRAME)
        content = INDEX_HEAD.pack(len(frames), len(runs)) + frames.tobytes() + runs.tobytes()
        codec, packed = self._packer.pack(content)
        head = RecordHead(Kind.INDEX, codec, 0, len(packed), len(content))
        self._packed.append((head, bytes(packed)))
        self._frames, self._runs, self._nbytes = [], [], INDEX_HEAD.size
