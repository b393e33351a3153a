# SPDX-License-Identifier: Apache-2.0
"""Small images for the tests, and a second reader of the format, from its document alone."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard
from qemu_streams import page_of

from vmth.qemu.image import ImageWriter, Meta, SavedBlock
from vmth.qemu.ram import RUN, PageKind, Runs

PAGE = 4096
BLOCKS = (SavedBlock("pc.ram", 1000 * PAGE), SavedBlock("pc.rom", 20 * PAGE))
HEADER_BYTES, RECORD_BYTES = 32, 40
META, HEAD, PAGES, STATE, INDEX, END = 1, 2, 3, 4, 5, 6


class MemorySink(io.BytesIO):
    """A file in memory."""

    def write(self, data: Any) -> int:
        return super().write(bytes(data))


def meta(**changes: Any) -> Meta:
    fields: dict[str, Any] = {
        "machine": "pc-q35-7.2",
        "qemu_version": "7.2.22",
        "vmth_version": "1.0",
        "created_unix_ns": 1_700_000_000_000_000_000,
        "uuid": "",
        "name": "guest",
        "running": True,
        "live": False,
        "page_bytes": PAGE,
        "blocks": BLOCKS,
        **changes,
    }
    return Meta(**fields)


def zeros(page: int, npages: int, block: int = 0) -> tuple[Runs, bytes]:
    return np.array([(page, npages, 0, 0, 0, block, PageKind.ZERO)], dtype=RUN), b""


def data(
    page: int, npages: int, block: int = 0, *, seed: int = 1, gap: int = 8
) -> tuple[Runs, bytes]:
    """Pages as they lie in a stream: ``gap`` bytes before each; see ``content``."""
    payload = b"".join(b"#" * gap + content(seed, page + i, block) for i in range(npages))
    run = (page, npages, gap, PAGE + gap, PAGE, block, PageKind.PAGE)
    return np.array([run], dtype=RUN), payload


def content(seed: int, page: int, block: int = 0) -> bytes:
    """Even pages do not compress, odd ones do."""
    if page % 2:
        return bytes([seed, block, page & 0xFF, 7]) * (PAGE // 4)
    return page_of(seed * 1_000_003 + block * 100_003 + page)


def image(
    *pieces: tuple[Runs, bytes],
    level: int = 1,
    head: bytes = b"begin of the stream",
    state: bytes = b"end of the stream",
    about: Meta | None = None,
) -> bytes:
    """A whole file."""
    sink = MemorySink()
    with ImageWriter(sink, about or meta(), head, level=level, workers=1) as writer:
        for runs, payload in pieces:
            writer.pages(runs, memoryview(payload))
        writer.state(state)
        writer.finish()
    return sink.getvalue()


def saved(path: Path, *pieces: tuple[Runs, bytes], **options: Any) -> Path:
    path.write_bytes(image(*pieces, **options))
    return path


@dataclass
class Record:
    """As docs/images.md lays it out."""

    kind: int
    codec: int
    sequence: int
    payload: bytes
    content_bytes: int
    checksum: bytes = b""
    at: int = 0

    def sealed(self) -> bytes:
        head = struct.pack(
            "<IHHQII",
            0x52434556,
            self.kind,
            self.codec,
            self.sequence,
            len(self.payload),
            self.content_bytes,
        )
        self.checksum = checksum(head + bytes(16) + self.payload)
        return head + self.checksum + self.payload

    @property
    def content(self) -> bytes:
        """Of any kind but PAGES."""
        return self.unpack(self.payload)

    def unpack(self, packed: bytes) -> bytes:
        if self.codec == 1:
            return packed
        return zstandard.ZstdDecompressor().decompress(packed)


def checksum(record: bytes) -> bytes:
    """XXH3-128, padded with zeros to a power of two; its low half comes first, little-endian."""
    size = 4096
    while size < len(record):
        size *= 2
    return xxhash.xxh3_128_digest(record.ljust(size, b"\0"))[::-1]


def records(file: bytes) -> list[Record]:
    found = []
    at = HEADER_BYTES
    while at < len(file):
        magic, kind, codec, sequence, payload, unpacked, said = struct.unpack_from(
            "<IHHQII16s", file, at
        )
        assert magic == 0x52434556
        end = at + RECORD_BYTES + payload
        whole = file[at:end]
        assert said == checksum(whole[:24] + bytes(16) + whole[40:])
        record = Record(kind, codec, sequence, file[at + RECORD_BYTES : end], unpacked, said, at)
        found.append(record)
        at = end
    return found


def joined(file: bytes, parts: list[Record]) -> bytes:
    """A file of these records, each with a checksum that fits what it holds now."""
    return file[:HEADER_BYTES] + b"".join(record.sealed() for record in parts)


def renumbered(file: bytes, parts: list[Record]) -> bytes:
    """The same, numbers, offsets and the digest of all records made right too."""
    at, place, moved = HEADER_BYTES, 0, {}
    for record in parts:
        record.sequence, place = place, place + 1
        moved[record.at] = record.at = at
        at += RECORD_BYTES + len(record.payload)
    end = parts[-1]
    values = list(struct.unpack_from("<10Q16sQ32s8s", end.payload))
    values[0] = len(parts)
    values[1] = sum(record.kind == PAGES for record in parts)
    values[2] = next(r.at for r in parts if r.kind in (STATE, INDEX, END))
    values[3] = next(r.at for r in parts if r.kind in (INDEX, END))
    digest = hashlib.sha256()
    for record in parts[:-1]:
        record.sealed()
        digest.update(record.checksum)
    values[10], values[11] = digest.digest()[:16], at
    end.payload = struct.pack("<10Q16sQ32s8s", *values)
    return joined(file, parts)


@dataclass
class Described:
    """What the second reader found."""

    meta: dict[str, Any]
    head: bytes
    state: bytes
    pages: dict[tuple[int, int], bytes]
    superseded: int
    end: tuple[Any, ...]


def read_again(file: bytes) -> Described:
    """The whole file by the document."""
    assert file[:8] == b"VMTHIMG\n"
    version, flags, head_bytes = struct.unpack_from("<HHI", file, 8)
    assert (version, flags, head_bytes) == (1, 0, RECORD_BYTES) and not any(file[16:24])
    assert struct.unpack_from("<Q", file, 24)[0] == xxhash.xxh64_intdigest(file[:24])
    pages: dict[tuple[int, int], bytes] = {}
    parts = records(file)
    superseded = 0
    for record in parts:
        if record.kind != PAGES:
            continue
        nruns, rows = struct.unpack_from("<II", record.payload)
        unpacked = record.unpack(record.payload[8 + 16 * nruns :])
        assert len(unpacked) == rows * PAGE == record.content_bytes
        at = 0
        for i in range(nruns):
            page, npages, block, kind = struct.unpack_from("<QIHH", record.payload, 8 + 16 * i)
            for number in range(page, page + npages):
                superseded += (block, number) in pages
                pages[block, number] = unpacked[at : at + PAGE] if kind == 2 else bytes(PAGE)
                at += PAGE if kind == 2 else 0
        assert at == len(unpacked)
    assert [record.sequence for record in parts] == list(range(len(parts)))
    assert [record.kind for record in parts] == sorted(record.kind for record in parts)
    return Described(
        json.loads(parts[0].content),
        b"".join(record.content for record in parts if record.kind == HEAD),
        b"".join(record.content for record in parts if record.kind == STATE),
        pages,
        superseded,
        struct.unpack("<10Q16sQ32s8s", parts[-1].payload),
    )
