# SPDX-License-Identifier: Apache-2.0
"""How two ends meet: preambles over sockets, the offer, and what a destination checks in it."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from vmth import __version__
from vmth.channel.forms import FORM_NAMES
from vmth.channel.reuse import REUSE
from vmth.channel.sockets import LinkOptions, dial
from vmth.errors import ChannelError, RefusedError, StreamError
from vmth.guest import CanTakePages, Guest
from vmth.options import WIRE_PAGE_BYTES, MigrateOptions
from vmth.types import BlockFlags, Gpa, Mapping, RamBlock
from vmth.uri import Endpoint
from vmth.wire.framing import (
    PREAMBLE_BYTES,
    PREAMBLE_REPLY_BYTES,
    Preamble,
    PreambleReply,
    PreambleStatus,
)
from vmth.wire.messages import (
    Accept,
    BlockInfo,
    HandedOn,
    HashAlgorithm,
    Message,
    Offer,
    Refuse,
    RefuseCode,
    Role,
)

__all__ = [
    "FEATURES",
    "HANDED_ON",
    "PACKED_STATE",
    "SCOPE_STREAM",
    "SEAL_AHEAD",
    "WIRE_PAGE_BYTES",
    "Incoming",
    "OfferRefused",
    "accepted_scope",
    "agreed_scope",
    "check_blocks",
    "check_offer",
    "common_features",
    "compare_blocks",
    "hear_handed_on",
    "make_offer",
    "open_connection",
    "open_page_channels",
    "read_exactly",
    "read_preamble",
    "receive_before",
]

#: Page forms beyond normal, zero and hole that this release speaks.
FEATURES: tuple[str, ...] = FORM_NAMES
#: Offered: the source may be let go although guest memory was verified as handed on to the program
#: that runs the guest, not in that program's memory. Accepted: that is how far the proof reaches.
SCOPE_STREAM = "scope-stream"
#: Offered: the source keeps dedup and delta away from blocks that the destination hands on.
#: Accepted: HandedOn follows and names them. Without it such a destination takes neither form.
HANDED_ON = "handed-on"
#: Offered: Seal may come, behind LastBarrier, before the last pages have landed. Accepted: it waits
#: for them there, which saves a round trip of downtime.
SEAL_AHEAD = "seal-ahead"
#: Offered: pieces of state may come as PackedState. Accepted: they are taken so too.
PACKED_STATE = "packed-state"
#: Page connections that are being made; a destination takes no more than some dozens at a time.
OPENED_AT_ONCE = 8
#: Bits of BlockFlags that a peer must know.
_CRITICAL_FLAGS = 0xFFFF0000
_KNOWN_FLAGS = int(BlockFlags.ROM | BlockFlags.SHARED | BlockFlags.DISCARDABLE)


@dataclass(frozen=True, slots=True)
class Incoming:
    """What a destination learns before it makes a guest. ``blocks`` have no mapping yet."""

    session_id: bytes
    blocks: tuple[RamBlock, ...]
    guest: dict[str, str]
    mode: int
    peer: str

    @property
    def memory_bytes(self) -> int:
        return sum(block.used_length for block in self.blocks)


class OfferRefused(RefusedError):  # noqa: N818 - states a fact, as ChannelClosed does
    """Raised inside the destination; ``message`` is what the source is told."""

    def __init__(self, code: RefuseCode, reason: str) -> None:
        super().__init__(reason)
        self.message = Refuse(code, reason)


def read_exactly(sock: socket.socket, nbytes: int) -> bytes:
    """Raises ChannelError when the peer ends early or is silent for the socket's timeout."""
    data = bytearray()
    while len(data) < nbytes:
        try:
            piece = sock.recv(nbytes - len(data))
        except OSError as error:
            raise ChannelError(f"handshake: {error}") from error
        if not piece:
            raise ChannelError(f"handshake: the peer closed after {len(data)} of {nbytes} bytes")
        data += piece
    return bytes(data)


