# SPDX-License-Identifier: Apache-2.0
"""zstd as multifd uses it: one stream a channel, flushed after each packet; output is bounded.

The package ``zstandard`` is needed for it (``pip install vmth[qemu]``).
"""

from __future__ import annotations

from typing import Any

from vmth.errors import StreamError, UsageError

zstandard: Any
try:
    import zstandard
except ImportError:
    zstandard = None

__all__ = ["Unzstd"]

#: A block of 128 KiB output takes at least 4 bytes: what one feed may expand to is bounded.
FEED_BYTES = 1024


class Unzstd:
    """A channel's decompressor. Raises UsageError if ``zstandard`` is not installed."""

    def __init__(self) -> None:
        if zstandard is None:
            raise UsageError("multifd zstd: the package zstandard is not installed (vmth[qemu])")
        self._stream = zstandard.ZstdDecompressor().decompressobj()

    def pages(self, payload: memoryview, nbytes: int) -> bytes:
        """What a packet's payload holds; it must be ``nbytes`` long, else StreamError."""
        parts: list[bytes] = []
        total = 0
        for at in range(0, len(payload), FEED_BYTES):
            try:
                part = self._stream.decompress(payload[at : at + FEED_BYTES])
            except zstandard.ZstdError as error:
                raise StreamError(f"multifd zstd: {error}") from None
            total += len(part)
            if total > nbytes:
                break
            parts.append(part)
        if total != nbytes:
            raise StreamError(f"multifd zstd: pages of {total} bytes, allowed {nbytes}")
        return b"".join(parts)
