# SPDX-License-Identifier: Apache-2.0
"""The index of a file's contents: whatever a file holds, each page that is not zeros is found by
its content at a place that has it; and no index that does not fit its file is ever used."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_world import PAGE, data, image, saved, zeros

from vmth.channel.reuse import ReuseSource
from vmth.errors import RefusedError, UsageError
from vmth.reuse import build as build_module
from vmth.reuse.content import open_pages
from vmth.reuse.index import build, index_path, usable
from vmth.reuse.layout import (
    ENTRY_BYTES,
    HEADER_BYTES,
    FileKind,
    Header,
    Identity,
    UnusableError,
    body_checksum,
)
from vmth.reuse.warm import IndexProgress, WarmFiles

GOLDEN = Path(__file__).parent / "golden" / "reuse-index.hex"
KEY = bytes(range(32))
in_place = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def page(number: int) -> bytes:
    """Page content by number; 0 is zeros."""
    return (number.to_bytes(8, "little") * (PAGE // 8)) if number else bytes(PAGE)


def raw(path: Path, numbers: Sequence[int], *, holes: bool = False) -> Path:
    with path.open("wb") as file:
        for number in numbers:
            if holes and number == 0:
                file.seek(PAGE, os.SEEK_CUR)
            else:
                file.write(page(number))
        file.truncate(len(numbers) * PAGE)
    return path


def digest(content: bytes, key: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16, key=key).digest()


def contents_of(source: ReuseSource) -> dict[bytes, bytes]:
    """Hash to content, read as the document says: by place and frame, from the file alone."""
    found = {}
    unpack = zstandard.ZstdDecompressor()
    for row, place in zip(source.hashes, source.places.tolist(), strict=True):
        for first, npages, offset, nbytes in source.frames.tolist():
            if first <= place < first + npages:
                held = os.pread(source.fd, nbytes, offset)
                if nbytes != npages * PAGE:
                    held = unpack.decompress(held)
                at = (place - first) * PAGE
                found[row.tobytes()] = held[at : at + PAGE]
    assert len(found) == len(source.places)
    return found


def check(source: ReuseSource, wanted: set[bytes]) -> None:
    """Every content that is wanted is found, by its hash, at a place that has it; nothing else."""
    found = contents_of(source)
    assert set(found.values()) == wanted
    assert all(hashed == digest(content, source.key) for hashed, content in found.items())
    assert [row.tobytes() for row in source.hashes] == sorted(
        found, key=lambda row: struct.unpack("<QQ", row)
    )


@in_place
@given(
    numbers=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    holes=st.booleans(),
    gathered=st.integers(1, 30),
    piece_pages=st.integers(1, 9),
)
def test_each_content_of_a_raw_file_is_found(
    tmp_path: Path, numbers: list[int], holes: bool, gathered: int, piece_pages: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "LEAST_GATHERED", gathered)
        patch.setattr("vmth.reuse.content.PIECE_BYTES", piece_pages * PAGE)
        path = raw(tmp_path / "file", numbers, holes=holes)
        index_path(path).unlink(missing_ok=True)
        with WarmFiles([path]) as warm:
            check(warm.sources[0], {page(number) for number in numbers if number})
            (file,) = warm.files
            places = warm.sources[0].places.tolist()
        # Of equal pages it is the first one.
        assert sorted(places) == sorted(numbers.index(n) for n in set(numbers) if n)
        kept = len(set(numbers) - {0})
        assert file.contents == kept and file.memory_bytes == ENTRY_BYTES * kept
        assert file.repeated_pages == sum(n != 0 for n in numbers) - kept
        assert file.hole_pages + file.zero_pages == numbers.count(0)


@in_place
@given(
    numbers=st.lists(st.integers(0, 40), min_size=1, max_size=80),
    limit=st.integers(1, 50),
    gathered=st.integers(1, 20),
)
def test_within_a_limit_the_lowest_hashes_stay(
    tmp_path: Path, numbers: list[int], limit: int, gathered: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "LEAST_GATHERED", gathered)
        patch.setattr("vmth.reuse.content.PIECE_BYTES", 3 * PAGE)
        path = raw(tmp_path / "file", numbers)
        with open_pages(path) as file:  # type: ignore[attr-defined]
            rows = build_module.find_contents(file, KEY, limit)
    by_hash = {digest(page(n), KEY): n for n in set(numbers) - {0}}
    order = sorted(by_hash, key=lambda row: struct.unpack("<QQ", row))
    assert [row.tobytes() for row in rows.hashes] == order[:limit]
    built = rows.built
    kept = {by_hash[row] for row in order[:limit]}
    assert rows.places.tolist() == [numbers.index(by_hash[row]) for row in order[:limit]]
    assert built.pages == len(numbers)
    left_at_least = sum(n not in kept and n != 0 for n in set(numbers))
    assert built.left_pages >= left_at_least and (built.left_pages > 0) == (len(order) > limit)
    assert (
        built.zero_pages + built.repeated_pages + built.left_pages + len(rows.places) == built.pages
    )


@pytest.mark.parametrize("level", [0, 1])
def test_each_content_of_a_saved_vm_is_found(tmp_path: Path, level: int) -> None:
    pieces = (
        zeros(0, 3),
        data(3, 150),
        zeros(153, 847),
        data(0, 20, 1),
        data(4, 2, seed=2),
        data(7, 3),
    )
    path = saved(tmp_path / "vm.vmth", *pieces, level=level)
    wanted = set()
    for runs, payload in pieces:
        for run in runs:
            for i in range(int(run["npages"])):
                at = int(run["at"]) + i * int(run["stride"])
                wanted.add(payload[at : at + PAGE])
    wanted.discard(b"")
    with WarmFiles([path]) as warm:
        assert warm.files[0].kind == "image"
        packed = warm.sources[0].frames[:, 3] != warm.sources[0].frames[:, 1] * np.uint64(PAGE)
        assert packed.any() == bool(level)
        check(warm.sources[0], wanted)
        first = warm.sources[0].hashes.tobytes()
    with WarmFiles([path]) as again:
        assert not again.files[0].built and again.sources[0].hashes.tobytes() == first


def test_an_index_is_built_once_and_kept_for_its_owner(tmp_path: Path) -> None:
    path = raw(tmp_path / "file", range(9))
    seen: list[IndexProgress] = []
    with WarmFiles([path], progress=seen.append) as warm:
        assert warm.files[0].built and warm.notes == [
            f"{path}: its index was built: there was none"
        ]
    assert seen[-1] == IndexProgress(str(path), 9, 9)
    where = index_path(path)
    assert where.stat().st_mode & 0o777 == 0o600
    before = where.read_bytes()
    with WarmFiles([path]) as warm:
        assert not warm.files[0].built and warm.notes == []
        check(warm.sources[0], {page(n) for n in range(1, 9)})
    assert where.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["file", "file.vmth-index"]


def test_indexes_elsewhere_tell_files_of_one_name_apart(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "indexes")]
    for folder in folders:
        folder.mkdir()
    paths = [raw(folders[0] / "disk", [1, 2]), raw(folders[1] / "disk", [3])]
    with WarmFiles(paths, folder=folders[2]) as warm:
        assert [file.contents for file in warm.files] == [2, 1]
    assert len(os.listdir(folders[2])) == 2
    assert os.listdir(folders[0]) == os.listdir(folders[1]) == ["disk"]
    with WarmFiles(paths, folder=folders[2]) as warm:
        assert not any(file.built for file in warm.files)


def test_files_used_together_come_to_one_key(tmp_path: Path) -> None:
    paths = [raw(tmp_path / "a", [1, 2]), raw(tmp_path / "b", [3])]
    for path in paths:
        WarmFiles([path]).close()
    with WarmFiles(paths) as warm:
        assert [file.built for file in warm.files] == [False, True]
        assert warm.sources[0].key == warm.sources[1].key
        assert "its key is not that of" in warm.notes[0]
        check(warm.sources[1], {page(3)})
    with WarmFiles(paths) as warm:
        assert not any(file.built for file in warm.files)


def test_an_index_that_cannot_be_kept_is_used_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = raw(tmp_path / "file", [1, 2, 3])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vmth.atomic.AtomicFile.sync", full)
    with WarmFiles([path]) as warm:
        check(warm.sources[0], {page(n) for n in (1, 2, 3)})
        assert warm.files[0].index == "" and "No space left" in warm.notes[1]
    assert os.listdir(tmp_path) == ["file"]


# -- the memory bound ------------------------------------------------------------------------------


def test_a_file_given_twice_is_used_once(tmp_path: Path) -> None:
    path = raw(tmp_path / "vm", [1, 2, 3])
    link = tmp_path / "link"
    link.symlink_to(path)
    other = raw(tmp_path / "other", [1, 2, 3])
    with WarmFiles([path, link, other, path], memory_bytes=6 * ENTRY_BYTES) as warm:
        assert [one.path for one in warm.files] == [str(path), str(other)]
        assert [one.contents for one in warm.files] == [3, 3]
        assert f"{link}: the same file as {path}, used once" in warm.notes
        assert f"{path}: the same file as {path}, used once" in warm.notes


def test_memory_goes_to_the_files_in_their_order(tmp_path: Path) -> None:
    paths = [
        raw(tmp_path / name, range(first, first + 10)) for name, first in (("a", 1), ("b", 20))
    ]
    with WarmFiles(paths, memory_bytes=14 * ENTRY_BYTES) as warm:
        assert [file.contents for file in warm.files] == [10, 4]
        assert [file.left_pages for file in warm.files] == [0, 6]
        assert warm.memory_bytes == 14 * ENTRY_BYTES
        assert any("6 pages, spread over the file, are not reused" in note for note in warm.notes)
        assert len(contents_of(warm.sources[1])) == 4
    with WarmFiles(paths, memory_bytes=10 * ENTRY_BYTES) as warm:
        assert [source.path for source in warm.sources] == [str(paths[0])]
        assert "not reused" in warm.notes[-1]
    with WarmFiles(paths) as warm:  # more memory: the second is built again
        assert [file.contents for file in warm.files] == [10, 10]
        assert "it was kept to 4 contents" in warm.notes[0]
    with WarmFiles(paths, memory_bytes=3 * ENTRY_BYTES) as warm:  # less: a part is used
        assert [file.contents for file in warm.files] == [3] and not warm.files[0].built


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"memory_bytes": 23}, "received 23, allowed 24"),
        ({"folder": Path("/nowhere/at/all")}, "received /nowhere/at/all, which is none"),
    ],
)
def test_options_out_of_bounds(tmp_path: Path, options: dict[str, Any], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        WarmFiles([raw(tmp_path / "file", [1])], **options)


# -- files that are refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begin", "error"),
    [
        (b"QFI\xfb", "is a qcow2 image: .*qemu-img convert -O raw"),
        (b"KDMV", "is a VMDK image"),
        (b"vhdxfile", "is a VHDX image"),
        (bytes(0x40) + b"\x7f\x10\xda\xbe", "is a VDI image"),
        (b"LUKS\xba\xbe", "is an encrypted"),
        (b"QEVM", "is a migration stream of QEMU: .*vmth save"),
        (b"LibvirtQemudSave", "is a saved VM of libvirt"),
        (b"VMTHIDX\n", "is an index of pages"),
        (b"VMTHIMG\n" + bytes(5000), "this image cannot be reused"),
    ],
)
def test_a_file_without_aligned_pages_is_refused_by_name(
    tmp_path: Path, begin: bytes, error: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(begin.ljust(2 * PAGE, b"x"))
    with pytest.raises(RefusedError, match=error):
        WarmFiles([path])
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "short").write_bytes(b"x" * (PAGE - 1))
    for name, error in (("pipe", "regular file"), ("short", "less than a page"), ("no", "No such")):
        with pytest.raises(RefusedError, match=error):
            WarmFiles([tmp_path / name])


@pytest.mark.parametrize("path", ["/proc/self/mem", "/proc/meminfo"])
def test_a_file_whose_bytes_cannot_be_read_is_named(path: str) -> None:
    with pytest.raises(RefusedError, match=rf"{path} cannot be read: I"):
        open_pages(Path(path))


def test_a_damaged_image_is_refused_by_name(tmp_path: Path) -> None:
    whole = bytearray(image(data(0, 100), level=0))
    path = tmp_path / "vm.vmth"
    for at in (100, len(whole) // 2, len(whole) - 50):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(RefusedError, match=r"vm\.vmth"):
            WarmFiles([path])
    assert os.listdir(tmp_path) == ["vm.vmth"]
    path.write_bytes(whole)
    with WarmFiles([path]) as warm:
        assert warm.files[0].contents == 100


# -- indexes that are not used ---------------------------------------------------------------------


def indexed(tmp_path: Path, numbers: Sequence[int] = range(200)) -> tuple[Path, Path]:
    path = raw(tmp_path / "file", numbers)
    WarmFiles([path]).close()
    return path, index_path(path)


def reason(path: Path) -> str:
    """Why the index is not used; empty where it is. Then it is built again, and is right."""
    with open_pages(path) as file:  # type: ignore[attr-defined]
        try:
            usable(index_path(path), file)
        except UnusableError as error:
            why = str(error)
        else:
            why = ""
    with WarmFiles([path]) as warm:
        assert warm.files[0].built == bool(why)
        held = path.read_bytes()
        pages = {held[at : at + PAGE] for at in range(0, len(held) // PAGE * PAGE, PAGE)}
        check(warm.sources[0], pages - {bytes(PAGE)})
    return why


def test_a_file_that_was_changed_is_indexed_again(tmp_path: Path) -> None:
    path, _ = indexed(tmp_path)
    assert reason(path) == ""
    os.utime(path, ns=(1, 1))
    assert reason(path) == "the file was changed since"
    os.truncate(path, 100 * PAGE)
    assert reason(path) == "the file was changed since"
    raw(tmp_path / "other", range(100)).rename(path)
    os.utime(path, ns=(1, 1))
    assert reason(path) == "the file was changed since"


def test_pages_behind_equal_times_are_found_by_samples(tmp_path: Path) -> None:
    path, _ = indexed(tmp_path)
    times = path.stat()
    with path.open("r+b") as file:
        for number in range(200):
            file.write(page(number + 5000))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "of the file is another one now" in reason(path)


def test_each_byte_of_the_header_matters(tmp_path: Path) -> None:
    path, where = indexed(tmp_path)
    good = where.read_bytes()
    for at in range(HEADER_BYTES):
        bad = bytearray(good[:HEADER_BYTES])
        bad[at] ^= 0x41
        with pytest.raises(UnusableError):
            Header.unpack(bytes(bad))
    where.write_bytes(bad + good[HEADER_BYTES:])
    assert reason(path) == "its header is damaged"


@pytest.mark.slow
@in_place
@given(st.data())
def test_a_damaged_body_is_never_used(tmp_path: Path, drawn: st.DataObject) -> None:
    path, where = indexed(tmp_path)
    good = where.read_bytes()
    bad = bytearray(good)
    at = drawn.draw(st.integers(HEADER_BYTES, len(good) - 1))
    bad[at] ^= drawn.draw(st.integers(1, 255))
    where.write_bytes(bad)
    assert reason(path) == "it is damaged"
    where.write_bytes(good[: drawn.draw(st.integers(0, len(good) - 1))])
    assert reason(path) != ""
    where.write_bytes(drawn.draw(st.binary(min_size=1, max_size=200)) + good)
    assert reason(path) != ""


def resealed(index: bytes, **body: Any) -> bytes:
    """With checksums that fit: what somebody wrote who can compute them."""
    header = bytearray(index[:HEADER_BYTES])
    n = (len(index) - HEADER_BYTES) // ENTRY_BYTES
    hashes = body.get("hashes", index[HEADER_BYTES : HEADER_BYTES + 16 * n])
    places = body.get("places", index[HEADER_BYTES + 16 * n :])
    for at, value in body.get("header", {}).items():
        header[at : at + len(value)] = value
    checksum = xxhash.xxh64_intdigest(places, xxhash.xxh64_intdigest(hashes))
    header[136:144] = checksum.to_bytes(8, "little")
    header[-8:] = xxhash.xxh64_intdigest(bytes(header[:-8])).to_bytes(8, "little")
    whole: bytes = bytes(header) + hashes + places
    return whole


def test_a_forged_index_is_not_used(tmp_path: Path) -> None:
    path, where = indexed(tmp_path)
    good = where.read_bytes()
    n = 199
    hashes = good[HEADER_BYTES : HEADER_BYTES + 16 * n]
    places = good[HEADER_BYTES + 16 * n :]
    forged: dict[str, dict[str, Any]] = {
        "place 200 is outside of 200 pages": {"places": struct.pack("<Q", 200) + places[8:]},
        "its hashes do not rise": {"hashes": hashes[16:32] + hashes[:16] + hashes[32:]},
        "of the file is another one now": {"places": places[8:] + places[:8]},
        "its version is 2, allowed 1": {"header": {8: b"\2"}},
        "kind 7 or header of 4096 bytes": {"header": {10: b"\7"}},
        "kind 1 or header of 8192 bytes": {"header": {12: b"\0\x20"}},
        "its pages have 0 bytes": {"header": {16: b"\0\0"}},
        "it has 4294967495 entries": {"header": {24 + 4: b"\1"}},
        "its header says": {"header": {24: b"\xff"}},
        "it is of a image file": {"header": {10: b"\2"}},
    }
    assert resealed(good) == good
    for why, change in forged.items():
        where.write_bytes(resealed(good, **change))
        assert why in reason(path)


def test_an_index_that_others_can_write_is_not_used(tmp_path: Path) -> None:
    path, where = indexed(tmp_path)
    where.chmod(0o622)
    assert reason(path) == "others can write it"
    where.unlink()
    where.mkdir()
    with WarmFiles([path]) as warm:
        assert warm.files[0].index == "" and "is a directory" in warm.notes[1]


@pytest.mark.parametrize("step", ["extend", "write", "sync", "_rename"])
def test_a_build_that_ends_at_a_step_leaves_the_old_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path, where = indexed(tmp_path)
    before = where.read_bytes()
    raw(path, range(100, 150))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    if step == "extend":
        with pytest.raises(KeyboardInterrupt):
            WarmFiles([path], progress=killed)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(f"vmth.atomic.AtomicFile.{step}", killed)
            with pytest.raises(KeyboardInterrupt):
                WarmFiles([path])
    assert where.read_bytes() == before and len(os.listdir(tmp_path)) == 2
    assert reason(path) == "the file was changed since"


def test_two_that_build_at_once_leave_a_whole_index(tmp_path: Path) -> None:
    path = raw(tmp_path / "file", range(50))
    where = index_path(path)
    with open_pages(path) as file:  # type: ignore[attr-defined]
        inner: list[Any] = []

        def other(_done: int, _pages: int) -> None:
            if not inner:
                inner.append(build(where, file, bytes(32), 1000))

        outer = build(where, file, KEY, 1000, other)
        assert usable(where, file).header.key == KEY
        # What the first one mapped is its own, whole.
        assert inner[0].hashes.tobytes() != outer.hashes.tobytes()
        assert all(
            digest(page(place), bytes(32)) == row.tobytes()
            for row, place in zip(inner[0].hashes, inner[0].places.tolist(), strict=True)
        )


def test_the_bytes_of_an_index(tmp_path: Path) -> None:
    """Golden: changing them needs a new version of the format."""
    path = raw(tmp_path / "file", [5, 0, 7, 5])
    with open_pages(path) as file:  # type: ignore[attr-defined]
        rows = build_module.find_contents(file, KEY, 100)
    checksum = body_checksum(rows.hashes, rows.places)
    header = Header(FileKind.RAW, PAGE, 2, Identity(4 * PAGE, 1234, 99), rows.built, checksum, KEY)
    packed = header.pack()
    assert Header.unpack(packed) == header
    written = packed[:144] + packed[-8:] + rows.hashes.tobytes() + rows.places.tobytes()
    assert not any(packed[144:-8])
    assert written.hex() == "".join(GOLDEN.read_text().split())


# -- the command -----------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vmth", "index", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_command_indexes_ahead(tmp_path: Path) -> None:
    path = raw(tmp_path / "file", [1, 0, 2, 2])
    done = command(str(path))
    assert done.returncode == 0 and done.stdout.splitlines() == [
        (
            f"{path} (raw): 2 different contents in 4 pages, 1 zero or holes, 1 repeated; index "
            f"{index_path(path)}, 48B"
        ),
        f"note: {path}: its index was built: there was none",
    ]
    told = json.loads(command("--json", str(path)).stdout)
    assert told["files"][0]["built"] is False and told["files"][0]["contents"] == 2
    assert told["index_memory_bytes"] == 2 * ENTRY_BYTES and told["notes"] == []
    with WarmFiles([path]) as warm:
        assert not warm.files[0].built


@pytest.mark.slow
def test_the_command_says_what_is_not_allowed(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"QFI\xfb".ljust(PAGE, b"\0"))
    done = command("--json", str(path))
    assert done.returncode == 3 and json.loads(done.stdout)["exit_code"] == 3
    assert "is a qcow2 image" in done.stderr
    assert command("--reuse-memory", "1", str(path)).returncode == 2
    assert command("--reuse-memory", "lots", str(path)).returncode == 2
    assert command().returncode == 2