def open_connection(
    endpoint: Endpoint, options: LinkOptions, preamble: Preamble, index: int
) -> socket.socket:
    """Dial and exchange preambles. Raises ChannelError, StreamError or RefusedError."""
    return _open_timed(endpoint, options, preamble, index)[0]


def open_page_channels(
    endpoint: Endpoint, options: LinkOptions, session_id: bytes, token: bytes, channels: int
) -> list[tuple[socket.socket, int]]:
    """All of them, several at once: each takes two round trips. By index; with each the ns that its
    preamble took there and back. Raises what the first that failed raises, with none left open."""

    def open_one(index: int) -> tuple[socket.socket, int]:
        preamble = Preamble(Role.PAGE, session_id, index, token)
        return _open_timed(endpoint, options, preamble, index + 1)

    if channels == 1:
        return [open_one(0)]
    pool = ThreadPoolExecutor(min(channels, OPENED_AT_ONCE), "vmth-dial")
    opening = [pool.submit(open_one, index) for index in range(channels)]
    try:
        wait(opening, return_when=FIRST_EXCEPTION)
    finally:
        pool.shutdown(cancel_futures=True)
    try:
        return [future.result() for future in sorted(opening, key=Future.cancelled)]
    except BaseException:
        for future in opening:
            if not future.cancelled() and future.exception() is None:
                future.result()[0].close()
        raise


def _open_timed(
    endpoint: Endpoint, options: LinkOptions, preamble: Preamble, index: int
) -> tuple[socket.socket, int]:
    """``open_connection``, and the ns that the preamble took there and back."""
    sock = dial(endpoint, options, index)
    try:
        sock.settimeout(options.connect_timeout_s)
        try:
            said_ns = time.monotonic_ns()
            sock.sendall(preamble.pack())
            reply = PreambleReply.unpack(read_exactly(sock, PREAMBLE_REPLY_BYTES))
            trip_ns = time.monotonic_ns() - said_ns
        except OSError as error:
            if isinstance(error, ChannelError):
                raise
            raise ChannelError(f"{endpoint.display}: handshake: {error}") from error
        except StreamError as error:
            raise RefusedError(f"{endpoint.display} is not a vmth destination: {error}") from error
        _check_reply(endpoint, preamble, reply)
    except BaseException:
        sock.close()
        raise
    return sock, trip_ns


def _check_reply(endpoint: Endpoint, preamble: Preamble, reply: PreambleReply) -> None:
    if reply.status is PreambleStatus.OK:
        return
    if reply.status is PreambleStatus.VERSION:
        raise RefusedError(
            f"{endpoint.display} speaks protocol versions {reply.version_min} to "
            f"{reply.version_max}, we speak {preamble.version_min} to {preamble.version_max}"
        )
    raise RefusedError(f"{endpoint.display} refused the connection: {reply.status.name.lower()}")


def receive_before(sock: socket.socket, nbytes: int, deadline_s: float) -> bytes:
    """One recv() of a peer that has until ``deadline_s`` (time.monotonic(); infinity: for ever) for
    all that it has to say, however small its pieces. Raises ChannelError past that."""
    left_s = deadline_s - time.monotonic()
    try:
        if left_s <= 0:
            raise TimeoutError("timed out")
        sock.settimeout(None if left_s == math.inf else left_s)
        return sock.recv(nbytes)
    except OSError as error:
        raise ChannelError(f"handshake: {error}") from error


def read_preamble(sock: socket.socket, deadline_s: float) -> Preamble:
    """At the destination: read and check; PreambleError carries the status to answer. Raises
    ChannelError when it is not whole by ``deadline_s`` (as for ``receive_before``)."""
    data = b""
    while len(data) < PREAMBLE_BYTES:
        piece = receive_before(sock, PREAMBLE_BYTES - len(data), deadline_s)
        if not piece:
            raise ChannelError(f"handshake: the peer closed after {len(data)} of {PREAMBLE_BYTES}")
        data += piece
    return Preamble.unpack(data)


