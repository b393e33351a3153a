/* SPDX-License-Identifier: Apache-2.0 */
/* Page hash: key expansion, the batch loops, XXH3-128's finish. Accumulation is a kernel. */
#include "vmth/page_hash.h"

#include <errno.h>

#include "core/endian.h"
#include "core/kernel_ops.h"
#include "core/page_size.h"
#include "core/xxh3.h"

/* The default secret of the specification: a constant of the algorithm. */
static const uint8_t default_secret[VMTH_HASH_SECRET_BYTES] = {
    /* clang-format off */
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
    /* clang-format on */
};

void vmth_hash_key_init(struct vmth_hash_key *key, uint64_t seed)
{
    key->seed = seed;
    for (size_t i = 0; i < VMTH_HASH_SECRET_BYTES; i += 16) {
        store_le64(key->secret + i, load_le64(default_secret + i) + seed);
        store_le64(key->secret + i + 8, load_le64(default_secret + i + 8) - seed);
    }
}

static inline uint64_t multiply_fold(uint64_t a, uint64_t b)
{
    const unsigned __int128 product = (unsigned __int128)a * b;

    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint64_t merge_acc(const uint64_t acc[8], const uint8_t *secret, uint64_t start)
{
    uint64_t value = start;

    for (unsigned lane = 0; lane < 8; lane += 2) {
        value += multiply_fold(acc[lane] ^ load_le64(secret + 8 * lane),
                               acc[lane + 1] ^ load_le64(secret + 8 * lane + 8));
    }
    value ^= value >> 37;
    value *= 0x165667919E3779F9u;
    return value ^ (value >> 32);
}

static struct vmth_u128 finish(const uint64_t acc[8], const uint8_t *secret, size_t page_bytes)
{
    struct vmth_u128 hash;

    hash.lo = merge_acc(acc, secret + 11, page_bytes * XXH_PRIME64_1);
    hash.hi = merge_acc(acc, secret + VMTH_HASH_SECRET_BYTES - XXH3_STRIPE_BYTES - 11,
                        ~(page_bytes * XXH_PRIME64_2));
    if (hash.lo == 0 && hash.hi == 0) {
        hash.lo = 1; /* {0, 0} marks a page without a valid hash */
    }
    return hash;
}

int vmth_page_hash(const struct vmth_hash_key *key, const uint8_t *pages, size_t page_bytes,
                   size_t npages, struct vmth_u128 *out)
{
    const struct hash_ops *hash = kernel_hash();

    if (!page_size_valid(page_bytes)) {
        return -EINVAL;
    }
    for (size_t i = 0; i < npages; i++) {
        uint64_t acc[8];

        hash->accumulate(acc, key->secret, pages + i * page_bytes, page_bytes, 0);
        out[i] = finish(acc, key->secret, page_bytes);
    }
    return 0;
}

/* The zero page's hash needs no memory: all blocks are taken as zero. */
static struct vmth_u128 hash_of_zero_page(const struct hash_ops *hash,
                                          const struct vmth_hash_key *key, size_t page_bytes)
{
    uint64_t acc[8];

    hash->accumulate(acc, key->secret, NULL, page_bytes, page_bytes / XXH3_BLOCK_BYTES);
    return finish(acc, key->secret, page_bytes);
}

int vmth_page_hash_zero(const struct vmth_hash_key *key, const uint8_t *pages, size_t page_bytes,
                        size_t npages, struct vmth_u128 *out, uint64_t *zero_words, size_t *nzero)
{
    const struct hash_ops *hash = kernel_hash();
    const struct zero_ops *zero = kernel_zero();
    struct vmth_u128 zero_hash = {0, 0}; /* made when the first zero page is met */
    size_t zeros = 0;

    if (!page_size_valid(page_bytes)) {
        return -EINVAL;
    }
    for (size_t i = 0; i < npages; i++) {
        const uint8_t *page = pages + i * page_bytes;
        /* Almost every page that is not zero shows it in its first cache line. Where it does not,
         * the blocks already seen to be zero are not read again. */
        const size_t prefix = zero->zero_prefix(page, page_bytes);

        if (i % 64 == 0) {
            zero_words[i / 64] = 0;
        }
        if (prefix == page_bytes) {
            if (zeros == 0) {
                zero_hash = hash_of_zero_page(hash, key, page_bytes);
            }
            out[i] = zero_hash;
            zero_words[i / 64] |= UINT64_C(1) << (i % 64);
            zeros++;
        } else {
            uint64_t acc[8];

            hash->accumulate(acc, key->secret, page, page_bytes, prefix / XXH3_BLOCK_BYTES);
            out[i] = finish(acc, key->secret, page_bytes);
        }
    }
    *nzero = zeros;
    return 0;
}
