# SPDX-License-Identifier: Apache-2.0
"""Images of saved VMs: what is written is read back, by a second reader too; damage is found."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_world import (
    BLOCKS,
    END,
    HEAD,
    HEADER_BYTES,
    INDEX,
    META,
    PAGE,
    PAGES,
    RECORD_BYTES,
    STATE,
    MemorySink,
    Record,
    content,
    data,
    image,
    joined,
    meta,
    read_again,
    records,
    renumbered,
    saved,
    zeros,
)

from vmth.errors import RefusedError, StreamError, UsageError
from vmth.qemu.image import Image, ImageWriter, SavedBlock, is_image
from vmth.qemu.image import codec as codec_module
from vmth.qemu.image.layout import MAX_FRAME_RUNS
from vmth.qemu.ram import RUN

SEED = 20260301
GOLDEN = Path(__file__).parent / "golden" / "image.hex"


def small() -> tuple[Any, ...]:
    """Two passes: pages of every kind, and some that come again."""
    return (
        zeros(0, 3),
        data(3, 5),
        zeros(8, 992),
        zeros(0, 20, 1),
        data(4, 2, seed=2),
        zeros(7, 1),
    )


def expected() -> dict[tuple[int, int], bytes]:
    pages = {(0, page): bytes(PAGE) for page in range(1000)}
    pages |= {(1, page): bytes(PAGE) for page in range(20)}
    pages |= {(0, page): content(1, page) for page in (3, 6)}
    return pages | {(0, page): content(2, page) for page in (4, 5)}


def verified(path: Path) -> Image:
    with Image.open(path) as opened:
        opened.verify(workers=1)
        return opened


def damage_is_found(path: Path, file: bytes) -> str:
    path.write_bytes(file)
    with pytest.raises(StreamError) as caught:
        verified(path)
    return str(caught.value)


@pytest.mark.parametrize("level", [0, 1, 3])
def test_what_is_written_is_read(tmp_path: Path, level: int) -> None:
    path = saved(tmp_path / "image", *small(), level=level)
    file = path.read_bytes()
    assert is_image(file[:100]) and not is_image(b"QEVM" + bytes(100))
    again = read_again(file)
    assert again.pages == expected() and again.superseded == 3
    assert (again.head, again.state) == (b"begin of the stream", b"end of the stream")
    with Image.open(path) as opened:
        opened.verify()
        assert opened.meta == meta() and opened.head == again.head
        assert b"".join(opened.state()) == again.state
        assert opened.end.superseded_pages == 3 and opened.end.digest_pages == 1020
        assert (opened.end.normal_pages, opened.end.zero_pages) == (7, 1016)
        pages = {(b, p): bytes(c) if c is not None else bytes(PAGE) for b, p, c in opened.pages()}
        assert pages == expected()
        assert all(opened.read_page(*at) == held for at, held in expected().items())


def test_pages_that_an_image_does_not_hold(tmp_path: Path) -> None:
    with Image.open(saved(tmp_path / "image", data(3, 5))) as opened:
        opened.verify()
        assert opened.read_page(0, 2) is None and opened.read_page(1, 3) is None
        assert opened.read_page(0, 3) == content(1, 3)
        for block, page in ((2, 0), (-1, 0), (0, 1000), (1, 20), (0, -1)):
            with pytest.raises(UsageError, match="allowed are 2 blocks"):
                opened.read_page(block, page)


def test_an_image_without_pages(tmp_path: Path) -> None:
    path = saved(tmp_path / "image", head=b"", state=b"")
    assert read_again(path.read_bytes()).pages == {}
    assert verified(path).end.frames == 0


def test_the_digest_follows_memory_alone(tmp_path: Path) -> None:
    """Not how pages were cut into runs, packed, or sent again."""
    one = verified(saved(tmp_path / "one", *small(), level=0)).end
    pieces = [zeros(0, 20, 1), zeros(7, 993), data(6, 1), data(4, 2, seed=2), data(3, 1)]
    pieces += [zeros(2 - page, 1) for page in range(3)]
    two = verified(saved(tmp_path / "two", *pieces, level=3)).end
    assert (one.digest_lo, one.digest_hi) == (two.digest_lo, two.digest_hi)
    three = verified(saved(tmp_path / "three", *pieces, zeros(3, 1))).end
    assert (one.digest_lo, one.digest_hi) != (three.digest_lo, three.digest_hi)


def test_many_frames_and_a_long_head_and_state(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    head, state = chance.randbytes(2_500_000), chance.randbytes(3_000_000)
    path = saved(tmp_path / "image", data(0, 300), data(100, 300), head=head, state=state)
    with Image.open(path) as opened:
        opened.verify(workers=3)
        assert opened.head == head and b"".join(opened.state()) == state
        assert opened.end.frames == 10 and opened.end.superseded_pages == 200
        held = {(b, p): bytes(c or b"") for b, p, c in opened.pages()}
    assert held == {(0, page): content(1, page) for page in range(400)}


@pytest.mark.slow
def test_many_short_runs(tmp_path: Path) -> None:
    """A frame has a bounded number of runs, an INDEX record a bounded length."""
    about = meta(blocks=(SavedBlock("pc.ram", 1_000_000 * PAGE),))
    runs = np.zeros(150_000, dtype=RUN)
    runs["page"], runs["npages"], runs["kind"] = np.arange(150_000) * 2, 1, 1
    path = saved(tmp_path / "image", (runs, b""), about=about)
    found = records(path.read_bytes())
    assert sum(record.kind == PAGES for record in found) == -(-150_000 // MAX_FRAME_RUNS)
    assert sum(record.kind == INDEX for record in found) == 3
    with Image.open(path) as opened:
        opened.verify()
        assert opened.read_page(0, 299_998) == bytes(PAGE)
        assert opened.read_page(0, 299_997) is None


def test_runs_of_a_stream_are_joined_across_calls() -> None:
    found = records(
        image(*(data(page, 1) for page in range(10)), *(zeros(10 + i, 1) for i in range(9)))
    )
    (frame,) = (record for record in found if record.kind == PAGES)
    assert frame.payload[:4] == (2).to_bytes(4, "little")


def test_golden_bytes() -> None:
    """The format does not change: another version is another number."""
    file = image(zeros(0, 2), data(2, 1), zeros(3, 997), zeros(0, 20, 1), level=0)
    assert file.hex() == "".join(GOLDEN.read_text().split())


# ---- damage ------------------------------------------------------------------------------------


def regions(file: bytes) -> list[int]:
    """Bytes of every field: of the header, and of each record's head, begin, middle and end."""
    places = list(range(HEADER_BYTES))
    for record in records(file):
        places += range(record.at, record.at + RECORD_BYTES)
        first, last = record.at + RECORD_BYTES, record.at + RECORD_BYTES + len(record.payload)
        places += [*range(first, min(last, first + 24)), (first + last) // 2, last - 1]
    return sorted(set(places))


@pytest.mark.parametrize("part", range(8))
def test_a_changed_byte_of_any_field_is_found(tmp_path: Path, part: int) -> None:
    file = image(zeros(0, 3), data(3, 2), zeros(5, 1), data(3, 1, seed=2))
    chance = random.Random(SEED + part)
    for at in regions(file)[part::8]:
        changed = bytearray(file)
        changed[at] ^= 1 << chance.randrange(8)
        damage_is_found(tmp_path / "image", bytes(changed))


@pytest.mark.slow
def test_a_changed_byte_anywhere_is_found(tmp_path: Path) -> None:
    file = image(zeros(0, 3), data(3, 2), zeros(5, 1), data(3, 1, seed=2))
    chance = random.Random(SEED)
    for at in range(len(file)):
        changed = bytearray(file)
        changed[at] ^= chance.randrange(1, 256)
        damage_is_found(tmp_path / "image", bytes(changed))


def test_a_cut_and_an_addition_are_found(tmp_path: Path) -> None:
    file = image(*small())
    cuts = {0, 1, HEADER_BYTES, len(file) - 1}
    for record in records(file):
        cuts |= {record.at, record.at + 1, record.at + RECORD_BYTES}
    for at in cuts:
        assert "allowed" in damage_is_found(tmp_path / "image", file[:at])
    for more in (b"\0", file[-200:], bytes(4096)):
        damage_is_found(tmp_path / "image", file + more)


def test_missing_doubled_and_moved_records_are_found(tmp_path: Path) -> None:
    file = image(data(0, 70), data(80, 70), data(0, 5, seed=3))
    count = len(records(file))
    other = records(image(data(0, 70, seed=9), data(80, 70, seed=9), data(0, 5, seed=3)))
    assert count == len(other) == 9
    for i in range(count):
        parts = records(file)
        damage_is_found(tmp_path / "image", joined(file, parts[:i] + parts[i + 1 :]))
        damage_is_found(tmp_path / "image", joined(file, parts[: i + 1] + parts[i:]))
        # The same place, number and length, of another save.
        if parts[i].payload != other[i].payload:
            damage_is_found(
                tmp_path / "image", joined(file, [*parts[:i], other[i], *parts[i + 1 :]])
            )
        if i + 1 < count:
            swapped = [*parts[:i], parts[i + 1], parts[i], *parts[i + 2 :]]
            damage_is_found(tmp_path / "image", joined(file, swapped))


def test_missing_and_doubled_frames_are_found_by_the_index_too(tmp_path: Path) -> None:
    """Also where numbers, offsets and the digest of all records were made right."""
    file = image(data(0, 70), data(80, 70), data(0, 5, seed=3))
    parts = records(file)
    frames = [i for i, record in enumerate(parts) if record.kind == PAGES]
    assert renumbered(file, records(file)) == file
    for i in frames:
        fewer, more = records(file), records(file)
        del fewer[i]
        again = records(file)[i]
        more.insert(i, again)
        assert "index" in damage_is_found(tmp_path / "image", renumbered(file, fewer))
        assert "index" in damage_is_found(tmp_path / "image", renumbered(file, more))


def test_damage_within_a_frame_is_never_given_out(tmp_path: Path) -> None:
    file = bytearray(image(data(0, 70), data(80, 70)))
    second = [record for record in records(bytes(file)) if record.kind == PAGES][1]
    file[second.at + 2000] ^= 1
    path = tmp_path / "image"
    path.write_bytes(file)
    with Image.open(path) as opened:
        assert opened.read_page(0, 3) == content(1, 3)
        with pytest.raises(StreamError, match=f"record at {second.at}: checksum: received"):
            opened.read_page(0, 81)
        with pytest.raises(StreamError, match="checksum"):
            list(opened.frames())
        with pytest.raises(StreamError, match="checksum"):
            opened.check()


# ---- hostile files -----------------------------------------------------------------------------


def end_with(file: bytes, **changes: int) -> bytes:
    """The file, fields of its END changed and the checksum made right."""
    parts = records(file)
    names = ["records", "frames", "state", "index", "normal", "zero", "superseded"]
    names += ["lo", "hi", "pages"]
    payload = bytearray(parts[-1].payload)
    for name, value in changes.items():
        at = 96 + 8 if name == "file_bytes" else 8 * names.index(name)
        payload[at : at + 8] = value.to_bytes(8, "little")
    parts[-1].payload = bytes(payload)
    return joined(file, parts)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"records": 3}, "record number"),
        ({"frames": 2**63}, "index: frames"),
        ({"state": 2**63}, "offsets of STATE and INDEX"),
        ({"index": 40}, "offsets of STATE and INDEX"),
        ({"normal": 2**64 - 1}, "normal and zero pages"),
        ({"zero": 0}, "normal and zero pages"),
        ({"superseded": 2**40}, "superseded"),
        ({"lo": 1}, "digest of memory"),
        ({"hi": 1}, "digest of memory"),
        ({"pages": 1}, "superseded"),
    ],
)
def test_numbers_at_the_end_that_cannot_be(
    tmp_path: Path, changes: dict[str, int], says: str
) -> None:
    assert says in damage_is_found(tmp_path / "image", end_with(image(*small()), **changes))


