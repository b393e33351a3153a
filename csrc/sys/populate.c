/* SPDX-License-Identifier: Apache-2.0 */
/* madvise(2) of Linux 5.14 and later, that maps a range at once; mincore(2). */
#define _GNU_SOURCE
#include "sys/populate.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

/* The C library's header may be older than the kernel. */
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

static int system_populate(void *ctx, void *address, size_t nbytes, enum vmth_populate_kind kind)
{
    const int advice = kind == VMTH_POPULATE_WRITE ? MADV_POPULATE_WRITE : MADV_POPULATE_READ;

    (void)ctx;
    return madvise(address, nbytes, advice) < 0 ? -errno : 0;
}

static int64_t system_resident(void *ctx, void *address, size_t nbytes)
{
    const size_t page_bytes = (size_t)getpagesize();
    unsigned char seen[512];
    int64_t n = 0;
    size_t done;
    size_t i;

    (void)ctx;
    for (done = 0; done < nbytes;) {
        size_t take = nbytes - done;

        if (take > sizeof(seen) * page_bytes) {
            take = sizeof(seen) * page_bytes;
        }
        if (mincore((char *)address + done, take, seen) < 0) {
            return -errno;
        }
        for (i = 0; i < (take + page_bytes - 1) / page_bytes; i++) {
            n += seen[i] & 1;
        }
        done += take;
    }
    return n;
}

const struct vmth_populate_ops *vmth_populate_system_ops(void)
{
    static const struct vmth_populate_ops ops = {
        .populate = system_populate, .resident = system_resident, .ctx = NULL};

    return &ops;
}
