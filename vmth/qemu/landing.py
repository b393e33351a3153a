# SPDX-License-Identifier: Apache-2.0
"""Where the pages of an arriving guest land: in the destination QEMU's memory, or in its stream.

    memory   blocks that QEMU maps shared are written in place, through QEMU's own open file;
             what else there is (ROMs, video memory) goes through the stream
    stream   all blocks go through the stream

QEMU needs no capability for either: a stream may leave pages out, and QEMU keeps what its memory
holds there. A file counts only if the QEMU process itself has it open, and, where QEMU tells the
address of a block, if that very file is mapped shared there: a path could name another file by now.
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

from vmth.errors import RefusedError
from vmth.qemu.qmp import Qmp, QmpError, Question
from vmth.types import Gpa, MadeMapping, Mapping, RamBlock
from vmth.units import format_size

__all__ = [
    "MAX_BESIDE_BYTES",
    "FindMade",
    "Land",
    "Landing",
    "choose_landing",
    "listed_blocks",
    "memory_backends",
    "open_shared",
    "shared_blocks",
]

#: Of blocks that cannot be written in place although the landing is "memory".
MAX_BESIDE_BYTES = 128 << 20
_NAMES_SHOWN = 4
_MEMDEV_PREFIX = "/objects/"

#: A line of "info ramblock": name, page size, offset, used, total; later also address and rights.
_RAMBLOCK_LINE = re.compile(
    r"\s*(?P<name>\S.*?)\s+\d+(?:\.\d+)? [KMGTPE]?i?B\s+0x[0-9a-f]+\s+0x(?P<used>[0-9a-f]+)"
    r"\s+0x(?P<total>[0-9a-f]+)(?:\s+0x(?P<hva>[0-9a-f]+)\s+r[ow])?\s*"
)
_MAPS_LINE = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<rights>\S{4}) (?P<offset>[0-9a-f]+) \S+ "
    r"(?P<inode>\d+)(?: .*)?"
)


#: (descriptor, offset, bytes) -> what is mapped of that file already.
FindMade: TypeAlias = Callable[[int, int, int], MadeMapping | None]


class Land(enum.Enum):
    """What may be asked for."""

    MEMORY = "memory"
    STREAM = "stream"
    AUTO = "auto"  #: the first of the two that the destination allows


@dataclass(frozen=True, slots=True)
class ListedBlock:
    """A ramblock of the destination QEMU. Bytes; ``hva`` is an address in QEMU's process."""

    idstr: str
    used_length: int
    max_length: int
    hva: int | None


@dataclass(slots=True)
class Landing:
    """Decided. ``kind`` is MEMORY or STREAM; ``blocks`` have a file where they are written in
    place, and no mapping where they go through the stream. Owns the files: ``close()``."""

    kind: Land
    blocks: tuple[RamBlock, ...]
    reason: str  #: why this one
    notes: tuple[str, ...] = ()  #: what is weaker than asked
    _files: list[int] = field(default_factory=list)

    @property
    def verified_scope(self) -> str:
        return self.kind.value

    def close(self) -> None:
        """Let the files go; mappings stay. Idempotent."""
        while self._files:
            os.close(self._files.pop())


#: What ``listed_blocks`` and ``memory_backends`` ask, for ``Qmp.ask_ahead``.
LANDING_QUESTIONS: Final[tuple[Question, ...]] = (
    ("human-monitor-command", {"command-line": "info ramblock"}),
    ("query-memdev", None),
)


def listed_blocks(qmp: Qmp) -> dict[str, ListedBlock] | None:
    """The blocks that QEMU has, by name; None for one whose human monitor is switched off."""
    try:
        text = qmp.execute(*LANDING_QUESTIONS[0])
    except QmpError:
        return None
    found = {}
    for line in str(text).splitlines():
        match = _RAMBLOCK_LINE.fullmatch(line)
        if match:
            hva = int(match["hva"], 16) if match["hva"] else None
            block = ListedBlock(match["name"], int(match["used"], 16), int(match["total"], 16), hva)
            found[block.idstr] = block
    return found


def memory_backends(qmp: Qmp) -> dict[str, dict[str, Any]]:
    """By their id, what ``query-memdev`` says of QEMU's memory backends; ``share`` is always there.
    Raises QmpError for a QEMU that does not know the question."""
    backends = {
        str(row["id"]): dict(row) for row in qmp.execute(*LANDING_QUESTIONS[1]) if "id" in row
    }
    for name, row in backends.items():
        if "share" not in row:  # before QEMU 6.1 only the object itself says it
            row["share"] = _property(qmp, name, "share") is True
    return backends


def _property(qmp: Qmp, backend: str, key: str) -> Any:
    """None where the backend does not have it."""
    try:
        return qmp.execute("qom-get", {"path": f"{_MEMDEV_PREFIX}{backend}", "property": key})
    except QmpError:
        return None


