/* SPDX-License-Identifier: Apache-2.0 */
/* Which pages hold zero bytes only, and the partition of a batch by that.
 *
 *   page ids before   5  6  7  8  9        zero: 6 9
 *   page ids after    5  7  8 | 6  9       nnormal = 3; both halves keep their order
 *
 * Pure; page contents may change while they are read (a live guest): the answer then is that of
 * some moment during the call for each page, and the page is dirty again. */
#ifndef VMTH_ZERO_PAGE_H
#define VMTH_ZERO_PAGE_H

#include <stdbool.h>

#include "vmth/common.h"

VMTH_BEGIN_DECLS

/* True if `nbytes` (a multiple of 64, however many) bytes are all zero.
 * Any alignment. Stops at the first cache lines that are not. */
bool vmth_is_zero(const uint8_t *bytes, size_t nbytes);

/* Bit i of `zero_words` (LSB first; (npages + 63) / 64 words are written whole) = page i of the pages
 * back to back at `pages` is zero. Returns 0, or -EINVAL for a page size that is no power of two in
 * 4096 .. 2 MiB. */
VMTH_MUST_CHECK int vmth_zero_scan(const uint8_t *pages, size_t page_bytes, size_t npages,
                                   uint64_t *zero_words, size_t *nzero);

/* Partition `ids` (page numbers relative to `host`, the address of page 0) in place: normal pages
 * left, zero pages right, each in their order. `scratch` holds n entries. */
VMTH_MUST_CHECK int vmth_zero_partition(const uint8_t *host, size_t page_bytes, uint64_t *ids, size_t n,
                                        uint64_t *scratch, size_t *nnormal);

VMTH_END_DECLS

#endif
