# SPDX-License-Identifier: Apache-2.0
"""Cython over csrc/sys: write tracking, populated pages, what the kernel offers, reading sockets.

Sizes are pages of the host and addresses bytes. Every call releases the GIL. Errors of the kernel
are OSError with the errno; sizes that do not fit a bitmap are ValueError.
"""

import os

from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memset, strerror


cdef extern from "stdbool.h":
    ctypedef bint c_bool "bool"

cdef extern from "sys/memory_ops.h" nogil:
    struct vmth_memory_ops:
        pass
    const vmth_memory_ops *vmth_memory_ops_kernel()

cdef extern from "sys/pagemap_scan.h" nogil:
    enum:
        VMTH_PAGE_IS_HUGE

    struct vmth_page_query:
        uint64_t category_mask
        uint64_t return_mask

    int vmth_pagemap_count(const vmth_memory_ops *ops, int pagemap_fd, const vmth_page_query *query,
                           uint64_t start, uint64_t npages, uint64_t page_bytes, uint64_t *count)

cdef extern from "sys/uffd_wp.h" nogil:
    enum vmth_uffd_missing:
        VMTH_UFFD_NOTHING_MISSING
        VMTH_UFFD_SYSCALL
        VMTH_UFFD_WP_ASYNC
        VMTH_UFFD_PAGEMAP
        VMTH_UFFD_PAGEMAP_SCAN

    struct vmth_uffd_wp:
        int uffd
        int pagemap_fd

    int vmth_uffd_wp_open(vmth_uffd_wp *tracker, const vmth_memory_ops *ops, uint64_t page_bytes,
                          vmth_uffd_missing *missing)
    int vmth_uffd_wp_add(const vmth_uffd_wp *tracker, uint64_t address, uint64_t npages,
                         uint64_t *populated)
    int vmth_uffd_wp_fetch(const vmth_uffd_wp *tracker, uint64_t address, uint64_t npages,
                           uint64_t *words)
    int vmth_uffd_wp_peek(const vmth_uffd_wp *tracker, uint64_t address, uint64_t npages,
                          uint64_t *words)
    int vmth_uffd_wp_remove(const vmth_uffd_wp *tracker, uint64_t address, uint64_t npages)
    void vmth_uffd_wp_close(vmth_uffd_wp *tracker)
    int vmth_uffd_features(const vmth_memory_ops *ops, uint64_t *features)

cdef extern from "sys/populated.h" nogil:
    int vmth_populated_anon(const vmth_memory_ops *ops, int pagemap_fd, uint64_t address,
                            uint64_t npages, uint64_t page_bytes, uint64_t *words, uint64_t page)
    int vmth_populated_file(const vmth_memory_ops *ops, int fd, uint64_t offset, uint64_t npages,
                            uint64_t page_bytes, uint64_t *words, uint64_t page)
    int vmth_populated_file_is_exact(const vmth_memory_ops *ops, int fd, c_bool *exact)

cdef extern from "sys/populate.h" nogil:
    enum vmth_populate_kind:
        VMTH_POPULATE_READ
    struct vmth_populate_ops:
        int (*populate)(void *ctx, void *address, size_t nbytes,
                        vmth_populate_kind kind) noexcept nogil
        int64_t (*resident)(void *ctx, void *address, size_t nbytes) noexcept nogil
        void *ctx
    const vmth_populate_ops *vmth_populate_system_ops()

cdef extern from "sys/sock_take.h" nogil:
    int vmth_sock_take(int fd, uint8_t *buffer, size_t nbytes, int64_t patience_ns, size_t *got,
                       c_bool *ended)


PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
cdef uint64_t _page_bytes = PAGE_BYTES

_MISSING = {
    VMTH_UFFD_SYSCALL: "userfaultfd",
    VMTH_UFFD_WP_ASYNC: "UFFD_FEATURE_WP_ASYNC",
    VMTH_UFFD_PAGEMAP: "/proc/self/pagemap",
    VMTH_UFFD_PAGEMAP_SCAN: "PAGEMAP_SCAN",
}


cdef object _os_error(int result, str what):
    return OSError(-result, f"{what}: {strerror(-result).decode()}")


cdef uint64_t *_words(uint64_t[::1] bitmap, uint64_t first, uint64_t npages) except? NULL:
    """The bitmap's words, checked to hold pages [first, first + npages)."""
    cdef uint64_t capacity = <uint64_t>bitmap.shape[0] * 64
    if first > capacity or npages > capacity - first:
        raise ValueError(f"pages [{first}, {first + npages}) in a bitmap of {capacity} bits")
    return &bitmap[0] if capacity > 0 else NULL


def uffd_features() -> int:
    cdef uint64_t features = 0
    cdef int result
    with nogil:
        result = vmth_uffd_features(vmth_memory_ops_kernel(), &features)
    if result < 0:
        raise _os_error(result, "userfaultfd")
    return features


