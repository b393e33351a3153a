# SPDX-License-Identifier: Apache-2.0
"""The index of a file's contents, kept on disk beside it and mapped from there.

    usable(): header, checksum, rows, the file's identity, some pages hashed again -> mapped
    build():  the file is read once -> written under a temporary name -> renamed -> mapped

Two that build at once each write a whole file; the later rename stays. What is mapped belongs to
the page cache: it can be dropped and read again.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vmth import kernels
from vmth.atomic import AtomicFile
from vmth.errors import RefusedError
from vmth.reuse.build import Rows, find_contents
from vmth.reuse.content import PageFile
from vmth.reuse.layout import (
    ENTRY_BYTES,
    HEADER_BYTES,
    Header,
    UnusableError,
    body_checksum,
    check_rows,
)

__all__ = ["SUFFIX", "ContentIndex", "build", "index_path", "usable"]

U64 = npt.NDArray[np.uint64]

SUFFIX = ".vmth-index"
#: Pages that are hashed again before an index is used.
SAMPLES = 64


@dataclass(frozen=True, slots=True, eq=False)
class ContentIndex:
    """Checked, and ready to be used with the file that it was made of. The arrays are read-only and
    keep what they are mapped from. ``trouble``: why it is in this process's memory alone."""

    header: Header
    hashes: U64 = field(repr=False)
    places: U64 = field(repr=False)
    trouble: str = ""

    @property
    def memory_bytes(self) -> int:
        return ENTRY_BYTES * len(self.places)


def index_path(path: Path, folder: Path | None = None) -> Path:
    """Beside the file; in ``folder`` under a name that tells files of one name apart."""
    if folder is None:
        return path.with_name(path.name + SUFFIX)
    tag = hashlib.blake2b(os.fsencode(path.absolute()), digest_size=8).hexdigest()
    return folder / f"{path.name[:200]}-{tag}{SUFFIX}"


def usable(where: Path, file: PageFile) -> ContentIndex:
    """The index at ``where``. Raises UnusableError with the reason for which it has to be built
    again, FileNotFoundError where there is none."""
    try:
        fd = os.open(where, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnusableError(f"it cannot be read: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        _check_owner(status)
        header = Header.unpack(os.pread(fd, HEADER_BYTES, 0))
        _check_file(header, status.st_size, file)
        index = _map(fd, header)
    except OSError as error:
        raise UnusableError(f"it cannot be read: {error.strerror}") from None
    finally:
        os.close(fd)
    if body_checksum(index.hashes, index.places) != header.body_checksum:
        raise UnusableError("it is damaged")
    check_rows(index.hashes, index.places, file.npages)
    _compare_samples(index, file)
    return index


def _check_owner(status: os.stat_result) -> None:
    """Whoever can write it could make it useless, and knows its key."""
    if not stat.S_ISREG(status.st_mode):
        raise UnusableError("it is no regular file")
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise UnusableError("others can write it")


def _check_file(header: Header, index_bytes: int, file: PageFile) -> None:
    if index_bytes != header.file_bytes:
        raise UnusableError(f"it has {index_bytes} bytes, its header says {header.file_bytes}")
    if (header.kind, header.page_bytes) != (file.kind, file.page_bytes):
        raise UnusableError(f"it is of a {header.kind.name.lower()} file or of other pages")
    if header.identity != file.identity():
        raise UnusableError("the file was changed since")


def _compare_samples(index: ContentIndex, file: PageFile) -> None:
    """The times of a file can be set, and a device has none."""
    rows = np.unique(np.linspace(0, len(index.places) - 1, SAMPLES).astype(np.intp))
    found = np.zeros((1, 2), dtype=np.uint64)
    for row in rows.tolist() if len(index.places) else ():
        page = int(index.places[row])
        try:
            content = file.page(page)
        except RefusedError as error:
            raise UnusableError(str(error)) from None
        kernels.content_hash(content, file.page_bytes, index.header.key, found)
        if not np.array_equal(found[0], index.hashes[row]):
            raise UnusableError(f"page {page} of the file is another one now")


def build(
    where: Path,
    file: PageFile,
    key: bytes,
    limit: int,
    progress: Callable[[int, int], None] = lambda _done, _pages: None,
) -> ContentIndex:
    """Read ``file`` and keep its index at ``where``, in place of one that is there; where that
    cannot be written, it is in memory only (``trouble``). Raises RefusedError if the file cannot be
    read; then, and when ``progress`` raises, what was at ``where`` stays."""
    identity = file.identity()  # a change from now on shows at the next use
    rows = find_contents(file, key, limit, progress)
    header = Header(
        file.kind,
        file.page_bytes,
        len(rows.places),
        identity,
        rows.built,
        body_checksum(rows.hashes, rows.places),
        key,
    )
    try:
        return _write(where, header, rows)
    except (OSError, RefusedError) as error:
        return ContentIndex(header, rows.hashes, rows.places, f"it was not kept: {error}")


def _write(where: Path, header: Header, rows: Rows) -> ContentIndex:
    with AtomicFile(where, replace=True) as out:
        out.write(header.pack())
        out.write(rows.hashes.reshape(-1).view(np.uint8).data)
        out.write(rows.places.view(np.uint8).data)
        fd = os.open(out.readable, os.O_RDONLY | os.O_CLOEXEC)
        try:
            index = _map(fd, header)
        finally:
            os.close(fd)
        out.publish()
    return index


def _map(fd: int, header: Header) -> ContentIndex:
    mapped = mmap.mmap(fd, header.file_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    n = header.entries
    hashes = np.frombuffer(mapped, dtype=np.uint64, count=2 * n, offset=HEADER_BYTES)
    places = np.frombuffer(mapped, dtype=np.uint64, count=n, offset=HEADER_BYTES + 16 * n)
    return ContentIndex(header, hashes.reshape(n, 2), places)
