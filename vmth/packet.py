# SPDX-License-Identifier: Apache-2.0
"""Page packets as plain data: encode, decode, inspect (``csrc/include/vmth/packet.h``).

The movers do this natively; here it serves tests and the inspection of captures. Nothing does I/O.
Every decode checks what the movers check and raises ``StreamError`` that names the field, what was
received and what is allowed; nothing is returned then.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vmth._native import _packet
from vmth.errors import StreamError, UsageError

__all__ = [
    "ACK_BYTES",
    "HEADER_BYTES",
    "Ack",
    "AckStatus",
    "Desc",
    "Header",
    "Limits",
    "PacketKind",
    "PageForm",
    "decode_acks",
    "decode_descriptors",
    "decode_header",
    "encode_acks",
    "encode_packet",
]

HEADER_BYTES = 64
ACK_BYTES = 32


class PacketKind(enum.IntEnum):
    PAGES = 1
    BARRIER = 2
    END = 3
    ACK = 4


class PageForm(enum.IntEnum):
    NORMAL = 1
    ZERO = 2
    HOLE = 3
    FREE = 4
    SAME = 5
    DEDUP = 6
    DELTA = 7
    ZSTD = 8
    REUSE = 9


class AckStatus(enum.IntEnum):
    LANDED = 1
    MISSED = 2


ALL_FORMS = frozenset(PageForm)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the session knows and a packet must keep to."""

    block_npages: Sequence[int]
    page_bytes: int = 4096
    forms: frozenset[PageForm] = ALL_FORMS
    channel: int = 0

    def _mask(self) -> int:
        return sum(1 << form for form in self.forms)


@dataclass(frozen=True, slots=True)
class Header:
    """The 64-byte header. ``checksum`` is what was received; encoding makes it."""

    kind: PacketKind
    seq: int
    block: int = 0
    round: int = 0
    channel: int = 0
    desc_bytes: int = 0
    payload_bytes: int = 0
    ndesc: int = 0
    npages: int = 0
    checksum: int = 0


@dataclass(frozen=True, slots=True)
class Desc:
    """A run of pages in one form. ``result`` is the hash (lo, hi) of a dedup or delta page.

    A reuse descriptor's payload is a content hash a page, 16 bytes each.
    A zstd descriptor without payload has its pages in the frame of the next that has one.
    ``packed``: a delta's payload is a zstd frame of the delta.
    """

    page: int
    npages: int
    form: PageForm
    payload_bytes: int = 0
    base_block: int = 0
    base_page: int = 0
    result: tuple[int, int] = (0, 0)
    packed: bool = False


@dataclass(frozen=True, slots=True)
class Ack:
    """A packet landed: digest (lo, hi) of what did, and whether pages of ``block`` were missed."""

    seq: int
    digest: tuple[int, int] = (0, 0)
    status: AckStatus = AckStatus.LANDED
    block: int = 0


Decoded = TypeVar("Decoded")


def _refusing(decode: Callable[..., Decoded], *args: object) -> Decoded:
    try:
        return decode(*args)
    except _packet.PacketError as error:
        field, received, allowed = error.args
        raise StreamError(f"packet {field}: received {received}, allowed {allowed}") from None


def encode_packet(
    kind: PacketKind,
    seq: int,
    descriptors: Sequence[Desc] = (),
    *,
    block: int = 0,
    round_: int = 0,
    channel: int = 0,
    page_bytes: int = 4096,
    checksum_seed: int = 0,
) -> bytes:
    """Header and descriptors of a PAGES, BARRIER or END packet; the payload follows on the wire.

    A normal descriptor's payload is its pages; the other forms say theirs.
    """
    payload_bytes = sum(
        desc.npages * page_bytes if desc.form is PageForm.NORMAL else desc.payload_bytes
        for desc in descriptors
    )
    body = b"".join(_encode_desc(desc) for desc in descriptors)
    npages = sum(desc.npages for desc in descriptors)
    header = _packet.encode_header(
        kind,
        block,
        round_,
        channel,
        seq,
        payload_bytes,
        len(descriptors),
        npages,
        body,
        checksum_seed,
    )
    return header + body


def encode_acks(
    seq: int,
    acks: Sequence[Ack],
    missed: Sequence[Desc] = (),
    *,
    round_: int = 0,
    channel: int = 0,
    checksum_seed: int = 0,
) -> bytes:
    """An ACK packet: everything up to ``seq`` has landed; ``missed`` has form SAME."""
    body = b"".join(_packet.encode_ack(a.seq, *a.digest, a.status, a.block) for a in acks)
    body += b"".join(_encode_desc(desc) for desc in missed)
    npages = sum(desc.npages for desc in missed)
    header = _packet.encode_header(
        PacketKind.ACK, 0, round_, channel, seq, 0, len(acks), npages, body, checksum_seed
    )
    return header + body


