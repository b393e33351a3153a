# SPDX-License-Identifier: Apache-2.0
# cython: boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Cython over csrc/core: checks sizes, releases the GIL, calls. vmth.kernels is the public face."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmth._native._core cimport *

import errno

import numpy as np


cdef int _need_bits(object words, object npages, str name) except -1:
    if npages < 0 or npages > 64 * len(words):
        raise ValueError(f"{name} has {64 * len(words)} bits, {npages} asked for")
    return 0


cdef int _need_range(object words, object page, object npages) except -1:
    if page < 0 or npages < 0 or page + npages > 64 * len(words):
        raise ValueError(
            f"pages {page} + {npages} are outside a bitmap of {64 * len(words)} bits")
    return 0


cdef size_t _count_pages(object data, object page_bytes) except? 0:
    if page_bytes < 4096 or page_bytes > 2 << 20 or page_bytes & (page_bytes - 1):
        raise ValueError(
            f"page size {page_bytes}: allowed are powers of two from 4096 to {2 << 20}")
    if len(data) % page_bytes:
        raise ValueError(f"{len(data)} bytes are no whole number of pages of {page_bytes}")
    return len(data) // page_bytes


cdef int _need_hashes(const uint64_t[:, ::1] hashes, object npages) except -1:
    if hashes.shape[1] != 2:
        raise ValueError(f"hashes need 2 columns (lo, hi), not {hashes.shape[1]}")
    if npages >= 0 and <size_t>hashes.shape[0] != npages:
        raise ValueError(f"hashes have {hashes.shape[0]} rows for {npages} pages")
    return 0


def bitmap_count(const uint64_t[::1] words, page, npages):
    cdef uint64_t bits, first, n
    _need_range(words, page, npages)
    first, n = page, npages
    if n == 0:
        return 0
    with nogil:
        bits = vmth_bitmap_count(&words[0], first, n)
    return bits


def bitmap_merge(uint64_t[::1] into, const uint64_t[::1] other, npages):
    cdef uint64_t added, n
    _need_bits(into, npages, "into")
    _need_bits(other, npages, "other")
    n = npages
    if n == 0:
        return 0
    with nogil:
        added = vmth_bitmap_merge(&into[0], &other[0], n)
    return added


def bitmap_fetch_and_clear(uint64_t[::1] live, uint64_t[::1] into, npages):
    cdef uint64_t fetched, n
    _need_bits(live, npages, "live")
    _need_bits(into, npages, "into")
    n = npages
    if n == 0:
        return 0
    with nogil:
        fetched = vmth_bitmap_fetch_and_clear(&live[0], &into[0], n)
    return fetched


def bitmap_set_range(uint64_t[::1] words, page, npages):
    cdef uint64_t first, n
    _need_range(words, page, npages)
    first, n = page, npages
    if n:
        with nogil:
            vmth_bitmap_set_range(&words[0], first, n)


def bitmap_clear_range(uint64_t[::1] words, page, npages):
    cdef uint64_t first, n
    _need_range(words, page, npages)
    first, n = page, npages
    if n:
        with nogil:
            vmth_bitmap_clear_range(&words[0], first, n)


def bitmap_runs(const uint64_t[::1] words, npages, start, uint64_t[:, ::1] out):
    cdef uint64_t n, first, resume = 0
    cdef size_t nruns = 0
    cdef int result
    _need_bits(words, npages, "words")
    if start < 0 or start > npages:
        raise ValueError(f"start {start} is outside 0..{npages}")
    if out.shape[0] == 0 or out.shape[1] != 2:
        raise ValueError(f"out needs shape (n > 0, 2), not ({out.shape[0]}, {out.shape[1]})")
    n, first = npages, start
    if n == 0:
        return 0, 0
    with nogil:
        result = vmth_bitmap_runs(&words[0], n, first, <vmth_run *>&out[0, 0], out.shape[0],
                                  &nruns, &resume)
    if result != 0:
        raise ValueError(f"bitmap_runs refused its arguments ({result})")
    return nruns, resume


def bitmap_from_bytes(uint64_t[::1] words, const uint8_t[::1] data, npages):
    cdef uint64_t n
    _need_bits(words, npages, "words")
    if len(data) < (npages + 7) // 8:
        raise ValueError(f"{len(data)} bytes hold {8 * len(data)} bits, {npages} asked for")
    n = npages
    if n:
        with nogil:
            vmth_bitmap_from_bytes(&words[0], &data[0], n)


