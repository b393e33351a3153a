# SPDX-License-Identifier: Apache-2.0
# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""Cython over csrc/core's page forms: zstd frames, deltas, content index. vmth.codec is the face."""

from libc.stdint cimport uint8_t, uint16_t, uint64_t

from vmth._native._core cimport *

import errno

import numpy as np


cdef class Codec:
    """One thread's zstd contexts."""

    cdef vmth_codec codec

    def __cinit__(self):
        self.codec.compressor = NULL
        self.codec.decompressor = NULL
        if vmth_codec_create(&self.codec, VMTH_CODEC_COMPRESS | VMTH_CODEC_DECOMPRESS) != 0:
            raise MemoryError("zstd contexts")

    def __dealloc__(self):
        vmth_codec_destroy(&self.codec)

    def compress(self, const uint8_t[::1] data, int level, room):
        cdef size_t size = 0, limit
        cdef uint8_t[::1] view
        if level == 0 or level < VMTH_CODEC_MIN_LEVEL or level > VMTH_CODEC_MAX_LEVEL:
            raise ValueError(f"level {level}: allowed are {VMTH_CODEC_MIN_LEVEL} to "
                             f"{VMTH_CODEC_MAX_LEVEL}, and not 0")
        limit = room
        out = bytearray(room)
        if limit and data.shape[0]:
            view = out
            with nogil:
                size = vmth_codec_compress(&self.codec, level, &data[0], data.shape[0], &view[0],
                                           limit)
        return bytes(out[:size]) if size else None

    def decompress(self, const uint8_t[::1] frame, nbytes):
        cdef size_t exactly = nbytes
        cdef int result = -errno.EPROTO
        cdef uint8_t[::1] view
        out = bytearray(nbytes)
        if frame.shape[0] and exactly:
            view = out
            with nogil:
                result = vmth_codec_decompress(&self.codec, &frame[0], frame.shape[0], &view[0],
                                               exactly)
        if result == -errno.ENOMEM:
            raise MemoryError("zstd")
        if result != 0:
            raise ValueError(f"{len(frame)} bytes are not one zstd frame of {nbytes} bytes")
        return bytes(out)

    def held_bytes(self):
        return vmth_codec_bytes(&self.codec)


def promising(const uint8_t[::1] page):
    cdef bint answer
    if page.shape[0] == 0 or page.shape[0] % 4096:
        raise ValueError(f"{page.shape[0]} bytes are no page")
    with nogil:
        answer = vmth_codec_promising(&page[0], page.shape[0])
    return answer


def delta_encode(const uint8_t[::1] base, const uint8_t[::1] now, room):
    cdef size_t nbytes = 0, limit = room
    cdef int result
    cdef uint8_t[::1] view
    if base.shape[0] != now.shape[0] or base.shape[0] == 0:
        raise ValueError(f"a base of {base.shape[0]} bytes for a page of {now.shape[0]}")
    out = bytearray(room + 1)
    view = out
    with nogil:
        result = vmth_delta_encode(&base[0], &now[0], now.shape[0], &view[0], limit, &nbytes)
    if result == -errno.ENOSPC:
        return None
    if result != 0:
        raise ValueError(
            f"page size {now.shape[0]}: allowed are powers of two from 4096 to {2 << 20}")
    return bytes(out[:nbytes])


def delta_apply(uint8_t[::1] page, const uint8_t[::1] delta):
    cdef int result = 0
    if delta.shape[0]:
        with nogil:
            result = vmth_delta_apply(&page[0] if page.shape[0] else NULL, page.shape[0], &delta[0],
                                      delta.shape[0])
    if result != 0:
        raise ValueError(f"{delta.shape[0]} bytes are no delta of a page of {page.shape[0]}")


cdef class ContentIndex:
    """Places of contents, by hash; ``nbytes`` of memory."""

    cdef vmth_content_index index
    cdef object memory

    def __cinit__(self, nbytes):
        cdef uint8_t[::1] view
        if nbytes < VMTH_CONTENT_BUCKET_BYTES:
            raise ValueError(f"{nbytes} bytes, at least {VMTH_CONTENT_BUCKET_BYTES}")
        memory = np.zeros(nbytes + VMTH_CONTENT_BUCKET_BYTES, dtype=np.uint8)
        start = -memory.ctypes.data % VMTH_CONTENT_BUCKET_BYTES
        self.memory = memory[start:start + nbytes]
        view = self.memory
        if vmth_content_index_init(&self.index, &view[0], view.shape[0]) != 0:
            raise ValueError(f"content index of {nbytes} bytes")

    def insert(self, uint64_t lo, uint64_t hi, uint16_t block, uint64_t page):
        cdef vmth_u128 content
        content.lo, content.hi = lo, hi
        vmth_content_index_insert(&self.index, &content, block, page)

    def find(self, uint64_t lo, uint64_t hi):
        cdef vmth_u128 content
        cdef uint16_t block = 0
        cdef uint64_t page = 0
        content.lo, content.hi = lo, hi
        if vmth_content_index_find(&self.index, &content, &block, &page):
            return block, page
        return None

    def forget(self, uint64_t lo, uint64_t hi, uint16_t block, uint64_t page):
        cdef vmth_u128 content
        content.lo, content.hi = lo, hi
        vmth_content_index_forget(&self.index, &content, block, page)


def select(str family, str name):
    if vmth_kernel_select(family.encode(), name.encode()) != 0:
        raise ValueError(f"kernel {family}={name} does not run here")