def packed(record: Record, raw: bytes) -> Record:
    record.codec, record.payload, record.content_bytes = 1, raw, len(raw)
    return record


FRAME = "<QIHH"


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ((0, 0, 0, 1), "run of block 'pc.ram'"),
        ((1000, 1, 0, 1), "run of block 'pc.ram': received page 1000 and 1 pages"),
        ((999, 2, 0, 1), "within 1000"),
        ((2**64 - 1, 2, 0, 1), "run of block"),
        ((0, 2**32 - 1, 0, 1), "run of block"),
        ((0, 1, 2, 1), "block of a run: received 2, allowed below 2"),
        ((0, 1, 0, 3), "kind of a run"),
        ((0, 1, 0, 0), "kind of a run"),
        ((0, 1, 0, 2), "data pages of a frame"),
    ],
)
def test_runs_that_cannot_be(tmp_path: Path, run: tuple[int, ...], says: str) -> None:
    file = image(zeros(0, 1))
    in_frame, in_index = records(file), records(file)
    frame = next(record for record in in_frame if record.kind == PAGES)
    frame.payload = frame.payload[:8] + struct.pack(FRAME, *run)
    damage_is_found(tmp_path / "image", renumbered(file, in_frame))
    index = next(record for record in in_index if record.kind == INDEX)
    packed(index, index.content[:-16] + struct.pack(FRAME, *run))
    assert says in damage_is_found(tmp_path / "image", renumbered(file, in_index))


