/* SPDX-License-Identifier: Apache-2.0 */
/* What QEMU's two parsers demand of the block table that they are given. */
#ifndef VMTH_CORE_QEMU_BLOCKS_H
#define VMTH_CORE_QEMU_BLOCKS_H

#include <stdbool.h>

#include "vmth/qemu_ram.h"

static inline bool qemu_blocks_valid(const struct vmth_qemu_blocks *blocks)
{
    const uint32_t page_bytes = blocks->page_bytes;

    return page_bytes >= VMTH_QEMU_MIN_PAGE_BYTES && page_bytes <= VMTH_QEMU_MAX_PAGE_BYTES &&
           (page_bytes & (page_bytes - 1)) == 0 && blocks->nblocks <= VMTH_QEMU_MAX_BLOCKS;
}

#endif
