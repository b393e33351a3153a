# SPDX-License-Identifier: Apache-2.0
"""The start-up probe: what it reports, where it comes from, and that nothing stays behind."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest

from vmth._native import _sys
from vmth.dirty import probe as probe_module
from vmth.dirty.mappings import MappingKind, huge_pages_forbidden, mapping_kind
from vmth.dirty.probe import Finding, Status, probe
from vmth.memory import address_of

NAMES = [
    "uffd-wp",
    "kernel-writes",
    "discard-anon",
    "discard-anon-thp",
    "discard-shared",
    "pagemap-scan",
    "seek-data",
]


def test_every_check_is_reported_and_what_is_not_ok_has_a_reason() -> None:
    findings = probe()
    assert list(findings) == NAMES
    for finding in findings.values():
        assert (finding.status is Status.OK) == (finding.reason == "")


def test_the_answer_is_kept_and_cannot_be_changed() -> None:
    assert probe() is probe()
    with pytest.raises(TypeError):
        probe()["uffd-wp"] = Finding(Status.OK)  # type: ignore[index]


def test_nothing_stays_behind() -> None:
    before = len(os.listdir("/proc/self/fd"))
    probe_module.probe.__wrapped__()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_the_kernel_refuses_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused:
        def __init__(self) -> None:
            raise OSError(22, "UFFD_FEATURE_WP_ASYNC: Invalid argument")

    monkeypatch.setattr(_sys, "UffdWp", Refused)
    findings = probe_module.probe.__wrapped__()
    assert findings["uffd-wp"].status is Status.ABSENT
    assert "UFFD_FEATURE_WP_ASYNC" in findings["uffd-wp"].reason
    assert findings["discard-anon"] == Finding(Status.ABSENT, "no uffd-wp")
    assert findings["seek-data"].status is probe()["seek-data"].status


def test_a_kernel_that_reports_nothing_is_faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf:
        def add(self, address: int, npages: int) -> None: ...
        def fetch(self, address: int, npages: int, bitmap: _sys.U64) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr(_sys, "UffdWp", Deaf)
    findings = probe_module.probe.__wrapped__()
    for name in ("kernel-writes", "discard-anon", "discard-shared"):
        assert findings[name].status is Status.FAULTY
    assert "0 of 512" in findings["discard-anon"].reason


@pytest.mark.skipif(probe()["uffd-wp"].status is not Status.OK, reason=probe()["uffd-wp"].reason)
def test_the_kernels_features_include_what_the_tracker_needs() -> None:
    wp_unpopulated, wp_async = 1 << 13, 1 << 15
    assert _sys.uffd_features() & wp_unpopulated
    assert _sys.uffd_features() & wp_async


def test_mapping_kinds() -> None:
    fd = os.memfd_create("vmth-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4 * mmap.PAGESIZE)
    cases = [
        (-1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, MappingKind.PRIVATE_ANONYMOUS),
        (-1, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, MappingKind.SHARED),
        (fd, mmap.MAP_SHARED, MappingKind.SHARED),
        (fd, mmap.MAP_PRIVATE, MappingKind.PRIVATE_FILE),
    ]
    for file, flags, kind in cases:
        view = np.frombuffer(mmap.mmap(file, 4 * mmap.PAGESIZE, flags), dtype=np.uint8)
        assert mapping_kind(address_of(view), view.nbytes) is kind
    os.close(fd)


def test_huge_pages_are_forbidden_only_where_all_of_the_range_says_so() -> None:
    mapped = mmap.mmap(-1, 8 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = address_of(np.frombuffer(mapped, dtype=np.uint8))
    mapped.madvise(mmap.MADV_NOHUGEPAGE, 0, 4 * mmap.PAGESIZE)
    assert huge_pages_forbidden(address, 4 * mmap.PAGESIZE)
    assert not huge_pages_forbidden(address, 5 * mmap.PAGESIZE)
