# SPDX-License-Identifier: Apache-2.0
"""Content: the shares, the copies, the holes and the placement are what was asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmth.errors import UsageError
from vmth.guests import content
from vmth.guests.content import (
    DEFAULT_CONTENT,
    FILES,
    KINDS,
    RANDOM,
    ContentSpec,
    _place,
    fill,
)
from vmth.guests.memory import PAGE_BYTES, BlockPlan, GuestMemory, plan_blocks

MIB = 1 << 20
#: sha256 of the default mix, as it was before template and file-copy were there.
PINNED_CONTENT = "c66f47e1a3de8aef2c6f04ea56599bd4be24c42a38717400f027aee2ac2374fe"


@contextmanager
def guest_memory(*lengths: int) -> Iterator[GuestMemory]:
    plans = [BlockPlan(f"ram{i}", i << 32, length) for i, length in enumerate(lengths)]
    memory = GuestMemory(plans)
    try:
        yield memory
    finally:
        memory.close()


def all_pages(memory: GuestMemory) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.concatenate([view.reshape(-1, PAGE_BYTES) for view in memory.views])


def allocated_bytes(memory: GuestMemory) -> int:
    return sum(os.fstat(fd).st_blocks * 512 for fd in memory.fds)


def test_default_content_has_its_shares() -> None:
    with guest_memory(4 * MIB) as memory:
        report = fill(memory, ContentSpec.parse(DEFAULT_CONTENT), 1)
        pages = all_pages(memory)
        zero = ~pages.any(axis=1)
        assert sum(report.pages.values()) == len(pages) == 1024
        shares = {"zero": 307, "hole": 0, "dup": 153, "files": 360, "random": 204}
        assert report.pages == shares | {"template": 0, "file-copy": 0}
        assert zero.sum() >= report.pages["zero"]
        assert report.files_read > 0 and report.file_pages_repeated == 0
        # Populated zeros: everything has memory behind it.
        assert allocated_bytes(memory) == 4 * MIB


def test_copies_equal_a_random_page_farther_below_than_stated() -> None:
    with guest_memory(3 * MIB, MIB) as memory:
        report = fill(memory, ContentSpec.parse("dup=40,random=60"), 5)
        pages = all_pages(memory)
        assert report.dup_distance_bytes == len(pages) // 4 * PAGE_BYTES
        first_seen: dict[bytes, int] = {}
        copies = 0
        for number, page in enumerate(pages):
            original = first_seen.setdefault(page.tobytes(), number)
            if original != number:
                copies += 1
                assert (number - original) * PAGE_BYTES > report.dup_distance_bytes
        assert copies == report.pages["dup"] == 409


def test_holes_have_no_memory_and_zeros_have() -> None:
    with guest_memory(2 * MIB) as memory:
        fill(memory, ContentSpec.parse("hole=50,zero=50"), 2)
        assert allocated_bytes(memory) == MIB
        assert not all_pages(memory).any()


def test_nothing_is_written_below_the_first_byte() -> None:
    with guest_memory(MIB) as memory:
        fill(memory, ContentSpec.parse("random=100"), 2, first_byte=64 * PAGE_BYTES)
        pages = all_pages(memory)
        assert not pages[:64].any() and pages[64:].any(axis=1).all()


def test_counter_dwords_are_zero_whatever_the_content() -> None:
    with guest_memory(2 * MIB, MIB) as memory:
        counters = np.zeros(512, dtype=np.bool_)
        counters[100:400] = True
        spec = ContentSpec.parse("dup=25,files=25,random=50")
        fill(memory, spec, 3, first_byte=10 * PAGE_BYTES, counter_pages=counters)
        first = np.asarray(all_pages(memory)[:, :4].any(axis=1))
        assert not first[100:400].any()
        assert first[10:100].any() and first[400:].any()


def test_pages_of_templates_equal_one_of_sixteen() -> None:
    with guest_memory(2 * MIB) as memory:
        report = fill(memory, ContentSpec.parse("template=75,zero=25"), 5)
        kinds, counts = np.unique(all_pages(memory), axis=0, return_counts=True)
        assert report.pages["template"] == 384 and report.dup_distance_bytes == 0
        assert len(kinds) == 17  # and zero
        assert counts.sum() == 512 and counts.min() >= 8
        assert len(np.unique(kinds[1:, :8], axis=0)) == 16


FILE_COPY_MIXES = ["file-copy=40,files=60", "file-copy=30,dup=30,files=20,random=20"]


@pytest.mark.parametrize("text", FILE_COPY_MIXES)
def test_copies_of_files_and_of_random_pages_keep_their_distance(text: str) -> None:
    with guest_memory(3 * MIB, MIB) as memory:
        spec = ContentSpec.parse(text)
        report = fill(memory, spec, 5)
        placed = _place(spec, 1024, np.random.default_rng([5, 1]))
        pages = all_pages(memory)
        assert report.dup_distance_bytes > 0
        first_seen: dict[int, dict[bytes, int]] = {RANDOM: {}, FILES: {}}
        for kind, start, end in zip(placed.kinds, placed.starts, placed.ends, strict=True):
            for number in range(start, end):
                page = pages[number].tobytes()
                if kind in (RANDOM, FILES):
                    first_seen[kind].setdefault(page, number)
                    continue
                original = first_seen[RANDOM if KINDS[kind] == "dup" else FILES][page]
                assert (number - original) * PAGE_BYTES > report.dup_distance_bytes


def test_the_default_mix_is_what_it_was_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / str(number) for number in range(9)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes((number, 1, 2)) * (5000 + 3000 * number))
    monkeypatch.setattr(content, "_walk_files", lambda: map(str, paths))
    with guest_memory(2 * MIB) as memory:
        fill(memory, ContentSpec.parse(DEFAULT_CONTENT), 20260101)
        assert hashlib.sha256(all_pages(memory).tobytes()).hexdigest() == PINNED_CONTENT


@pytest.mark.slow
def test_one_seed_gives_one_content() -> None:
    contents = []
    for seed in (9, 9, 10):
        with guest_memory(MIB) as memory:
            fill(memory, ContentSpec.parse(DEFAULT_CONTENT), seed)
            contents.append(all_pages(memory))
    assert np.array_equal(contents[0], contents[1])
    assert not np.array_equal(contents[0], contents[2])


def test_kinds_are_spread_over_memory() -> None:
    with guest_memory(32 * MIB) as memory:
        fill(memory, ContentSpec.parse("zero=50,random=50"), 4)
        zero = ~all_pages(memory).any(axis=1)
        for quarter in np.split(zero, 4):
            assert 0.2 < quarter.mean() < 0.8


@pytest.mark.parametrize(
    "text",
    [
        "",
        "zero",
        "zero=",
        "zero=-1,random=101",
        "zero=50",
        "zero=60,random=60",
        "zero=50,zero=50",
        "ones=100",
        "zero=1e2",
        "dup=50,zero=50",
        "dup=50,files=50",
        "file-copy=50,random=50",
        "templates=100",
        "zero=50;random=50",
    ],
)
def test_bad_content_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        ContentSpec.parse(text)


@given(st.text(alphabet="zerohldupfinasmtcy=,0123 -", max_size=40))
def test_any_text_parses_or_is_a_usage_error(text: str) -> None:
    try:
        spec = ContentSpec.parse(text)
    except UsageError:
        return
    assert sum(spec.percent) == 100


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 100), min_size=6, max_size=6),
    st.integers(0, 2**32),
    st.integers(2, 300),
)
def test_any_share_fills_every_page_once(cuts: list[int], seed: int, npages: int) -> None:
    parts = [int(part) for part in np.diff(sorted(cuts), prepend=0, append=100)]
    shares = dict(zip(KINDS, parts, strict=True))
    if (shares["dup"] and not shares["random"]) or (shares["file-copy"] and not shares["files"]):
        return
    spec = ContentSpec.parse(",".join(f"{key}={share}" for key, share in shares.items()))
    with guest_memory(npages * PAGE_BYTES) as memory:
        report = fill(memory, spec, seed)
        assert sum(report.pages.values()) == npages
        assert set(report.pages) == set(KINDS)
        assert allocated_bytes(memory) == (npages - report.pages["hole"]) * PAGE_BYTES


def test_block_table_of_small_and_large_guests() -> None:
    assert plan_blocks(MIB) == [BlockPlan("ram", 0, MIB)]
    assert plan_blocks(3 << 30) == [BlockPlan("ram", 0, 3 << 30)]
    assert plan_blocks(4 << 30) == [
        BlockPlan("ram-low", 0, 3 << 30),
        BlockPlan("ram-high", 4 << 30, 1 << 30),
    ]
    for wrong in (0, MIB - 4096, MIB + 1, -MIB, 1 << 60):
        with pytest.raises(UsageError):
            plan_blocks(wrong)
