/* SPDX-License-Identifier: Apache-2.0 */
/* Masks of changed bytes with AVX-512.
 *
 * Why it equals the scalar twin: vpcmpb (not equal) of a cache line gives one bit a byte, the lowest
 * byte's first, set exactly if the two differ. */
#if defined(__x86_64__)

#include "core/kernel_ops.h"
#include "core/x86/vector.h"

AVX512 static uint64_t changed_avx512(const uint8_t *base, const uint8_t *now,
                                      uint64_t masks[DELTA_PIECE_LINES])
{
    uint64_t lines = 0;

    for (unsigned line = 0; line < DELTA_PIECE_LINES; line++) {
        const size_t at = 64 * (size_t)line;
        const uint64_t mask =
            _mm512_cmpneq_epi8_mask(_mm512_loadu_si512(base + at), _mm512_loadu_si512(now + at));

        masks[line] = mask;
        lines |= (uint64_t)(mask != 0) << line;
    }
    return lines;
}

const struct delta_ops delta_avx512 = {"avx512", changed_avx512};

#else
typedef int delta_avx512_is_not_built_here;
#endif
