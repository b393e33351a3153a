"""Cython over csrc/sys: write tracking and populated pages of this process's memory, reading of
stream sockets.

Addresses are bytes, counts are pages of the host (``PAGE_BYTES``). Bitmaps are C-contiguous uint64.
Calls release the GIL. OSError: the kernel refused, the message begins with what it refused.
ValueError: a bitmap that is too short, a closed tracker. One caller at a time per object.
"""

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

PAGE_BYTES: int

def uffd_features() -> int:
    """The feature bits of this kernel's userfaultfd."""

class UffdWp:
    """A userfaultfd in WP_ASYNC mode; it owns two file descriptors until ``close()`` or
    deletion."""

    def __init__(self) -> None: ...
    def add(self, address: int, npages: int, populated: U64 | None = None) -> None:
        """Track and arm; set the bits of pages that were populated when they were armed."""

    def fetch(self, address: int, npages: int, bitmap: U64) -> None:
        """OR in what was written since it was armed, and arm it again. Bit i is page i."""

    def peek(self, address: int, npages: int, bitmap: U64) -> None:
        """OR in what ``fetch`` would, and arm nothing."""

    def remove(self, address: int, npages: int) -> None: ...
    def close(self) -> None:
        """End all tracking. Idempotent."""

def huge_pages(address: int, npages: int) -> int:
    """How many of these pages a huge page maps."""

def populated_anon(address: int, npages: int, bitmap: U64, page: int) -> None:
    """Private anonymous memory: set bit (page + i) for each populated page i from ``address``."""

def populated_file(fd: int, offset: int, npages: int, bitmap: U64, page: int) -> None:
    """Shared memory: set bit (page + i) for each page i of the file that is not a hole."""

def populated_file_is_exact(fd: int) -> bool:
    """Whether the file's holes are known to be zeros (tmpfs, memfd)."""

def resident(address: int, nbytes: int) -> int:
    """How many pages of the range are in memory, mapped here or not. Raises OSError."""

def populate_read(address: int, nbytes: int) -> None:
    """MADV_POPULATE_READ. Raises OSError."""

def sock_take(fd: int, buffer: memoryview, patience_ns: int) -> tuple[int, bool]:
    """Read what arrives on a stream socket until the buffer is full, nothing has come for
    ``patience_ns``, or the peer has closed; never waits for the first byte. (bytes, closed)."""
