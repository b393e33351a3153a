/* SPDX-License-Identifier: Apache-2.0 */
/* madvise(2) of Linux 5.14 and later, that maps a range at once. */
#define _GNU_SOURCE
#include "sys/populate.h"

#include <errno.h>
#include <sys/mman.h>

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

const struct vmth_populate_ops *vmth_populate_system_ops(void)
{
    static const struct vmth_populate_ops ops = {.populate = system_populate, .ctx = NULL};

    return &ops;
}
