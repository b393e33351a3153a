/* SPDX-License-Identifier: Apache-2.0 */
/* The running digest of all guest memory.
 *
 *   table of one ramblock    | h(page 0) | h(page 1) | {0,0} | h(page 3) | ...    16 bytes a page
 *   digest                   D = sum over valid pages of mix(block, page, h)  mod 2^128
 *
 * Replacing one page's hash is O(1): subtract the old term, add the new one. The sum commutes, so
 * each worker thread keeps a partial digest and the total is their sum; a table entry has one
 * writer between two barriers. mix() is a bijection of h for a fixed (block, page), so two
 * different hashes of one page never give the same term, and it depends on the place, so two pages
 * that changed places do not cancel.
 *
 * Pure: callers own the tables and serialise access to an entry. */
#ifndef VMTH_MEMORY_DIGEST_H
#define VMTH_MEMORY_DIGEST_H

#include "vmth/common.h"

VMTH_BEGIN_DECLS

/* A partial or total digest. Zero-initialised is the digest of nothing. `pages` counts valid pages
 * (modulo 2^64: a partial digest may have taken out more than it put in). */
struct vmth_digest {
    struct vmth_u128 sum;
    uint64_t pages;
};

struct vmth_u128 vmth_digest_mix(uint32_t block, uint64_t page, const struct vmth_u128 *hash);

/* total += part */
void vmth_digest_merge(struct vmth_digest *total, const struct vmth_digest *part);

/* Set the entries of pages [first, first + n) to new_hashes[0..n): takes old valid terms out, puts
 * the new in. `table` points at page 0's entry. An entry of {0,0} in new_hashes makes it invalid.
 * `fresh`, if not NULL, gets the sum of the new terms alone (a packet's digest), added on top. */
void vmth_digest_replace(struct vmth_digest *digest, uint32_t block, uint64_t first, size_t n,
                         struct vmth_u128 *table, const struct vmth_u128 *new_hashes,
                         struct vmth_digest *fresh);

/* The same with one hash for every page (zero runs). */
void vmth_digest_fill(struct vmth_digest *digest, uint32_t block, uint64_t first, size_t n,
                      struct vmth_u128 *table, const struct vmth_u128 *hash,
                      struct vmth_digest *fresh);

/* Take pages out: entries become {0,0}. Before the first byte of a page is overwritten. */
void vmth_digest_invalidate(struct vmth_digest *digest, uint32_t block, uint64_t first, size_t n,
                            struct vmth_u128 *table);

/* The digest of pages [first, first + n) computed anew from the table. */
struct vmth_digest vmth_digest_of(uint32_t block, uint64_t first, size_t n,
                                  const struct vmth_u128 *table);

/* The same for hashes without a table: hashes[0] is page first's. */
struct vmth_digest vmth_digest_of_hashes(uint32_t block, uint64_t first, size_t n,
                                         const struct vmth_u128 *hashes);

/* The digest of pages [first, first + n) that all have one hash. */
struct vmth_digest vmth_digest_of_fill(uint32_t block, uint64_t first, uint64_t n,
                                       const struct vmth_u128 *hash);

VMTH_END_DECLS

#endif