def test_lengths_that_cannot_be(tmp_path: Path) -> None:
    file = image(zeros(0, 1), data(1, 3))
    for kind, field, value, says in (
        (PAGES, 16, 2**31, "payload bytes: received 2147483648"),
        (PAGES, 20, 2**31, "content bytes: received 2147483648"),
        (PAGES, 20, PAGE, "checksum"),
        (META, 16, 1 << 20, "bytes of the record"),
        (INDEX, 6, 7, "codec: received 7"),
        (STATE, 4, 0, "record kind: received 0"),
        (HEAD, 4, 7, "record kind: received 7"),
        (END, 0, 1, "record magic"),
    ):
        at = next(record.at for record in records(file) if record.kind == kind)
        changed = bytearray(file)
        width = 2 if field in (4, 6) else 4
        changed[at + field : at + field + width] = value.to_bytes(width, "little")
        assert says in damage_is_found(tmp_path / "image", bytes(changed))


def test_an_index_cannot_list_more_than_the_file_has_room_for(tmp_path: Path) -> None:
    file = image(zeros(0, 1))
    parts = records(file)
    place = next(i for i, record in enumerate(parts) if record.kind == INDEX)
    listed = parts[place].content
    frames = 10_000
    row, run = listed[8:24], listed[24:]
    raw = (frames).to_bytes(4, "little") * 2 + row * frames + run * frames
    parts[place].codec, parts[place].content_bytes = 2, len(raw)
    parts[place].payload = zstandard.ZstdCompressor().compress(raw)
    said = damage_is_found(tmp_path / "image", renumbered(file, parts))
    assert "bytes of all frames listed" in said


