# SPDX-License-Identifier: Apache-2.0
"""The process guest: the walker as a native thread over the holder's memory, without /dev/kvm.

Its "CPU state" is the walker's twelve registers and its place in time; they travel as one
little-endian record, version 2:

    offset  field
    0       u32 x 12  registers, in the order of CONTROL_FIELDS
    48      u32       npaces, 0 to 16
    52      u64       running_ns
    60      u64       next_due_ns: running time at which the step after the last beat may begin
    68      {u64 from_ns, u64 beat_interval_ns} x npaces

Version 1 had no pool: nine registers.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence

from vmth._native import _guest
from vmth.errors import GuestError, StreamError, UsageError
from vmth.guest import DirtySource
from vmth.guests.machine import BeatReport, Pace
from vmth.guests.memory import GuestMemory
from vmth.types import RamBlock

__all__ = ["STATE_VERSION", "ProcessMachine", "decode_state", "encode_state"]

STATE_VERSION = 2
_HEAD = struct.Struct("<12I I Q Q")
_PACE = struct.Struct("<Q Q")

State = tuple[tuple[int, ...], list[tuple[int, int]], int, int]


def encode_state(
    registers: Sequence[int], paces: Sequence[tuple[int, int]], running_ns: int, next_due_ns: int
) -> bytes:
    """The record drawn above."""
    head = _HEAD.pack(*registers, len(paces), running_ns, next_due_ns)
    return head + b"".join(_PACE.pack(*pace) for pace in paces)


def decode_state(version: int, data: bytes) -> State:
    """Its parts, the length checked; the walker checks the values. StreamError: the bytes came
    from another host, and are not such a record."""
    if version != STATE_VERSION:
        raise StreamError(f"process state version {version}: this holder reads {STATE_VERSION}")
    if len(data) < _HEAD.size:
        raise StreamError(f"process state of {len(data)} bytes: at least {_HEAD.size}")
    *registers, npaces, running_ns, next_due_ns = _HEAD.unpack_from(data)
    if npaces > _guest.PACES_MAX:
        raise StreamError(f"process state with {npaces} paces: at most {_guest.PACES_MAX}")
    expected = _HEAD.size + npaces * _PACE.size
    if len(data) != expected:
        raise StreamError(f"process state of {len(data)} bytes: {expected} with {npaces} paces")
    paces = [(int(a), int(b)) for a, b in _PACE.iter_unpack(data[_HEAD.size :])]
    return tuple(registers), paces, running_ns, next_due_ns


class ProcessMachine:
    """Implements ``Machine``. Only the first block is walked; ``ram-high`` moves idle.

    Its one dirty source is "uffd-wp": the walker writes through this process's page tables. A
    walker whose schedule leaves its memory has crashed: every call but ``close`` then raises
    GuestError.
    """

    vcpus = 1

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._walker = _guest.Walker(memory.views[0])

    @property
    def blocks(self) -> Sequence[RamBlock]:
        return self._memory.blocks

    def start_fresh(self, paces: Sequence[Pace]) -> None:
        try:
            self._walker.reset([(pace.from_ns, pace.beat_interval_ns) for pace in paces])
        except OSError as error:
            raise GuestError(f"the process guest cannot start: {_reason(error)}") from None
        self.resume()

    def pause(self) -> bool:
        was_running = self._walker.pause()
        self._raise_if_crashed()
        return was_running

    def resume(self) -> None:
        try:
            self._walker.resume()
        except OSError as error:
            raise GuestError(f"the process guest cannot run: {_reason(error)}") from None

    def pause_at_beat(self, timeout_ns: int) -> bool:
        stands = self._walker.pause_at_beat(timeout_ns)
        self._raise_if_crashed()
        return stands

    def save_state(self) -> tuple[int, bytes]:
        try:
            return STATE_VERSION, encode_state(*self._walker.save())
        except OSError as error:
            raise GuestError(f"no state of the process guest: {_reason(error)}") from None

    def load_state(self, version: int, data: bytes) -> None:
        """StreamError for bytes that are no state, or with a value outside its bounds."""
        state = decode_state(version, data)
        try:
            self._walker.load(*state)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise StreamError(f"process state: {_reason(error)}") from None
            raise GuestError(f"the process guest takes no state: {_reason(error)}") from None

    def beat_report(self) -> BeatReport:
        report = self._raise_if_crashed()
        return BeatReport(
            beats=report["beats"],
            first_beat_at_ns=report["first_beat_at_ns"],
            last_beat_at_ns=report["last_beat_at_ns"],
            max_gap_ns=report["max_gap_ns"],
            running_ns=report["running_ns"],
            out_of_order=report["out_of_order"],
        )

    def throttle(self, percent: int) -> None:
        if not 0 <= percent <= 99:
            raise UsageError(f"throttle of {percent} %: must be 0 to 99")
        self._walker.throttle(percent)

    def throttle_vcpus(self, percents: Sequence[int]) -> None:
        if len(percents) != self.vcpus:
            raise UsageError(f"throttle of {len(percents)} vCPUs: the process guest has one")
        self.throttle(percents[0])

    def vcpu_dirty_pages(self) -> Sequence[int]:
        """Not known: userfaultfd does not tell who wrote."""
        return ()

    def dirty_source(self, name: str) -> DirtySource:
        if name != "uffd-wp":
            raise UsageError(f"dirty source {name!r}: the process guest has uffd-wp")
        from vmth.dirty.uffd import UffdWpSource

        source: DirtySource = UffdWpSource(self._memory.blocks)
        return source

    def _raise_if_crashed(self) -> dict[str, int]:
        report = self._walker.report()
        if report["fault"]:
            raise GuestError(f"the process guest crashed: {_REASONS[errno.EFAULT]}")
        return report

    def close(self) -> None:
        """Stop the walker; its memory may go afterwards. Idempotent."""
        self._walker.close()


_REASONS = {
    errno.EBUSY: "it runs",
    errno.EINVAL: "a register, the control block or a pace is outside its bounds",
    errno.EFAULT: "its schedule points outside of its memory",
}


def _reason(error: OSError) -> str:
    return _REASONS.get(error.errno or 0, str(error))
