# SPDX-License-Identifier: Apache-2.0
"""The KVM micro-VM's state as bytes: what moves with the guest beside its memory.

Version 1 is the state of one vCPU, little-endian, no padding, nothing optional:

    u32 at_beat (0, 1)   u32 npaces   u32 nmsrs   u32 0
    u64 beats   u64 out_of_order   u64 running_ns   u64 due_ns
    npaces x {u64 from_ns, u64 beat_interval_ns}        ascending from_ns
    nmsrs  x {u32 index, u32 0, u64 value}
    kvm_regs 144 | kvm_sregs 312 | kvm_fpu 416 | kvm_mp_state 4 | kvm_vcpu_events 64 | kvm_xcrs 392

Version 2 is that of several, 2 to 8: u32 number, then for each u32 length and the bytes above.

The kernel's structs are its x86 ABI. What arrives is hostile: sizes and bounds are checked here,
values of registers by KVM, which refuses what no vCPU can have. Pure: no I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vmth._native import _kvm
from vmth.errors import StreamError
from vmth.guests.machine import VCPUS_MAX

__all__ = [
    "STATES_VERSION",
    "STATE_VERSION",
    "decode_state",
    "decode_states",
    "encode_state",
    "encode_states",
]

STATE_VERSION = 1  #: of one vCPU
STATES_VERSION = 2  #: of several

_HEAD = struct.Struct("<IIIIQQQQ")
_PACE = struct.Struct("<QQ")
_MSR = struct.Struct("<IIQ")
_NR_XCRS = struct.Struct("<I")
_COUNT = struct.Struct("<I")
#: Order on the wire; sizes are the ABI's, and the build's own are checked against them by the
#: tests.
_STRUCTS = (
    ("regs", 144),
    ("sregs", 312),
    ("fpu", 416),
    ("mp_state", 4),
    ("events", 64),
    ("xcrs", 392),
)
#: A century: keeps sums of times far from the end of 64 bits.
_MAX_TIME_NS = 100 * 366 * 86400 * 10**9


def encode_states(states: Sequence[_kvm.VcpuState]) -> tuple[int, bytes]:
    """(version, bytes) of all vCPUs, in their order."""
    if len(states) == 1:
        return STATE_VERSION, encode_state(states[0])
    parts = [_COUNT.pack(len(states))]
    for state in states:
        data = encode_state(state)
        parts += [_COUNT.pack(len(data)), data]
    return STATES_VERSION, b"".join(parts)


def decode_states(version: int, data: bytes, vcpus: int) -> list[_kvm.VcpuState]:
    """The inverse, for a guest with ``vcpus``. StreamError for anything else, or for another number
    of them."""
    if version == STATE_VERSION:
        states = [decode_state(version, data)]
    elif version != STATES_VERSION:
        raise StreamError(
            f"vCPU state: version {version} received, {STATE_VERSION} or {STATES_VERSION} allowed"
        )
    else:
        states = [decode_state(STATE_VERSION, piece) for piece in _pieces(data)]
    if len(states) != vcpus:
        raise StreamError(f"vCPU state: of {len(states)} vCPUs received, {vcpus} allowed")
    return states


def _pieces(data: bytes) -> list[bytes]:
    count, at = _u32_at(data, 0), _COUNT.size
    if not 2 <= count <= VCPUS_MAX:
        raise StreamError(f"vCPU state: {count} vCPUs received, 2 to {VCPUS_MAX} allowed")
    pieces = []
    for _ in range(count):
        nbytes, at = _u32_at(data, at), at + _COUNT.size
        if nbytes > len(data) - at:
            raise StreamError(
                f"vCPU state: {nbytes} bytes announced, {len(data) - at} bytes received"
            )
        pieces.append(data[at : at + nbytes])
        at += nbytes
    if at != len(data):
        raise StreamError(f"vCPU state: {len(data)} bytes received, exactly {at} allowed")
    return pieces


def _u32_at(data: bytes, at: int) -> int:
    if len(data) - at < _COUNT.size:
        raise StreamError(f"vCPU state: {len(data)} bytes received, at least {at + 4} allowed")
    return int(_COUNT.unpack_from(data, at)[0])


def encode_state(state: _kvm.VcpuState) -> bytes:
    """Version 1 bytes of ``state``."""
    parts = [
        _HEAD.pack(
            int(state["at_beat"]),
            len(state["paces"]),
            len(state["msrs"]),
            0,
            state["beats"],
            state["out_of_order"],
            state["running_ns"],
            state["due_ns"],
        )
    ]
    parts += [_PACE.pack(*pace) for pace in state["paces"]]
    parts += [_MSR.pack(index, 0, value) for index, value in state["msrs"]]
    parts += [
        state["regs"],
        state["sregs"],
        state["fpu"],
        state["mp_state"],
        state["events"],
        state["xcrs"],
    ]
    return b"".join(parts)


def decode_state(version: int, data: bytes) -> _kvm.VcpuState:
    """The inverse. StreamError, naming what was received and what is allowed, for anything else."""
    if version != STATE_VERSION:
        raise StreamError(f"vCPU state: version {version} received, {STATE_VERSION} allowed")
    if len(data) < _HEAD.size:
        raise StreamError(f"vCPU state: {len(data)} bytes received, at least {_HEAD.size} wanted")
    at_beat, npaces, nmsrs, reserved, *counters = _HEAD.unpack_from(data)
    beats, out_of_order, running_ns, due_ns = counters
    _bound("heartbeat flag", at_beat, 1)
    _bound("number of paces", npaces, _kvm.MAX_PACES)
    _bound("number of MSRs", nmsrs, _kvm.MAX_MSRS)
    _bound("reserved word", reserved, 0)
    _bound("heartbeats", beats, 2**32 - 1)
    _bound("heartbeats out of order", out_of_order, 2**32 - 1)
    _bound("running time in ns", running_ns, _MAX_TIME_NS)
    _bound("time of the next heartbeat in ns", due_ns, _MAX_TIME_NS)
    expected = (
        _HEAD.size + npaces * _PACE.size + nmsrs * _MSR.size + sum(size for _, size in _STRUCTS)
    )
    if len(data) != expected:
        raise StreamError(f"vCPU state: {len(data)} bytes received, exactly {expected} allowed")
    at = _HEAD.size
    paces = _decode_paces(data[at : at + npaces * _PACE.size])
    at += npaces * _PACE.size
    msrs = _decode_msrs(data[at : at + nmsrs * _MSR.size])
    at += nmsrs * _MSR.size
    structs: dict[str, bytes] = {}
    for name, size in _STRUCTS:
        structs[name] = data[at : at + size]
        at += size
    _bound("number of XCRs", _NR_XCRS.unpack_from(structs["xcrs"])[0], _kvm.MAX_XCRS)
    return {
        "regs": structs["regs"],
        "sregs": structs["sregs"],
        "fpu": structs["fpu"],
        "mp_state": structs["mp_state"],
        "events": structs["events"],
        "xcrs": structs["xcrs"],
        "msrs": msrs,
        "beats": beats,
        "out_of_order": out_of_order,
        "running_ns": running_ns,
        "due_ns": due_ns,
        "at_beat": bool(at_beat),
        "paces": paces,
    }


def _bound(what: str, received: int, allowed: int) -> None:
    if received > allowed:
        raise StreamError(f"vCPU state: {what} is {received}, at most {allowed} allowed")


def _decode_paces(data: bytes) -> list[tuple[int, int]]:
    paces: list[tuple[int, int]] = []
    for from_ns, interval_ns in _PACE.iter_unpack(data):
        _bound("start of a pace in ns", from_ns, _MAX_TIME_NS)
        _bound("heartbeat interval in ns", interval_ns, _MAX_TIME_NS)
        if paces and from_ns <= paces[-1][0]:
            raise StreamError(
                f"vCPU state: pace from {from_ns} ns received, more than {paces[-1][0]} allowed"
            )
        paces.append((from_ns, interval_ns))
    return paces


def _decode_msrs(data: bytes) -> list[tuple[int, int]]:
    msrs: list[tuple[int, int]] = []
    for index, reserved, value in _MSR.iter_unpack(data):
        _bound("reserved word of an MSR", reserved, 0)
        msrs.append((index, value))
    return msrs