def test_a_frame_that_unpacks_to_more_than_it_says(tmp_path: Path) -> None:
    file = image(data(1, 1))
    for raw in (bytes(2 * PAGE), bytes(PAGE - 1), bytes(1 << 28)):
        parts = records(file)
        frame = next(record for record in parts if record.kind == PAGES)
        frame.codec = 2
        frame.payload = frame.payload[:24] + zstandard.ZstdCompressor().compress(raw)
        said = damage_is_found(tmp_path / "image", renumbered(file, parts))
        assert "zstd frame's content bytes" in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "record at 32"),
        (b"[]", "record at 32"),
        (b'{"machine": 1}', "record at 32"),
        (b"{" * 100_000, "record at 32"),
        (b'{"machine":"' + b"m" * 5000 + b'"', "record at 32"),
    ],
)
def test_a_description_that_cannot_be(tmp_path: Path, text: bytes, says: str) -> None:
    file = image(zeros(0, 1))
    parts = records(file)
    packed(parts[0], text)
    assert says in damage_is_found(tmp_path / "image", renumbered(file, parts))


@pytest.mark.parametrize(
    "changes",
    [
        {"page_bytes": 1000},
        {"page_bytes": 1 << 20},
        {"page_bytes": 0},
        {"blocks": ()},
        {"blocks": (SavedBlock("a", PAGE), SavedBlock("a", PAGE))},
        {"blocks": (SavedBlock("", PAGE),)},
        {"blocks": (SavedBlock("a" * 256, PAGE),)},
        {"blocks": (SavedBlock("a", PAGE + 1),)},
        {"blocks": (SavedBlock("a", -PAGE),)},
        {"blocks": (SavedBlock("a", 1 << 62),)},
        {"blocks": tuple(SavedBlock(f"b{i}", PAGE) for i in range(5000))},
        {"machine": "m" * 5000},
        {"created_unix_ns": -1},
        {"facts": {"long": "x" * (1 << 20)}},
        {"blocks": (SavedBlock("\udc80", PAGE),)},
    ],
)
def test_a_vm_that_cannot_be_described_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match="this VM cannot be saved"):
        ImageWriter(MemorySink(), meta(**changes), b"")


