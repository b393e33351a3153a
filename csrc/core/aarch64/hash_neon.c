/* SPDX-License-Identifier: Apache-2.0 */
/* XXH3 accumulation with NEON.
 *
 * Why it equals the scalar twin: the eight lanes are four registers of two 64-bit lanes, and every
 * scalar step is one exact lane-wise instruction modulo 2^64: EOR; UMULL or UMLAL of the low and the
 * high 32 bits of each lane (XTN and SHRN); the word of lane i ^ 1 (EXT swaps a register's two
 * lanes); additions, which commute. The scramble multiplies by a 32-bit prime as high half times
 * prime, shifted up by 32, plus low half times prime. NEON is part of every AArch64 CPU, so the default
 * flags already allow it. Little-endian only, as the lanes are loaded as bytes lie. */
#if defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__

#include <arm_neon.h>

#include "core/kernel_ops.h"
#include "core/xxh3.h"

#define PREFETCH_BYTES 512
#define REGISTERS 4u

static inline uint64x2_t load(const uint8_t *from)
{
    return vreinterpretq_u64_u8(vld1q_u8(from));
}

static inline void add_stripe(uint64x2_t acc[REGISTERS], const uint8_t *in, const uint8_t *secret)
{
    for (unsigned i = 0; i < REGISTERS; i++) {
        const uint64x2_t word = load(in + 16 * i);
        const uint64x2_t keyed = veorq_u64(word, load(secret + 16 * i));
        const uint64x2_t with_neighbour = vaddq_u64(acc[i], vextq_u64(word, word, 1));

        acc[i] = vmlal_u32(with_neighbour, vmovn_u64(keyed), vshrn_n_u64(keyed, 32));
    }
}

static inline void scramble(uint64x2_t acc[REGISTERS], const uint8_t *secret)
{
    const uint32x2_t prime = vdup_n_u32(XXH_PRIME32_1);

    for (unsigned i = 0; i < REGISTERS; i++) {
        const uint64x2_t folded = veorq_u64(acc[i], vshrq_n_u64(acc[i], 47));
        const uint64x2_t mixed = veorq_u64(folded, load(secret + 16 * i));
        const uint64x2_t high = vmull_u32(vshrn_n_u64(mixed, 32), prime);

        acc[i] = vmlal_u32(vshlq_n_u64(high, 32), vmovn_u64(mixed), prime);
    }
}

static void accumulate_neon(uint64_t out[8], const uint8_t *secret, const uint8_t *page,
                            size_t page_bytes, size_t zero_blocks)
{
    const size_t last_block = page_bytes / XXH3_BLOCK_BYTES - 1;
    uint64x2_t acc[REGISTERS];

    for (unsigned i = 0; i < REGISTERS; i++) {
        acc[i] = vld1q_u64(xxh3_initial_acc + 2 * i);
    }
    for (size_t block = 0; block <= last_block; block++) {
        const uint8_t *in =
            block < zero_blocks ? xxh3_zero_block : page + block * XXH3_BLOCK_BYTES;

        for (unsigned stripe = 0; stripe < XXH3_BLOCK_STRIPES - 1; stripe++) {
            const uint8_t *at = in + stripe * XXH3_STRIPE_BYTES;

            __builtin_prefetch(at + PREFETCH_BYTES);
            add_stripe(acc, at, secret + 8 * stripe);
        }
        const uint8_t *at = in + (XXH3_BLOCK_STRIPES - 1) * XXH3_STRIPE_BYTES;

        if (block < last_block) {
            add_stripe(acc, at, secret + 8 * (XXH3_BLOCK_STRIPES - 1));
            scramble(acc, secret + XXH3_SCRAMBLE_SECRET);
        } else {
            add_stripe(acc, at, secret + XXH3_LAST_SECRET);
        }
    }
    for (unsigned i = 0; i < REGISTERS; i++) {
        vst1q_u64(out + 2 * i, acc[i]);
    }
}

const struct hash_ops hash_neon = {"neon", accumulate_neon};

#else
typedef int hash_neon_is_not_built_here;
#endif
