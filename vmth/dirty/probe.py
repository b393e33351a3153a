# SPDX-License-Identifier: Apache-2.0
"""What this machine offers for write tracking, and which known kernel faults it has.

Each check is a few pages of memory and a few calls, so that a fault is found by what the kernel
does and not by its version. Run at start-up; the answer is kept for the life of the process.
"""

from __future__ import annotations

import enum
import functools
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from vmth._native import _sys
from vmth.memory import address_of
from vmth.types import bitmap_words

__all__ = ["Finding", "Status", "probe"]

_HUGE_BYTES = 2 << 20
_HUGE_PAGES = _HUGE_BYTES // _sys.PAGE_BYTES


class Status(enum.Enum):
    OK = "ok"
    ABSENT = "absent"  #: not offered here, or not permitted
    FAULTY = "faulty"  #: offered, and it does not do what it should


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; ``reason`` says what was seen, and is empty where all is well."""

    status: Status
    reason: str = ""


_OK = Finding(Status.OK)


@functools.cache
def probe() -> Mapping[str, Finding]:
    """Every check by name, in this order:

    - ``uffd-wp``: userfaultfd with WP_ASYNC, and PAGEMAP_SCAN.
    - ``kernel-writes``: a system call's write into tracked memory is reported.
    - ``discard-anon``: MADV_DONTNEED of private anonymous memory is reported (it reads as zeros
      afterwards, so it is a write).
    - ``discard-anon-thp``: the same for a transparent huge page (absent: none was to be had).
    - ``discard-shared``: a hole punched in shared memory is reported.
    - ``pagemap-scan``: PAGEMAP_SCAN tells a written page from one that never was.
    - ``seek-data``: SEEK_DATA finds a page of a memfd that was written with pwrite.

    Raises nothing that a machine could cause: what does not work is a finding.
    """
    findings = {"uffd-wp": _finding(_check_uffd_wp)}
    needs_tracking: dict[str, Callable[[], Finding]] = {
        "kernel-writes": _check_kernel_writes,
        "discard-anon": _check_discard_anon,
        "discard-anon-thp": _check_discard_anon_thp,
        "discard-shared": _check_discard_shared,
    }
    for name, check in needs_tracking.items():
        findings[name] = (
            _finding(check) if findings["uffd-wp"] == _OK else Finding(Status.ABSENT, "no uffd-wp")
        )
    findings["pagemap-scan"] = _finding(_check_pagemap_scan)
    findings["seek-data"] = _finding(_check_seek_data)
    return MappingProxyType(findings)


def _finding(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except OSError as error:
        return Finding(Status.ABSENT, str(error))


def _check_uffd_wp() -> Finding:
    _sys.UffdWp().close()
    return _OK


class _Tracked:
    """A huge page's worth of memory, aligned to it, written and tracked."""

    def __init__(self, flags: int, advice: int | None) -> None:
        self._mapped = mmap.mmap(-1, 2 * _HUGE_BYTES, flags | mmap.MAP_ANONYMOUS)
        view = np.frombuffer(self._mapped, dtype=np.uint8)
        self._offset = -address_of(view) % _HUGE_BYTES
        self._address = address_of(view) + self._offset
        self.bytes = view[self._offset : self._offset + _HUGE_BYTES]
        if advice is not None:
            self._mapped.madvise(advice, self._offset, _HUGE_BYTES)
        self.bytes[:] = 1
        self._tracker = _sys.UffdWp()
        self._tracker.add(self._address, _HUGE_PAGES)

    def is_huge(self) -> bool:
        return _sys.huge_pages(self._address, _HUGE_PAGES) == _HUGE_PAGES

    def discard(self, advice: int) -> None:
        self._mapped.madvise(advice, self._offset, _HUGE_BYTES)

    def written_pages(self) -> int:
        bitmap = np.zeros(bitmap_words(_HUGE_PAGES), dtype=np.uint64)
        self._tracker.fetch(self._address, _HUGE_PAGES, bitmap)
        return int(np.bitwise_count(bitmap).sum())

    def close(self) -> None:
        self._tracker.close()


def _check_kernel_writes() -> Finding:
    tracked = _Tracked(mmap.MAP_PRIVATE, None)
    try:
        with open("/dev/zero", "rb", buffering=0) as zeros:
            zeros.readinto(tracked.bytes[:1].data)
        written = tracked.written_pages()
    finally:
        tracked.close()
    if written == 0:
        return Finding(Status.FAULTY, "a write by the kernel into tracked memory is not reported")
    return _OK


def _check_discard_anon() -> Finding:
    return _check_discard(
        _Tracked(mmap.MAP_PRIVATE, mmap.MADV_NOHUGEPAGE),
        mmap.MADV_DONTNEED,
        "this kernel does not report discarded anonymous memory",
    )


def _check_discard_anon_thp() -> Finding:
    tracked = _Tracked(mmap.MAP_PRIVATE, mmap.MADV_HUGEPAGE)
    if not tracked.is_huge():
        tracked.close()
        return Finding(Status.ABSENT, "no transparent huge page was to be had")
    return _check_discard(
        tracked,
        mmap.MADV_DONTNEED,
        "this kernel does not report discarded transparent huge pages",
    )


def _check_discard_shared() -> Finding:
    return _check_discard(
        _Tracked(mmap.MAP_SHARED, None),
        mmap.MADV_REMOVE,
        "this kernel does not report holes punched in shared memory",
    )


def _check_discard(tracked: _Tracked, advice: int, fault: str) -> Finding:
    try:
        tracked.discard(advice)
        written = tracked.written_pages()
    finally:
        tracked.close()
    if written < _HUGE_PAGES:
        return Finding(Status.FAULTY, f"{fault} ({written} of {_HUGE_PAGES} pages)")
    return _OK


def _check_pagemap_scan() -> Finding:
    mapped = mmap.mmap(-1, _HUGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped.madvise(mmap.MADV_NOHUGEPAGE)
    view = np.frombuffer(mapped, dtype=np.uint8)
    view[3 * _sys.PAGE_BYTES] = 1
    bitmap = np.zeros(bitmap_words(_HUGE_PAGES), dtype=np.uint64)
    _sys.populated_anon(address_of(view), _HUGE_PAGES, bitmap, 0)
    if int(bitmap[0]) != 1 << 3 or bitmap[1:].any():
        return Finding(Status.FAULTY, "PAGEMAP_SCAN does not find the one page that was written")
    return _OK


def _check_seek_data() -> Finding:
    fd = os.memfd_create("vmth-probe", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, _HUGE_BYTES)
        os.pwrite(fd, b"x", 3 * _sys.PAGE_BYTES)
        bitmap = np.zeros(bitmap_words(_HUGE_PAGES), dtype=np.uint64)
        _sys.populated_file(fd, 0, _HUGE_PAGES, bitmap, 0)
        exact = _sys.populated_file_is_exact(fd)
    finally:
        os.close(fd)
    if not exact or not int(bitmap[0]) >> 3 & 1:
        return Finding(Status.FAULTY, "SEEK_DATA does not find a written page of a memfd")
    return _OK
