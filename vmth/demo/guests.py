# SPDX-License-Identifier: Apache-2.0
"""The demo's guests: a guest in its holder, with the demo's record as one more state stream.

``DepartingGuest`` writes the record when its state is saved; ``ArrivingGuest`` reads it when the
state is loaded, and compares all bytes then if it was given the source's memory: that is the
moment when both guests stand still and hold the same. Everything else is the holder's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from vmth.demo.compare import compare_memories
from vmth.demo.record import RECORD_BYTES, STREAM_NAME, TravelRecord, from_stream, to_stream
from vmth.errors import GuestError, UsageError
from vmth.guest import DirtySource, StateStream
from vmth.guests.bystander import beats_in_memory
from vmth.guests.client import HolderGuest
from vmth.guests.requests import Prepared
from vmth.guests.schedule import Control, Workload, rate_reached_bps
from vmth.types import Bitmap, RamBlock

__all__ = [
    "ArrivingGuest",
    "DemoGuest",
    "DepartingGuest",
    "duplicate_memory",
    "guest_info",
    "vcpus_of",
]


class DemoGuest:
    """A ``Guest`` with every option, all of it forwarded to ``holder``."""

    def __init__(self, holder: HolderGuest) -> None:
        self.holder = holder

    @property
    def blocks(self) -> Sequence[RamBlock]:
        return self.holder.blocks

    @property
    def dirty(self) -> Sequence[DirtySource]:
        return self.holder.dirty

    def pause(self) -> bool:
        return self.holder.pause()

    def resume(self) -> None:
        self.holder.resume()

    def save_state(self, write: Callable[[StateStream], None]) -> None:
        self.holder.save_state(write)

    def switchover_threads(self) -> Sequence[int]:
        return self.holder.switchover_threads()

    def estimate_state_bytes(self) -> int:
        return self.holder.estimate_state_bytes() + RECORD_BYTES

    def load_state(self, streams: Iterable[StateStream]) -> None:
        self.holder.load_state(streams)

    def release(self) -> None:
        self.holder.release()

    def throttle(self, percent: int) -> None:
        self.holder.throttle(percent)

    def throttle_vcpus(self, percents: Sequence[int]) -> None:
        self.holder.throttle_vcpus(percents)

    def vcpu_dirty_pages(self) -> Sequence[int]:
        return self.holder.vcpu_dirty_pages()

    def populated(self, block: int, page: int, npages: int, out: Bitmap) -> None:
        self.holder.populated(block, page, npages, out)

    def hold(self) -> None:
        self.holder.hold()

    def is_running(self) -> bool:
        return self.holder.is_running()

    def describe(self) -> dict[str, str]:
        return self.holder.describe()


class DepartingGuest(DemoGuest):
    """At the source. ``record`` is what it was last sent off with; None before that."""

    def __init__(
        self, holder: HolderGuest, workload: Workload, content: str, prepared: Prepared
    ) -> None:
        super().__init__(holder)
        self.workload = workload
        self.content = content
        self.prepared = prepared
        self.record: TravelRecord | None = None

    def save_state(self, write: Callable[[StateStream], None]) -> None:
        self.holder.save_state(write)
        self.record = self.take_record()
        write(to_stream(self.record))

    def take_record(self) -> TravelRecord:
        """As of now."""
        report = self.holder.beat_report()
        return TravelRecord(
            guest=self.holder.kind,
            content=self.content,
            workload=self.workload.kind,
            rate_bps=self.workload.rate_bps,
            working_set_bytes=self.workload.working_set_bytes,
            seed=self.workload.seed,
            jump=self.workload.jump,
            beats=report.beats,
            last_beat_at_ns=report.last_beat_at_ns,
            out_of_order=report.out_of_order,
            running_ns=report.running_ns,
            rate_reached_bps=rate_reached_bps(
                report.beats, self.prepared.writes_per_beat, report.running_ns
            ),
            other_beats=report.other_beats,
        )


class ArrivingGuest(DemoGuest):
    """At the destination. ``source_memory``: the source's memfds, one a block, if all bytes are to
    be compared before this guest may run; they stay the caller's."""

    def __init__(self, holder: HolderGuest, source_memory: Sequence[int] = ()) -> None:
        super().__init__(holder)
        self.record: TravelRecord | None = None
        self.beats_in_memory = 0  #: what the guest itself had counted when it arrived
        self.other_beats_in_memory: tuple[int, ...] = ()  #: its vCPUs after the first
        self.bytes_compared = 0
        self._source_memory = source_memory

    def load_state(self, streams: Iterable[StateStream]) -> None:
        """Raises GuestError when the demo's stream is missing or damaged, VerificationError when a
        byte differs from the source's memory."""
        others: list[StateStream] = []
        for stream in streams:
            if stream.name == STREAM_NAME:
                self.record = from_stream(stream)
            else:
                others.append(stream)
        if self.record is None:
            raise GuestError(f"no state stream {STREAM_NAME!r}: the source is no vmth demo")
        if self._source_memory:
            fds = [block.mapping.fd for block in self.blocks]
            self.bytes_compared = compare_memories(
                self.blocks, [fd for fd in fds if fd is not None], self._source_memory
            )
        self.holder.load_state(others)
        if len(self.record.other_beats) != self.holder.vcpus - 1:
            raise GuestError(
                f"state stream {STREAM_NAME}: received heartbeats of "
                f"{len(self.record.other_beats) + 1} vCPUs, allowed {self.holder.vcpus}"
            )
        memory = self.holder.views()[0]
        self.beats_in_memory = Control.read(memory).beats
        self.other_beats_in_memory = beats_in_memory(memory, self.holder.vcpus)


def guest_info(holder: HolderGuest) -> dict[str, str]:
    """What the destination needs to make an empty guest of the same kind."""
    return {"kind": holder.kind} | ({"vcpus": str(holder.vcpus)} if holder.vcpus != 1 else {})


def vcpus_of(info: Mapping[str, str]) -> int:
    """UsageError for what is no number; how many a guest may have is checked where it is made."""
    text = info.get("vcpus", "1")
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise UsageError(f"vCPUs of the guest: received {text!r}, allowed a number")
    return int(text)


def duplicate_memory(guest: DemoGuest) -> list[int]:
    """The guest's memfds once more, inheritable; the caller closes them. They keep the memory."""
    duplicates: list[int] = []
    for block in guest.blocks:
        assert block.mapping.fd is not None
        duplicates.append(os.dup(block.mapping.fd))
        os.set_inheritable(duplicates[-1], True)
    return duplicates
