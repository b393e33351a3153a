# SPDX-License-Identifier: Apache-2.0
"""The device state of a stream, kept as it comes.

It comes while the guest is paused, when memory that nobody has touched before takes longer to get
than the bytes take to be copied: the first mebibyte, more than most guests have, is touched when
the store is made.
"""

from __future__ import annotations

from vmth.qemu.stream import description_begin

__all__ = ["FIRST_BYTES", "StateStore"]

FIRST_BYTES = 1 << 20


class StateStore:
    """Not thread-safe. Of more than ``most_bytes`` at least the last half of that is kept."""

    def __init__(self, most_bytes: int) -> None:
        self.total_bytes = 0  #: that were added
        self._most_bytes = most_bytes
        self._bytes = bytearray(min(FIRST_BYTES, most_bytes))
        self._filled = 0

    def __len__(self) -> int:
        return self._filled

    def add(self, data: memoryview | bytes) -> None:
        """Copies ``data``, at most ``most_bytes`` / 2 of it at once."""
        self.total_bytes += len(data)
        if self._filled + len(data) > self._most_bytes:
            self._drop(self._filled - self._most_bytes // 2)
        begin, self._filled = self._filled, self._filled + len(data)
        fits = min(len(data), len(self._bytes) - begin)
        with memoryview(self._bytes) as room:
            room[begin : begin + fits] = data[:fits]
        self._bytes += data[fits:]

    def _drop(self, nbytes: int) -> None:
        if nbytes > 0:
            self._filled -= nbytes
            del self._bytes[:nbytes]

    def ends_with(self, end: bytes) -> bool:
        return self._bytes.endswith(end, 0, self._filled)

    def last(self, nbytes: int) -> bytes:
        """A copy of as many as there are."""
        return bytes(self._bytes[max(0, self._filled - nbytes) : self._filled])

    def copy(self) -> bytes:
        """All that is kept."""
        with memoryview(self._bytes) as kept:
            return bytes(kept[: self._filled])

    def description(self) -> memoryview | None:
        """The vmdescription with which it ends, by reference, or None. To be released before
        ``add()``."""
        begin = description_begin(self._bytes, self._filled)
        return None if begin is None else memoryview(self._bytes)[begin : self._filled]
