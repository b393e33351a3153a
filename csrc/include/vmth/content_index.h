/* SPDX-License-Identifier: Apache-2.0 */
/* Where a content is known to be: from a page's hash to a place (block, page), within fixed memory.
 *
 *   bucket 0 (64 bytes)                                     bucket 1 ...
 *   | tag^place place | tag^place place | .. | .. |         tag    upper half of the hash
 *                                                           place  block and page; 0: empty
 *   The lower half of the hash chooses the bucket.
 *
 * It is a hint, and lossy: a full bucket gives up one of its entries for the new one, and a content has
 * one place, the first that was told. Two contents whose tags agree by chance are taken for one: who
 * uses an answer compares the content or its whole hash.
 *
 * Threads: all calls but init may run at once. The two words of an entry are read and written one by
 * one; a reader that sees halves of two entries finds no tag, for each is stored XORed with its place.
 *
 * Pure: no allocation, no I/O, no locks; the caller owns the memory. */
#ifndef VMTH_CONTENT_INDEX_H
#define VMTH_CONTENT_INDEX_H

#include <stdbool.h>

#include "vmth/common.h"

VMTH_BEGIN_DECLS

#define VMTH_CONTENT_ENTRY_BYTES 16u
#define VMTH_CONTENT_BUCKET_BYTES 64u
#define VMTH_CONTENT_MAX_PAGE ((UINT64_C(1) << 48) - 1)

struct vmth_content_index {
    uint64_t *words;       /* the caller's memory */
    uint64_t bucket_mask;  /* number of buckets, a power of two, less one */
};

/* An empty index in memory[0, nbytes), which holds zeros and is not touched yet: fresh anonymous memory
 * costs nothing until it is used. It uses the largest power of two of buckets; `memory` is aligned to 64
 * bytes and stays the caller's. Returns 0, or -EINVAL for less than one bucket or another
 * alignment. */
VMTH_MUST_CHECK int vmth_content_index_init(struct vmth_content_index *index, void *memory,
                                            size_t nbytes);

/* The content of this hash is at (block, page). A content that has a place keeps it. `page` is at most
 * VMTH_CONTENT_MAX_PAGE; {0, 0} is no hash: both are left out. */
void vmth_content_index_insert(struct vmth_content_index *index, const struct vmth_u128 *hash,
                               uint16_t block, uint64_t page);

/* Where is it? False: not known, and the outputs are untouched. */
bool vmth_content_index_find(const struct vmth_content_index *index, const struct vmth_u128 *hash,
                             uint16_t *block, uint64_t *page);

/* (block, page) no longer has this content. Other places of it are unaffected. */
void vmth_content_index_forget(struct vmth_content_index *index, const struct vmth_u128 *hash,
                               uint16_t block, uint64_t page);

VMTH_END_DECLS

#endif
