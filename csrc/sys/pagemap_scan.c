/* SPDX-License-Identifier: Apache-2.0 */
/* Chunked scans of the page tables with an answer of bounded size. */
#include "sys/pagemap_scan.h"

#include <errno.h>

/* 12 KiB of stack; the kernel's own buffer is not larger, so more would not save a walk. A denser
 * answer costs one more ioctl for every so many regions. */
#define SCAN_REGIONS 512

static uint64_t chunk_end(uint64_t at, uint64_t end)
{
    uint64_t next = (at / VMTH_PAGEMAP_CHUNK_BYTES + 1) * VMTH_PAGEMAP_CHUNK_BYTES;

    return next < end ? next : end;
}

/* The caller trusts the regions with its bitmaps: none may lie outside of the chunk. */
static bool region_is_inside(const struct vmth_page_region *region, uint64_t from, uint64_t end)
{
    return region->start >= from && region->start < region->end && region->end <= end;
}

int vmth_pagemap_scan(const struct vmth_memory_ops *ops, int pagemap_fd,
                      const struct vmth_page_query *query, uint64_t start, uint64_t npages,
                      uint64_t page_bytes, vmth_page_region_fn *found, void *context)
{
    struct vmth_page_region regions[SCAN_REGIONS];
    uint64_t end = start + npages * page_bytes;
    uint64_t at = start;

    while (at < end) {
        struct vmth_pm_scan_arg arg = {
            .size = sizeof(arg),
            .flags = query->flags,
            .start = at,
            .end = chunk_end(at, end),
            .vec = (uint64_t)(uintptr_t)regions,
            .vec_len = SCAN_REGIONS,
            .category_inverted = query->category_inverted,
            .category_mask = query->category_mask,
            .category_anyof_mask = query->category_anyof_mask,
            .return_mask = query->return_mask,
        };
        uint64_t next;
        int64_t nregions = ops->ioctl(ops, pagemap_fd, VMTH_PAGEMAP_SCAN, &arg);

        if (nregions < 0) {
            return (int)nregions;
        }
        if (nregions > SCAN_REGIONS || arg.walk_end > arg.end) {
            return -EIO;
        }
        next = arg.walk_end;
        for (int64_t i = 0; i < nregions; i++) {
            const struct vmth_page_region *region = &regions[i];

            if (!region_is_inside(region, at, arg.end)) {
                return -EIO;
            }
            /* Linux 6.18 can report (and arm) pages past walk_end: an end that an earlier flush of
             * its buffer left behind. Regions come in order, so all before this one was walked. */
            next = region->end > next ? region->end : next;
            found(context, (region->start - start) / page_bytes,
                  (region->end - region->start) / page_bytes, region->categories);
        }
        if (next <= at) {
            return -EIO;
        }
        at = next;
    }
    return 0;
}

static void add_pages(void *context, uint64_t page, uint64_t npages, uint64_t categories)
{
    uint64_t *count = context;

    (void)page;
    (void)categories;
    *count += npages;
}

int vmth_pagemap_count(const struct vmth_memory_ops *ops, int pagemap_fd,
                       const struct vmth_page_query *query, uint64_t start, uint64_t npages,
                       uint64_t page_bytes, uint64_t *count)
{
    uint64_t counted = 0;
    int result =
        vmth_pagemap_scan(ops, pagemap_fd, query, start, npages, page_bytes, add_pages, &counted);

    if (result == 0) {
        *count = counted;
    }
    return result;
}
