/* SPDX-License-Identifier: Apache-2.0 */
/* PAGEMAP_SCAN: what the kernel's page tables say about a range of this process's memory.
 *
 *   pages      0  1  2  3  4  5  6  7          (W: written since it was armed)
 *              .  W  W  .  .  W  .  .
 *   regions       [1,3):W        [5,6):W       maximal stretches of equal categories
 *
 * One call scans any range: it asks the kernel at most VMTH_PAGEMAP_CHUNK_BYTES at a time (the walk
 * holds the address space's lock, which stops the owner's mmap calls) and takes the answer in a
 * vector of fixed size, resuming where the kernel stopped.
 *
 * The structs and constants are the kernel's ABI, spelled out here because Debian 12's headers
 * (6.1) are older than the ioctl (6.7); linux/fs.h of newer systems defines the same under other
 * names. */
#ifndef VMTH_SYS_PAGEMAP_SCAN_H
#define VMTH_SYS_PAGEMAP_SCAN_H

#include <stdbool.h>
#include <sys/ioctl.h>

#include "sys/memory_ops.h"

VMTH_BEGIN_DECLS

/* Categories of a page. */
enum {
    VMTH_PAGE_IS_WPALLOWED = 1 << 0, /* the mapping is registered with WP_ASYNC */
    VMTH_PAGE_IS_WRITTEN = 1 << 1,   /* written since it was armed, or never armed */
    VMTH_PAGE_IS_FILE = 1 << 2,      /* backed by a file (shared memory too) */
    VMTH_PAGE_IS_PRESENT = 1 << 3,   /* has a page in the page table */
    VMTH_PAGE_IS_SWAPPED = 1 << 4,   /* swapped, migrating, or an armed entry without a page */
    VMTH_PAGE_IS_PFNZERO = 1 << 5,   /* maps the kernel's one page of zeros */
    VMTH_PAGE_IS_HUGE = 1 << 6,      /* mapped by a PMD (THP) or hugetlb */
};

/* Flags of a scan. */
enum {
    VMTH_PM_SCAN_WP_MATCHING = 1 << 0, /* write-protect each page that matches, in the same step */
    VMTH_PM_SCAN_CHECK_WPASYNC = 1 << 1, /* fail with EPERM where the range is not registered */
};

/* The kernel's struct page_region: one stretch of the answer. */
struct vmth_page_region {
    uint64_t start;      /* first byte, an address */
    uint64_t end;        /* first byte after it */
    uint64_t categories; /* the categories of all its pages, masked with return_mask */
};

/* The kernel's struct pm_scan_arg. */
struct vmth_pm_scan_arg {
    uint64_t size;      /* of this struct: the ABI's version */
    uint64_t flags;     /* VMTH_PM_SCAN_* */
    uint64_t start;     /* first byte to scan; page aligned */
    uint64_t end;       /* first byte not to scan */
    uint64_t walk_end;  /* out: where the walk stopped, or an earlier page: see pagemap_scan.c */
    uint64_t vec;       /* address of an array of regions for the answer */
    uint64_t vec_len;   /* its length in regions */
    uint64_t max_pages; /* stop after so many matching pages; 0: no limit */
    uint64_t category_inverted;   /* these categories are inverted before they are compared */
    uint64_t category_mask;       /* a page matches if it has all of these ... */
    uint64_t category_anyof_mask; /* ... and, unless 0, at least one of these */
    uint64_t return_mask;         /* the categories to report */
};

#define VMTH_PAGEMAP_SCAN _IOWR('f', 16, struct vmth_pm_scan_arg)

/* The most that one ioctl walks: chunks end where the address is a multiple of it, hence never
 * inside a huge page, which write-protecting a part of would split. */
#define VMTH_PAGEMAP_CHUNK_BYTES (UINT64_C(1) << 30)

/* What to look for; the fields have the meaning of the kernel's. */
struct vmth_page_query {
    uint64_t flags;
    uint64_t category_inverted;
    uint64_t category_mask;
    uint64_t category_anyof_mask;
    uint64_t return_mask;
};

/* One region of an answer in pages, relative to the start of the scan. */
typedef void vmth_page_region_fn(void *context, uint64_t page, uint64_t npages,
                                 uint64_t categories);

/* Scan `npages` pages of `page_bytes` from address `start` and call `found` for each region, in
 * order, from this thread. `pagemap_fd` is /proc/self/pagemap. Returns 0, or the ioctl's negative
 * errno: -ENOTTY before Linux 6.7, -EPERM where VMTH_PM_SCAN_CHECK_WPASYNC finds a mapping that is
 * not registered, -EIO if the kernel's answer lies outside of what was asked. After an error the
 * regions that were reported until then are valid, and have been write-protected if so asked. */
VMTH_MUST_CHECK int vmth_pagemap_scan(const struct vmth_memory_ops *ops, int pagemap_fd,
                                      const struct vmth_page_query *query, uint64_t start,
                                      uint64_t npages, uint64_t page_bytes,
                                      vmth_page_region_fn *found, void *context);

/* Count the pages that match. Same errors; *count is untouched on error. */
VMTH_MUST_CHECK int vmth_pagemap_count(const struct vmth_memory_ops *ops, int pagemap_fd,
                                       const struct vmth_page_query *query, uint64_t start,
                                       uint64_t npages, uint64_t page_bytes, uint64_t *count);

VMTH_END_DECLS

#endif
