/* SPDX-License-Identifier: Apache-2.0 */
/* Whole-word bitmap loops with AVX2 and POPCNT.
 *
 * Why it equals the scalar twin: POPCNT counts the same bits, OR is bitwise at any width; runs: see
 * runs_bmi.h, and a group of words is skipped only outside a run and if the OR of all is zero. */
#if defined(__x86_64__)

#include "core/kernel_ops.h"
#include "core/x86/runs_bmi.h"
#include "core/x86/vector.h"

AVX2 static uint64_t count_avx2(const uint64_t *words, size_t n)
{
    uint64_t bits[4] = {0, 0, 0, 0}; /* four chains: POPCNT has a latency of three cycles */
    size_t i = 0;

    for (; i + 4 <= n; i += 4) {
        for (unsigned k = 0; k < 4; k++) {
            bits[k] += (uint64_t)_mm_popcnt_u64(words[i + k]);
        }
    }
    for (; i < n; i++) {
        bits[0] += (uint64_t)_mm_popcnt_u64(words[i]);
    }
    return bits[0] + bits[1] + bits[2] + bits[3];
}

AVX2 static uint64_t merge_avx2(uint64_t *into, const uint64_t *from, size_t n)
{
    uint64_t bits[4] = {0, 0, 0, 0};
    size_t i = 0;

    for (; i + 4 <= n; i += 4) {
        for (unsigned k = 0; k < 4; k++) {
            bits[k] += (uint64_t)_mm_popcnt_u64(from[i + k] & ~into[i + k]);
        }
        for (unsigned k = 0; k < 4; k++) {
            into[i + k] |= from[i + k];
        }
    }
    for (; i < n; i++) {
        bits[0] += (uint64_t)_mm_popcnt_u64(from[i] & ~into[i]);
        into[i] |= from[i];
    }
    return bits[0] + bits[1] + bits[2] + bits[3];
}

AVX2 static inline bool is_empty_group_avx2(const uint64_t *words)
{
    const __m256i any = _mm256_or_si256(_mm256_loadu_si256((const __m256i *)(const void *)words),
                                        _mm256_loadu_si256((const __m256i *)(const void *)(words + 4)));

    return _mm256_testz_si256(any, any) != 0;
}

AVX2 static size_t runs_avx2(const uint64_t *words, size_t from, size_t to, struct run_sink *sink)
{
    return walk_runs(words, from, to, sink, is_empty_group_avx2, NULL);
}

const struct bitmap_ops bitmap_avx2 = {"avx2", count_avx2, merge_avx2, runs_avx2};

#else
typedef int bitmap_avx2_is_not_built_here;
#endif
