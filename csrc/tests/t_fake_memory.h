/* SPDX-License-Identifier: Apache-2.0 */
/* A fake of the kernel behind vmth_memory_ops: page-table entries in an array, counted descriptors. */
#ifndef VMTH_TESTS_T_FAKE_MEMORY_H
#define VMTH_TESTS_T_FAKE_MEMORY_H

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdbool.h>
#include <string.h>

#include "sys/memory_ops.h"
#include "sys/pagemap_scan.h"
#include "t_check.h"

#define FAKE_PAGE_BYTES 4096u
#define FAKE_PAGES 8192u
/* In the middle of a chunk's last huge page, so that a scan of all pages crosses a chunk's end. */
#define FAKE_BASE (7 * VMTH_PAGEMAP_CHUNK_BYTES - 1000 * FAKE_PAGE_BYTES)

enum { FAKE_UFFD = 100, FAKE_PAGEMAP, FAKE_DEVICE };

struct fake_memory {
    struct vmth_memory_ops ops; /* first: the hooks get a pointer to it */
    uint8_t categories[FAKE_PAGES];
    int open_fds;
    int registrations;
    int scans;
    uint64_t features;
    uint64_t range_ioctls;
    /* What each call answers instead of working; 0: it works. */
    int fail_userfaultfd;
    int fail_device;
    int fail_pagemap;
    int fail_register;
    int fail_scan;
    /* Corrupts the answer of a scan, unless NULL. */
    void (*lie)(struct vmth_pm_scan_arg *arg, struct vmth_page_region *regions);
};

static inline struct fake_memory *fake_of(const struct vmth_memory_ops *self)
{
    return (struct fake_memory *)(uintptr_t)self;
}

static inline int fake_opened(struct fake_memory *fake, int failure, int fd)
{
    if (failure != 0) {
        return failure;
    }
    fake->open_fds++;
    return fd;
}

static int fake_open(const struct vmth_memory_ops *self, const char *path, int flags)
{
    struct fake_memory *fake = fake_of(self);

    T_CHECK((flags & O_CLOEXEC) != 0);
    if (strcmp(path, "/dev/userfaultfd") == 0) {
        return fake_opened(fake, fake->fail_device, FAKE_DEVICE);
    }
    T_CHECK(strcmp(path, "/proc/self/pagemap") == 0);
    return fake_opened(fake, fake->fail_pagemap, FAKE_PAGEMAP);
}

static int fake_close(const struct vmth_memory_ops *self, int fd)
{
    T_CHECK(fd >= FAKE_UFFD && fd <= FAKE_DEVICE);
    fake_of(self)->open_fds--;
    return 0;
}

static int fake_userfaultfd(const struct vmth_memory_ops *self, int flags)
{
    T_CHECK((flags & O_CLOEXEC) != 0);
    return fake_opened(fake_of(self), fake_of(self)->fail_userfaultfd, FAKE_UFFD);
}

static inline bool fake_matches(const struct vmth_pm_scan_arg *arg, uint64_t categories)
{
    categories ^= arg->category_inverted;
    return (categories & arg->category_mask) == arg->category_mask &&
           (arg->category_anyof_mask == 0 || (categories & arg->category_anyof_mask) != 0);
}

/* The kernel's rule: regions are merged if they touch and their returned categories are equal; the
 * walk stops before the first page that finds no room; a page is armed only when it is reported. */
static inline int64_t fake_scan(struct fake_memory *fake, struct vmth_pm_scan_arg *arg)
{
    struct vmth_page_region *regions = (struct vmth_page_region *)(uintptr_t)arg->vec;
    uint64_t n = 0;
    uint64_t at;

    for (at = arg->start; at < arg->end; at += FAKE_PAGE_BYTES) {
        uint8_t *entry = &fake->categories[(at - FAKE_BASE) / FAKE_PAGE_BYTES];
        uint64_t returned = *entry & arg->return_mask;

        if (!fake_matches(arg, *entry)) {
            continue;
        }
        if (n > 0 && regions[n - 1].end == at && regions[n - 1].categories == returned) {
            regions[n - 1].end = at + FAKE_PAGE_BYTES;
        } else if (n == arg->vec_len) {
            break;
        } else {
            regions[n++] = (struct vmth_page_region){at, at + FAKE_PAGE_BYTES, returned};
        }
        if (arg->flags & VMTH_PM_SCAN_WP_MATCHING) {
            *entry &= (uint8_t)~VMTH_PAGE_IS_WRITTEN;
        }
    }
    arg->walk_end = at;
    return (int64_t)n;
}

static inline int64_t fake_pagemap_scan(struct fake_memory *fake, struct vmth_pm_scan_arg *arg)
{
    int64_t n = 0;

    fake->scans++;
    T_EQUAL(arg->size, 96);
    T_CHECK(arg->start < arg->end);
    T_EQUAL(arg->start / VMTH_PAGEMAP_CHUNK_BYTES, (arg->end - 1) / VMTH_PAGEMAP_CHUNK_BYTES);
    if (fake->fail_scan != 0) {
        return fake->fail_scan;
    }
    if (arg->start < FAKE_BASE || arg->end > FAKE_BASE + FAKE_PAGES * FAKE_PAGE_BYTES) {
        arg->walk_end = arg->end; /* the caller's stack, when it tries whether the ioctl is there */
    } else {
        n = fake_scan(fake, arg);
    }
    if (fake->lie != NULL && n > 0) {
        fake->lie(arg, (struct vmth_page_region *)(uintptr_t)arg->vec);
    }
    return n;
}

static int64_t fake_ioctl(const struct vmth_memory_ops *self, int fd, unsigned long request,
                          void *arg)
{
    struct fake_memory *fake = fake_of(self);

    if (request == VMTH_PAGEMAP_SCAN) {
        T_EQUAL(fd, FAKE_PAGEMAP);
        return fake_pagemap_scan(fake, arg);
    }
    if (fd == FAKE_DEVICE) {
        return fake_opened(fake, 0, FAKE_UFFD);
    }
    T_EQUAL(fd, FAKE_UFFD);
    if (request == UFFDIO_API) {
        struct uffdio_api *api = arg;

        if ((api->features & ~fake->features) != 0) {
            return -EINVAL;
        }
        api->features = fake->features;
    } else if (request == UFFDIO_REGISTER) {
        if (fake->fail_register != 0) {
            return fake->fail_register;
        }
        fake->registrations++;
        ((struct uffdio_register *)arg)->ioctls = fake->range_ioctls;
    } else {
        T_EQUAL(request, UFFDIO_UNREGISTER);
        fake->registrations--;
    }
    return 0;
}

static inline void fake_init(struct fake_memory *fake)
{
    *fake = (struct fake_memory){
        .ops = {.open = fake_open,
                .close = fake_close,
                .ioctl = fake_ioctl,
                .userfaultfd = fake_userfaultfd},
        .features = UINT64_MAX,
        .range_ioctls = UINT64_MAX,
    };
}

#endif
