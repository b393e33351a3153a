# SPDX-License-Identifier: Apache-2.0
"""Fills guest memory with stated, seeded content: ``zero=30,dup=15,files=35,random=20`` (percent).

    key        pages that
    zero       are populated and hold zeros
    hole       are never written: no memory behind them
    dup        equal a ``random`` page more than 64 MiB below (or as far as the guest allows)
    files      hold text and binaries of this machine: Python's standard library, then /usr/lib
    random     are incompressible
    template   equal one of 16 incompressible pages
    file-copy  equal a ``files`` page as far below as ``dup`` does a ``random`` one

Kinds lie in runs of random length, shuffled by the seed, so that no kind fills one end of memory;
only copies keep away from the first pages, which have nothing below to copy. Pages are written
with pwrite: half the cost of faulting them in through a mapping, and no mapping of the filler
grows. The fill is deterministic for one seed, memory size, machine and NumPy version.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmth.errors import GuestError, UsageError
from vmth.guests.memory import PAGE_BYTES, GuestMemory

__all__ = ["DEFAULT_CONTENT", "KINDS", "ContentSpec", "FillReport", "fill"]

U8 = npt.NDArray[np.uint8]

DEFAULT_CONTENT = "zero=30,dup=15,files=35,random=20"
KINDS = ("zero", "hole", "dup", "files", "random", "template", "file-copy")
ZERO, HOLE, DUP, FILES, RANDOM, TEMPLATE, FILE_COPY = range(7)
#: Kind of copies -> kind of their originals.
ORIGINALS = {DUP: RANDOM, FILE_COPY: FILES}
TEMPLATES = 16

DUP_DISTANCE_BYTES = 64 << 20
RUN_PAGES_MAX = 255
#: Bytes that are prepared at once, at most one run.
CHUNK_BYTES = (RUN_PAGES_MAX + 1) * PAGE_BYTES
#: The walk over the machine's files ends after so many.
FILES_MAX = 20_000
FILE_BYTES_MAX = 16 << 20


@dataclass(frozen=True, slots=True)
class ContentSpec:
    """Percent of each kind, in the order of ``KINDS``; they add up to 100."""

    percent: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> ContentSpec:
        """``key=percent`` pairs, comma separated. UsageError names what is wrong."""
        shares: dict[str, int] = {}
        for item in text.split(","):
            key, sign, number = item.strip().partition("=")
            if key not in KINDS:
                raise UsageError(f"content {key!r}: one of {', '.join(KINDS)}")
            if not sign or not number.isdecimal() or int(number) > 100:
                raise UsageError(f"content {item.strip()!r}: {key}=0 to {key}=100")
            if key in shares:
                raise UsageError(f"content {key!r} is given twice")
            shares[key] = int(number)
        total = sum(shares.values())
        if total != 100:
            raise UsageError(f"content {text!r} adds up to {total} percent: must be 100")
        for copy, original in ORIGINALS.items():
            if shares.get(KINDS[copy], 0) and not shares.get(KINDS[original], 0):
                raise UsageError(
                    f"content {text!r}: {KINDS[copy]} copies {KINDS[original]} pages,"
                    " and there are none"
                )
        return cls(tuple(shares.get(kind, 0) for kind in KINDS))

    def __str__(self) -> str:
        pairs = zip(KINDS, self.percent, strict=True)
        return ",".join(f"{kind}={share}" for kind, share in pairs if share)


@dataclass(frozen=True, slots=True)
class FillReport:
    """What was written: pages of each kind. ``dup_distance_bytes``: every copy (dup, file-copy) is
    farther than this from its original; below 64 MiB where the guest is small, 0 without copies.
    ``file_pages_repeated``: pages of files that were used before, because this machine has no
    more."""

    pages: dict[str, int]
    dup_distance_bytes: int
    files_read: int
    file_pages_repeated: int


@dataclass(frozen=True, slots=True)
class _Placement:
    """Runs in page order: kind and first page of each; ``ends`` is the page behind it."""

    kinds: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    dup_distance_pages: int


def _counts(spec: ContentSpec, npages: int) -> list[int]:
    """Pages of each kind: exact shares, the rounding left to the largest."""
    counts = [npages * share // 100 for share in spec.percent]
    counts[max(range(len(KINDS)), key=lambda kind: spec.percent[kind])] += npages - sum(counts)
    return counts


def _cut(npages: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Random run lengths that add up to ``npages``."""
    if npages == 0:
        return np.zeros(0, dtype=np.int64)
    ends = np.cumsum(rng.integers(1, RUN_PAGES_MAX + 1, 2 * npages // RUN_PAGES_MAX + 2))
    while ends[-1] < npages:
        more = np.cumsum(rng.integers(1, RUN_PAGES_MAX + 1, 2 * npages // RUN_PAGES_MAX + 2))
        ends = np.concatenate([ends, ends[-1] + more])
    ends = np.append(ends[ends < npages], npages)
    return np.diff(ends, prepend=0)


def _place(spec: ContentSpec, npages: int, rng: np.random.Generator) -> _Placement:
    counts = _counts(spec, npages)
    for copy, original in ORIGINALS.items():
        if counts[copy] and not counts[original]:
            counts[ZERO], counts[copy] = counts[ZERO] + counts[copy], 0
    kinds_list, lengths_list = [], []
    for kind, count in enumerate(counts):
        lengths = _cut(count, rng)
        lengths_list.append(lengths)
        kinds_list.append(np.full(len(lengths), kind, dtype=np.int64))
    kinds, lengths = np.concatenate(kinds_list), np.concatenate(lengths_list)
    order = rng.permutation(len(kinds))
    distance = 0
    copies = [copy for copy in ORIGINALS if counts[copy]]
    if copies:
        order, distance = _copies_after_originals(order, kinds, lengths, copies)
    kinds, lengths = kinds[order], lengths[order]
    ends = np.cumsum(lengths)
    return _Placement(kinds, ends - lengths, ends, distance)


def _copies_after_originals(
    order: npt.NDArray[np.int64],
    kinds: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    copies: list[int],
) -> tuple[npt.NDArray[np.int64], int]:
    """(order, distance). A run of each kind that is copied first, then other kinds up to
    ``distance`` pages behind the begin of the last of them, then the shuffled rest: every copy has
    an original more than ``distance`` pages below."""
    first = np.array([order[np.flatnonzero(kinds[order] == ORIGINALS[copy])[0]] for copy in copies])
    copied = np.isin(kinds[order], copies)
    others = order[~copied & ~np.isin(order, first)]
    npages = int(lengths.sum())
    head_max = npages - int(lengths[order[copied]].sum()) - int(lengths[first[:-1]].sum())
    distance = min(DUP_DISTANCE_BYTES // PAGE_BYTES, npages // 4, head_max // 2)
    head_pages = lengths[first[-1]] + np.cumsum(lengths[others])
    head = others[: int(np.searchsorted(head_pages, distance, side="right")) + 1]
    taken = np.concatenate([first, head])
    rest = order[~np.isin(order, taken)]
    return np.concatenate([taken, rest]), distance


class _Files:
    """An endless stream of whole pages of file content; each file begins on a page, as in the page
    cache. ``repeated`` counts pages handed out after every file had been read once."""

    def __init__(self, seed: int) -> None:
        self.read = 0
        self.repeated = 0
        paths = list(_walk_files())
        order = np.random.default_rng([seed, 2]).permutation(len(paths))
        self._paths = [paths[i] for i in order]
        self._next_path = 0
        self._wrapped = False
        self._data: U8 = np.zeros(0, dtype=np.uint8)

    def take(self, npages: int) -> U8:
        """Pages, as bytes. GuestError when this machine has no file that can be read."""
        out = np.zeros(npages * PAGE_BYTES, dtype=np.uint8)
        at = 0
        while at < len(out):
            if len(self._data) == 0:
                self._advance()
            piece, self._data = self._data[: len(out) - at], self._data[len(out) - at :]
            out[at : at + len(piece)] = piece
            at += -(-len(piece) // PAGE_BYTES) * PAGE_BYTES
        if self._wrapped:
            self.repeated += npages
        return out

    def _advance(self) -> None:
        for _ in range(len(self._paths)):
            path = self._paths[self._next_path]
            self._next_path += 1
            if self._next_path == len(self._paths):
                self._next_path, self._wrapped = 0, True
            data = _read_file(path)
            if data:
                self.read += 1
                self._data = np.frombuffer(data, dtype=np.uint8)
                return
        raise GuestError("content files: this machine has no readable file below /usr/lib")


def _read_file(path: str) -> bytes:
    """Its first 16 MiB; nothing for what is smaller than a page or cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        size = os.fstat(fd).st_size
        return os.read(fd, min(size, FILE_BYTES_MAX)) if size >= PAGE_BYTES else b""
    except OSError:
        return b""
    finally:
        os.close(fd)


def _walk_files() -> Iterator[str]:
    """Regular files in a fixed order, at most ``FILES_MAX``; folders breadth first."""
    folders = [sysconfig.get_path("stdlib"), "/usr/lib"]
    found = 0
    for folder in folders:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if entry.name != "__pycache__":
                    folders.append(entry.path)
            elif entry.is_file(follow_symlinks=False):
                yield entry.path
                found += 1
                if found == FILES_MAX:
                    return


class _Pages:
    """All blocks of a guest as one row of pages, from ``first_byte`` of the first block on."""

    def __init__(self, memory: GuestMemory, first_byte: int) -> None:
        self._fds = memory.fds
        self._views = [view.reshape(-1, PAGE_BYTES) for view in memory.views]
        self._first = first_byte // PAGE_BYTES
        self._ends = np.cumsum([len(view) for view in self._views])

    def __len__(self) -> int:
        return int(self._ends[-1]) - self._first

    def write(self, page: int, data: U8) -> None:
        """``data`` from ``page`` on, through the memfds."""
        at, done = page + self._first, 0
        while done < len(data):
            block = int(np.searchsorted(self._ends, at, side="right"))
            in_block = at - (int(self._ends[block]) - len(self._views[block]))
            room = (int(self._ends[block]) - at) * PAGE_BYTES
            written = os.pwrite(
                self._fds[block], data[done : done + room].data, in_block * PAGE_BYTES
            )
            if written == 0 or written % PAGE_BYTES:
                raise GuestError(f"guest memory took {written} of {len(data) - done} bytes")
            done += written
            at += written // PAGE_BYTES

    def read(self, pages: npt.NDArray[np.int64]) -> U8:
        """A copy of the given pages, one after the other."""
        out = np.empty((len(pages), PAGE_BYTES), dtype=np.uint8)
        at = pages + self._first
        blocks = np.searchsorted(self._ends, at, side="right")
        for block in np.unique(blocks):
            mine = blocks == block
            start = int(self._ends[block]) - len(self._views[block])
            out[mine] = self._views[block][at[mine] - start]
        return out.reshape(-1)


def fill(
    memory: GuestMemory,
    spec: ContentSpec,
    seed: int,
    *,
    first_byte: int = 0,
    counter_pages: npt.NDArray[np.bool_] | None = None,
) -> FillReport:
    """Write the content into fresh memory from ``first_byte`` (of the first block, a multiple of
    the page) on; below it nothing is touched. The first dword of pages marked in ``counter_pages``
    (one bool a page of the first block) is zero whatever the content. GuestError or OSError leave
    memory partly filled."""
    pages = _Pages(memory, first_byte)
    rng = np.random.default_rng([seed, 1])
    placement = _place(spec, len(pages), rng)
    originals = {copy: _pages_of(placement, kind) for copy, kind in ORIGINALS.items()}
    templates = _templates(seed)
    files = _Files(seed) if FILES in placement.kinds else None
    zeros = np.zeros(CHUNK_BYTES, dtype=np.uint8)
    counted = _counted(counter_pages, first_byte // PAGE_BYTES, len(pages))
    counts = dict.fromkeys(KINDS, 0)
    for kind, start, end in zip(
        placement.kinds.tolist(), placement.starts.tolist(), placement.ends.tolist(), strict=True
    ):
        npages = end - start
        counts[KINDS[kind]] += npages
        if kind == HOLE:
            continue
        if kind == ZERO:
            pages.write(start, zeros[: npages * PAGE_BYTES])
            continue
        if kind == RANDOM:
            data = rng.bit_generator.random_raw(npages * 512).view(np.uint8)
        elif kind == FILES:
            assert files is not None
            data = files.take(npages)
        elif kind == TEMPLATE:
            data = templates[rng.integers(0, TEMPLATES, npages)].reshape(-1)
        else:
            copies = np.arange(start, end, dtype=np.int64)
            below = np.searchsorted(originals[kind], copies - placement.dup_distance_pages)
            data = pages.read(originals[kind][(rng.random(npages) * below).astype(np.int64)])
        data.reshape(npages, PAGE_BYTES)[counted[start:end], :4] = 0
        pages.write(start, data)
    return FillReport(
        pages=counts,
        dup_distance_bytes=placement.dup_distance_pages * PAGE_BYTES,
        files_read=files.read if files else 0,
        file_pages_repeated=files.repeated if files else 0,
    )


def _templates(seed: int) -> U8:
    """(TEMPLATES, PAGE_BYTES), by a generator of their own: nothing else changes with them."""
    rng = np.random.default_rng([seed, 3])
    return rng.integers(0, 256, (TEMPLATES, PAGE_BYTES), dtype=np.uint8)


def _counted(
    counter_pages: npt.NDArray[np.bool_] | None, first: int, npages: int
) -> npt.NDArray[np.bool_]:
    counted = np.zeros(npages, dtype=np.bool_)
    if counter_pages is not None:
        mine = counter_pages[first : first + npages]
        counted[: len(mine)] = mine
    return counted


def _pages_of(placement: _Placement, kind: int) -> npt.NDArray[np.int64]:
    mine = placement.kinds == kind
    starts, lengths = placement.starts[mine], (placement.ends - placement.starts)[mine]
    before = np.cumsum(lengths) - lengths
    pages: npt.NDArray[np.int64] = np.repeat(starts - before, lengths)
    return pages + np.arange(len(pages), dtype=np.int64)
