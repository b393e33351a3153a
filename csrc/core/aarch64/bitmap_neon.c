/* SPDX-License-Identifier: Apache-2.0 */
/* Whole-word bitmap loops with NEON.
 *
 * Why it equals the scalar twin: CNT counts the bits of each byte, and the pairwise widening additions
 * sum them exactly (a 64-bit lane gains at most 64 a step); OR and BIC are bitwise at any width; a
 * group of words is skipped only outside a run and if the OR of all is zero, and every other group is
 * walked by the scalar twin itself. */
#if defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__

#include <arm_neon.h>

#include "core/kernel_ops.h"
#include "core/popcount.h"
#include "core/run_sink.h"

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

/* Four cache lines a branch, so that an empty bitmap is walked as fast as it is read; then by group. */
static size_t skip_zero_neon(const uint64_t *words, size_t from, size_t to)
{
    for (; from + 32 <= to; from += 32) {
        uint64x2_t any[4] = {vdupq_n_u64(0), vdupq_n_u64(0), vdupq_n_u64(0), vdupq_n_u64(0)};

        for (size_t i = 0; i < 32; i += 8) {
            for (size_t k = 0; k < 4; k++) {
                any[k] = vorrq_u64(any[k], vld1q_u64(words + from + i + 2 * k));
            }
        }
        any[0] = vorrq_u64(vorrq_u64(any[0], any[1]), vorrq_u64(any[2], any[3]));
        if (vmaxvq_u32(vreinterpretq_u32_u64(any[0])) != 0) {
            break;
        }
    }
    for (; from + 8 <= to; from += 8) {
        const uint64_t *group = words + from;
        const uint64x2_t any = vorrq_u64(vorrq_u64(vld1q_u64(group), vld1q_u64(group + 2)),
                                         vorrq_u64(vld1q_u64(group + 4), vld1q_u64(group + 6)));

        if (vmaxvq_u32(vreinterpretq_u32_u64(any)) != 0) {
            break;
        }
    }
    return from;
}

static size_t runs_neon(const uint64_t *words, size_t from, size_t to, struct run_sink *sink)
{
    while (from < to) {
        if (!sink->open) {
            from = skip_zero_neon(words, from, to);
        }
        const size_t end = from + 8 < to ? from + 8 : to;
        const size_t next = bitmap_scalar.runs(words, from, end, sink);

        if (next < end) {
            return next;
        }
        from = end;
    }
    return from;
}

const struct bitmap_ops bitmap_neon = {"neon", count_neon, merge_neon, runs_neon};

#else
typedef int bitmap_neon_is_not_built_here;
#endif
