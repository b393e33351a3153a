# SPDX-License-Identifier: Apache-2.0
"""What the guest's own counters say after a move, and after a move that failed.

A heartbeat is lost, repeated or skipped if the host saw two that do not follow each other, at
either end; if the number that arrived in memory is not the one that the source saw last (nor that
of a beat on its way); or if the guest's own count and the host's differ where the guest stands at a
beat. A write is lost if a page's counter or the bytes stored last are not what the guest's schedule
calls for.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from vmth.errors import GuestError
from vmth.guests.bystander import check_bystanders
from vmth.guests.check import check
from vmth.guests.client import HolderGuest

if TYPE_CHECKING:
    from vmth.demo.guests import ArrivingGuest, DepartingGuest

__all__ = ["GuestCheckReport", "beats_missing", "check_arrival", "check_at_home"]

_BEAT_TIMEOUT_NS = 10_000_000_000
_POLL_S = 0.001


class GuestCheckReport(msgspec.Struct, frozen=True):
    """``writes_checked`` page writes were made since the guest first ran; ``writes_lost`` of them
    are not in memory, or are there more than once. ``failures`` is empty where all is well."""

    beats: int
    heartbeats_lost: int
    writes_checked: int
    writes_lost: int
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures


def check_arrival(guest: ArrivingGuest) -> tuple[int | None, GuestCheckReport]:
    """(heartbeat gap in ns, report) of a guest that runs here since it arrived; it is paused
    afterwards. Raises GuestError when it cannot be asked or does not beat."""
    record = guest.record
    assert record is not None
    lost = beats_missing(guest.holder.kind, record.beats, guest.beats_in_memory)
    lost += record.out_of_order
    for seen, in_memory in zip(record.other_beats, guest.other_beats_in_memory, strict=True):
        lost += beats_missing(guest.holder.kind, seen, in_memory)
    report = _check(guest.holder, lost, record.beats)
    first_at_ns = guest.holder.beat_report().first_beat_at_ns
    gap_ns = (
        first_at_ns - record.last_beat_at_ns if first_at_ns and record.last_beat_at_ns else None
    )
    return gap_ns, report


def beats_missing(kind: str, seen: int, in_memory: int) -> int:
    """Between what the source's host saw last and what arrived in memory. The micro-VM counts a
    beat in memory two instructions before its host hears of it: paused between them it is one
    ahead, and its next beat is that one, which the host checks."""
    if kind == "kvm" and in_memory == seen + 1:
        return 0
    return abs(seen - in_memory)


def check_at_home(guest: DepartingGuest) -> GuestCheckReport:
    """The same for a source guest that must have gone on running; ``check_arrival``'s errors."""
    return _check(guest.holder, 0, guest.holder.beat_report().beats)


def _check(holder: HolderGuest, heartbeats_lost: int, beats_before: int) -> GuestCheckReport:
    if not (_await_beat(holder, beats_before) and holder.pause_at_beat(_BEAT_TIMEOUT_NS)):
        raise GuestError(
            f"the {holder.kind} guest did not come to a heartbeat within "
            f"{_BEAT_TIMEOUT_NS // 1_000_000_000} s"
        )
    memory, report = holder.views()[0], holder.beat_report()
    found, others = check(memory), check_bystanders(memory, holder.vcpus)
    heartbeats_lost += report.out_of_order + abs(report.beats - found.beats)
    for told, counted in zip(report.other_beats, others.beats, strict=True):
        heartbeats_lost += abs(told - counted)
    failures = [*found.problems, *others.problems]
    if heartbeats_lost:
        failures.append(f"{heartbeats_lost} heartbeats were lost, repeated or skipped")
    return GuestCheckReport(
        beats=report.beats,
        heartbeats_lost=heartbeats_lost,
        writes_checked=found.writes,
        writes_lost=found.lost_writes + found.repeated_writes + others.lost + others.repeated,
        failures=tuple(failures),
    )


def _await_beat(holder: HolderGuest, beats_before: int) -> bool:
    """True when the guest has beaten again; False when it has not for the timeout."""
    give_up_ns = time.monotonic_ns() + _BEAT_TIMEOUT_NS
    while holder.beat_report().beats <= beats_before:
        if time.monotonic_ns() > give_up_ns:
            return False
        time.sleep(_POLL_S)
    return True
