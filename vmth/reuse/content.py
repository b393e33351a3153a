# SPDX-License-Identifier: Apache-2.0
"""A file as pages: a raw one as it lies, or a saved VM's image by its frames.

    raw     page | page | hole | page ...        page p at p * page size; a rest is left out
    image   frame: data pages | frame ...        data pages numbered through, zero pages have none

Other formats are refused by name: what they hold does not lie at page boundaries.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from vmth.errors import RefusedError, StreamError, UsageError
from vmth.qemu.image.layout import is_image
from vmth.qemu.image.reader import Image
from vmth.reuse.layout import FileKind, Identity

__all__ = ["PageFile", "Piece", "RawFile", "SavedImage", "open_pages"]

U8: TypeAlias = npt.NDArray[np.uint8]
U64: TypeAlias = npt.NDArray[np.uint64]
#: Reads a stretch of pages when called, in any thread: (number of the first, their bytes).
Piece: TypeAlias = Callable[[], tuple[int, U8]]

PIECE_BYTES = 4 << 20
_HOLDS = "only content that lies at page boundaries can be reused"
#: (offset, bytes there, what it is)
_FORMATS = (
    (0, b"QFI\xfb", "a qcow2 image"),
    (0, b"QED\0", "a QED image"),
    (0, b"KDMV", "a VMDK image"),
    (0, b"COWD", "a VMDK image"),
    (0, b"vhdxfile", "a VHDX image"),
    (0, b"conectix", "a VHD image"),
    (0, b"WithoutFreeSpace", "a Parallels image"),
    (0, b"WithouFreSpacExt", "a Parallels image"),
    (0x40, b"\x7f\x10\xda\xbe", "a VDI image"),
    (0, b"LUKS\xba\xbe", "an encrypted (LUKS) image"),
)
#: The same without a way to make it raw by converting a disk.
_STREAMS = (
    (b"QEVM", "a migration stream of QEMU"),
    (b"LibvirtQemudSave", "a saved VM of libvirt"),
    (b"VMTHIDX\n", "an index of pages"),
)


class PageFile(Protocol):
    """An open file of pages. ``fd`` is its own until ``close()``. Methods that read raise
    RefusedError for a file that is damaged or was cut, from any thread."""

    path: Path
    fd: int
    kind: FileKind
    page_bytes: int
    npages: int  #: of its page space

    def identity(self) -> Identity: ...

    def frames(self) -> U64:
        """Where its pages are: ``ReuseSource.frames``."""

    def pieces(self) -> Iterator[Piece]:
        """All that may hold something else than zeros, in order."""

    def page(self, number: int) -> U8:
        """One page's bytes."""

    def close(self) -> None: ...


def open_pages(path: Path, page_bytes: int = 4096) -> PageFile:
    """Raises RefusedError for a file that cannot be read as pages, naming the way out."""
    try:
        # Opening a pipe would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise RefusedError(f"{path} cannot be read: {error.strerror}") from None
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise RefusedError(f"{path}: allowed are a regular file and a block device")
        try:
            begin = os.pread(fd, 4096, 0)
            if not is_image(begin):
                _refuse_formats(path, begin)
                raw = RawFile(path, fd, page_bytes)
                undo.pop_all()
                return raw
        except OSError as error:
            raise RefusedError(f"{path} cannot be read: {error.strerror}") from None
    return _open_image(path, page_bytes)


def _refuse_formats(path: Path, begin: bytes) -> None:
    for at, magic, what in _FORMATS:
        if begin[at : at + len(magic)] == magic:
            raise RefusedError(
                f"{path} is {what}: {_HOLDS}; qemu-img convert -O raw makes a file of it that is"
            )
    for magic, what in _STREAMS:
        if begin.startswith(magic):
            raise RefusedError(
                f"{path} is {what}: {_HOLDS}; allowed are raw files and images of vmth save"
            )