def bitmap_to_bytes(const uint64_t[::1] words, npages):
    cdef uint64_t n
    cdef uint8_t[::1] view
    _need_bits(words, npages, "words")
    n = npages
    data = bytearray((npages + 7) // 8)
    if n:
        view = data
        with nogil:
            vmth_bitmap_to_bytes(&view[0], &words[0], n)
    return bytes(data)


def is_zero(const uint8_t[::1] data):
    cdef bint answer
    if len(data) % 64:
        raise ValueError(f"{len(data)} bytes are no multiple of 64")
    if len(data) == 0:
        return True
    with nogil:
        answer = vmth_is_zero(&data[0], data.shape[0])
    return answer


def zero_scan(const uint8_t[::1] pages, page_bytes):
    cdef size_t npages = _count_pages(pages, page_bytes)
    cdef size_t size = page_bytes, nzero = 0
    cdef int result
    words = np.zeros((npages + 63) // 64, dtype=np.uint64)
    cdef uint64_t[::1] view = words
    if npages:
        with nogil:
            result = vmth_zero_scan(&pages[0], size, npages, &view[0], &nzero)
        if result != 0:
            raise ValueError(f"zero_scan refused its arguments ({result})")
    return words, nzero


def zero_partition(const uint8_t[::1] memory, page_bytes, uint64_t[::1] ids):
    cdef size_t npages = _count_pages(memory, page_bytes)
    cdef size_t size = page_bytes, nnormal = 0
    cdef int result
    cdef uint64_t[::1] scratch
    if len(ids) == 0:
        return 0
    if np.max(ids) >= npages:
        raise ValueError(f"page {np.max(ids)} is outside memory of {npages} pages")
    scratch = np.empty(len(ids), dtype=np.uint64)
    with nogil:
        result = vmth_zero_partition(&memory[0], size, &ids[0], ids.shape[0], &scratch[0],
                                     &nnormal)
    if result != 0:
        raise ValueError(f"zero_partition refused its arguments ({result})")
    return nnormal


def page_hash(const uint8_t[::1] pages, page_bytes, uint64_t seed, uint64_t[:, ::1] out):
    cdef size_t npages = _count_pages(pages, page_bytes)
    cdef size_t size = page_bytes
    cdef vmth_hash_key key
    cdef int result
    _need_hashes(out, npages)
    if npages:
        with nogil:
            vmth_hash_key_init(&key, seed)
            result = vmth_page_hash(&key, &pages[0], size, npages, <vmth_u128 *>&out[0, 0])
        if result != 0:
            raise ValueError(f"page_hash refused its arguments ({result})")


def page_hash_zero(const uint8_t[::1] pages, page_bytes, uint64_t seed, uint64_t[:, ::1] out):
    cdef size_t npages = _count_pages(pages, page_bytes)
    cdef size_t size = page_bytes, nzero = 0
    cdef vmth_hash_key key
    cdef int result
    words = np.zeros((npages + 63) // 64, dtype=np.uint64)
    cdef uint64_t[::1] view = words
    _need_hashes(out, npages)
    if npages:
        with nogil:
            vmth_hash_key_init(&key, seed)
            result = vmth_page_hash_zero(&key, &pages[0], size, npages, <vmth_u128 *>&out[0, 0],
                                         &view[0], &nzero)
        if result != 0:
            raise ValueError(f"page_hash_zero refused its arguments ({result})")
    return words, nzero


def content_hash(const uint8_t[::1] pages, page_bytes, const uint8_t[::1] key,
                 uint64_t[:, ::1] out):
    cdef size_t npages = _count_pages(pages, page_bytes)
    cdef size_t size = page_bytes
    cdef vmth_content_key expanded
    cdef int result
    if key.shape[0] != VMTH_CONTENT_KEY_BYTES:
        raise ValueError(f"a content key has {VMTH_CONTENT_KEY_BYTES} bytes, not {key.shape[0]}")
    _need_hashes(out, npages)
    if npages:
        with nogil:
            vmth_content_key_init(&expanded, &key[0])
            result = vmth_content_hash_run(&expanded, &pages[0], size, npages,
                                           <vmth_u128 *>&out[0, 0])
        if result != 0:
            raise ValueError(f"content_hash refused its arguments ({result})")


def checksum64(const uint8_t[::1] data, uint64_t seed):
    cdef uint64_t value
    with nogil:
        value = vmth_checksum64(&data[0] if data.shape[0] else NULL, data.shape[0], seed)
    return value


def digest_of(uint32_t block, uint64_t page, const uint64_t[:, ::1] table):
    cdef vmth_digest digest
    _need_hashes(table, -1)
    if table.shape[0] == 0:
        return 0, 0, 0
    with nogil:
        digest = vmth_digest_of_hashes(block, page, table.shape[0],
                                       <const vmth_u128 *>&table[0, 0])
    return digest.sum.lo, digest.sum.hi, digest.pages


def digest_fill_of(uint32_t block, uint64_t page, uint64_t npages, uint64_t lo, uint64_t hi):
    cdef vmth_u128 value
    cdef vmth_digest digest
    value.lo, value.hi = lo, hi
    with nogil:
        digest = vmth_digest_of_fill(block, page, npages, &value)
    return digest.sum.lo, digest.sum.hi, digest.pages


def kernels():
    cdef size_t f = 0, i
    cdef const char *family = vmth_kernel_family(0)
    found = {}
    while family != NULL:
        names = []
        i = 0
        while vmth_kernel_name(family, i) != NULL:
            names.append(vmth_kernel_name(family, i).decode())
            i += 1
        found[family.decode()] = names
        f += 1
        family = vmth_kernel_family(f)
    return found


def select(str family, str name):
    cdef int result = vmth_kernel_select(family.encode(), name.encode())
    if result == 0:
        return
    if result == -errno.ENOENT:
        reason = "no implementation of that name exists"
    elif result == -errno.ENOSYS:
        reason = "it is not in this build (another architecture's)"
    elif result == -errno.ENOTSUP:
        reason = "this CPU cannot run it"
    else:
        raise ValueError(f"kernel family {family!r}: known are {', '.join(kernels())}")
    raise ValueError(
        f"kernel {family}={name}: {reason}; this build and CPU run "
        f"{', '.join(kernels()[family])}")


def selected(str family):
    cdef const char *name = vmth_kernel_selected(family.encode())
    if name == NULL:
        raise ValueError(f"kernel family {family!r}: known are {', '.join(kernels())}")
    return name.decode()
