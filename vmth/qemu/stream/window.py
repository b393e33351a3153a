# SPDX-License-Identifier: Apache-2.0
"""The bytes that were fed and not used yet, for parsers that want to see whole records.

    carry: [begin of a cut record ...]     chunks: [what was fed, by reference] [...] [...]

A parser is shown the carry if there is one, else the oldest chunk. If what it sees ends within a
record it raises ``ShortError`` and the record, not the chunk, is joined in the carry: of a large
chunk's pages only the one that its edge cuts is copied.
"""

from __future__ import annotations

from collections import deque

__all__ = ["ShortError", "Window"]


class ShortError(Exception):
    """What is there ends within a record; ``need`` bytes would show it. ``soft``: any more help."""

    def __init__(self, need: int, *, soft: bool = False) -> None:
        super().__init__(need)
        self.need = need
        self.soft = soft


class Window:
    """Not thread-safe. ``position`` counts the bytes that were used since the beginning."""

    def __init__(self) -> None:
        self._carry = bytearray()
        self._chunks: deque[memoryview] = deque()
        self.position = 0
        self.available = 0
        self.eof = False

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        if len(view):
            self._chunks.append(view)
            self.available += len(view)

    @property
    def carried(self) -> bool:
        """Is ``view()`` of the carry? Events must then copy what they keep."""
        return bool(self._carry)

    def view(self) -> memoryview:
        """What a parser may look at; empty if there is nothing. Release it before the next call."""
        if self._carry:
            return memoryview(self._carry)
        return self._chunks[0][:] if self._chunks else memoryview(b"")

    def gather(self, need: int) -> int:
        """Join bytes until ``need`` can be seen at once, or all there are. How many it is."""
        carry, chunks = self._carry, self._chunks
        while len(carry) < need and chunks:
            piece = chunks[0][: need - len(carry)]
            carry += piece
            if len(piece) == len(chunks[0]):
                chunks.popleft()
            else:
                chunks[0] = chunks[0][len(piece) :]
        return len(carry)

    def forget(self) -> int:
        """Drop what was fed and not used, as if it had not been fed. How many bytes."""
        nbytes, self.available = self.available, 0
        self._carry.clear()
        self._chunks.clear()
        return nbytes

    def use(self, nbytes: int) -> None:
        """Drop the first ``nbytes`` of ``view()``."""
        if nbytes == 0:
            return
        if self._carry:
            del self._carry[:nbytes]
        elif nbytes == len(self._chunks[0]):
            self._chunks.popleft()
        else:
            self._chunks[0] = self._chunks[0][nbytes:]
        self.position += nbytes
        self.available -= nbytes
