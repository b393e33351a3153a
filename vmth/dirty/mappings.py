# SPDX-License-Identifier: Apache-2.0
"""What kind of mapping holds a range of this process's memory, by /proc/self/maps."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["MappingKind", "huge_pages_forbidden", "mapping_kind"]

#: Names that the kernel shows for private memory without a file.
_ANONYMOUS_NAMES = (b"[heap]", b"[stack", b"[anon:")


class MappingKind(enum.Enum):
    """Which rule decides what tracking sees, and whether a page was ever populated."""

    PRIVATE_ANONYMOUS = "private anonymous"  #: all of it; only this process can write it
    SHARED = "shared"  #: at least a part can be written through another mapping or the file
    PRIVATE_FILE = "private file"  #: the file shines through where it was not written
    UNMAPPED = "not mapped throughout"


@dataclass(frozen=True, slots=True)
class _Area:
    """One line of /proc/self/maps."""

    start: int
    end: int
    shared: bool
    anonymous: bool


def mapping_kind(address: int, length: int) -> MappingKind:
    """The kind of [address, address + length). Raises OSError where /proc cannot be read."""
    areas = list(_areas(address, length))
    reached = address
    for area in areas:
        if area.start > reached:
            return MappingKind.UNMAPPED
        reached = area.end
    if reached < address + length:
        return MappingKind.UNMAPPED
    if any(area.shared for area in areas):
        return MappingKind.SHARED
    if all(area.anonymous for area in areas):
        return MappingKind.PRIVATE_ANONYMOUS
    return MappingKind.PRIVATE_FILE


def _areas(address: int, length: int) -> Iterator[_Area]:
    """The areas that overlap [address, address + length), in order."""
    with open("/proc/self/maps", "rb") as lines:
        for line in lines:
            # 7f00-7f10 rw-p 00000000 00:00 0    [name or path]
            bounds, _, rest = line.partition(b" ")
            start, _, end = bounds.partition(b"-")
            if int(end, 16) <= address:
                continue
            if int(start, 16) >= address + length:
                return
            fields = rest.split(None, 4)
            name = fields[4] if len(fields) > 4 else b""
            anonymous = fields[2:4] == [b"00:00", b"0"] and (
                not name or name.startswith(_ANONYMOUS_NAMES)
            )
            yield _Area(int(start, 16), int(end, 16), fields[0][3:4] == b"s", anonymous)


def huge_pages_forbidden(address: int, length: int) -> bool:
    """Whether madvise(MADV_NOHUGEPAGE) holds for all of [address, address + length).

    Walks the page tables of the whole process (smaps): for start-up only.
    """
    inside = False
    with open("/proc/self/smaps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            head, _, rest = line.partition(" ")
            if "-" in head and not head.endswith(":"):
                start, _, end = head.partition("-")
                inside = int(start, 16) < address + length and int(end, 16) > address
            elif inside and head == "VmFlags:" and "nh" not in rest.split():
                return False
    return True