def decode_header(data: bytes, limits: Limits) -> Header:
    """The header at the start of ``data``, checked except for its checksum."""
    kind, block, round_, channel, seq, desc_bytes, payload_bytes, ndesc, npages, checksum = (
        _refusing(
            _packet.decode_header,
            data,
            np.array(limits.block_npages, dtype=np.uint64),
            limits.page_bytes,
            limits._mask(),
            limits.channel,
        )
    )
    return Header(
        kind=PacketKind(kind),
        seq=seq,
        block=block,
        round=round_,
        channel=channel,
        desc_bytes=desc_bytes,
        payload_bytes=payload_bytes,
        ndesc=ndesc,
        npages=npages,
        checksum=checksum,
    )


def decode_descriptors(data: bytes, limits: Limits, *, checksum_seed: int = 0) -> list[Desc]:
    """The descriptors of the PAGES packet at the start of ``data`` (header and descriptors).

    Checksum, count, pages and payload are checked against the header, and zstd frames as a whole.
    """
    header, body = _split(data, limits, PacketKind.PAGES, checksum_seed)
    _refusing(
        _packet.check_pages,
        data,
        np.array(limits.block_npages, dtype=np.uint64),
        limits.page_bytes,
        limits._mask(),
        limits.channel,
    )
    found: list[Desc] = []
    at = 0
    for _ in range(header.ndesc):
        used, desc = _decode_desc(body, at, header.block, limits)
        at += used
        found.append(desc)
    return found


def decode_acks(
    data: bytes, limits: Limits, *, checksum_seed: int = 0
) -> tuple[list[Ack], list[Desc]]:
    """The acknowledgements and the missed pages of the ACK packet at the start of ``data``.

    Missed pages must lie within a block that an acknowledgement of status MISSED names.
    """
    header, body = _split(data, limits, PacketKind.ACK, checksum_seed)
    acks: list[Ack] = []
    for i in range(header.ndesc):
        seq, lo, hi, status, block = _refusing(_packet.decode_ack, body, i * ACK_BYTES)
        if block >= len(limits.block_npages):
            raise StreamError(
                f"packet ack.block: received {block}, allowed {len(limits.block_npages) - 1}"
            )
        acks.append(Ack(seq, (lo, hi), AckStatus(status), block))
    named = [ack.block for ack in acks if ack.status is AckStatus.MISSED]
    at = len(acks) * ACK_BYTES
    if not named:
        _expect("desc_bytes", header.desc_bytes, at)
    missed: list[Desc] = []
    while at < len(body):
        used, desc = _decode_desc(
            body, at, max(named, key=lambda block: limits.block_npages[block]), limits
        )
        _expect("desc.form", desc.form, PageForm.SAME)
        at += used
        missed.append(desc)
    return acks, missed


def _encode_desc(desc: Desc) -> bytes:
    try:
        return _packet.encode_desc(
            desc.page,
            desc.npages,
            desc.form,
            int(desc.packed),
            desc.payload_bytes,
            desc.base_block,
            desc.base_page,
            *desc.result,
        )
    except _packet.PacketError as error:
        field, received, allowed = error.args
        raise UsageError(f"packet {field}: {received}, allowed {allowed}") from None


def _decode_desc(body: bytes, at: int, block: int, limits: Limits) -> tuple[int, Desc]:
    used, (page, npages, form, flags, payload_bytes, base_block, base_page, lo, hi) = _refusing(
        _packet.decode_desc,
        body,
        at,
        block,
        np.array(limits.block_npages, dtype=np.uint64),
        limits.page_bytes,
        limits._mask(),
    )
    return used, Desc(
        page, npages, PageForm(form), payload_bytes, base_block, base_page, (lo, hi), bool(flags)
    )


def _split(
    data: bytes, limits: Limits, kind: PacketKind, checksum_seed: int
) -> tuple[Header, bytes]:
    """Header and descriptor bytes of a packet whose kind and checksum are as they must be."""
    header = decode_header(data, limits)
    body = data[HEADER_BYTES : HEADER_BYTES + header.desc_bytes]
    _expect("kind", header.kind, kind)
    _expect("desc_bytes", len(body), header.desc_bytes)
    _refusing(_packet.verify, data[:HEADER_BYTES], body, checksum_seed)
    return header, body


def _expect(field: str, received: int, allowed: int) -> None:
    if received != allowed:
        raise StreamError(f"packet {field}: received {received}, allowed {allowed}")
