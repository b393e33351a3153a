# SPDX-License-Identifier: Apache-2.0
"""The micro-VM's state bytes: golden layout, round trip, and hostile input. No /dev/kvm needed."""

from __future__ import annotations

import hashlib

import pytest

from vmth._native import _kvm
from vmth.errors import StreamError
from vmth.guests.kvm_state import (
    STATE_VERSION,
    STATES_VERSION,
    decode_state,
    decode_states,
    encode_state,
    encode_states,
)

SIZES = {"regs": 144, "sregs": 312, "fpu": 416, "mp_state": 4, "events": 64, "xcrs": 392}
STRUCT_BYTES = sum(SIZES.values())
HEAD = (
    "01000000 02000000 01000000 00000000"  # at_beat, paces, MSRs, reserved
    "0500000000000000 0100000000000000"  # beats, out of order
    "8877665544332200 9988776655443300"  # running_ns, due_ns: both a few months
)


def sample() -> _kvm.VcpuState:
    return {
        "regs": bytes(range(144)),
        "sregs": b"s" * 312,
        "fpu": b"f" * 416,
        "mp_state": b"\0\0\0\0",
        "events": b"e" * 64,
        "xcrs": b"\1" + b"\0" * 391,
        "msrs": [(0x10, 0x1122334455667788)],
        "beats": 5,
        "out_of_order": 1,
        "running_ns": 0x0022334455667788,
        "due_ns": 0x0033445566778899,
        "at_beat": True,
        "paces": [(0, 1000), (2000, 0)],
    }


def test_sizes_are_the_kernels() -> None:
    assert _kvm.STATE_SIZES == SIZES


def test_golden_bytes() -> None:
    data = encode_state(sample())
    assert data[:48].hex() == HEAD.replace(" ", "")
    assert data[48:80].hex() == ("0000000000000000e803000000000000d0070000000000000000000000000000")
    assert data[80:96].hex() == "10000000000000008877665544332211"
    assert len(data) == 96 + STRUCT_BYTES
    assert hashlib.sha256(data).hexdigest() == (
        "1b250510893c51c5ce063e522897de1f1371f7aedac8872ae52e25e105252305"
    )


def test_round_trip() -> None:
    assert decode_state(STATE_VERSION, encode_state(sample())) == sample()


@pytest.mark.parametrize("version", [0, 2, 2**32 - 1])
def test_other_versions_are_refused(version: int) -> None:
    with pytest.raises(StreamError, match=f"version {version} received, 1 allowed"):
        decode_state(version, encode_state(sample()))


def test_every_truncation_and_extension_is_refused() -> None:
    data = encode_state(sample())
    for length in range(len(data)):
        with pytest.raises(StreamError, match=r"bytes received"):
            decode_state(STATE_VERSION, data[:length])
    with pytest.raises(StreamError, match=r"bytes received"):
        decode_state(STATE_VERSION, data + b"\0")


HOSTILE = [
    # name, offset, bytes, message
    ("flag", 0, b"\2", "heartbeat flag is 2, at most 1"),
    ("paces", 4, b"\xff\xff\xff\xff", "number of paces is 4294967295, at most 16"),
    ("msrs", 8, b"\4", "number of MSRs is 4, at most 3"),
    ("reserved", 12, b"\1", "reserved word is 1, at most 0"),
    ("beats", 20, b"\1", "heartbeats is"),
    ("out of order", 28, b"\1", "heartbeats out of order is"),
    ("running", 39, b"\xff", "running time in ns is"),
    ("due", 47, b"\xff", "time of the next heartbeat in ns is"),
    ("pace start", 55, b"\xff", "start of a pace in ns is"),
    ("pace interval", 63, b"\xff", "heartbeat interval in ns is"),
    ("pace order", 48, b"\xd0\x07", "pace from 2000 ns received, more than 2000 allowed"),
    ("msr reserved", 84, b"\1", "reserved word of an MSR is 1, at most 0"),
    ("xcrs", 96 + STRUCT_BYTES - 392, b"\x11", "number of XCRs is 17, at most 16"),
]


@pytest.mark.parametrize(
    ("offset", "change", "message"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE]
)
def test_numbers_out_of_bounds_are_refused(offset: int, change: bytes, message: str) -> None:
    data = bytearray(encode_state(sample()))
    data[offset : offset + len(change)] = change
    with pytest.raises(StreamError, match=message):
        decode_state(STATE_VERSION, bytes(data))


def test_any_flipped_byte_decodes_or_raises_stream_error() -> None:
    data = encode_state(sample())
    for offset in range(96 + 8):
        for flip in (0x01, 0x80, 0xFF):
            flipped = bytearray(data)
            flipped[offset] ^= flip
            try:
                decoded = decode_state(STATE_VERSION, bytes(flipped))
            except StreamError:
                continue
            assert encode_state(decoded) == flipped


def several(count: int) -> list[_kvm.VcpuState]:
    return [{**sample(), "beats": vcpu} for vcpu in range(count)]


@pytest.mark.parametrize("count", [1, 2, 8])
def test_states_of_several_vcpus(count: int) -> None:
    version, data = encode_states(several(count))
    assert version == (STATE_VERSION if count == 1 else STATES_VERSION)
    assert decode_states(version, data, count) == several(count)
    with pytest.raises(StreamError, match=f"of {count} vCPUs received, {count + 1} allowed"):
        decode_states(version, data, count + 1)


def test_one_vcpus_bytes_are_those_of_version_1() -> None:
    assert encode_states([sample()]) == (STATE_VERSION, encode_state(sample()))


def test_several_states_that_are_none() -> None:
    _, data = encode_states(several(3))
    for length in range(len(data)):
        with pytest.raises(StreamError, match="received"):
            decode_states(STATES_VERSION, data[:length], 3)
    with pytest.raises(StreamError, match="exactly"):
        decode_states(STATES_VERSION, data + b"\0", 3)
    for count in (0, 1, 9, 2**32 - 1):
        with pytest.raises(StreamError, match=f"{count} vCPUs received, 2 to 8 allowed"):
            decode_states(STATES_VERSION, count.to_bytes(4, "little") + data[4:], 3)
    with pytest.raises(StreamError, match="version 3 received, 1 or 2 allowed"):
        decode_states(3, data, 3)
