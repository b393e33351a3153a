/* SPDX-License-Identifier: Apache-2.0 */
/* userfaultfd in WP_ASYNC mode: open, register, arm; PAGEMAP_SCAN reports and arms again. */
#define _GNU_SOURCE
#include "sys/uffd_wp.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>

#include "vmth/bitmap.h"

/* Newer than Debian 12's linux/userfaultfd.h (6.1). */
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13) /* write-protect entries without a page, too */
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15) /* the kernel resolves write-protect faults by itself */
#endif

#define NEEDED_FEATURES                                                                            \
    (UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM)

/* WP_ASYNC never waits for user space, so a descriptor limited to faults of user mode still tracks
 * the kernel's writes, and needs no privilege. A seccomp filter may forbid the system call where
 * the device is allowed. */
static int open_uffd(const struct vmth_memory_ops *ops)
{
    int flags = O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY;
    int fd = ops->userfaultfd(ops, flags);
    int device;

    if (fd >= 0) {
        return fd;
    }
    device = ops->open(ops, "/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0) {
        return fd;
    }
    fd = (int)ops->ioctl(ops, device, USERFAULTFD_IOC_NEW, (void *)(uintptr_t)flags);
    ops->close(ops, device);
    return fd;
}

static int handshake(const struct vmth_memory_ops *ops, int uffd, uint64_t wanted,
                     uint64_t *offered)
{
    struct uffdio_api api = {.api = UFFD_API, .features = wanted};
    int64_t result = ops->ioctl(ops, uffd, UFFDIO_API, &api);

    if (result < 0) {
        return (int)result;
    }
    *offered = api.features;
    return 0;
}

int vmth_uffd_features(const struct vmth_memory_ops *ops, uint64_t *features)
{
    int uffd = open_uffd(ops);
    int result;

    if (uffd < 0) {
        return uffd;
    }
    result = handshake(ops, uffd, 0, features);
    ops->close(ops, uffd);
    return result;
}

static void ignore_region(void *context, uint64_t page, uint64_t npages, uint64_t categories)
{
    (void)context;
    (void)page;
    (void)npages;
    (void)categories;
}

/* Is the ioctl there? Asks about the page that holds this function's own frame. */
static int try_pagemap_scan(const struct vmth_memory_ops *ops, int pagemap_fd, uint64_t page_bytes)
{
    const struct vmth_page_query query = {
        .category_mask = VMTH_PAGE_IS_PRESENT,
        .return_mask = VMTH_PAGE_IS_PRESENT,
    };
    uint64_t own = (uint64_t)(uintptr_t)&query / page_bytes * page_bytes;

    return vmth_pagemap_scan(ops, pagemap_fd, &query, own, 1, page_bytes, ignore_region, NULL);
}

static int open_parts(struct vmth_uffd_wp *tracker, enum vmth_uffd_missing *missing)
{
    uint64_t offered = 0;
    int result;

    *missing = VMTH_UFFD_SYSCALL;
    tracker->uffd = open_uffd(tracker->ops);
    if (tracker->uffd < 0) {
        return tracker->uffd;
    }
    *missing = VMTH_UFFD_WP_ASYNC;
    result = handshake(tracker->ops, tracker->uffd, NEEDED_FEATURES, &offered);
    if (result < 0) {
        return result;
    }
    if ((offered & NEEDED_FEATURES) != NEEDED_FEATURES) {
        return -EOPNOTSUPP;
    }
    *missing = VMTH_UFFD_PAGEMAP;
    tracker->pagemap_fd =
        tracker->ops->open(tracker->ops, "/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (tracker->pagemap_fd < 0) {
        return tracker->pagemap_fd;
    }
    *missing = VMTH_UFFD_PAGEMAP_SCAN;
    return try_pagemap_scan(tracker->ops, tracker->pagemap_fd, tracker->page_bytes);
}

int vmth_uffd_wp_open(struct vmth_uffd_wp *tracker, const struct vmth_memory_ops *ops,
                      uint64_t page_bytes, enum vmth_uffd_missing *missing)
{
    int result;

    *tracker = (struct vmth_uffd_wp){
        .ops = ops,
        .uffd = -1,
        .pagemap_fd = -1,
        .page_bytes = page_bytes,
    };
    result = open_parts(tracker, missing);
    if (result < 0) {
        vmth_uffd_wp_close(tracker);
        return result;
    }
    *missing = VMTH_UFFD_NOTHING_MISSING;
    return 0;
}

