# SPDX-License-Identifier: Apache-2.0
"""Where a device section ends. The stream does not say; there are two ways to know.

A stored stream ends with a vmdescription, whose field sizes add up to each section's length
(``device_sizes``). In a running stream the footer is looked for (``find_end``): its five bytes
followed by what may come after a section. State may hold those bytes by chance, so the second part
is never left out; even then it is a heuristic, and callers carry the bytes unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

from vmth.errors import StreamError
from vmth.qemu.stream.fields import BE32, MAX_DESCRIPTION_BYTES, MAX_DEVICE_BYTES, SECTION_FOOTER

__all__ = [
    "DeviceSizes",
    "description_at_end",
    "description_begin",
    "device_sizes",
    "find_end",
    "footer_pattern",
    "run_state_in",
]

#: Payload bytes of a section by (idstr, instance_id).
DeviceSizes: TypeAlias = Mapping[tuple[str, int], int]

MAX_COMMAND_CODE = 32
MAX_PLAUSIBLE_COMMAND_BYTES = 1024
MAX_DEPTH = 64


def description_at_end(tail: bytes) -> bytes | None:
    """The JSON with which a stored stream ends, or None. ``tail``: the file's last bytes."""
    begin = description_begin(tail, len(tail))
    return None if begin is None else tail[begin:]


def description_begin(data: bytes | bytearray, end: int) -> int | None:
    """Where the JSON begins with which a stored stream ends at ``end``, or None. Copies nothing."""
    at, first = end, max(0, end - MAX_DESCRIPTION_BYTES - 6)
    while (at := data.rfind(b"\x00\x06", first, at)) >= 0:
        length = int.from_bytes(data[at + 2 : at + 6], "big")
        if at + 6 + length == end and length > 0:
            return at + 6
    return None


def run_state_in(state: bytes) -> str | None:
    """The run state that the state's own section "globalstate" holds: that before QEMU stopped
    the guest for the migration. None where a machine sends none."""
    name = b"\x0bglobalstate"
    at = state.find(name)
    if at < 5 or state[at - 5] != 4:
        return None
    begin = at + len(name) + 8
    size = int.from_bytes(state[begin : begin + 4], "big")
    text = state[begin + 4 : begin + 4 + min(size, 100)].partition(b"\0")[0]
    return text.decode("ascii", "replace") or None


def device_sizes(description: bytes) -> dict[tuple[str, int], int]:
    """Payload bytes of each section that the vmdescription lists.

    Raises StreamError if it is not such a description.
    """
    try:
        parsed = json.loads(description)
        return {
            (str(device["name"]), int(device["instance_id"])): _body_bytes(device, 0)
            for device in parsed["devices"]
        }
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StreamError(f"vmdescription: {type(error).__name__}: {error}") from None


def _body_bytes(state: Any, depth: int) -> int:
    if depth > MAX_DEPTH:
        raise ValueError(f"subsections nested {depth} deep, allowed {MAX_DEPTH}")
    total = 0
    for field in state.get("fields", ()):
        total += int(field["size"]) * int(field.get("array_len", 1))
    for sub in state.get("subsections", ()):
        # 0x05, the name with its length, the version
        name = str(sub["vmsd_name"] if "vmsd_name" in sub else sub["name"])
        total += 1 + 1 + len(name.encode()) + 4 + _body_bytes(sub, depth + 1)
    if not 0 <= total <= MAX_DEVICE_BYTES:
        raise ValueError(f"section of {total} bytes, allowed {MAX_DEVICE_BYTES}")
    return total


def footer_pattern(section_id: int) -> Callable[[memoryview, int], int]:
    """A search for this section's footer: its position at or after the one given, or -1."""
    search = re.compile(re.escape(bytes([SECTION_FOOTER]) + BE32.pack(section_id))).search

    def find(view: memoryview, at: int) -> int:
        match = search(view, at)
        return match.start() if match else -1

    return find


def find_end(
    find: Callable[[memoryview, int], int],
    view: memoryview,
    scanned: int,
    seen: Collection[int],
    started: Collection[int],
    *,
    complete: bool,
    in_package: bool,
) -> tuple[int, bool]:
    """(position, found): where the footer is, or from where to look on when there is more.

    ``complete``: nothing comes after ``view``.
    """
    at = scanned
    while (at := find(view, at)) >= 0:
        verdict = _may_follow(view[at + 5 : at + 5 + 300], seen, started, in_package=in_package)
        if verdict or (verdict is None and complete):
            return at, True
        if verdict is None:
            return at, False
        at += 1
    return max(scanned, len(view) - 4), False


def _may_follow(
    rest: memoryview, seen: Collection[int], started: Collection[int], *, in_package: bool
) -> bool | None:
    """Can what stands behind a footer be the next header? None: more bytes are needed to tell."""
    if len(rest) == 0:
        return None
    kind = rest[0]
    if kind in (1, 4):
        return _is_section_header(rest, seen)
    if len(rest) < 5 and kind in (2, 3, 8):
        return None
    if kind in (2, 3):
        return int.from_bytes(rest[1:5], "big") in started
    if kind == 8:
        code, nbytes = int.from_bytes(rest[1:3], "big"), int.from_bytes(rest[3:5], "big")
        return 1 <= code <= MAX_COMMAND_CODE and nbytes <= MAX_PLAUSIBLE_COMMAND_BYTES
    if kind == 0 and not in_package:
        if len(rest) < 2:
            return None
        if rest[1] != 6:
            return False
        return None if len(rest) < 7 else rest[6] == ord("{")
    return False


def _is_section_header(rest: memoryview, seen: Collection[int]) -> bool | None:
    """A section that was not seen yet, with a printable name."""
    if len(rest) < 6:
        return None
    if int.from_bytes(rest[1:5], "big") in seen or rest[5] == 0:
        return False
    name = bytes(rest[6 : 6 + rest[5]])
    if any(not 0x20 <= byte <= 0x7E for byte in name):
        return False
    return True if len(name) == rest[5] else None
