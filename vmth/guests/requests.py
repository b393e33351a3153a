# SPDX-License-Identifier: Apache-2.0
"""What a holder is asked and answers: bounded, schema-checked msgpack, one datagram each way.

A connection is a SOCK_SEQPACKET unix socket. Its first request is ``Setup`` (the spawner's
connection), ``Attach`` (a mover) or ``Status`` (anyone who only asks); then each request gets
exactly one reply, in order. File descriptors travel beside the reply to ``Memory`` and
``DirtyStart`` (SCM_RIGHTS). Both ends are the same release of vmth on one machine, so there is no
version negotiation beyond ``HOLDER_PROTOCOL``; a holder that outlived an upgrade refuses the attach
and names both numbers.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from vmth.errors import GuestError
from vmth.guests.machine import VCPUS_MAX

__all__ = [
    "FDS_MAX",
    "HOLDER_PROTOCOL",
    "REQUEST_MAX_BYTES",
    "Ack",
    "Attach",
    "Attached",
    "BlockRow",
    "DirtyFetch",
    "DirtyFetched",
    "DirtyPeek",
    "DirtyPeeked",
    "DirtyRearm",
    "DirtyStart",
    "DirtyStarted",
    "DirtyStop",
    "Failed",
    "Hold",
    "LoadState",
    "Memory",
    "Pause",
    "PauseAtBeat",
    "Prepare",
    "Prepared",
    "Release",
    "Reply",
    "Report",
    "Reported",
    "Request",
    "Resume",
    "SaveState",
    "Saved",
    "Setup",
    "Shutdown",
    "Start",
    "Status",
    "StatusReport",
    "Throttle",
    "VcpuDirty",
    "VcpuPages",
    "Was",
    "decode_reply",
    "decode_request",
    "encode",
]

HOLDER_PROTOCOL = 3
#: The largest datagram either way: a vCPU's state fits many times.
REQUEST_MAX_BYTES = 128 << 10
FDS_MAX = 16

U32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
U63 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
U64 = Annotated[int, msgspec.Meta(ge=0)]  # msgpack has no larger ones
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Vcpus = Annotated[int, msgspec.Meta(ge=1, le=VCPUS_MAX)]
Percent = Annotated[int, msgspec.Meta(ge=0, le=99)]
State = Annotated[bytes, msgspec.Meta(max_length=REQUEST_MAX_BYTES - 1024)]


class _Request(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    pass


class BlockRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One block: as it is to be made, or as it is."""

    idstr: Name
    gpa: U63
    length_bytes: U63


class Setup(_Request, frozen=True):
    """First of all, from the spawner: what to make, with which dirty source (KVM makes its VM for
    one of them), and whom the holder belongs to. ``owner_pid`` 0: nobody, it lives by its leases.
    ``linger_s``: how long it waits without a mover; ``hold_linger_s``: how long a held guest waits,
    whatever becomes of the owner."""

    protocol: U32
    kind: Name
    dirty_source: Name
    blocks: Annotated[list[BlockRow], msgspec.Meta(min_length=1, max_length=8)]
    owner_pid: U32
    linger_s: Annotated[float, msgspec.Meta(ge=0, le=1e9)]
    hold_linger_s: Annotated[float, msgspec.Meta(ge=0, le=1e9)]
    vcpus: Vcpus = 1


class Attach(_Request, frozen=True):
    """First of a new mover: answered by ``Attached`` or ``Failed("busy")``."""

    protocol: U32


class Status(_Request, frozen=True):
    """Read-only, from any connection at any time."""


class Prepare(_Request, frozen=True):
    """Fill an empty guest: content, then the program of a workload."""

    content: Text
    workload: Name
    rate_bps: U63
    working_set_bytes: U63
    seed: U64
    jump: tuple[U63, U63] | None


class Start(_Request, frozen=True):
    """Run the guest that was prepared."""


class Pause(_Request, frozen=True):
    pass


class Resume(_Request, frozen=True):
    pass


class PauseAtBeat(_Request, frozen=True):
    timeout_ns: Annotated[int, msgspec.Meta(ge=0, le=60_000_000_000)]


class SaveState(_Request, frozen=True):
    pass


class LoadState(_Request, frozen=True):
    version: U32
    data: State


class Report(_Request, frozen=True):
    pass


class Throttle(_Request, frozen=True):
    """All vCPUs alike, or each."""

    percents: Annotated[list[Percent], msgspec.Meta(min_length=1, max_length=VCPUS_MAX)]


class VcpuDirty(_Request, frozen=True):
    """Which vCPU dirtied how much?"""


class Hold(_Request, frozen=True):
    pass


class Memory(_Request, frozen=True):
    """Hand out the memfds, one a block, in block-table order."""


class DirtyStart(_Request, frozen=True):
    """Start the dirty source; hands out its bitmaps, one memfd a block."""


