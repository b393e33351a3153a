# SPDX-License-Identifier: Apache-2.0
"""Control messages: what the two ends say to each other beside the pages.

Each message is a frozen msgspec struct; its wire type number stands in ``MESSAGE_TYPES``. A type
with bit 15 set may be ignored by a peer that does not know it, any other unknown type refuses.
docs/protocol.md says who sends what when. Times are CLOCK_REALTIME nanoseconds of the sender and
only informative: no decision rests on another machine's clock.
"""

from __future__ import annotations

import enum

import msgspec

__all__ = [
    "MESSAGE_TYPES",
    "PROTOCOL_VERSION",
    "PROTOCOL_VERSION_MIN",
    "Abort",
    "AbortCode",
    "Aborted",
    "Accept",
    "Answer",
    "AnswerState",
    "BlockInfo",
    "DigestReply",
    "DigestRequest",
    "DigestSource",
    "Grant",
    "HandedOn",
    "HashAlgorithm",
    "LastBarrier",
    "Message",
    "Mismatch",
    "Mode",
    "Offer",
    "PackedState",
    "Paused",
    "Ping",
    "Pong",
    "Query",
    "Refuse",
    "RefuseCode",
    "Released",
    "ReleasedSeen",
    "ReuseFilter",
    "ReusePart",
    "Role",
    "RoundDone",
    "Running",
    "Seal",
    "Sealed",
    "State",
]

PROTOCOL_VERSION = 1
PROTOCOL_VERSION_MIN = 1


class Role(enum.IntEnum):
    """What a connection is for; stands in its preamble. 0 is invalid in every enum."""

    CONTROL = 1
    PAGE = 2
    QUERY = 3
    FAULT = 4


class Mode(enum.IntEnum):
    LIVE = 1
    COLD = 2


class HashAlgorithm(enum.IntEnum):
    """How pages are hashed. NONE: the digest is off, nothing is verified."""

    NONE = 1
    XXH3_128 = 2


class RefuseCode(enum.IntEnum):
    BLOCKS = 1  #: the block tables differ
    PAGE_SIZE = 2
    FEATURES = 3
    MEMORY = 4  #: not enough of it at the destination
    BUSY = 5  #: no room for another session, or this session id is known
    GUEST = 6  #: make_guest raised
    POLICY = 7  #: not allowed here (plaintext beyond loopback, another mode)


class AbortCode(enum.IntEnum):
    CANCELLED = 1
    FAILED = 2
    VERIFICATION = 3
    PROTOCOL = 4
    GUEST = 5
    NOT_CONVERGED = 6


class AnswerState(enum.IntEnum):
    """What a destination says of a session when asked. After ABORTED it will never run."""

    UNKNOWN = 1  #: no record here, or another receiver: proves nothing
    ABORTED = 2
    STARTING = 3  #: in-doubt here too: the guest cannot be asked
    RUNNING = 4


