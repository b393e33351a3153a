# SPDX-License-Identifier: Apache-2.0
"""Numbers and strings of the stream, big-endian, names behind their length; and its bounds."""

from __future__ import annotations

import struct

from vmth.errors import StreamError, UsageError
from vmth.qemu.stream.events import CommandCode
from vmth.qemu.stream.window import ShortError

__all__ = [
    "BE16",
    "BE32",
    "BE64",
    "COMMAND_BYTES",
    "FILE_MAGIC",
    "FILE_VERSION",
    "MAX_CAPABILITIES",
    "MAX_COMMAND_BYTES",
    "MAX_DESCRIPTION_BYTES",
    "MAX_DEVICE_BYTES",
    "MAX_MACHINE_BYTES",
    "MAX_SECTIONS",
    "RAM_VERSION",
    "SECTION_FOOTER",
    "be",
    "bound",
    "expect",
    "name_text",
    "string_at",
    "wire_string",
]

BE16 = struct.Struct(">H")
BE32 = struct.Struct(">I")
BE64 = struct.Struct(">Q")

FILE_MAGIC = b"QEVM"
FILE_VERSION = 3
RAM_VERSION = 4
SECTION_FOOTER = 0x7E

MAX_MACHINE_BYTES = 4096
MAX_CAPABILITIES = 64
MAX_SECTIONS = 65536
MAX_COMMAND_BYTES = 65535
#: A device section without an end within this many bytes is passed through.
MAX_DEVICE_BYTES = 64 << 20
MAX_DESCRIPTION_BYTES = 64 << 20

#: Data bytes of the commands whose length is fixed.
COMMAND_BYTES: dict[int, tuple[int, ...]] = {
    CommandCode.OPEN_RETURN_PATH: (0,),
    CommandCode.PING: (4,),
    CommandCode.POSTCOPY_ADVISE: (0, 16),
    CommandCode.POSTCOPY_LISTEN: (0,),
    CommandCode.POSTCOPY_RUN: (0,),
    CommandCode.PACKAGED: (4,),
    CommandCode.ENABLE_COLO: (0,),
    CommandCode.POSTCOPY_RESUME: (0,),
    CommandCode.SWITCHOVER_START: (0,),
}


def be(view: memoryview, at: int, nbytes: int) -> int:
    """The number of ``nbytes`` bytes at ``at``."""
    if len(view) < at + nbytes:
        raise ShortError(at + nbytes)
    return int.from_bytes(view[at : at + nbytes], "big")


def string_at(view: memoryview, at: int) -> tuple[str, int]:
    """The str8 at ``at`` and where it ends."""
    end = at + 1 + be(view, at, 1)
    if len(view) < end:
        raise ShortError(end)
    return name_text(bytes(view[at + 1 : end])), end


def name_text(raw: bytes) -> str:
    """Names are ASCII in practice; any other byte survives the way back."""
    return raw.decode("utf-8", "surrogateescape")


def wire_string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    if len(raw) > 255:
        raise UsageError(f"string: received {len(raw)} bytes, allowed 255")
    return bytes([len(raw)]) + raw


def expect(what: str, received: int, allowed: int) -> None:
    if received != allowed:
        raise StreamError(f"{what}: received {received:#x}, allowed {allowed:#x}")


def bound(what: str, received: int, allowed: int) -> int:
    if received > allowed:
        raise StreamError(f"{what}: received {received}, allowed at most {allowed}")
    return received
