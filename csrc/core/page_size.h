/* SPDX-License-Identifier: Apache-2.0 */
/* Which page sizes the kernels take. */
#ifndef VMTH_CORE_PAGE_SIZE_H
#define VMTH_CORE_PAGE_SIZE_H

#include <stdbool.h>
#include <stddef.h>

#define VMTH_MIN_PAGE_BYTES ((size_t)4096)
#define VMTH_MAX_PAGE_BYTES ((size_t)2 << 20)

static inline bool page_size_valid(size_t page_bytes)
{
    return page_bytes >= VMTH_MIN_PAGE_BYTES && page_bytes <= VMTH_MAX_PAGE_BYTES &&
           (page_bytes & (page_bytes - 1)) == 0;
}

#endif