class DigestSource(enum.IntEnum):
    TABLE = 1  #: from the hashes kept when pages landed
    MEMORY = 2  #: computed anew from guest memory (audit)


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all: encoded as a msgpack array of the fields in order."""


class BlockInfo(Message, frozen=True):
    """One row of the block table."""

    idstr: str
    used_length: int
    max_length: int
    gpa: int
    page_size: int
    backing_page_size: int
    flags: int
    numa_node: int


class Offer(Message, frozen=True):
    """Source, first: what is to come."""

    session_id: bytes
    mode: int
    page_size: int
    hash_algorithm: int
    hash_seed: int
    channels: int
    blocks: list[BlockInfo]
    features: list[str]
    audit: bool
    peer_timeout_ms: int
    vmth_version: str
    guest: dict[str, str]


class Accept(Message, frozen=True):
    """Destination: yes; ``token`` binds the page channels to this session."""

    receiver_id: bytes
    token: bytes
    features: list[str]
    vmth_version: str


class Refuse(Message, frozen=True):
    code: int
    reason: str


class HandedOn(Message, frozen=True):
    """Destination, right after an Accept with the feature ``handed-on``: indexes of the blocks
    whose pages it hands on to another program. It does not hold them: no page is based on them."""

    blocks: list[int]


class ReuseFilter(Message, frozen=True):
    """Destination, right after an Accept with the feature ``reuse``: what its files have follows in
    parts, ``entries`` fingerprints at most. ``key`` is that of the content hash."""

    key: bytes
    entries: int


class ReusePart(Message, frozen=True):
    """Destination: ``count`` fingerprints from ``base`` on, which rise through all parts
    (``csrc/include/vmth/content_filter.h``). Rounds begin after the ``last``."""

    base: int
    count: int
    data: bytes
    last: bool


class RoundDone(Message, frozen=True):
    """Source, informative: a round has landed."""

    round: int
    pages: int
    dirty_pages: int
    expected_downtime_ns: int


class Paused(Message, frozen=True):
    """Source: no vCPU runs; ``was_running``: the destination resumes it after the grant."""

    at_ns: int
    was_running: bool


class State(Message, frozen=True):
    """Source: a piece of a state stream; ``data`` belongs at ``offset``, ``last`` closes it."""

    name: str
    version: int
    offset: int
    data: bytes
    last: bool


class PackedState(Message, frozen=True):
    """State whose piece of ``nbytes`` is in one zstd frame, with the feature ``packed-state``."""

    name: str
    version: int
    offset: int
    frame: bytes
    nbytes: int
    last: bool


class LastBarrier(Message, frozen=True):
    """Source, with the feature ``seal-ahead``: the next Seal is of the pages before this barrier,
    counted on each channel from 1, and may come before they do. It is judged when so many have
    come on every channel."""

    count: int


class Seal(Message, frozen=True):
    """Source: all has been sent. ``pages`` = pages with a valid hash (free ones are not);
    ``state_bytes`` and ``state_crc32`` cover the concatenated streams in the order sent."""

    digest_lo: int
    digest_hi: int
    pages: int
    streams: int
    state_bytes: int
    state_crc32: int


class Sealed(Message, frozen=True):
    """Destination: digests equal, state loaded, every resource held."""

    digest_lo: int
    digest_hi: int
    pages: int


class Mismatch(Message, frozen=True):
    """Destination: its own digest differs, or pages are missing. The source may repair and seal
    again."""

    digest_lo: int
    digest_hi: int
    pages: int


class DigestRequest(Message, frozen=True):
    """Source: sub-digests of pages [page, page + npages) of a block, one every ``step`` pages."""

    source: int
    block: int
    page: int
    npages: int
    step: int


class DigestReply(Message, frozen=True):
    """Destination: per step 16 bytes digest (lo, hi little-endian); with step 1 the page hash."""

    source: int
    block: int
    page: int
    npages: int
    step: int
    digests: bytes


class Grant(Message, frozen=True):
    """Source: the right to run passes. It is in the source's journal."""

    receiver_id: bytes


class Running(Message, frozen=True):
    """Destination: the guest runs here (or stays paused as it was at the source)."""

    at_ns: int


class Released(Message, frozen=True):
    """Source: the guest is freed here; the destination's record may go."""


class ReleasedSeen(Message, frozen=True):
    """Destination: heard it. The source's record may go too."""


class Abort(Message, frozen=True):
    """Either: this session is over and the guest stays at the source. Before the grant, or after
    Aborted."""

    code: int
    reason: str


class Aborted(Message, frozen=True):
    """Destination: journaled, it will never run. Only this makes a granted source resume."""

    receiver_id: bytes
    reason: str


class Query(Message, frozen=True):
    """Query connection: what became of the session? Fences a session that is not STARTING."""

    session_id: bytes
    receiver_id: bytes


class Answer(Message, frozen=True):
    session_id: bytes
    receiver_id: bytes
    state: int
    detail: str


class Ping(Message, frozen=True):
    number: int


class Pong(Message, frozen=True):
    number: int


#: Wire type numbers. Never reused. Bit 15 set = may be ignored by a peer that does not know it.
MESSAGE_TYPES: dict[int, type[Message]] = {
    0x0001: Offer,
    0x0002: Accept,
    0x0003: Refuse,
    0x0004: Paused,
    0x0005: State,
    0x0006: Seal,
    0x0007: Sealed,
    0x0008: Mismatch,
    0x0009: DigestRequest,
    0x000A: DigestReply,
    0x000B: Grant,
    0x000C: Running,
    0x000D: Released,
    0x000E: ReleasedSeen,
    0x000F: Abort,
    0x0010: Aborted,
    0x0011: Query,
    0x0012: Answer,
    0x0013: Ping,
    0x0014: Pong,
    0x0015: ReuseFilter,
    0x0016: ReusePart,
    0x0017: HandedOn,
    0x0018: LastBarrier,
    0x0019: PackedState,
    0x8001: RoundDone,
}
