# SPDX-License-Identifier: Apache-2.0
"""A tiny generator of migration streams, written from the format's description and nothing else."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

PAGE = 4096
ZERO, MEM_SIZE, NORMAL, EOS, CONTINUE = 0x2, 0x4, 0x8, 0x10, 0x20
XBZRLE, COMPRESS, FLUSH = 0x40, 0x100, 0x200
RAM_ID = 2
BLOCKS = (("pc.ram", 64 * PAGE), ("/rom@etc/acpi/tables", 3 * PAGE))


def u16(value: int) -> bytes:
    return struct.pack(">H", value)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def str8(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def page_of(seed: int, page_bytes: int = PAGE) -> bytes:
    """A page whose bytes all follow from ``seed``, and that is not zero."""
    return b"".join(u64((seed * 0x9E3779B97F4A7C15 + i) & (2**64 - 1)) for i in range(512))[
        :page_bytes
    ]


def record(page: int, flag: int, body: bytes, idstr: str | None = None) -> bytes:
    if idstr is None:
        return u64(page * PAGE | flag | CONTINUE) + body
    return u64(page * PAGE | flag) + str8(idstr) + body


def zero(page: int, idstr: str | None = None) -> bytes:
    return record(page, ZERO, b"\0", idstr)


def normal(page: int, idstr: str | None = None, seed: int | None = None) -> bytes:
    return record(page, NORMAL, page_of(page if seed is None else seed), idstr)


def eos() -> bytes:
    return u64(EOS)


def flush() -> bytes:
    return u64(FLUSH)


def header(machine: str = "pc-q35-7.2", *fields: tuple[str, bytes]) -> bytes:
    out = b"QEVM" + u32(3) + b"\x07" + u32(len(machine)) + machine.encode()
    for name, body in fields:
        out += b"\x05" + str8("configuration/" + name) + u32(1) + body
    return out


def capabilities(*names: str) -> tuple[str, bytes]:
    return "capabilities", u32(len(names)) + b"".join(str8(name) for name in names)


def footer(section_id: int) -> bytes:
    return b"\x7e" + u32(section_id)


def block_list(blocks: Sequence[tuple[str, int]] = BLOCKS, extra: bytes = b"") -> bytes:
    out = u64(sum(length for _, length in blocks) | MEM_SIZE)
    return out + b"".join(str8(name) + u64(length) + extra for name, length in blocks)


def start(payload: bytes, idstr: str = "ram", version: int = 4, section_id: int = RAM_ID) -> bytes:
    head = b"\x01" + u32(section_id) + str8(idstr) + u32(0) + u32(version)
    return head + payload + footer(section_id)


def part(payload: bytes) -> bytes:
    return b"\x02" + u32(RAM_ID) + payload + footer(RAM_ID)


def end(payload: bytes) -> bytes:
    return b"\x03" + u32(RAM_ID) + payload + footer(RAM_ID)


def full(section_id: int, idstr: str, body: bytes, instance_id: int = 0) -> bytes:
    head = b"\x04" + u32(section_id) + str8(idstr) + u32(instance_id) + u32(1)
    return head + body + footer(section_id)


def command(code: int, data: bytes = b"") -> bytes:
    return b"\x08" + u16(code) + u16(len(data)) + data


def description(devices: Sequence[tuple[str, int]]) -> bytes:
    """vmdescription of devices with one field each, of that many bytes."""
    listed: list[dict[str, Any]] = [
        {
            "name": name,
            "instance_id": 0,
            "version": 1,
            "fields": [{"name": "data", "type": "buffer", "size": size}],
        }
        for name, size in devices
    ]
    text = json.dumps({"page_size": PAGE, "devices": listed}).encode()
    return b"\x06" + u32(len(text)) + text


#: Device state that holds its own footer by chance, and the begin of what may follow one.
TRICKY = b"abc" + footer(7) + b"\x04" + u32(8) + b"\x03\x00no" + footer(7) + b"\x00\x06nothing"


def plain() -> bytes:
    """A whole precopy stream with every plain record, two rounds and two devices."""
    return b"".join(
        (
            header(),
            command(1),
            command(2, u32(1)),
            start(block_list() + eos()),
            part(
                zero(0, "pc.ram")
                + b"".join(zero(page) for page in range(1, 5))
                + normal(5)
                + normal(6)
                + normal(9)
                + normal(0, "/rom@etc/acpi/tables", 100)
                + eos()
            ),
            # CONTINUE goes on from the section before.
            part(zero(1) + normal(2, None, 101) + eos()),
            end(normal(5, "pc.ram", 102) + normal(6, None, 103) + eos()),
            full(7, "timer", TRICKY),
            full(9, "0000:00:1f.2/ahci", bytes(1000)),
            b"\x00",
            description([("timer", len(TRICKY)), ("0000:00:1f.2/ahci", 1000)]),
        )
    )


def postcopy() -> bytes:
    """Precopy, then the package and pages behind it; no vmdescription."""
    package = b"".join(
        (
            command(4),
            full(7, "timer", TRICKY),
            full(9, "cpu", bytes(64)),
            command(2, u32(3)),
            command(5),
        )
    )
    discard = bytes([0]) + str8("pc.ram") + b"\0" + u64(0) + u64(PAGE)
    return b"".join(
        (
            header(),
            command(3, u64(PAGE) + u64(PAGE)),
            start(block_list() + eos()),
            part(normal(3, "pc.ram") + eos()),
            command(6, discard),
            command(2, u32(2)),
            command(7, u32(len(package))),
            package,
            command(2, u32(4)),
            part(normal(0) + eos()),
            end(eos()),
            b"\x00",
        )
    )


def multifd_hello(channel: int) -> bytes:
    return u32(0x11223344) + u32(1) + bytes(16) + bytes([channel]) + bytes(39)


def multifd_packet(
    number: int,
    normal_pages: Sequence[int] = (),
    zero_pages: Sequence[int] = (),
    payload: bytes = b"",
    *,
    idstr: str = "pc.ram",
    flags: int = 0,
    size: int | None = None,
) -> bytes:
    """``size``: next_packet_size, where it is not the payload's."""
    head = struct.pack(
        ">IIIIIIQI4x24x256s",
        0x11223344,
        1,
        flags,
        128,
        len(normal_pages),
        len(payload) if size is None else size,
        number,
        len(zero_pages),
        idstr.encode(),
    )
    offsets = b"".join(u64(page * PAGE) for page in (*normal_pages, *zero_pages))
    return head + offsets.ljust(8 * 128, b"\0") + payload
