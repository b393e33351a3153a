/* SPDX-License-Identifier: Apache-2.0 */
/* Masks of changed bytes with NEON.
 *
 * Why it equals the scalar twin: CMEQ makes a byte all ones exactly if the two are equal. Masked with
 * 1, 2, 4, ... 128 by place in its group of eight, the bytes of a group add up to the group's bits, the
 * lowest byte's first; three pairwise additions make one 64-bit word of 64 bytes, and its complement
 * marks those that differ. */
#if defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__

#include <arm_neon.h>

#include "core/kernel_ops.h"

static inline uint8x16_t equal_bits(const uint8_t *a, const uint8_t *b)
{
    static const uint8_t places[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};

    return vandq_u8(vceqq_u8(vld1q_u8(a), vld1q_u8(b)), vld1q_u8(places));
}

static uint64_t changed_neon(const uint8_t *base, const uint8_t *now,
                             uint64_t masks[DELTA_PIECE_LINES])
{
    uint64_t lines = 0;

    for (unsigned line = 0; line < DELTA_PIECE_LINES; line++) {
        const size_t at = 64 * (size_t)line;
        const uint8x16_t low = vpaddq_u8(equal_bits(base + at, now + at),
                                         equal_bits(base + at + 16, now + at + 16));
        const uint8x16_t high = vpaddq_u8(equal_bits(base + at + 32, now + at + 32),
                                          equal_bits(base + at + 48, now + at + 48));
        const uint8x16_t pairs = vpaddq_u8(low, high);
        const uint8x16_t bits = vpaddq_u8(pairs, pairs);
        const uint64_t mask = ~vgetq_lane_u64(vreinterpretq_u64_u8(bits), 0);

        masks[line] = mask;
        lines |= (uint64_t)(mask != 0) << line;
    }
    return lines;
}

const struct delta_ops delta_neon = {"neon", changed_neon};

#else
typedef int delta_neon_is_not_built_here;
#endif