def check_blocks(blocks: Sequence[RamBlock]) -> None:
    """What our own guest offers. Raises RefusedError naming the block."""
    if not blocks:
        raise RefusedError("the guest has no ramblock; allowed: 1 and more")
    seen: set[str] = set()
    for block in blocks:
        where = f"ramblock {block.idstr!r}"
        if block.idstr in seen:
            raise RefusedError(f"{where} stands twice in the block table")
        seen.add(block.idstr)
        if block.tracking_page_size != WIRE_PAGE_BYTES:
            raise RefusedError(
                f"{where}: tracking page size {block.tracking_page_size}, allowed {WIRE_PAGE_BYTES}"
            )
        if block.used_length <= 0 or block.used_length % WIRE_PAGE_BYTES:
            raise RefusedError(
                f"{where}: length {block.used_length}, allowed positive multiples of "
                f"{WIRE_PAGE_BYTES}"
            )


def make_offer(
    session_id: bytes,
    hash_seed: int,
    blocks: Sequence[RamBlock],
    options: MigrateOptions,
    guest: dict[str, str],
    features: Sequence[str] = (),
) -> Offer:
    """``features``: beyond FEATURES, what this guest's source offers."""
    return Offer(
        session_id=session_id,
        mode=options.mode,
        page_size=WIRE_PAGE_BYTES,
        hash_algorithm=HashAlgorithm.XXH3_128 if options.digest else HashAlgorithm.NONE,
        hash_seed=hash_seed,
        channels=options.channels,
        blocks=[
            BlockInfo(
                block.idstr,
                block.used_length,
                block.max_length or block.used_length,
                block.gpa,
                block.tracking_page_size,
                block.backing_page_size,
                int(block.flags),
                block.numa_node,
            )
            for block in blocks
        ],
        features=[*_offered(options), HANDED_ON, PACKED_STATE, *features],
        audit=options.audit,
        peer_timeout_ms=int(options.peer_timeout_s * 1000),
        vmth_version=__version__,
        guest=guest,
    )


def _offered(options: MigrateOptions) -> list[str]:
    """A destination tells what it has where reuse is offered: not for a source that will not use
    it. Without the digest nothing would tell that a page was missed, and an audit comes before its
    seal: then the seal waits here."""
    forms = [name for name in FEATURES if name != REUSE or name in options.forms]
    return [*forms, SEAL_AHEAD] if options.digest and not options.audit else forms


def accepted_scope(offer: Offer, accept: Accept) -> str:
    """How far the destination's digest reaches. Raises StreamError if it accepts what was not
    offered."""
    unasked = sorted(set(accept.features) - set(offer.features))
    if unasked:
        raise StreamError(
            f"Accept.features: received {', '.join(unasked)}, allowed "
            f"{', '.join(offer.features) or 'none'}"
        )
    return "stream" if SCOPE_STREAM in accept.features else "memory"


def hear_handed_on(receive: Callable[[], Message], accept: Accept, nblocks: int) -> Sequence[int]:
    """At the source: blocks of which the destination keeps no page, as it tells behind its Accept.
    Raises StreamError for anything else, and what ``receive`` raises."""
    if HANDED_ON not in accept.features:
        return ()
    told = receive()
    if not isinstance(told, HandedOn):
        raise StreamError(f"received {type(told).__name__}, allowed HandedOn")
    if told.blocks and told.blocks[-1] >= nblocks:
        raise StreamError(
            f"HandedOn.blocks: received {told.blocks[-1]}, allowed 0 to {nblocks - 1}"
        )
    return told.blocks


