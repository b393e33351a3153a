# SPDX-License-Identifier: Apache-2.0
"""Contents of records, packed with zstd or as they are, and unpacked within their bounds.

The package ``zstandard`` is needed for zstd (``pip install vmth[qemu]``); an image that was saved
without compression is read without it.
"""

from __future__ import annotations

from typing import Any

from vmth.errors import UsageError
from vmth.qemu.image.layout import MAX_CONTENT_BYTES, Codec, damaged

zstandard: Any
try:
    import zstandard
except ImportError:
    zstandard = None

__all__ = ["DEFAULT_LEVEL", "MAX_LEVEL", "Packer", "Unpacker", "check_level"]

#: Level 3 saves 5 % more of ordinary files and takes 1.5 times as long.
DEFAULT_LEVEL = 1
MAX_LEVEL = 19
#: Packed must be below this share of its content, or the content is stored as it is.
WORTH_IT = 15 / 16


def check_level(level: int) -> None:
    """Raises UsageError for a level that there is not, or that zstandard would be needed for."""
    if not 0 <= level <= MAX_LEVEL:
        raise UsageError(f"compression level: received {level}, allowed 0 to {MAX_LEVEL}")
    if level:
        _need_zstandard("saving with compression")


class Packer:
    """One thread's. ``level`` 0: nothing is packed. Raises as ``check_level``."""

    def __init__(self, level: int) -> None:
        check_level(level)
        self._zstd: Any = None
        if level:
            # The record's checksum covers the frame.
            self._zstd = zstandard.ZstdCompressor(
                level=level, write_checksum=False, write_content_size=True
            )

    def pack(self, content: bytes | memoryview) -> tuple[Codec, bytes | memoryview]:
        if self._zstd is not None and len(content):
            packed: bytes = self._zstd.compress(content)
            if len(packed) < len(content) * WORTH_IT:
                return Codec.ZSTD, packed
        return Codec.RAW, content


class Unpacker:
    """One thread's. Raises UsageError when a zstd record comes and zstandard is not there."""

    def __init__(self) -> None:
        self._zstd: Any = None

    def unpack(
        self, codec: Codec, packed: memoryview, content_bytes: int, where: str
    ) -> bytes | memoryview:
        """The content, by reference where it was not packed. StreamError if it is not just
        ``content_bytes`` long (which is bounded); nothing larger is ever allocated."""
        if codec is Codec.RAW:
            if len(packed) != content_bytes:
                damaged(where, "content bytes", len(packed), content_bytes)
            return packed
        if self._zstd is None:
            _need_zstandard("this image is compressed and")
            self._zstd = zstandard.ZstdDecompressor(max_window_size=2 * MAX_CONTENT_BYTES)
        try:
            said = zstandard.frame_content_size(packed)
            if said != content_bytes:
                damaged(where, "zstd frame's content bytes", said, content_bytes)
            content: bytes = self._zstd.decompress(
                packed, max_output_size=content_bytes, allow_extra_data=False
            )
        except (zstandard.ZstdError, ValueError) as error:
            damaged(where, "zstd frame", repr(str(error)), "one whole frame")
        if len(content) != content_bytes:
            damaged(where, "content bytes", len(content), content_bytes)
        return content


def _need_zstandard(what: str) -> None:
    if zstandard is None:
        raise UsageError(f"{what} needs the package zstandard, install vmth[qemu]")
