# SPDX-License-Identifier: Apache-2.0
"""The destination's end of a demonstration: take in one guest, let it run on, check it.

The same code serves ``vmth demo --receive`` and the destination process of a local demonstration.
What is checked comes from the guest itself: the heartbeats that it counted, and a counter for
every page that it wrote. The record that travelled with it says how far it had come at the source.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from vmth.demo.check import GuestCheckReport, check_arrival
from vmth.demo.guests import ArrivingGuest, vcpus_of
from vmth.demo.record import TravelRecord
from vmth.demo.settings import ArrivalSettings
from vmth.errors import CancelledError
from vmth.guest import Guest
from vmth.guests.spawn import ReadyHolder, choose_guest, spawn_destination
from vmth.handshake import Incoming
from vmth.listener import Listener
from vmth.meter import MoverCost, MoverMeter
from vmth.options import WIRE_PAGE_BYTES, ReceiveOptions
from vmth.received import ReceiveResult
from vmth.reuse.report import FileReused, reused_of
from vmth.reuse.warm import IndexProgress
from vmth.uri import parse_endpoint

__all__ = ["Arrival", "receive_one"]


class Arrival(msgspec.Struct, frozen=True):
    """One guest that came and was checked. ``heartbeat_gap_ns``: from the last beat at the source
    to the first here, by both hosts' CLOCK_REALTIME; None when one of them never beat."""

    session_id: str
    peer: str
    guest: str
    guest_reason: str
    was_running: bool
    verified: bool
    verified_scope: str
    digest: str
    memory_bytes: int
    wire_bytes: int
    bytes_compared: int
    heartbeat_gap_ns: int | None
    record: TravelRecord
    check: GuestCheckReport
    cost: MoverCost
    fallbacks: tuple[str, ...]
    reused: tuple[FileReused, ...] = ()
    notes: tuple[str, ...] = ()


def receive_one(
    uri: str,
    settings: ArrivalSettings,
    options: ReceiveOptions,
    *,
    source_memory: Sequence[int] = (),
    on_listening: Callable[[Listener], None] = lambda _: None,
    on_running: Callable[[ReceiveResult], None] = lambda _: None,
    on_indexing: Callable[[IndexProgress], None] = lambda _: None,
    ended: threading.Event | None = None,
) -> Arrival:
    """Listen at ``uri``, take in one guest of a demonstration, let it run on, check it and end it.

    ``source_memory``: see ArrivingGuest. Raises what ``vmth.receive`` raises, and GuestError when
    the guest cannot be asked; no guest is left behind then. A failed check raises nothing: it
    stands in ``check``. Files to reuse are indexed first (``on_indexing``). To end the wait from
    another thread, put a CancelledError into the listener's ``outcomes``; ``ended`` cuts the time
    short that the guest runs on.
    """
    holder: ReadyHolder
    made: list[ArrivingGuest] = []
    reasons: list[str] = []

    def make_guest(incoming: Incoming) -> Guest:
        kind, reason = choose_guest(settings.guest or incoming.guest.get("kind") or None)
        guest = ArrivingGuest(
            spawn_destination(kind, incoming.blocks, holder=holder, vcpus=vcpus_of(incoming.guest)),
            source_memory,
        )
        made.append(guest)
        reasons.append(reason)
        return guest

    with contextlib.ExitStack() as resources:
        warm = resources.enter_context(settings.reuse.open(on_indexing))
        options = replace(options, reuse=warm.sources)
        resources.callback(_end, made)
        holder = ReadyHolder()  # started before a guest comes, as a host has its hypervisor ready
        resources.callback(holder.close)
        listener = resources.enter_context(
            Listener(parse_endpoint(uri, listening=True), make_guest, options)
        )
        on_listening(listener)
        with MoverMeter() as meter:
            result = _wait(listener)
        on_running(result)
        guest = result.guest
        assert isinstance(guest, ArrivingGuest) and guest.record is not None
        (ended or threading.Event()).wait(settings.run_on_ns / 1e9)
        gap_ns, check = check_arrival(guest)
        return Arrival(
            session_id=result.session_id,
            peer=result.peer,
            guest=guest.holder.kind,
            guest_reason=reasons[made.index(guest)],
            was_running=result.was_running,
            verified=result.verified,
            verified_scope=result.verified_scope,
            digest=result.digest,
            memory_bytes=result.memory_bytes,
            wire_bytes=result.wire_bytes,
            bytes_compared=guest.bytes_compared,
            heartbeat_gap_ns=gap_ns,
            record=guest.record,
            check=check,
            cost=meter.cost,
            fallbacks=(*listener.fallbacks, *result.fallbacks),
            reused=reused_of(warm.files, result.reused, WIRE_PAGE_BYTES),
            notes=tuple(warm.notes),
        )


def _end(guests: Sequence[ArrivingGuest]) -> None:
    for guest in guests:
        guest.holder.shutdown()


def _wait(listener: Listener) -> ReceiveResult:
    """The first session's guest. One that arrives while the wait is being ended is here all the
    same, and nowhere else: it is taken."""
    try:
        return listener.wait_for_guest()
    except (KeyboardInterrupt, CancelledError):
        listener.close()
        with contextlib.suppress(queue.Empty):
            outcome = listener.outcomes.get_nowait()
            if isinstance(outcome, ReceiveResult):
                return outcome
        raise