class RawFile:
    """A disk's or a memory's bytes as they are. Takes ``fd`` over."""

    kind = FileKind.RAW

    def __init__(self, path: Path, fd: int, page_bytes: int) -> None:
        self.path = path
        self.page_bytes = page_bytes
        self._device = stat.S_ISBLK(os.fstat(fd).st_mode)
        self.size_bytes = os.lseek(fd, 0, os.SEEK_END)
        self.npages = self.size_bytes // page_bytes
        if self.npages == 0:
            raise RefusedError(f"{path} has {self.size_bytes} bytes, less than a page")
        self.fd = fd

    def identity(self) -> Identity:
        status = os.fstat(self.fd)
        if self._device:
            return Identity(os.lseek(self.fd, 0, os.SEEK_END), 0, status.st_rdev)
        return Identity(status.st_size, status.st_mtime_ns, status.st_ino)

    def frames(self) -> U64:
        nbytes = self.npages * self.page_bytes
        return np.array([[0, self.npages, 0, nbytes]], dtype=np.uint64)

    def pieces(self) -> Iterator[Piece]:
        size, whole = self.page_bytes, self.npages * self.page_bytes
        at = 0
        while (data := self._data_from(at, whole)) is not None:
            at, ends = data
            while at < ends:
                nbytes = min(PIECE_BYTES, ends - at)
                yield partial(self._read, at // size, nbytes)
                at += nbytes

    def _data_from(self, at: int, whole: int) -> tuple[int, int] | None:
        """The next stretch of whole pages that is no hole: (from, to) in bytes."""
        if at >= whole:
            return None
        size = self.page_bytes
        try:
            begins = os.lseek(self.fd, at, os.SEEK_DATA)
            ends = os.lseek(self.fd, begins, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole follows
                return None
            if error.errno == errno.EINVAL:  # a device knows no holes
                return at, whole
            raise RefusedError(f"{self.path} cannot be read: {error.strerror}") from None
        begins = begins // size * size
        return (begins, min(whole, -(-ends // size) * size)) if begins < whole else None

    def _read(self, page: int, nbytes: int) -> tuple[int, U8]:
        room = np.empty(nbytes, dtype=np.uint8)
        done, at = 0, page * self.page_bytes
        try:
            while done < nbytes:
                got = os.preadv(self.fd, [room.data[done:]], at + done)
                if got == 0:
                    raise RefusedError(f"{self.path} was cut while it was read")
                done += got
        except OSError as error:
            raise RefusedError(f"{self.path} at {at}: {error.strerror}") from None
        return page, room

    def page(self, number: int) -> U8:
        return self._read(number, self.page_bytes)[1]

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _open_image(path: Path, page_bytes: int) -> SavedImage:
    with contextlib.ExitStack() as undo:
        try:
            image = undo.enter_context(Image.open(path))
            saved = SavedImage(path, image)
        except (OSError, StreamError, UsageError) as error:
            raise RefusedError(f"this image cannot be reused: {error}") from None
        if saved.page_bytes != page_bytes:
            raise RefusedError(f"{path}: pages of {saved.page_bytes} bytes, allowed {page_bytes}")
        undo.pop_all()
        return saved


class SavedImage:
    """What ``vmth save`` wrote. Owns ``image``; header, index and end of the file were checked when
    that was opened, each frame is when it is read."""

    kind = FileKind.IMAGE

    def __init__(self, path: Path, image: Image) -> None:
        self.path = path
        self.page_bytes = image.page_bytes
        self.fd = image.fileno()
        self._image = image
        self._frames = image.data_places()
        self.npages = int(self._frames[-1, :2].sum()) if len(self._frames) else 0

    def identity(self) -> Identity:
        status = os.fstat(self.fd)
        return Identity(status.st_size, status.st_mtime_ns, status.st_ino)

    def frames(self) -> U64:
        return np.ascontiguousarray(self._frames[:, :4])

    def pieces(self) -> Iterator[Piece]:
        for row in range(len(self._frames)):
            yield partial(self._load, row)

    def _load(self, row: int) -> tuple[int, U8]:
        first, number = int(self._frames[row, 0]), int(self._frames[row, 4])
        try:
            return first, self._image.load_frame(number).data.reshape(-1)
        except StreamError as error:
            raise RefusedError(f"{self.path} is damaged: {error}") from None

    def page(self, number: int) -> U8:
        row = int(np.searchsorted(self._frames[:, 0], np.uint64(number), side="right")) - 1
        first, data = self._load(row)
        at = (number - first) * self.page_bytes
        return data[at : at + self.page_bytes]

    def close(self) -> None:
        self._image.close()
        self.fd = -1
