/* SPDX-License-Identifier: Apache-2.0 */
/* Which pages may hold something other than zeros, found without touching (allocating) any.
 *
 *   private anonymous memory     the page table:  .  P  P  z  .  S     P present, S swapped,
 *                                populated:          1  1        1     z the kernel's page of zeros
 *   shared memory                the file:        SEEK_DATA / SEEK_HOLE (a page that was written
 *                                through another mapping or with pwrite is not in our page table)
 *
 * The answer holds for the moment of the question: a caller asks after its write tracking was
 * armed, so that a page which is populated later is reported as written. A page that maps the
 * kernel's page of zeros was only ever read: a write replaces it, which the tracking sees; it
 * counts as not populated. */
#ifndef VMTH_SYS_POPULATED_H
#define VMTH_SYS_POPULATED_H

#include "sys/pagemap_scan.h"

VMTH_BEGIN_DECLS

/* Set bit (page + i) of `words` for each populated page i of [address, + npages) of private
 * anonymous memory of this process. `pagemap_fd` is /proc/self/pagemap. Entries that a userfaultfd
 * armed without a page look like swap and count as populated. Errors are vmth_pagemap_scan's. */
VMTH_MUST_CHECK int vmth_populated_anon(const struct vmth_memory_ops *ops, int pagemap_fd,
                                        uint64_t address, uint64_t npages, uint64_t page_bytes,
                                        uint64_t *words, uint64_t page);

/* Set bit (page + i) of `words` for each page i of the file range [offset, + npages pages) that is
 * not a hole; pages that were reserved (fallocate) and never written may count, and holes where as much
 * is allocated behind the file's end. Never too few on tmpfs and memfd; elsewhere
 * (vmth_populated_file_is_exact) not to be used.
 * Takes no time where the file is allocated in full, else for the range only, however long its data
 * goes on behind: a little where the kernel counts a range's pages (cachestat, Linux 6.5), else a
 * system call for each page of data.
 * Moves the file position of `fd`. Returns 0 or lseek's negative errno. */
VMTH_MUST_CHECK int vmth_populated_file(const struct vmth_memory_ops *ops, int fd, uint64_t offset,
                                        uint64_t npages, uint64_t page_bytes, uint64_t *words,
                                        uint64_t page);

/* Is `fd` shared memory (tmpfs, memfd), whose holes are known to be zeros? A disk file's holes
 * depend on its file system, hugetlbfs reports none. */
VMTH_MUST_CHECK int vmth_populated_file_is_exact(const struct vmth_memory_ops *ops, int fd,
                                                 bool *exact);

VMTH_END_DECLS

#endif