cdef class UffdWp:
    cdef vmth_uffd_wp _tracker

    def __cinit__(self):
        cdef vmth_uffd_missing missing = VMTH_UFFD_NOTHING_MISSING
        cdef int result
        self._tracker.uffd = -1
        self._tracker.pagemap_fd = -1
        with nogil:
            result = vmth_uffd_wp_open(&self._tracker, vmth_memory_ops_kernel(), _page_bytes,
                                       &missing)
        if result < 0:
            raise _os_error(result, _MISSING[missing])

    def __dealloc__(self):
        vmth_uffd_wp_close(&self._tracker)

    cdef int _check_open(self) except -1:
        if self._tracker.uffd < 0:
            raise ValueError("the tracker is closed")
        return 0

    def add(self, uint64_t address, uint64_t npages, uint64_t[::1] populated=None):
        cdef uint64_t *words = NULL
        cdef int result
        self._check_open()
        if populated is not None:
            words = _words(populated, 0, npages)
        with nogil:
            result = vmth_uffd_wp_add(&self._tracker, address, npages, words)
        if result < 0:
            raise _os_error(result, f"track {npages} pages from {address:#x}")

    def fetch(self, uint64_t address, uint64_t npages, uint64_t[::1] bitmap not None):
        cdef uint64_t *words = _words(bitmap, 0, npages)
        cdef int result
        self._check_open()
        with nogil:
            result = vmth_uffd_wp_fetch(&self._tracker, address, npages, words)
        if result < 0:
            raise _os_error(result, f"fetch {npages} pages from {address:#x}")

    def peek(self, uint64_t address, uint64_t npages, uint64_t[::1] bitmap not None):
        cdef uint64_t *words = _words(bitmap, 0, npages)
        cdef int result
        self._check_open()
        with nogil:
            result = vmth_uffd_wp_peek(&self._tracker, address, npages, words)
        if result < 0:
            raise _os_error(result, f"look at {npages} pages from {address:#x}")

    def remove(self, uint64_t address, uint64_t npages):
        cdef int result
        self._check_open()
        with nogil:
            result = vmth_uffd_wp_remove(&self._tracker, address, npages)
        if result < 0:
            raise _os_error(result, f"stop tracking {npages} pages from {address:#x}")

    def close(self):
        vmth_uffd_wp_close(&self._tracker)


def huge_pages(uint64_t address, uint64_t npages) -> int:
    cdef vmth_page_query query
    cdef uint64_t count = 0
    cdef int pagemap_fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    cdef int result
    memset(&query, 0, sizeof(query))
    query.category_mask = query.return_mask = VMTH_PAGE_IS_HUGE
    try:
        with nogil:
            result = vmth_pagemap_count(vmth_memory_ops_kernel(), pagemap_fd, &query, address,
                                        npages, _page_bytes, &count)
    finally:
        os.close(pagemap_fd)
    if result < 0:
        raise _os_error(result, "PAGEMAP_SCAN")
    return count


def populated_anon(uint64_t address, uint64_t npages, uint64_t[::1] bitmap not None, uint64_t page):
    cdef uint64_t *words = _words(bitmap, page, npages)
    cdef int pagemap_fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    cdef int result
    try:
        with nogil:
            result = vmth_populated_anon(vmth_memory_ops_kernel(), pagemap_fd, address, npages,
                                         _page_bytes, words, page)
    finally:
        os.close(pagemap_fd)
    if result < 0:
        raise _os_error(result, "PAGEMAP_SCAN")


def populated_file(int fd, uint64_t offset, uint64_t npages, uint64_t[::1] bitmap not None,
                   uint64_t page):
    cdef uint64_t *words = _words(bitmap, page, npages)
    cdef int result
    with nogil:
        result = vmth_populated_file(vmth_memory_ops_kernel(), fd, offset, npages, _page_bytes,
                                     words, page)
    if result < 0:
        raise _os_error(result, "SEEK_DATA")


def populated_file_is_exact(int fd) -> bool:
    cdef c_bool exact = False
    cdef int result
    with nogil:
        result = vmth_populated_file_is_exact(vmth_memory_ops_kernel(), fd, &exact)
    if result < 0:
        raise _os_error(result, "fstatfs")
    return exact


def resident(uint64_t address, size_t nbytes) -> int:
    cdef const vmth_populate_ops *ops = vmth_populate_system_ops()
    cdef int64_t npages
    with nogil:
        npages = ops.resident(ops.ctx, <void *>address, nbytes)
    if npages < 0:
        raise _os_error(<int>npages, "mincore")
    return npages


def populate_read(uint64_t address, size_t nbytes):
    cdef const vmth_populate_ops *ops = vmth_populate_system_ops()
    cdef int result
    with nogil:
        result = ops.populate(ops.ctx, <void *>address, nbytes, VMTH_POPULATE_READ)
    if result < 0:
        raise _os_error(result, "MADV_POPULATE_READ")


def sock_take(int fd, uint8_t[::1] buffer not None, int64_t patience_ns) -> tuple:
    cdef size_t nbytes = buffer.shape[0], got = 0
    cdef c_bool ended = False
    cdef int result
    if nbytes == 0 or patience_ns < 0:
        raise ValueError(f"{nbytes} bytes, patience of {patience_ns} ns")
    with nogil:
        result = vmth_sock_take(fd, &buffer[0], nbytes, patience_ns, &got, &ended)
    if result < 0:
        raise _os_error(result, "receive")
    return got, bool(ended)
