/* SPDX-License-Identifier: Apache-2.0 */
/* Mapping pages ahead of their use: one call for a range instead of one fault for each page.
 *
 *   READ    what is there becomes readable (and, where it is shared, writable); a hole of shared
 *           memory is allocated, one of private memory maps the kernel's page of zeros
 *   WRITE   every page is allocated, private and writable: for holes that are about to be filled
 *
 * Content never changes, and a page that could not be mapped faults later as it would have. */
#ifndef VMTH_SYS_POPULATE_H
#define VMTH_SYS_POPULATE_H

#include <stddef.h>
#include <stdint.h>

#include "vmth/common.h"

VMTH_BEGIN_DECLS

enum vmth_populate_kind { VMTH_POPULATE_READ = 1, VMTH_POPULATE_WRITE = 2 };

/* A hook returns 0 or a negative errno; any thread calls it. Tests replace the table. */
struct vmth_populate_ops {
    /* -EINVAL: the kernel (before 5.14) or the kind of mapping cannot. -ENOMEM: no memory, or not
     * mapped throughout. -EFAULT: a page has nothing behind it. Pages before it are mapped. */
    int (*populate)(void *ctx, void *address, size_t nbytes, enum vmth_populate_kind kind);
    /* How many pages (the kernel's) of the range are in memory, mapped here or not; `address` is a
     * multiple of a page. Or a negative errno. */
    int64_t (*resident)(void *ctx, void *address, size_t nbytes);
    void *ctx; /* handed to the hooks; owned by whoever filled the table */
};

/* The kernel's own calls (madvise with MADV_POPULATE_READ and _WRITE, mincore). Static storage,
 * read-only. */
const struct vmth_populate_ops *vmth_populate_system_ops(void);

VMTH_END_DECLS

#endif
