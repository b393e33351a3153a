/* SPDX-License-Identifier: Apache-2.0 */
/* Cryptographic hash of a page's content: what names a page across VMs and files.
 *
 *   pages    | page | page | ...        page_bytes each, anywhere
 *   out      | 16 bytes | 16 bytes |    the digest's bytes are lo, then hi, each little-endian
 *
 * It is BLAKE2b of RFC 7693 with a digest of 16 bytes and a key of 32, over one page. The page hash
 * (page_hash.h) detects errors and is some ten times as fast; this one is for content that somebody
 * else may have chosen: without the key no two pages with one digest can be found in less than about
 * 2^64 attempts, nor a second page for a digest in less than about 2^128.
 *
 * Pure: no allocation, no I/O, no locks; any thread may call with its own buffers. Kernel family
 * "content"; vector twins take 4 or 8 pages at once, so hand over several. */
#ifndef VMTH_CONTENT_HASH_H
#define VMTH_CONTENT_HASH_H

#include "vmth/common.h"

VMTH_BEGIN_DECLS

#define VMTH_CONTENT_KEY_BYTES 32
#define VMTH_CONTENT_HASH_BYTES 16

/* A key expanded once: BLAKE2b's chain after the key's own block. Read-only afterwards, so threads
 * share it. */
struct vmth_content_key {
    uint64_t chain[8];
};

void vmth_content_key_init(struct vmth_content_key *key,
                           const uint8_t secret[VMTH_CONTENT_KEY_BYTES]);

/* Hash the `npages` pages of `page_bytes` each (a power of two, 4096 to 2 MiB) that `pages` points
 * to. `out` holds `npages` entries. Returns 0, or -EINVAL for a page size outside the range. */
VMTH_MUST_CHECK int vmth_content_hash(const struct vmth_content_key *key,
                                      const uint8_t *const *pages, size_t page_bytes,
                                      size_t npages, struct vmth_u128 *out);

/* The same for pages that lie back to back from `base` on. */
VMTH_MUST_CHECK int vmth_content_hash_run(const struct vmth_content_key *key, const uint8_t *base,
                                          size_t page_bytes, size_t npages, struct vmth_u128 *out);

VMTH_END_DECLS

#endif
