/* SPDX-License-Identifier: Apache-2.0 */
/* BLAKE2b over whole pages, scalar: defines the answer for every other implementation. */
#include "core/blake2b.h"
#include "core/endian.h"
#include "core/kernel_ops.h"

const uint64_t blake2b_iv[8] = {
    UINT64_C(0x6a09e667f3bcc908), UINT64_C(0xbb67ae8584caa73b), UINT64_C(0x3c6ef372fe94f82b),
    UINT64_C(0xa54ff53a5f1d36f1), UINT64_C(0x510e527fade682d1), UINT64_C(0x9b05688c2b3e6c1f),
    UINT64_C(0x1f83d9abfb41bd6b), UINT64_C(0x5be0cd19137e2179)};

static inline uint64_t rotate(uint64_t value, unsigned bits)
{
    return value >> bits | value << (64 - bits);
}

static inline void mix(uint64_t v[16], unsigned a, unsigned b, unsigned c, unsigned d, uint64_t x,
                       uint64_t y)
{
    v[a] += v[b] + x;
    v[d] = rotate(v[d] ^ v[a], 32);
    v[c] += v[d];
    v[b] = rotate(v[b] ^ v[c], 24);
    v[a] += v[b] + y;
    v[d] = rotate(v[d] ^ v[a], 16);
    v[c] += v[d];
    v[b] = rotate(v[b] ^ v[c], 63);
}

void blake2b_compress(uint64_t chain[8], const uint8_t block[BLAKE2B_BLOCK_BYTES], uint64_t counter,
                      bool last)
{
    uint64_t m[16];
    uint64_t v[16];

    for (unsigned i = 0; i < 16; i++) {
        m[i] = load_le64(block + 8 * i);
    }
    for (unsigned i = 0; i < 8; i++) {
        v[i] = chain[i];
        v[i + 8] = blake2b_iv[i];
    }
    v[12] ^= counter;
    v[14] ^= last ? ~UINT64_C(0) : 0;
#define MIX(a, b, c, d, x, y) mix(v, a, b, c, d, m[x], m[y]);
    BLAKE2B_ROUNDS(BLAKE2B_ROUND)
#undef MIX
    for (unsigned i = 0; i < 8; i++) {
        chain[i] ^= v[i] ^ v[i + 8];
    }
}

static void hash_scalar_pages(const uint64_t start[8], const uint8_t *const *pages,
                              size_t page_bytes, size_t npages, struct vmth_u128 *out)
{
    for (size_t i = 0; i < npages; i++) {
        uint64_t chain[8];

        for (unsigned word = 0; word < 8; word++) {
            chain[word] = start[word];
        }
        for (size_t at = 0; at < page_bytes; at += BLAKE2B_BLOCK_BYTES) {
            /* The key's block came first, and counts. */
            blake2b_compress(chain, pages[i] + at, at + 2 * BLAKE2B_BLOCK_BYTES,
                             at + BLAKE2B_BLOCK_BYTES == page_bytes);
        }
        out[i].lo = chain[0];
        out[i].hi = chain[1];
    }
}

const struct content_ops content_scalar = {"scalar", hash_scalar_pages};