def choose_landing(
    qmp: Qmp,
    offered: Sequence[RamBlock],
    wanted: Land,
    find_made: FindMade = lambda _fd, _offset, _nbytes: None,
) -> Landing:
    """For the blocks that a source offers; ``find_made``: what is mapped already. Raises
    RefusedError, with nothing left open, when the destination does not have them or does not allow
    the landing that is ``wanted``."""
    listed = listed_blocks(qmp)
    if listed is not None:
        _compare(qmp, offered, listed)
    stream = tuple(replace(block, mapping=Mapping()) for block in offered)
    if wanted is Land.STREAM:
        return Landing(Land.STREAM, stream, "asked for")
    with contextlib.ExitStack() as opened:
        found = _Search(qmp, listed or {}, opened).all(offered)
        why_not = _why_not(offered, found)
        if why_not is None:
            landing = Landing(
                Land.MEMORY,
                tuple(
                    replace(block, mapping=_with_made(place.mapping, block, find_made))
                    for block, place in zip(offered, found, strict=True)
                ),
                "asked for" if wanted is Land.MEMORY else "QEMU's memory is shared",
                _beside_note(offered, found),
                [place.mapping.fd for place in found if place.mapping.fd is not None],
            )
            opened.pop_all()
            return landing
    if wanted is Land.MEMORY:
        raise RefusedError(f"land memory: {why_not}; or choose to land in the stream")
    return Landing(
        Land.STREAM,
        stream,
        why_not,
        (f"landed in QEMU's stream, verified as handed over and not in place: {why_not}",),
    )


def _with_made(mapping: Mapping, block: RamBlock, find_made: FindMade) -> Mapping:
    if mapping.fd is None:
        return mapping
    return replace(mapping, made=find_made(mapping.fd, mapping.offset, block.used_length))


def open_shared(
    qmp: Qmp, blocks: Sequence[RamBlock], opened: contextlib.ExitStack
) -> list[Mapping]:
    """Where QEMU's memory of each block is, in files that are opened into ``opened``; an empty
    Mapping for one that QEMU does not share, or that cannot be opened here."""
    found = _Search(qmp, listed_blocks(qmp) or {}, opened).all(blocks)
    return [place.mapping for place in found]


def shared_blocks(qmp: Qmp, opened: contextlib.ExitStack) -> list[RamBlock]:
    """What QEMU lists and shares, with the files, which are opened into ``opened``. Raises QmpError
    for a QEMU that does not know the questions."""
    listed = listed_blocks(qmp) or {}
    blocks = [RamBlock(row.idstr, row.used_length, Gpa(0), Mapping()) for row in listed.values()]
    found = _Search(qmp, listed, opened).all(blocks)
    return [
        replace(block, mapping=place.mapping)
        for block, place in zip(blocks, found, strict=True)
        if place.mapping.fd is not None
    ]


def _compare(qmp: Qmp, offered: Sequence[RamBlock], listed: dict[str, ListedBlock]) -> None:
    """QEMU would find it too, but say it only in its log."""
    for block in offered:
        ours = listed.get(block.idstr)
        if ours is None:
            raise RefusedError(
                f"ramblock {block.idstr!r} of the source is not in the QEMU at {qmp.path}, which "
                f"has {', '.join(map(repr, sorted(listed)))}: give it the same devices and memory"
            )
        if block.used_length > ours.max_length:
            raise RefusedError(
                f"ramblock {block.idstr!r}: the source has {block.used_length} bytes, the QEMU at "
                f"{qmp.path} room for {ours.max_length}: give it the same memory"
            )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one block can be written in place, or why not."""

    mapping: Mapping
    why_not: str = ""
    is_backend: bool = False  #: made by -object memory-backend-...: memory of the guest


@dataclass(frozen=True, slots=True)
class _OpenFile:
    """A descriptor of QEMU's."""

    path: str  #: of the link in /proc
    target: str
    status: os.stat_result


