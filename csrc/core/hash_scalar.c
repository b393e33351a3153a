/* SPDX-License-Identifier: Apache-2.0 */
/* XXH3 long-input accumulation, scalar: defines the answer for every other implementation. */
#include "core/endian.h"
#include "core/kernel_ops.h"
#include "core/xxh3.h"

const uint8_t xxh3_zero_block[XXH3_BLOCK_BYTES] = {0};

const uint64_t xxh3_initial_acc[8] = {XXH_PRIME32_3, XXH_PRIME64_1, XXH_PRIME64_2, XXH_PRIME64_3,
                                      XXH_PRIME64_4, XXH_PRIME32_2, XXH_PRIME64_5, XXH_PRIME32_1};

static inline void add_stripe(uint64_t acc[8], const uint8_t *in, const uint8_t *secret)
{
    for (unsigned lane = 0; lane < 8; lane++) {
        const uint64_t word = load_le64(in + 8 * lane);
        const uint64_t keyed = word ^ load_le64(secret + 8 * lane);

        acc[lane ^ 1] += word;
        acc[lane] += (keyed & 0xffffffffu) * (keyed >> 32);
    }
}

static void scramble(uint64_t acc[8], const uint8_t *secret)
{
    for (unsigned lane = 0; lane < 8; lane++) {
        uint64_t value = acc[lane];

        value ^= value >> 47;
        value ^= load_le64(secret + XXH3_SCRAMBLE_SECRET + 8 * lane);
        acc[lane] = value * XXH_PRIME32_1;
    }
}

static void accumulate_scalar(uint64_t out[8], const uint8_t *secret, const uint8_t *page,
                              size_t page_bytes, size_t zero_blocks)
{
    const size_t last_block = page_bytes / XXH3_BLOCK_BYTES - 1;
    uint64_t acc[8];

    for (unsigned lane = 0; lane < 8; lane++) {
        acc[lane] = xxh3_initial_acc[lane];
    }
    for (size_t block = 0; block < last_block; block++) {
        const uint8_t *in =
            block < zero_blocks ? xxh3_zero_block : page + block * XXH3_BLOCK_BYTES;

        for (unsigned stripe = 0; stripe < XXH3_BLOCK_STRIPES; stripe++) {
            add_stripe(acc, in + stripe * XXH3_STRIPE_BYTES, secret + 8 * stripe);
        }
        scramble(acc, secret);
    }
    const uint8_t *in =
        last_block < zero_blocks ? xxh3_zero_block : page + last_block * XXH3_BLOCK_BYTES;

    for (unsigned stripe = 0; stripe < XXH3_BLOCK_STRIPES - 1; stripe++) {
        add_stripe(acc, in + stripe * XXH3_STRIPE_BYTES, secret + 8 * stripe);
    }
    add_stripe(acc, in + (XXH3_BLOCK_STRIPES - 1) * XXH3_STRIPE_BYTES, secret + XXH3_LAST_SECRET);
    for (unsigned lane = 0; lane < 8; lane++) {
        out[lane] = acc[lane];
    }
}

const struct hash_ops hash_scalar = {"scalar", accumulate_scalar};