void vmth_uffd_wp_close(struct vmth_uffd_wp *tracker)
{
    if (tracker == NULL) {
        return;
    }
    if (tracker->uffd >= 0) {
        tracker->ops->close(tracker->ops, tracker->uffd);
    }
    if (tracker->pagemap_fd >= 0) {
        tracker->ops->close(tracker->ops, tracker->pagemap_fd);
    }
    tracker->uffd = -1;
    tracker->pagemap_fd = -1;
}

static int register_range(const struct vmth_uffd_wp *tracker, struct uffdio_range range)
{
    struct uffdio_register registration = {.range = range, .mode = UFFDIO_REGISTER_MODE_WP};
    int64_t result =
        tracker->ops->ioctl(tracker->ops, tracker->uffd, UFFDIO_REGISTER, &registration);

    if (result < 0) {
        return (int)result;
    }
    /* The kernel offers UFFDIO_ZEROPAGE everywhere but on hugetlb. */
    if ((registration.ioctls & (UINT64_C(1) << _UFFDIO_ZEROPAGE)) == 0) {
        return -EOPNOTSUPP;
    }
    return 0;
}

static void note_populated(void *context, uint64_t page, uint64_t npages, uint64_t categories)
{
    uint64_t *populated = context;
    bool present = (categories & VMTH_PAGE_IS_PRESENT) != 0;
    bool zeros = (categories & VMTH_PAGE_IS_PFNZERO) != 0;
    bool swapped = (categories & VMTH_PAGE_IS_SWAPPED) != 0;

    if (populated != NULL && (swapped || (present && !zeros))) {
        vmth_bitmap_set_range(populated, page, npages);
    }
}

/* A page that was registered and never armed reads as written, so everything is armed at once. The
 * scan matches every page: it arms and reports the category in one step under one lock. */
static int arm_range(const struct vmth_uffd_wp *tracker, uint64_t address, uint64_t npages,
                     uint64_t *populated)
{
    const struct vmth_page_query query = {
        .flags = VMTH_PM_SCAN_WP_MATCHING | VMTH_PM_SCAN_CHECK_WPASYNC,
        .return_mask = VMTH_PAGE_IS_PRESENT | VMTH_PAGE_IS_SWAPPED | VMTH_PAGE_IS_PFNZERO,
    };

    return vmth_pagemap_scan(tracker->ops, tracker->pagemap_fd, &query, address, npages,
                             tracker->page_bytes, note_populated, populated);
}

int vmth_uffd_wp_add(const struct vmth_uffd_wp *tracker, uint64_t address, uint64_t npages,
                     uint64_t *populated)
{
    struct uffdio_range range = {.start = address, .len = npages * tracker->page_bytes};
    int result = register_range(tracker, range);

    if (result == 0) {
        result = arm_range(tracker, address, npages, populated);
    } else if (result != -EOPNOTSUPP) {
        return result;
    }
    if (result < 0) {
        (void)tracker->ops->ioctl(tracker->ops, tracker->uffd, UFFDIO_UNREGISTER, &range);
    }
    return result;
}

static void note_written(void *context, uint64_t page, uint64_t npages, uint64_t categories)
{
    uint64_t *words = context;

    (void)categories;
    vmth_bitmap_set_range(words, page, npages);
}

static int scan_written(const struct vmth_uffd_wp *tracker, uint64_t address, uint64_t npages,
                        uint64_t *words, uint64_t flags)
{
    const struct vmth_page_query query = {
        .flags = flags | VMTH_PM_SCAN_CHECK_WPASYNC,
        .category_mask = VMTH_PAGE_IS_WRITTEN,
        .return_mask = VMTH_PAGE_IS_WRITTEN,
    };

    return vmth_pagemap_scan(tracker->ops, tracker->pagemap_fd, &query, address, npages,
                             tracker->page_bytes, note_written, words);
}

int vmth_uffd_wp_fetch(const struct vmth_uffd_wp *tracker, uint64_t address, uint64_t npages,
                       uint64_t *words)
{
    return scan_written(tracker, address, npages, words, VMTH_PM_SCAN_WP_MATCHING);
}

int vmth_uffd_wp_peek(const struct vmth_uffd_wp *tracker, uint64_t address, uint64_t npages,
                      uint64_t *words)
{
    return scan_written(tracker, address, npages, words, 0);
}

int vmth_uffd_wp_remove(const struct vmth_uffd_wp *tracker, uint64_t address, uint64_t npages)
{
    struct uffdio_range range = {.start = address, .len = npages * tracker->page_bytes};

    return (int)tracker->ops->ioctl(tracker->ops, tracker->uffd, UFFDIO_UNREGISTER, &range);
}
