# SPDX-License-Identifier: Apache-2.0
"""A file that appears under its name only when it is complete and on the disk.

Until then it has no name at all where the filesystem can do that (O_TMPFILE): then nothing is left
behind even by a killed process. Elsewhere it has a temporary name in the same directory.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path
from types import TracebackType

from vmth.errors import RefusedError

__all__ = ["AtomicFile"]


_KINDS = (
    (stat.S_ISDIR, "directory"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISSOCK, "socket"),
)


def refuse_special(path: Path) -> None:
    """RefusedError for what a file must not take the place of, a device for instance."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    for is_kind, name in _KINDS:
        if is_kind(mode):
            raise RefusedError(f"{path} is a {name}, allowed is a file")


class AtomicFile:
    """``write()`` all of it, then ``publish()``. Leaving the context without that leaves no file.

    ``replace``: an existing file is replaced, otherwise refused: RefusedError at once, and again at
    the end. A directory, device, pipe or socket always is; of a symbolic link the target counts.
    Mode 0600: it holds a VM's memory. Errors of the disk are OSErrors that name the path.
    """

    def __init__(self, path: Path, *, replace: bool = False) -> None:
        self.path = path
        self.published = False  #: it bears its name
        self._replace = replace
        self._target = path
        self._folder = path.parent
        self._temporary: Path | None = None
        if not replace and os.path.lexists(path):
            refuse_special(path)
            raise RefusedError(f"{path} exists; --force replaces it")
        if path.is_symlink():  # it stays, and what it names is replaced
            self._target = Path(os.path.realpath(path))
            self._folder = self._target.parent
        refuse_special(self.path)
        self._fd = self._open()

    def _open(self) -> int:
        if not self._folder.is_dir():
            raise RefusedError(f"{self.path}: {self._folder} is no directory")
        try:
            return os.open(self._folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:
            # No such thing on this filesystem. Any other reason shows again here.
            name = self._unused_name()
        try:
            fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RefusedError(f"{self.path} cannot be made: {error.strerror}") from error
        self._temporary = name
        return fd

    def _unused_name(self) -> Path:
        return self._folder / f".{self._target.name[:200]}.{secrets.token_hex(4)}.vmth"

    def write(self, data: bytes | memoryview) -> None:
        """Behind what was written before. Any buffer of bytes."""
        rest = memoryview(data)
        while len(rest):
            rest = rest[os.write(self._fd, rest) :]

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        """What lies between this and what is written elsewhere is a hole."""
        rest = memoryview(data)
        while len(rest):
            written = os.pwrite(self._fd, rest, offset)
            rest, offset = rest[written:], offset + written

    def extend(self, nbytes: int) -> None:
        """The file is this long, whatever was written of it."""
        os.truncate(self._fd, nbytes)

    @property
    def identity(self) -> tuple[int, int]:
        """(device, inode): whether what bears the name is this file."""
        status = os.fstat(self._fd)
        return status.st_dev, status.st_ino

    @property
    def readable(self) -> str:
        """A path by which this process can read what was written, before it has its name."""
        return f"/proc/self/fd/{self._fd}"

    def sync(self) -> None:
        """Return when the disk has all that was written."""
        os.fsync(self._fd)

    def publish(self) -> None:
        """Give it its name, and return when the disk has that too. Idempotent."""
        if self.published:
            return
        self.sync()
        if self._replace:
            self._rename()
        else:
            self._link(self.path)
        self.published = True
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._close()

    def _link(self, name: Path) -> None:
        """A name that must not exist yet."""
        source = self._temporary or Path(self.readable)
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Only with a directory's descriptor Python asks the kernel to follow the link.
            os.link(source, name, src_dir_fd=folder, follow_symlinks=True)
        except FileExistsError:
            raise RefusedError(f"{name} exists; --force replaces it") from None
        finally:
            os.close(folder)

    def _rename(self) -> None:
        if self._temporary is None:
            name = self._unused_name()
            self._link(name)
            self._temporary = name
        refuse_special(self.path)  # it may have been made meanwhile
        os.rename(self._temporary, self._target)
        self._temporary = None

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                self._temporary.unlink()
            self._temporary = None

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()
