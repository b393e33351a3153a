# SPDX-License-Identifier: Apache-2.0
"""What the demo's guest carries along: a state stream of its own beside the vCPU's.

It tells the destination what the guest was doing and how far it had come when it was paused, so
that the far end can check heartbeats and writes without a word from the near one.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from vmth.errors import GuestError
from vmth.guest import StateStream
from vmth.guests.machine import VCPUS_MAX

__all__ = [
    "RECORD_BYTES",
    "STREAM_NAME",
    "STREAM_VERSION",
    "TravelRecord",
    "from_stream",
    "to_stream",
]

STREAM_NAME = "vmth-demo"
STREAM_VERSION = 1
_MAX_BYTES = 4096
RECORD_BYTES = 512  #: for a forecast: what a record takes, or little less

_U63 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Text = Annotated[str, msgspec.Meta(max_length=256)]


class TravelRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Taken while the source guest is paused. Times are CLOCK_REALTIME ns of the source's host.
    ``other_beats``: of the vCPUs after the first."""

    guest: _Text
    content: _Text
    workload: _Text
    rate_bps: _U63
    working_set_bytes: _U63
    seed: Annotated[int, msgspec.Meta(ge=0)]
    jump: tuple[_U63, _U63] | None
    beats: _U63
    last_beat_at_ns: _U63
    out_of_order: _U63
    running_ns: _U63
    rate_reached_bps: float
    other_beats: Annotated[tuple[_U63, ...], msgspec.Meta(max_length=VCPUS_MAX - 1)] = ()


_decoder = msgspec.json.Decoder(TravelRecord)


def to_stream(record: TravelRecord) -> StateStream:
    return StateStream(STREAM_NAME, STREAM_VERSION, msgspec.json.encode(record))


def from_stream(stream: StateStream) -> TravelRecord:
    """Raises GuestError for another version and for bytes that are no record."""
    if stream.version != STREAM_VERSION:
        raise GuestError(
            f"state stream {STREAM_NAME}: received version {stream.version}, "
            f"allowed {STREAM_VERSION}"
        )
    if len(stream.data) > _MAX_BYTES:
        raise GuestError(
            f"state stream {STREAM_NAME}: received {len(stream.data)} bytes, allowed {_MAX_BYTES}"
        )
    try:
        return _decoder.decode(stream.data)
    except msgspec.DecodeError as error:
        raise GuestError(f"state stream {STREAM_NAME}: {error}") from error