def agreed_scope(guest: Guest, offer: Offer) -> str:
    """At the destination: how far its digest will prove that memory is right. Raises
    OfferRefused."""
    if not isinstance(guest, CanTakePages):
        return "memory"
    if offer.audit:
        raise OfferRefused(
            RefuseCode.FEATURES,
            "audit: received on, allowed off: guest memory is another program's",
        )
    scope = guest.verified_scope
    if scope == "stream" and SCOPE_STREAM not in offer.features:
        raise OfferRefused(
            RefuseCode.FEATURES,
            f"features: received {offer.features}, allowed with {SCOPE_STREAM!r}: guest memory is "
            "verified as handed on, not in place",
        )
    return scope


def common_features(offer: Offer) -> list[str]:
    """Of what is offered, what this release speaks: a destination's answer."""
    return [name for name in (*FEATURES, SEAL_AHEAD, PACKED_STATE) if name in offer.features]


def check_offer(offer: Offer, preamble: Preamble, max_memory_bytes: int, peer: str) -> Incoming:
    """What can be judged before a guest is made. Raises OfferRefused."""
    if offer.session_id != preamble.session_id:
        raise OfferRefused(
            RefuseCode.POLICY,
            f"session id: the preamble says {preamble.session_id.hex()}, "
            f"the offer {offer.session_id.hex()}",
        )
    if offer.page_size != WIRE_PAGE_BYTES:
        raise OfferRefused(
            RefuseCode.PAGE_SIZE,
            f"page size: received {offer.page_size}, allowed {WIRE_PAGE_BYTES}",
        )
    for row in offer.blocks:
        unknown = row.flags & _CRITICAL_FLAGS & ~_KNOWN_FLAGS
        if unknown:
            raise OfferRefused(
                RefuseCode.BLOCKS,
                f"ramblock {row.idstr!r}: critical flags received {unknown:#x}, allowed none",
            )
        if row.page_size != WIRE_PAGE_BYTES or row.used_length % WIRE_PAGE_BYTES:
            raise OfferRefused(
                RefuseCode.PAGE_SIZE,
                f"ramblock {row.idstr!r}: received {row.used_length} bytes in pages of "
                f"{row.page_size}, allowed whole pages of {WIRE_PAGE_BYTES}",
            )
    if len({row.idstr for row in offer.blocks}) != len(offer.blocks):
        raise OfferRefused(RefuseCode.BLOCKS, "block table: one name stands there twice")
    incoming = Incoming(
        offer.session_id,
        tuple(_as_block(row) for row in offer.blocks),
        offer.guest,
        offer.mode,
        peer,
    )
    if max_memory_bytes and incoming.memory_bytes > max_memory_bytes:
        raise OfferRefused(
            RefuseCode.MEMORY,
            f"guest memory: received {incoming.memory_bytes} bytes, allowed {max_memory_bytes}",
        )
    return incoming


def _as_block(row: BlockInfo) -> RamBlock:
    return RamBlock(
        idstr=row.idstr,
        used_length=row.used_length,
        gpa=Gpa(row.gpa),
        mapping=Mapping(),
        max_length=row.max_length,
        tracking_page_size=row.page_size,
        backing_page_size=row.backing_page_size,
        flags=BlockFlags(row.flags & _KNOWN_FLAGS),
        numa_node=row.numa_node,
    )


def compare_blocks(offered: Sequence[RamBlock], made: Sequence[RamBlock]) -> None:
    """The guest that make_guest made must have the offered table. Raises OfferRefused."""
    if len(offered) != len(made):
        raise OfferRefused(
            RefuseCode.BLOCKS, f"block table: received {len(offered)} blocks, ours has {len(made)}"
        )
    for theirs, ours in zip(offered, made, strict=True):
        for name in ("idstr", "used_length", "gpa", "tracking_page_size"):
            if getattr(theirs, name) != getattr(ours, name):
                raise OfferRefused(
                    RefuseCode.BLOCKS,
                    f"ramblock {theirs.idstr!r}: {name} received {getattr(theirs, name)}, "
                    f"ours is {getattr(ours, name)}",
                )
