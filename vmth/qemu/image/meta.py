# SPDX-License-Identifier: Apache-2.0
"""What an image says about its VM: the META record, JSON with a schema and bounds. No I/O."""

from __future__ import annotations

from typing import Any

import msgspec

from vmth.errors import RefusedError, StreamError
from vmth.qemu.image.layout import MAX_BLOCKS, MAX_META_BYTES, MAX_PAGES, damaged
from vmth.qemu.ram import MAX_IDSTR_BYTES

__all__ = ["Meta", "SavedBlock", "read_meta", "write_meta"]

MAX_TEXT_BYTES = 4096
#: The kernels hash pages of these sizes; QEMU's target pages are 4 KiB on what we know.
MIN_PAGE_BYTES = 4096
MAX_PAGE_BYTES = 65536


class SavedBlock(msgspec.Struct, frozen=True):
    """One ramblock, in the order of the stream's list; lengths in bytes."""

    idstr: str
    used_length: int


class Meta(msgspec.Struct, frozen=True):
    """Keys that a reader does not know are passed over; a key never changes its meaning."""

    machine: str  #: machine type; the restoring QEMU must have it
    qemu_version: str
    vmth_version: str
    created_unix_ns: int
    uuid: str  #: of the VM, empty where it has none
    name: str  #: of the VM, empty where it has none
    running: bool  #: it ran when it was saved, and runs after a restore
    live: bool  #: it ran while memory was saved: a page may be stored more than once
    page_bytes: int
    blocks: tuple[SavedBlock, ...]
    facts: dict[str, Any] = {}  #: vmth.qemu.facts of the source, for the check at the restore

    def npages(self, block: int) -> int:
        return -(-self.blocks[block].used_length // self.page_bytes)

    @property
    def memory_bytes(self) -> int:
        return sum(block.used_length for block in self.blocks)


def write_meta(meta: Meta) -> bytes:
    """Raises RefusedError for a VM that cannot be described, for example too many blocks."""
    try:
        _check(meta, "META")
        raw = msgspec.json.encode(meta)
    except (StreamError, UnicodeError, TypeError, OverflowError) as error:
        raise RefusedError(f"this VM cannot be saved: {error}") from None
    if len(raw) > MAX_META_BYTES:
        raise RefusedError(
            f"this VM cannot be saved: {len(raw)} bytes about it, allowed {MAX_META_BYTES}"
        )
    return raw


def read_meta(raw: bytes | memoryview, where: str) -> Meta:
    """Raises StreamError for anything but what ``write_meta`` allows."""
    try:
        meta = msgspec.json.decode(raw, type=Meta)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise StreamError(f"{where}: {error}") from None
    _check(meta, where)
    return meta


def _check(meta: Meta, where: str) -> None:
    for name in ("machine", "qemu_version", "vmth_version", "uuid", "name"):
        nbytes = len(getattr(meta, name).encode())
        if nbytes > MAX_TEXT_BYTES:
            damaged(where, f"bytes of {name}", nbytes, f"at most {MAX_TEXT_BYTES}")
    page_bytes = meta.page_bytes
    if not MIN_PAGE_BYTES <= page_bytes <= MAX_PAGE_BYTES or page_bytes & (page_bytes - 1):
        damaged(
            where,
            "page bytes",
            page_bytes,
            f"a power of two, {MIN_PAGE_BYTES} to {MAX_PAGE_BYTES}",
        )
    if not 1 <= len(meta.blocks) <= MAX_BLOCKS:
        damaged(where, "blocks", len(meta.blocks), f"1 to {MAX_BLOCKS}")
    if len({block.idstr for block in meta.blocks}) != len(meta.blocks):
        damaged(where, "block names", "one twice", "each once")
    npages = 0
    for block in meta.blocks:
        if not 1 <= len(block.idstr.encode()) <= MAX_IDSTR_BYTES:
            damaged(where, "block name", repr(block.idstr), f"1 to {MAX_IDSTR_BYTES} bytes")
        if block.used_length < 0 or block.used_length % page_bytes:
            damaged(where, f"length of block {block.idstr!r}", block.used_length, "whole pages")
        npages += block.used_length // page_bytes
    if npages > MAX_PAGES:
        damaged(where, "pages of all blocks", npages, f"at most {MAX_PAGES}")
    if not 0 <= meta.created_unix_ns < 1 << 64:
        damaged(where, "time", meta.created_unix_ns, "0 to 2**64 - 1")
