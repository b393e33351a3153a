/* SPDX-License-Identifier: Apache-2.0 */
/* Whole-word bitmap loops with NEON.
 *
 * Why it equals the scalar twin: CNT counts the bits of each byte, and the pairwise widening additions
 * sum them exactly (a 64-bit lane gains at most 64 a step); OR and BIC are bitwise at any width; a
 * group of words is skipped only if the OR of all of them is zero, and the first that is not is
 * searched word by word. */
#if defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__

#include <arm_neon.h>

#include "core/kernel_ops.h"
#include "core/popcount.h"

/* sum + the bits of each 64-bit lane of words */
static inline uint64x2_t add_bits(uint64x2_t sum, uint64x2_t words)
{
    const uint8x16_t bytes = vcntq_u8(vreinterpretq_u8_u64(words));

    return vpadalq_u32(sum, vpaddlq_u16(vpaddlq_u8(bytes)));
}

static uint64_t count_neon(const uint64_t *words, size_t n)
{
    uint64x2_t sum = vdupq_n_u64(0);
    size_t i = 0;

    for (; i + 2 <= n; i += 2) {
        sum = add_bits(sum, vld1q_u64(words + i));
    }
    return vaddvq_u64(sum) + (i < n ? popcount64(words[i]) : 0);
}

static uint64_t merge_neon(uint64_t *into, const uint64_t *from, size_t n)
{
    uint64x2_t sum = vdupq_n_u64(0);
    uint64_t last = 0;
    size_t i = 0;

    for (; i + 2 <= n; i += 2) {
        const uint64x2_t had = vld1q_u64(into + i);
        const uint64x2_t got = vld1q_u64(from + i);

        sum = add_bits(sum, vbicq_u64(got, had));
        vst1q_u64(into + i, vorrq_u64(had, got));
    }
    if (i < n) {
        last = popcount64(from[i] & ~into[i]);
        into[i] |= from[i];
    }
    return vaddvq_u64(sum) + last;
}

static size_t skip_empty_neon(const uint64_t *words, size_t from, size_t n)
{
    for (; from + 8 <= n; from += 8) {
        const uint64_t *group = words + from;
        const uint64x2_t any = vorrq_u64(vorrq_u64(vld1q_u64(group), vld1q_u64(group + 2)),
                                         vorrq_u64(vld1q_u64(group + 4), vld1q_u64(group + 6)));

        if (vmaxvq_u32(vreinterpretq_u32_u64(any)) != 0) {
            break;
        }
    }
    while (from < n && words[from] == 0) {
        from++;
    }
    return from;
}

const struct bitmap_ops bitmap_neon = {"neon", count_neon, merge_neon, skip_empty_neon};

#else
typedef int bitmap_neon_is_not_built_here;
#endif
