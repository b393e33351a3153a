/* SPDX-License-Identifier: Apache-2.0 */
/* Whole-word bitmap loops with AVX-512 and VPOPCNTDQ.
 *
 * Why it equals the scalar twin: VPOPCNTQ counts the bits of each of eight words and sums are exact in
 * 64 bits; OR and AND-NOT are bitwise at any width; words past n are masked off, so they count as zero
 * and are not stored; runs: see runs_bmi.h, and a group of words is skipped only outside a run and if
 * vptestmq finds all of it zero. */
#if defined(__x86_64__)

#include "core/kernel_ops.h"
#include "core/x86/runs_bmi.h"
#include "core/x86/vector.h"

#define WORDS 8u /* a register holds */

/* Lanes for the last n % 8 words. */
AVX512_POPCNT static inline __mmask8 tail_mask(size_t n)
{
    return (__mmask8)((1u << (n % WORDS)) - 1);
}

AVX512_POPCNT static uint64_t count_avx512(const uint64_t *words, size_t n)
{
    __m512i sum0 = _mm512_setzero_si512();
    __m512i sum1 = _mm512_setzero_si512();
    size_t i = 0;

    for (; i + 2 * WORDS <= n; i += 2 * WORDS) {
        sum0 = _mm512_add_epi64(sum0, _mm512_popcnt_epi64(_mm512_loadu_si512(words + i)));
        sum1 = _mm512_add_epi64(sum1, _mm512_popcnt_epi64(_mm512_loadu_si512(words + i + WORDS)));
    }
    for (; i + WORDS <= n; i += WORDS) {
        sum0 = _mm512_add_epi64(sum0, _mm512_popcnt_epi64(_mm512_loadu_si512(words + i)));
    }
    sum1 = _mm512_add_epi64(
        sum1, _mm512_popcnt_epi64(_mm512_maskz_loadu_epi64(tail_mask(n), words + i)));
    return (uint64_t)_mm512_reduce_add_epi64(_mm512_add_epi64(sum0, sum1));
}

AVX512_POPCNT static uint64_t merge_avx512(uint64_t *into, const uint64_t *from, size_t n)
{
    __m512i sum = _mm512_setzero_si512();
    size_t i = 0;

    for (; i + WORDS <= n; i += WORDS) {
        const __m512i had = _mm512_loadu_si512(into + i);
        const __m512i got = _mm512_loadu_si512(from + i);

        sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_andnot_si512(had, got)));
        _mm512_storeu_si512(into + i, _mm512_or_si512(had, got));
    }
    const __mmask8 tail = tail_mask(n);
    const __m512i had = _mm512_maskz_loadu_epi64(tail, into + i);
    const __m512i got = _mm512_maskz_loadu_epi64(tail, from + i);

    sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_andnot_si512(had, got)));
    _mm512_mask_storeu_epi64(into + i, tail, _mm512_or_si512(had, got));
    return (uint64_t)_mm512_reduce_add_epi64(sum);
}

AVX512_POPCNT static inline bool is_empty_group_avx512(const uint64_t *words)
{
    const __m512i group = _mm512_loadu_si512(words);

    return _mm512_test_epi64_mask(group, group) == 0;
}

AVX512_POPCNT static size_t runs_avx512(const uint64_t *words, size_t from, size_t to,
                                        struct run_sink *sink)
{
    return walk_runs(words, from, to, sink, is_empty_group_avx512);
}

const struct bitmap_ops bitmap_avx512 = {"avx512", count_avx512, merge_avx512, runs_avx512};

#else
typedef int bitmap_avx512_is_not_built_here;
#endif