@pytest.mark.slow
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(random_=st.randoms(use_true_random=False))
def test_any_bytes_behind_right_checksums(tmp_path: Path, random_: random.Random) -> None:
    """Whatever a record says, the outcome is an image or a StreamError, in bounded memory."""
    file = image(
        zeros(0, 3), data(3, 2), zeros(5, 1), data(3, 1, seed=2), level=random_.choice((0, 1))
    )
    parts = records(file)
    for _ in range(random_.randint(1, 3)):
        record = random_.choice(parts)
        raw = bytearray(record.payload)
        for _ in range(random_.randint(1, 4)):
            if raw:
                raw[random_.randrange(len(raw))] = random_.choice(
                    (0, 1, 255, random_.randrange(256))
                )
        if random_.random() < 0.2:
            raw = raw[: random_.randrange(len(raw) + 1)]
        record.payload = bytes(raw)
        if random_.random() < 0.2:
            record.kind, record.codec = random_.randint(0, 7), random_.randint(0, 3)
    sealed = renumbered if random_.random() < 0.7 and len(parts[-1].payload) >= 152 else joined
    path = tmp_path / "image"
    path.write_bytes(sealed(file, parts))
    try:
        verified(path)
    except StreamError:
        pass


# ---- the writer --------------------------------------------------------------------------------


def test_pages_in_a_form_that_is_not_stored_are_refused() -> None:
    with ImageWriter(MemorySink(), meta(), b"") as writer:
        for kind, nbytes in ((3, 100), (4, 100), (2, 100)):
            runs = np.array([(0, 1, 0, 0, nbytes, 0, kind)], dtype=RUN)
            with pytest.raises(StreamError, match="received form"):
                writer.pages(runs, memoryview(bytes(PAGE)))
        writer.state(b"x")
        with pytest.raises(UsageError, match="behind the state"):
            writer.pages(*zeros_view())


def zeros_view() -> tuple[Any, memoryview]:
    runs, payload = zeros(0, 1)
    return runs, memoryview(payload)


def test_what_the_sink_raises_is_raised() -> None:
    class FullDisk(MemorySink):
        def write(self, data: Any) -> int:
            if self.tell() > 200_000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    def write(writer: ImageWriter) -> None:
        for page in range(0, 900, 60):
            runs, payload = data(page, 60)
            writer.pages(runs, memoryview(payload))
        writer.finish()

    with ImageWriter(FullDisk(), meta(), b"", level=0) as writer:
        with pytest.raises(OSError, match="No space"):
            write(writer)


def test_options_out_of_range_are_refused() -> None:
    for options in ({"level": 20}, {"level": -1}, {"workers": 0}, {"workers": 65}):
        with pytest.raises(UsageError, match="allowed"):
            ImageWriter(MemorySink(), meta(), b"", **options)
    with pytest.raises(RefusedError, match="head"):
        ImageWriter(MemorySink(), meta(), bytes((16 << 20) + 1))


def test_without_zstandard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, zstd = saved(tmp_path / "a", *small(), level=0), saved(tmp_path / "b", *small())
    monkeypatch.setattr(codec_module, "zstandard", None)
    verified(plain)
    for act in (lambda: verified(zstd), lambda: ImageWriter(MemorySink(), meta(), b"")):
        with pytest.raises(UsageError, match=r"zstandard, install vmth\[qemu\]"):
            act()


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UsageError, match="regular file"):
            Image.open(path)
    with pytest.raises(FileNotFoundError):
        Image.open(tmp_path / "none")
    assert len(BLOCKS) == 2
