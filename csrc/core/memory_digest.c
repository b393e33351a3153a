/* SPDX-License-Identifier: Apache-2.0 */
/* The memory digest: mix() and the loops that keep table and sum together. docs/digest.md says why
 * mix() is what it is. */
#include "vmth/memory_digest.h"

#include <stdbool.h>

/* Odd constants without structure: the first 64-bit words of the fractional parts of sqrt(2),
 * sqrt(3), sqrt(5) and sqrt(7), the lowest bit set. */
#define MIX_1 0x6a09e667f3bcc909u
#define MIX_2 0xbb67ae8584caa73bu
#define MIX_3 0x3c6ef372fe94f82bu
#define MIX_4 0xa54ff53a5f1d36f1u

static inline uint64_t rotl(uint64_t value, unsigned bits)
{
    return (value << bits) | (value >> (64 - bits));
}

static inline uint64_t multiply_fold(uint64_t a, uint64_t b)
{
    const unsigned __int128 product = (unsigned __int128)a * b;

    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* A bijection of the place: pages below 2^40 and blocks below 2^24 never share a key. */
static inline uint64_t place_key(uint32_t block, uint64_t page)
{
    uint64_t key = (page ^ rotl(block, 40)) + MIX_1;

    key = (key ^ (key >> 32)) * MIX_2;
    key = (key ^ (key >> 29)) * MIX_3;
    return key ^ (key >> 32);
}

/* Two Feistel rounds: each adds to one half a function of the other half and the key, so the pair
 * can be undone for every key. */
static inline struct vmth_u128 mix(uint64_t key, struct vmth_u128 hash)
{
    struct vmth_u128 term;

    hash.lo ^= key;
    term.hi = hash.hi + multiply_fold(hash.lo ^ MIX_2, key ^ MIX_4);
    term.lo = hash.lo + multiply_fold(term.hi ^ rotl(key, 32), MIX_1);
    return term;
}

static inline bool is_valid(const struct vmth_u128 *hash)
{
    return (hash->lo | hash->hi) != 0;
}

static inline void add(struct vmth_u128 *sum, const struct vmth_u128 *term)
{
    const unsigned __int128 total =
        (((unsigned __int128)sum->hi << 64) | sum->lo) +
        (((unsigned __int128)term->hi << 64) | term->lo);

    sum->lo = (uint64_t)total;
    sum->hi = (uint64_t)(total >> 64);
}

static inline void subtract(struct vmth_u128 *sum, const struct vmth_u128 *term)
{
    const unsigned __int128 total =
        (((unsigned __int128)sum->hi << 64) | sum->lo) -
        (((unsigned __int128)term->hi << 64) | term->lo);

    sum->lo = (uint64_t)total;
    sum->hi = (uint64_t)(total >> 64);
}

struct vmth_u128 vmth_digest_mix(uint32_t block, uint64_t page, const struct vmth_u128 *hash)
{
    return mix(place_key(block, page), *hash);
}

void vmth_digest_merge(struct vmth_digest *total, const struct vmth_digest *part)
{
    add(&total->sum, &part->sum);
    total->pages += part->pages;
}

/* Put `hash` (which may be invalid) into an entry: the old term leaves *removed's side, the new one
 * joins *added's. */
static inline void put(struct vmth_digest *added, struct vmth_digest *removed, uint64_t key,
                       struct vmth_u128 *entry, const struct vmth_u128 *hash)
{
    if (is_valid(entry)) {
        const struct vmth_u128 old = mix(key, *entry);

        add(&removed->sum, &old);
        removed->pages++;
    }
    if (is_valid(hash)) {
        const struct vmth_u128 term = mix(key, *hash);

        add(&added->sum, &term);
        added->pages++;
    }
    *entry = *hash;
}

static void settle(struct vmth_digest *digest, const struct vmth_digest *added,
                   const struct vmth_digest *removed, struct vmth_digest *fresh)
{
    vmth_digest_merge(digest, added);
    subtract(&digest->sum, &removed->sum);
    digest->pages -= removed->pages;
    if (fresh != NULL) {
        vmth_digest_merge(fresh, added);
    }
}

void vmth_digest_replace(struct vmth_digest *digest, uint32_t block, uint64_t first, size_t n,
                         struct vmth_u128 *table, const struct vmth_u128 *new_hashes,
                         struct vmth_digest *fresh)
{
    struct vmth_digest added = {{0, 0}, 0};
    struct vmth_digest removed = {{0, 0}, 0};

    for (size_t i = 0; i < n; i++) {
        put(&added, &removed, place_key(block, first + i), &table[first + i], &new_hashes[i]);
    }
    settle(digest, &added, &removed, fresh);
}

void vmth_digest_fill(struct vmth_digest *digest, uint32_t block, uint64_t first, size_t n,
                      struct vmth_u128 *table, const struct vmth_u128 *hash,
                      struct vmth_digest *fresh)
{
    struct vmth_digest added = {{0, 0}, 0};
    struct vmth_digest removed = {{0, 0}, 0};
    const struct vmth_u128 same = *hash;

    for (size_t i = 0; i < n; i++) {
        put(&added, &removed, place_key(block, first + i), &table[first + i], &same);
    }
    settle(digest, &added, &removed, fresh);
}

void vmth_digest_invalidate(struct vmth_digest *digest, uint32_t block, uint64_t first, size_t n,
                            struct vmth_u128 *table)
{
    const struct vmth_u128 invalid = {0, 0};

    vmth_digest_fill(digest, block, first, n, table, &invalid, NULL);
}

struct vmth_digest vmth_digest_of_hashes(uint32_t block, uint64_t first, size_t n,
                                         const struct vmth_u128 *hashes)
{
    struct vmth_digest digest = {{0, 0}, 0};

    for (size_t i = 0; i < n; i++) {
        if (is_valid(&hashes[i])) {
            const struct vmth_u128 term = mix(place_key(block, first + i), hashes[i]);

            add(&digest.sum, &term);
            digest.pages++;
        }
    }
    return digest;
}

struct vmth_digest vmth_digest_of(uint32_t block, uint64_t first, size_t n,
                                  const struct vmth_u128 *table)
{
    return vmth_digest_of_hashes(block, first, n, table + first);
}

struct vmth_digest vmth_digest_of_fill(uint32_t block, uint64_t first, uint64_t n,
                                       const struct vmth_u128 *hash)
{
    struct vmth_digest digest = {{0, 0}, 0};

    if (!is_valid(hash)) {
        return digest;
    }
    for (uint64_t i = 0; i < n; i++) {
        const struct vmth_u128 term = mix(place_key(block, first + i), *hash);

        add(&digest.sum, &term);
    }
    digest.pages = n;
    return digest;
}
