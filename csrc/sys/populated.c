/* SPDX-License-Identifier: Apache-2.0 */
/* Populated pages of anonymous memory by its page table, of shared memory by its file. */
#define _GNU_SOURCE
#include "sys/populated.h"

#include <errno.h>
#include <unistd.h>

#include "vmth/bitmap.h"

enum { MOST_COUNTS = 16 };

#define TMPFS_FS_MAGIC UINT64_C(0x01021994) /* TMPFS_MAGIC of linux/magic.h; memfd has it, too */

struct target {
    uint64_t *words;
    uint64_t page;
};

static void note_populated(void *context, uint64_t page, uint64_t npages, uint64_t categories)
{
    const struct target *target = context;

    (void)categories;
    vmth_bitmap_set_range(target->words, target->page + page, npages);
}

int vmth_populated_anon(const struct vmth_memory_ops *ops, int pagemap_fd, uint64_t address,
                        uint64_t npages, uint64_t page_bytes, uint64_t *words, uint64_t page)
{
    const struct vmth_page_query query = {
        .category_inverted = VMTH_PAGE_IS_PFNZERO,
        .category_mask = VMTH_PAGE_IS_PFNZERO,
        .category_anyof_mask = VMTH_PAGE_IS_PRESENT | VMTH_PAGE_IS_SWAPPED,
    };
    struct target target = {.words = words, .page = page};

    return vmth_pagemap_scan(ops, pagemap_fd, &query, address, npages, page_bytes, note_populated,
                             &target);
}

/* Where the next data at or after `at` begins; `end` if there is none before it. */
static int64_t next_data(const struct vmth_memory_ops *ops, int fd, int64_t at, int64_t end)
{
    int64_t data = ops->lseek(ops, fd, at, SEEK_DATA);

    if (data == -ENXIO) {
        return end;
    }
    return data > end ? end : data;
}

/* Where the data at `at` ends, `end` if it goes on. SEEK_HOLE walks to the data's end wherever that
 * is, so it is asked only where a hole is known to come before `end`: asked for every piece of a
 * full file, it would walk the rest of the file each time. */
static int64_t next_hole(const struct vmth_memory_ops *ops, int fd, int64_t at, int64_t end,
                         uint64_t page_bytes, bool hole_ahead)
{
    int64_t hole = at;

    if (hole_ahead) {
        hole = ops->lseek(ops, fd, at, SEEK_HOLE);
        /* The data was punched out between the two questions: look again from here. */
        if (hole == -ENXIO) {
            return at;
        }
        return hole > end ? end : hole;
    }
    while (hole < end) {
        int64_t data = ops->lseek(ops, fd, hole, SEEK_DATA);

        if (data < 0 && data != -ENXIO) {
            return data;
        }
        if (data != hole) {
            break;
        }
        hole += (int64_t)page_bytes;
    }
    return hole;
}

/* Pages of the range that is left that hold something, as far as is known. */
struct held {
    int64_t pages;    /* -errno: the kernel does not count them */
    int64_t at;       /* where they were counted from; data behind that was taken off since */
    unsigned counted; /* times */
};

static void count_held(struct held *held, const struct vmth_memory_ops *ops, int fd, int64_t at,
                       int64_t end)
{
    held->pages = ops->cached_pages(ops, fd, (uint64_t)at, (uint64_t)(end - at));
    held->at = at;
    held->counted++;
}

/* Is all of [at, end), of `npages`, there? What was counted from an earlier place on may have pages in it
 * that were reserved and never written: those are counted and are no data. So a count that says yes is
 * taken again from here, a few times at most. */
static bool all_held(struct held *held, const struct vmth_memory_ops *ops, int fd, int64_t at,
                     int64_t end, uint64_t npages)
{
    if (held->pages >= 0 && (uint64_t)held->pages >= npages && held->at != at) {
        if (held->counted == MOST_COUNTS) {
            return false;
        }
        count_held(held, ops, fd, at, end);
    }
    return held->pages >= 0 && (uint64_t)held->pages >= npages;
}

/* Has the file no hole, as a guest's memory that was allocated beforehand? Told without a look at each
 * page, which for a large guest takes seconds. */
static bool fully_allocated(const struct vmth_memory_ops *ops, int fd, uint64_t end)
{
    uint64_t nbytes;
    uint64_t allocated;

    return ops->file_bytes(ops, fd, &nbytes, &allocated) == 0 && end <= nbytes &&
           allocated >= nbytes;
}

int vmth_populated_file(const struct vmth_memory_ops *ops, int fd, uint64_t offset, uint64_t npages,
                        uint64_t page_bytes, uint64_t *words, uint64_t page)
{
    const int64_t end = (int64_t)(offset + npages * page_bytes);
    int64_t at = next_data(ops, fd, (int64_t)offset, end);
    struct held held = {0, at, 0};

    if (at == (int64_t)offset && at < end && fully_allocated(ops, fd, (uint64_t)end)) {
        vmth_bitmap_set_range(words, page, npages);
        return 0;
    }
    if (at >= 0 && at < end) {
        count_held(&held, ops, fd, at, end);
    }
    while (at >= 0 && at < end) {
        const uint64_t first = ((uint64_t)at - offset) / page_bytes;
        int64_t hole;
        uint64_t last;

        if (all_held(&held, ops, fd, at, end, npages - first)) {
            vmth_bitmap_set_range(words, page + first, npages - first);
            return 0;
        }
        hole = next_hole(ops, fd, at, end, page_bytes, held.pages >= 0);
        if (hole < 0) {
            return (int)hole;
        }
        if (hole < at) {
            return -EIO;
        }
        last = ((uint64_t)hole - offset + page_bytes - 1) / page_bytes;
        vmth_bitmap_set_range(words, page + first, last - first);
        if (held.pages >= 0) {
            const int64_t taken = (int64_t)(last - first);

            /* Zero although there is more: it was written meanwhile. That costs a walk. */
            held.pages = held.pages > taken ? held.pages - taken : 0;
        }
        at = hole < end ? next_data(ops, fd, hole, end) : end;
        if (at >= 0 && at < hole) {
            return -EIO;
        }
    }
    return at < 0 ? (int)at : 0;
}

int vmth_populated_file_is_exact(const struct vmth_memory_ops *ops, int fd, bool *exact)
{
    uint64_t magic;
    int result = ops->fs_magic(ops, fd, &magic);

    if (result < 0) {
        return result;
    }
    *exact = magic == TMPFS_FS_MAGIC;
    return 0;
}
