# SPDX-License-Identifier: Apache-2.0
"""Cython over csrc/core/qemu_ram.c and qemu_multifd.c: runs in NumPy arrays. vmth.qemu.ram is the
public face."""

cimport cython
from libc.stdint cimport UINT32_MAX, uint8_t, uint32_t, uint64_t

import numpy as np

from vmth._native._core cimport *

PACKET_SHORT = VMTH_MULTIFD_SHORT
PACKETS_FULL = VMTH_MULTIFD_FULL
PACKET_OTHER = VMTH_MULTIFD_OTHER

RUN = np.dtype([("page", "<u8"), ("npages", "<u8"), ("at", "<u8"), ("stride", "<u4"),
                ("nbytes", "<u4"), ("block", "<u4"), ("kind", "<u4")])


class RecordError(Exception):
    """args: (field, received, allowed)"""


@cython.final
cdef class Blocks:
    """A block table: lengths, and names as they are on the wire."""

    cdef vmth_qemu_blocks table
    cdef const uint64_t[::1] lengths
    cdef bytes names

    def __init__(self, uint32_t page_bytes, const uint64_t[::1] lengths, bytes names):
        if len(names) != lengths.shape[0] * VMTH_QEMU_NAME_BYTES:
            raise ValueError("names do not fit lengths")
        self.lengths, self.names = lengths, names
        self.table.page_bytes = page_bytes
        self.table.nblocks = <uint32_t>lengths.shape[0]
        self.table.used_length = &lengths[0] if lengths.shape[0] else NULL
        self.table.names = <const uint8_t *><const char *>names


@cython.final
cdef class Parser:
    """Parses; remembers the block that CONTINUE means, and owns the array that runs go into."""

    cdef object room
    cdef uint8_t[::1] raw
    cdef size_t cap
    cdef uint32_t block

    def __init__(self, size_t cap):
        if cap == 0:
            raise ValueError("no room for runs")
        self.room = np.empty(cap, dtype=RUN)
        self.raw = self.room.view(np.uint8)
        self.cap = cap
        self.block = UINT32_MAX

    def forget(self):
        self.block = UINT32_MAX

    def continues(self):
        return self.block

    def go_on(self, uint32_t block):
        self.block = block

    def parse(self, Blocks blocks not None, const uint8_t[::1] data):
        cdef vmth_qemu_parsed parsed
        cdef vmth_qemu_error error
        cdef const uint8_t *at = &data[0] if data.shape[0] else NULL
        cdef size_t nbytes = data.shape[0]
        cdef vmth_qemu_run *out = <vmth_qemu_run *>&self.raw[0]
        cdef int result
        with nogil:
            result = vmth_qemu_ram_parse(&blocks.table, &self.block, at, nbytes, out, self.cap,
                                         &parsed, &error)
        if result != 0:
            if result == -22:
                raise ValueError("block table outside its bounds")
            raise RecordError(error.field.decode(), error.received, error.allowed)
        return (parsed.stop, parsed.used, parsed.need, parsed.value,
                self.room[:parsed.nruns].copy())


@cython.final
cdef class PacketParser:
    """Parses whole multifd packets; owns the array that runs go into."""

    cdef object room
    cdef uint8_t[::1] raw
    cdef size_t cap

    def __init__(self, size_t cap):
        self.room = np.empty(cap, dtype=RUN)
        self.raw = self.room.view(np.uint8)
        self.cap = cap

    def parse(self, Blocks blocks not None, const uint8_t[::1] data):
        cdef vmth_multifd_parsed parsed
        cdef const uint8_t *at = &data[0] if data.shape[0] else NULL
        cdef size_t nbytes = data.shape[0]
        cdef vmth_qemu_run *out = <vmth_qemu_run *>&self.raw[0] if self.cap else NULL
        cdef int result
        with nogil:
            result = vmth_multifd_parse(&blocks.table, at, nbytes, out, self.cap, &parsed)
        if result != 0:
            raise ValueError(f"block table, or room for {self.cap} runs, outside its bounds")
        return parsed.stop, parsed.used, self.room[:parsed.nruns].copy()


@cython.final
cdef class Encoder:
    """Encodes; remembers the block of the last record, whose name need not be said again."""

    cdef uint32_t block

    def __init__(self):
        self.block = UINT32_MAX

    def forget(self):
        self.block = UINT32_MAX

    def encode(self, Blocks blocks not None, const uint8_t[::1] runs, const uint8_t[::1] data):
        cdef size_t nruns = runs.shape[0] // sizeof(vmth_qemu_run)
        cdef const uint8_t *payload = &data[0] if data.shape[0] else NULL
        cdef const vmth_qemu_run *first
        cdef size_t total
        cdef uint8_t[::1] out
        if nruns == 0:
            return b""
        first = <const vmth_qemu_run *>&runs[0]
        total = vmth_qemu_ram_encoded_bytes(&blocks.table, self.block, first, nruns,
                                            data.shape[0])
        if total == 0:
            raise ValueError("a run is not within its block or its data")
        records = np.empty(total, dtype=np.uint8)
        out = records
        with nogil:
            vmth_qemu_ram_encode(&blocks.table, &self.block, first, nruns, payload, &out[0])
        return records.data
