# SPDX-License-Identifier: Apache-2.0
"""Opens the files of one migration: each with an index that was checked or built, one key for all.

with WarmFiles([path, ...], WarmOptions(...)) as warm:
    warm.sources            what the page channels take
    warm.files              what was found, file by file
    warm.notes              what was built again and why, and what was left out
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from vmth.channel.reuse import KEY_BYTES, MAX_REUSE_PAGES, ReuseSource
from vmth.errors import OptionError, RefusedError, UsageError
from vmth.reuse.content import PageFile, open_pages
from vmth.reuse.index import ContentIndex, build, index_path, usable
from vmth.reuse.layout import ENTRY_BYTES, UnusableError
from vmth.units import format_size

__all__ = [
    "DEFAULT_MEMORY_BYTES",
    "MAX_FILES",
    "IndexProgress",
    "ReuseChoice",
    "WarmFile",
    "WarmFiles",
]

#: Of the indexes of all files: 170 GiB of different pages.
DEFAULT_MEMORY_BYTES = 1 << 30
MAX_FILES = 64


@dataclass(frozen=True, slots=True)
class IndexProgress:
    """A file is being indexed."""

    path: str
    done_pages: int
    pages: int


@dataclass(frozen=True, slots=True)
class WarmFile:
    """One file and what of it can be reused. Pages: ``pages`` of the file, ``contents`` different
    ones in use, ``left_pages`` not in the index or not in use. ``memory_bytes``: of the index."""

    path: str
    kind: str  #: "raw" or "image"
    index: str  #: where the index is kept; empty: in memory only
    built: bool  #: just now
    pages: int
    hole_pages: int
    zero_pages: int
    repeated_pages: int
    contents: int
    left_pages: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class ReuseChoice:
    """What a destination was told to reuse."""

    paths: tuple[Path, ...] = ()
    folder: Path | None = None  #: for the indexes; None: each beside its file
    memory_bytes: int = DEFAULT_MEMORY_BYTES

    def open(self, progress: Callable[[IndexProgress], None] = lambda _: None) -> WarmFiles:
        """As ``WarmFiles``."""
        return WarmFiles(
            self.paths, folder=self.folder, memory_bytes=self.memory_bytes, progress=progress
        )


@dataclass(slots=True)
class _Opened:
    """A file, and its index once there is one; or why that has to be built."""

    file: PageFile
    where: Path
    index: ContentIndex | None = None
    why: str = ""
    built: bool = False


class WarmFiles:
    """The files and their indexes, open until ``close()``; a context manager. The constructor
    returns when all can be used: it reads a file whose index is missing or stale.

    ``memory_bytes`` bounds the indexes in use, all together; earlier files come first.
    ``progress`` is called from the constructor's thread and may raise. Raises UsageError for
    options that are not allowed, RefusedError for a file that cannot be reused.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        folder: Path | None = None,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        page_bytes: int = 4096,
        progress: Callable[[IndexProgress], None] = lambda _: None,
    ) -> None:
        if len(paths) > MAX_FILES:
            raise OptionError("paths", f"received {len(paths)} files, allowed {MAX_FILES}")
        if memory_bytes < ENTRY_BYTES:
            raise OptionError(
                "memory_bytes", f"received {memory_bytes}, allowed {ENTRY_BYTES} and more"
            )
        if folder is not None and not folder.is_dir():
            raise OptionError("folder", f"received {folder}, which is none, allowed directories")
        self.notes: list[str] = []
        self.files: list[WarmFile] = []
        self.sources: tuple[ReuseSource, ...] = ()
        self._progress = progress
        self._resources = contextlib.ExitStack()
        try:
            opened = self._once(
                [self._open(path, index_path(path, folder), page_bytes) for path in paths]
            )
            key = self._agree_on_key(opened)
            left = min(memory_bytes // ENTRY_BYTES, MAX_REUSE_PAGES)
            for one in opened:
                left -= self._take(one, key, left)
        except BaseException:
            self.close()
            raise

    @property
    def memory_bytes(self) -> int:
        """Of the indexes in use."""
        return sum(file.memory_bytes for file in self.files)

    def close(self) -> None:
        """When the sessions that use the sources have ended. Idempotent."""
        self.sources = ()
        self._resources.close()

    def __enter__(self) -> WarmFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ---- one after the other ---------------------------------------------------------------------

    def _open(self, path: Path, where: Path, page_bytes: int) -> _Opened:
        file = open_pages(path, page_bytes)
        self._resources.callback(file.close)
        opened = _Opened(file, where)
        try:
            opened.index = usable(where, file)
        except FileNotFoundError:
            opened.why = "there was none"
        except UnusableError as error:
            opened.why = str(error)
        return opened

    def _once(self, opened: Sequence[_Opened]) -> list[_Opened]:
        """A file that was given twice, under whatever names, would take its memory twice."""
        first: dict[tuple[int, int, int], _Opened] = {}
        for one in opened:
            about = os.fstat(one.file.fd)
            twin = first.setdefault((about.st_dev, about.st_ino, about.st_rdev), one)
            if twin is not one:
                self.notes.append(f"{one.file.path}: the same file as {twin.file.path}, used once")
        return list(first.values())

    def _agree_on_key(self, opened: Sequence[_Opened]) -> bytes:
        """A page is hashed once, whatever the number of files: the first index's key is that of
        all."""
        first = next((one for one in opened if one.index is not None), None)
        if first is None or first.index is None:
            return os.urandom(KEY_BYTES)
        key = first.index.header.key
        for one in opened:
            if one.index is not None and one.index.header.key != key:
                one.index = None
                one.why = f"its key is not that of {first.where}"
        return key

    def _take(self, opened: _Opened, key: bytes, limit: int) -> int:
        """Make a source of it; returns the contents that it has."""
        file, index = opened.file, opened.index
        if index is not None and not index.header.complete and len(index.places) < limit:
            opened.why = f"it was kept to {len(index.places)} contents"
            index = None
        if limit == 0:
            self.notes.append(f"{file.path}: not reused, the indexes before it take all memory")
            return 0
        if index is None:
            index = self._build(opened, key, limit)
        contents = min(limit, len(index.places))
        built = index.header.built
        left_pages = built.left_pages + len(index.places) - contents
        if left_pages:
            self.notes.append(
                f"{file.path}: {left_pages} pages, spread over the file, are not reused: the "
                f"index of this file may take {format_size(ENTRY_BYTES * limit)}; --reuse-memory "
                f"allows more, up to {format_size(ENTRY_BYTES * MAX_REUSE_PAGES)} for all files"
            )
        try:
            source = ReuseSource(
                str(file.path),
                file.fd,
                file.page_bytes,
                key,
                index.hashes[:contents],
                index.places[:contents],
                file.frames(),
            )
        except UsageError as error:
            raise RefusedError(f"this file cannot be reused: {error}") from None
        self.sources = (*self.sources, source)
        self.files.append(
            WarmFile(
                path=str(file.path),
                kind=file.kind.name.lower(),
                index="" if index.trouble else str(opened.where),
                built=opened.built,
                pages=file.npages,
                hole_pages=built.hole_pages,
                zero_pages=built.zero_pages,
                repeated_pages=built.repeated_pages,
                contents=contents,
                left_pages=left_pages,
                memory_bytes=ENTRY_BYTES * contents,
            )
        )
        return contents

    def _build(self, opened: _Opened, key: bytes, limit: int) -> ContentIndex:
        file = opened.file

        def progress(done: int, pages: int) -> None:
            self._progress(IndexProgress(str(file.path), done, pages))

        index = build(opened.where, file, key, limit, progress)
        opened.built = True
        self.notes.append(f"{file.path}: its index was built: {opened.why}")
        if index.trouble:
            self.notes.append(f"{file.path}: the index is in memory only: {index.trouble}")
        return index
