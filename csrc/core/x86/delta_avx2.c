/* SPDX-License-Identifier: Apache-2.0 */
/* Masks of changed bytes with AVX2.
 *
 * Why it equals the scalar twin: vpcmpeqb makes a byte all ones exactly if the two are equal, and
 * vpmovmskb takes one bit of each, the lowest byte's first; the complement marks those that differ. */
#if defined(__x86_64__)

#include "core/kernel_ops.h"
#include "core/x86/vector.h"

AVX2 static inline uint32_t equal_bytes(const uint8_t *a, const uint8_t *b)
{
    const __m256i left = _mm256_loadu_si256((const __m256i *)(const void *)a);
    const __m256i right = _mm256_loadu_si256((const __m256i *)(const void *)b);

    return (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(left, right));
}

AVX2 static uint64_t changed_avx2(const uint8_t *base, const uint8_t *now,
                                  uint64_t masks[DELTA_PIECE_LINES])
{
    uint64_t lines = 0;

    for (unsigned line = 0; line < DELTA_PIECE_LINES; line++) {
        const size_t at = 64 * (size_t)line;
        const uint64_t low = equal_bytes(base + at, now + at);
        const uint64_t high = equal_bytes(base + at + 32, now + at + 32);
        const uint64_t mask = ~(low | high << 32);

        masks[line] = mask;
        lines |= (uint64_t)(mask != 0) << line;
    }
    return lines;
}

const struct delta_ops delta_avx2 = {"avx2", changed_avx2};

#else
typedef int delta_avx2_is_not_built_here;
#endif