class DirtyFetch(_Request, frozen=True):
    """OR what was dirtied into the shared bitmaps; the mover takes it from there and clears
    them."""


class DirtyPeek(_Request, frozen=True):
    """The same of what a fetch would give, which it still does."""


class DirtyRearm(_Request, frozen=True):
    block: U32
    page: U63
    npages: U63


class DirtyStop(_Request, frozen=True):
    pass


class Release(_Request, frozen=True):
    """The guest runs elsewhere, or is to be discarded: free it and exit."""


class Shutdown(_Request, frozen=True):
    """End the guest, whatever it does, and exit."""


Request: TypeAlias = (
    Setup
    | Attach
    | Status
    | Prepare
    | Start
    | Pause
    | Resume
    | PauseAtBeat
    | SaveState
    | LoadState
    | Report
    | Throttle
    | VcpuDirty
    | Hold
    | Memory
    | DirtyStart
    | DirtyFetch
    | DirtyPeek
    | DirtyRearm
    | DirtyStop
    | Release
    | Shutdown
)


class _Reply(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    pass


class Ack(_Reply, frozen=True):
    """Done; nothing to tell."""


class Failed(_Reply, frozen=True):
    """``kind``: "usage", "stream", "guest", "busy", "refused"; the guest is as it was unless the
    text says so."""

    kind: Name
    text: str


class Attached(_Reply, frozen=True):
    """The connection is the mover's."""

    kind: Name
    dirty_source: Name
    blocks: Annotated[list[BlockRow], msgspec.Meta(min_length=1, max_length=8)]
    socket_path: str
    vcpus: Vcpus = 1


class Was(_Reply, frozen=True):
    """Pause: was it running? PauseAtBeat: does it stand at a beat?"""

    value: bool


class Saved(_Reply, frozen=True):
    version: U32
    data: bytes


class Reported(_Reply, frozen=True):
    """BeatReport."""

    beats: int
    first_beat_at_ns: int
    last_beat_at_ns: int
    max_gap_ns: int
    running_ns: int
    out_of_order: int
    other_beats: list[int] = []


class Prepared(_Reply, frozen=True):
    """How memory was filled. ``pages``: pages of each kind of content; ``rate_asked_bps`` 0:
    unpaced or idle; ``control_writes_per_beat``: page writes between two beats."""

    pages: dict[str, int]
    dup_distance_bytes: int
    files_read: int
    file_pages_repeated: int
    rate_asked_bps: int
    writes_per_beat: int
    working_set_pages: int


class VcpuPages(_Reply, frozen=True):
    """Of each vCPU; empty where that is not known."""

    pages: list[int]


class DirtyStarted(_Reply, frozen=True):
    """``rearm``: False where fetch itself re-arms, so that the mover need not ask."""

    rearm: bool


class DirtyFetched(_Reply, frozen=True):
    """``notes``: ``CanNote.notes()`` of the dirty source."""

    notes: list[Text]


class DirtyPeeked(_Reply, frozen=True):
    """``known``: the dirty source can be looked at."""

    known: bool


class StatusReport(_Reply, frozen=True):
    """``phase``: "empty" (no guest in it yet), "prepared", "loaded" (state is in, never ran),
    "running", "paused", "held" (paused, and stays so without a mover). ``ever_ran``: a vCPU ran in
    this holder. ``arrived``: the guest came by LoadState. ``problem``: why it cannot run any more,
    or empty."""

    kind: str
    phase: str
    running: bool
    ever_ran: bool
    arrived: bool
    problem: str
    beats: int
    mover_attached: bool
    memory_bytes: int
    pid: int


Reply: TypeAlias = (
    Ack
    | Failed
    | Attached
    | Was
    | Saved
    | Reported
    | Prepared
    | VcpuPages
    | DirtyStarted
    | DirtyFetched
    | DirtyPeeked
    | StatusReport
)

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(message: Request | Reply) -> bytes:
    """GuestError when it is larger than a datagram may be."""
    data = _encoder.encode(message)
    if len(data) > REQUEST_MAX_BYTES:
        raise GuestError(
            f"{type(message).__name__} of {len(data)} bytes: at most {REQUEST_MAX_BYTES}"
        )
    return data


def decode_request(data: bytes) -> Request:
    """GuestError for anything that is not one well-formed request."""
    if len(data) > REQUEST_MAX_BYTES:
        raise GuestError(f"request of {len(data)} bytes: at most {REQUEST_MAX_BYTES}")
    try:
        return _requests.decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise GuestError(f"not a holder request: {error}") from None


def decode_reply(data: bytes) -> Reply:
    """GuestError for anything that is not one well-formed reply."""
    try:
        return _replies.decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise GuestError(f"not a holder reply: {error}") from None
