# SPDX-License-Identifier: Apache-2.0
"""Bounds of every message field, as one table that the encoder and the decoder share.

msgspec has checked the types when this runs; here every number, length and enum is compared with
its bound. ``problem(message)`` says what is wrong, as in "Offer.channels: received 65, allowed
1 to 64"; the decoder makes a StreamError of it, the encoder a UsageError. A field without a row
would be unchecked: a test compares the table with the structs.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from vmth.wire import messages as m

__all__ = [
    "ID_BYTES",
    "MAX_BLOCKS",
    "MAX_CHANNELS",
    "MAX_DIGEST_BYTES",
    "MAX_FEATURES",
    "MAX_IDSTR_BYTES",
    "MAX_REUSE_ENTRIES",
    "MAX_STATE_CHUNK_BYTES",
    "MAX_TEXT_BYTES",
    "RULES",
    "problem",
]

ID_BYTES = 16  #: session ids, receiver ids and tokens
MAX_BLOCKS = 4096
MAX_CHANNELS = 64
MAX_FEATURES = 64
MAX_IDSTR_BYTES = 255
MAX_STATE_CHUNK_BYTES = 1 << 20
MAX_DIGEST_BYTES = 1 << 20
MAX_REUSE_ENTRIES = 1 << 26  #: as in csrc/include/vmth/content_filter.h, like the next two
REUSE_PART_ENTRIES = 16384
REUSE_PART_BYTES = 61440
MAX_TEXT_BYTES = 4096  #: reasons and details, for people

#: Returns None, or (received, allowed) in words. The second argument is the whole message.
Check: TypeAlias = Callable[[Any, Any], tuple[str, str] | None]

U32 = (1 << 32) - 1
U64 = (1 << 64) - 1


def between(low: int, high: int) -> Check:
    def check(value: int, _: object) -> tuple[str, str] | None:
        return None if low <= value <= high else (str(value), f"{low} to {high}")

    return check


def one_of(kind: type[enum.IntEnum]) -> Check:
    members = {member.value for member in kind}
    allowed = ", ".join(f"{member.value} ({member.name})" for member in kind)

    def check(value: int, _: object) -> tuple[str, str] | None:
        return None if value in members else (str(value), allowed)

    return check


def power_of_two(low: int, high: int) -> Check:
    def check(value: int, _: object) -> tuple[str, str] | None:
        if low <= value <= high and value & (value - 1) == 0:
            return None
        return str(value), f"a power of two from {low} to {high}"

    return check


def size(low: int, high: int) -> Check:
    """Bytes of a bytes field, or of a str field as UTF-8."""

    def check(value: bytes | str, _: object) -> tuple[str, str] | None:
        length = len(value.encode() if isinstance(value, str) else value)
        if low <= length <= high:
            return None
        return f"{length} bytes", f"{low} bytes" if low == high else f"{low} to {high} bytes"

    return check


def anything(_value: object, _message: object) -> None:
    """A bool: its type is all there is to check."""


def _max_length(value: int, block: m.BlockInfo) -> tuple[str, str] | None:
    if value == 0 or block.used_length <= value <= U64:
        return None
    return str(value), f"0 or at least used_length {block.used_length}"


def _used_length(value: int, block: m.BlockInfo) -> tuple[str, str] | None:
    if not 0 < value <= U64 - block.gpa + 1:
        return str(value), f"1 to {U64 - block.gpa + 1} from gpa {block.gpa:#x} on"
    if value % block.page_size:  # in bounds: its row stands before
        return str(value), f"multiples of page_size {block.page_size}"
    return None


def _blocks(value: Sequence[m.BlockInfo], _: object) -> tuple[str, str] | None:
    if not 1 <= len(value) <= MAX_BLOCKS:
        return f"{len(value)} blocks", f"1 to {MAX_BLOCKS}"
    seen: set[str] = set()
    for block in value:
        if block.idstr in seen:
            return f"idstr {block.idstr!r} twice", "each idstr once"
        seen.add(block.idstr)
    return None


def _features(value: Sequence[str], _: object) -> tuple[str, str] | None:
    if len(value) > MAX_FEATURES:
        return f"{len(value)} features", f"at most {MAX_FEATURES}"
    longest = max((len(feature.encode()) for feature in value), default=1)
    if longest > 64 or "" in value:
        return f"a feature of {0 if '' in value else longest} bytes", "1 to 64 bytes each"
    return None


def _guest(value: dict[str, str], _: object) -> tuple[str, str] | None:
    if len(value) > 64:
        return f"{len(value)} entries", "at most 64"
    for key, text in value.items():
        if len(key.encode()) > 64 or len(text.encode()) > 1024:
            return (
                f"key of {len(key.encode())}, value of {len(text.encode())} bytes",
                "keys up to 64, values up to 1024 bytes",
            )
    return None


def _digests(value: bytes, reply: m.DigestReply) -> tuple[str, str] | None:
    steps = -(-reply.npages // reply.step)  # step is in bounds: its row stands before
    if len(value) == 16 * steps:
        return None
    return f"{len(value)} bytes", f"16 for each of {steps} steps"


def _step(value: int, request: m.DigestRequest | m.DigestReply) -> tuple[str, str] | None:
    if not 1 <= value <= U64:
        return str(value), f"1 to {U64}"
    steps = -(-request.npages // value)
    if steps <= MAX_DIGEST_BYTES // 16:
        return None
    return f"{steps} steps", f"at most {MAX_DIGEST_BYTES // 16}"


def _rising_blocks(value: Sequence[int], _: object) -> tuple[str, str] | None:
    if len(value) > MAX_BLOCKS:
        return f"{len(value)} blocks", f"at most {MAX_BLOCKS}"
    for before, block in zip([-1, *value], value, strict=False):
        if not before < block < MAX_BLOCKS:
            return f"{block} after {before}", f"rising, below {MAX_BLOCKS}"
    return None


def _part_count(value: int, part: m.ReusePart) -> tuple[str, str] | None:
    """Only a set of nothing has a part of nothing: parts have an end."""
    least = 0 if part.last else 1
    if least <= value <= REUSE_PART_ENTRIES:
        return None
    return str(value), f"{least} to {REUSE_PART_ENTRIES}"


_ID = size(ID_BYTES, ID_BYTES)
_U32 = between(0, U32)
_U64 = between(0, U64)
_TEXT = size(0, MAX_TEXT_BYTES)
_VERSION = size(1, 64)
_DIGEST: dict[str, Check] = {"digest_lo": _U64, "digest_hi": _U64, "pages": _U64}
_PAGES: dict[str, Check] = {
    "source": one_of(m.DigestSource),
    "block": between(0, MAX_BLOCKS - 1),
    "page": _U64,
    "npages": between(1, U64),
    "step": _step,
}

#: Every field of every message, in order: a later check may rely on the earlier ones.
RULES: dict[type[m.Message], dict[str, Check]] = {
    m.BlockInfo: {
        "idstr": size(1, MAX_IDSTR_BYTES),
        "gpa": _U64,
        "page_size": power_of_two(4096, 1 << 30),
        "used_length": _used_length,
        "max_length": _max_length,
        "backing_page_size": power_of_two(4096, 16 << 30),
        "flags": _U32,
        "numa_node": between(-1, 65535),
    },
    m.Offer: {
        "session_id": _ID,
        "mode": one_of(m.Mode),
        "page_size": power_of_two(4096, 2 << 20),
        "hash_algorithm": one_of(m.HashAlgorithm),
        "hash_seed": _U64,
        "channels": between(1, MAX_CHANNELS),
        "blocks": _blocks,
        "features": _features,
        "audit": anything,
        "peer_timeout_ms": between(1, 86_400_000),
        "vmth_version": _VERSION,
        "guest": _guest,
    },
    m.Accept: {
        "receiver_id": _ID,
        "token": _ID,
        "features": _features,
        "vmth_version": _VERSION,
    },
    m.Refuse: {"code": one_of(m.RefuseCode), "reason": _TEXT},
    m.RoundDone: {
        "round": _U32,
        "pages": _U64,
        "dirty_pages": _U64,
        "expected_downtime_ns": _U64,
    },
    m.Paused: {"at_ns": _U64, "was_running": anything},
    m.State: {
        "name": size(1, 255),
        "version": _U32,
        "offset": _U64,
        "data": size(0, MAX_STATE_CHUNK_BYTES),
        "last": anything,
    },
    m.Seal: {**_DIGEST, "streams": _U32, "state_bytes": _U64, "state_crc32": _U32},
    m.Sealed: _DIGEST,
    m.Mismatch: _DIGEST,
    m.DigestRequest: _PAGES,
    m.DigestReply: {**_PAGES, "digests": _digests},
    m.Grant: {"receiver_id": _ID},
    m.Running: {"at_ns": _U64},
    m.Released: {},
    m.ReleasedSeen: {},
    m.Abort: {"code": one_of(m.AbortCode), "reason": _TEXT},
    m.Aborted: {"receiver_id": _ID, "reason": _TEXT},
    m.Query: {"session_id": _ID, "receiver_id": _ID},
    m.Answer: {
        "session_id": _ID,
        "receiver_id": _ID,
        "state": one_of(m.AnswerState),
        "detail": _TEXT,
    },
    m.Ping: {"number": _U64},
    m.Pong: {"number": _U64},
    m.HandedOn: {"blocks": _rising_blocks},
    m.LastBarrier: {"count": between(1, U64)},
    m.PackedState: {
        "name": size(1, 255),
        "version": _U32,
        "offset": _U64,
        "frame": size(1, MAX_STATE_CHUNK_BYTES),
        "nbytes": between(1, MAX_STATE_CHUNK_BYTES),
        "last": anything,
    },
    m.ReuseFilter: {"key": size(32, 32), "entries": between(0, MAX_REUSE_ENTRIES)},
    m.ReusePart: {
        "base": _U64,
        "count": _part_count,
        "data": size(0, REUSE_PART_BYTES),
        "last": anything,
    },
}


def problem(message: m.Message) -> str | None:
    """None, or "Message.field: received X, allowed Y" for the first field out of bounds."""
    name = type(message).__name__
    for field, check in RULES[type(message)].items():
        wrong = check(getattr(message, field), message)
        if wrong is not None:
            return f"{name}.{field}: received {wrong[0]}, allowed {wrong[1]}"
    if isinstance(message, m.Offer):
        for index, block in enumerate(message.blocks):
            inner = problem(block)
            if inner is not None:
                return f"Offer.blocks[{index}]: {inner}"
    return None
