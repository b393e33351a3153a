/* SPDX-License-Identifier: Apache-2.0 */
/* Keyed 128-bit page hash: XXH3-128 with a per-session seed.
 *
 *   memory   | page 0        | page 1        | ...          page_bytes each
 *   out      | lo hi         | lo hi         | ...          one vmth_u128 a page
 *
 * The value of a page is XXH3_128bits_withSeed(page, page_bytes, seed) of the xxHash 0.8
 * specification, except that an all-zero result is replaced by {1, 0}: {0, 0} marks a page
 * without a valid hash. It detects errors, not forgery.
 *
 * Pure: no allocation, no I/O, no locks; any thread may call with its own buffers. */
#ifndef VMTH_PAGE_HASH_H
#define VMTH_PAGE_HASH_H

#include "vmth/common.h"

VMTH_BEGIN_DECLS

#define VMTH_HASH_SECRET_BYTES 192

/* A seed expanded once a session. Read-only afterwards, so threads share it. */
struct vmth_hash_key {
    uint64_t seed;
    uint8_t secret[VMTH_HASH_SECRET_BYTES];
};

void vmth_hash_key_init(struct vmth_hash_key *key, uint64_t seed);

/* Hash `npages` pages of `page_bytes` each (a power of two, 4096 to 2 MiB) that lie back to back at
 * `pages`. `out` holds `npages` entries. Returns 0, or -EINVAL for a page size outside the range. */
VMTH_MUST_CHECK int vmth_page_hash(const struct vmth_hash_key *key, const uint8_t *pages,
                                   size_t page_bytes, size_t npages, struct vmth_u128 *out);

/* The same, and tell zero pages in the same pass over memory: bit i of `zero_words` (LSB first,
 * caller-cleared is not needed: (npages + 63) / 64 words are written) is set when page i holds zero
 * bytes only; its hash is then the zero page's. `*nzero` gets their number. */
VMTH_MUST_CHECK int vmth_page_hash_zero(const struct vmth_hash_key *key, const uint8_t *pages,
                                        size_t page_bytes, size_t npages, struct vmth_u128 *out,
                                        uint64_t *zero_words, size_t *nzero);

/* XXH64 of any bytes (the checksum of packet headers and descriptors). */
uint64_t vmth_checksum64(const void *data, size_t nbytes, uint64_t seed);

VMTH_END_DECLS

#endif