class _Search:
    """Looks for QEMU's memory in QEMU's descriptors; opens what it finds into ``opened``."""

    def __init__(
        self, qmp: Qmp, listed: dict[str, ListedBlock], opened: contextlib.ExitStack
    ) -> None:
        self._qmp = qmp
        self._listed = listed
        self._opened = opened
        self._process = f"/proc/{qmp.pid}"
        self._backends = memory_backends(qmp)
        self._open_files = list(_open_files(self._process))

    def all(self, offered: Sequence[RamBlock]) -> list[_Place]:
        return [self._place(block) for block in offered]

    def _place(self, block: RamBlock) -> _Place:
        name = block.idstr.removeprefix(_MEMDEV_PREFIX)
        row = self._backends.get(name)
        if row is None:
            return _Place(Mapping(), "no memory backend")
        if not row["share"]:
            return _Place(
                Mapping(),
                f"its memory backend {name!r} is not shared: use -object memory-backend-memfd,"
                f"id={name},size={row['size']},share=on with -machine memory-backend={name}",
                is_backend=True,
            )
        try:
            return self._shared(block, name, int(row["size"]))
        except (OSError, _NotFoundError) as error:
            why = f"the memory of its backend {name!r} cannot be opened here: {error}"
            return _Place(Mapping(), why, is_backend=True)

    def _shared(self, block: RamBlock, name: str, size: int) -> _Place:
        listed = self._listed.get(block.idstr)
        if listed is not None and listed.hva is not None:
            inode, offset = self._mapped_at(listed.hva)
            candidates = [file for file in self._open_files if file.status.st_ino == inode]
        else:
            candidates, offset = self._candidates(name, size), 0
        different = {(file.status.st_dev, file.status.st_ino) for file in candidates}
        if len(different) != 1:
            raise _NotFoundError(
                f"{len(different)} files that process {self._qmp.pid} has open could be it, "
                "allowed 1; a memory-backend-file with mem-path is certain"
            )
        fd = os.open(candidates[0].path, os.O_RDWR | os.O_CLOEXEC)
        self._opened.callback(os.close, fd)
        length = os.fstat(fd).st_size
        if length < offset + block.used_length:
            raise _NotFoundError(
                f"it has {length} bytes, the block needs {offset + block.used_length}"
            )
        return _Place(Mapping(fd=fd, offset=offset), is_backend=True)

    def _candidates(self, name: str, size: int) -> list[_OpenFile]:
        """Of QEMU's open files those that could be the backend's memory."""
        mem_path = str(_property(self._qmp, name, "mem-path") or "")
        if not mem_path:  # memory that never had a path
            return [
                file
                for file in self._open_files
                if file.target.startswith(("/memfd:", "/dev/shm/")) and file.status.st_size == size
            ]
        status = os.stat(f"{self._process}/root{os.path.abspath(mem_path)}")
        if stat.S_ISDIR(status.st_mode):  # QEMU made a file there and removed its name
            return [
                file
                for file in self._open_files
                if file.target.startswith(f"{os.path.abspath(mem_path)}/")
                and file.status.st_size >= size
            ]
        wanted = (status.st_dev, status.st_ino)
        return [
            file for file in self._open_files if (file.status.st_dev, file.status.st_ino) == wanted
        ]

    def _mapped_at(self, hva: int) -> tuple[int, int]:
        """(inode, offset in the file) of what QEMU has mapped shared at an address."""
        with open(f"{self._process}/maps") as maps:
            for line in maps:
                match = _MAPS_LINE.fullmatch(line.rstrip("\n"))
                if match is None:
                    continue
                start, end = int(match["start"], 16), int(match["end"], 16)
                if start <= hva < end:
                    if match["rights"][3] != "s":
                        raise _NotFoundError(f"at {hva:#x} QEMU's memory is private")
                    return int(match["inode"]), int(match["offset"], 16) + hva - start
        raise _NotFoundError(f"nothing is mapped at {hva:#x}")


class _NotFoundError(Exception):
    """A backend's memory was not found, or is not certain."""


def _open_files(process: str) -> Iterator[_OpenFile]:
    folder = f"{process}/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return  # another user's process, or not in our namespace
    for name in names:
        path = f"{folder}/{name}"
        with contextlib.suppress(OSError):  # closed meanwhile
            file = _OpenFile(path, os.readlink(path), os.stat(path))
            if stat.S_ISREG(file.status.st_mode):
                yield file


def _why_not(offered: Sequence[RamBlock], found: Sequence[_Place]) -> str | None:
    """Why these places do not make a landing in memory; None if they do."""
    beside_bytes = 0
    for block, place in zip(offered, found, strict=True):
        if place.mapping.fd is None:
            beside_bytes += block.used_length
            if place.is_backend:
                size = format_size(block.used_length)
                return f"ramblock {block.idstr!r} ({size}): {place.why_not}"
    if all(place.mapping.fd is None for place in found):
        return "no block of the guest has a memory backend"
    if beside_bytes > MAX_BESIDE_BYTES:
        return (
            f"{format_size(beside_bytes)} are outside of memory backends "
            f"({_names(offered, found)}), allowed {format_size(MAX_BESIDE_BYTES)}"
        )
    return None


def _beside_note(offered: Sequence[RamBlock], found: Sequence[_Place]) -> tuple[str, ...]:
    beside = [
        block for block, place in zip(offered, found, strict=True) if place.mapping.fd is None
    ]
    if not beside:
        return ()
    size = format_size(sum(block.used_length for block in beside))
    what = f"{size} outside of shared memory ({_names(offered, found)})"
    return (f"{what} were verified as handed to QEMU, not in place",)


def _names(offered: Sequence[RamBlock], found: Sequence[_Place]) -> str:
    names = [
        block.idstr for block, place in zip(offered, found, strict=True) if place.mapping.fd is None
    ]
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
