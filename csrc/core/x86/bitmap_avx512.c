/* SPDX-License-Identifier: Apache-2.0 */
/* Whole-word bitmap loops with AVX-512 (VPOPCNTDQ, VBMI2, BITALG).
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

/* Bit positions, in order, of a register with at most one bit in each byte and at most 16 in all:
 * the bytes that have one are compressed, and each is 8 times its index plus the zeros below its bit. */
AVX512_POPCNT static inline __m256i positions(__m512i bits, __mmask64 used, __m512i index)
{
    const __m512i below = _mm512_popcnt_epi8(_mm512_sub_epi8(bits, _mm512_set1_epi8(1)));
    const __m128i byte = _mm512_castsi512_si128(_mm512_maskz_compress_epi8(used, index));
    const __m128i bit = _mm512_castsi512_si128(_mm512_maskz_compress_epi8(used, below));

    return _mm256_add_epi16(_mm256_slli_epi16(_mm256_cvtepu8_epi16(byte), 3),
                            _mm256_cvtepu8_epi16(bit));
}

AVX512_POPCNT static inline void write_runs(struct vmth_run *out, __m128i starts, __m128i ends,
                                            uint64_t base)
{
    const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    const __m512i first = _mm512_cvtepu16_epi64(starts);
    const __m512i length = _mm512_sub_epi64(_mm512_cvtepu16_epi64(ends), first);
    const __m512i page = _mm512_add_epi64(first, _mm512_set1_epi64((long long)base));

    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(page, low, length));
    _mm512_storeu_si512(out + 4, _mm512_permutex2var_epi64(page, high, length));
}

/* The runs of 8 words that no run enters or leaves, where no byte has two starts or two ends: the k-th
 * start and the k-th end are the k-th run. Other groups (0) are walked word by word. */
AVX512_POPCNT static inline size_t closed_group_avx512(const uint64_t *words, uint64_t base,
                                                       struct vmth_run *out)
{
    const __m512i one = _mm512_set1_epi8(1);
    const __m512i index = _mm512_set_epi8(
        63, 62, 61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46, 45, 44, 43, 42, 41,
        40, 39, 38, 37, 36, 35, 34, 33, 32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18,
        17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i group = _mm512_loadu_si512(words);
    const __m512i previous = _mm512_alignr_epi64(group, _mm512_setzero_si512(), 7);
    const __m512i before =
        _mm512_or_si512(_mm512_slli_epi64(group, 1), _mm512_srli_epi64(previous, 63));
    const __m512i starts = _mm512_andnot_si512(before, group);
    const __m512i ends = _mm512_andnot_si512(group, before);
    const __mmask64 crowded = _mm512_test_epi8_mask(starts, _mm512_sub_epi8(starts, one)) |
                              _mm512_test_epi8_mask(ends, _mm512_sub_epi8(ends, one));
    const __mmask64 start_bytes = _mm512_test_epi8_mask(starts, starts);
    const __mmask64 end_bytes = _mm512_test_epi8_mask(ends, ends);
    const size_t n = (size_t)_mm_popcnt_u64(start_bytes);

    if (crowded != 0 || words[7] >> 63 != 0 || n > 16) {
        return 0;
    }
    const __m256i first = positions(starts, start_bytes, index);
    const __m256i end = positions(ends, end_bytes, index);

    write_runs(out, _mm256_castsi256_si128(first), _mm256_castsi256_si128(end), base);
    if (n > 8) {
        write_runs(out + 8, _mm256_extracti128_si256(first, 1), _mm256_extracti128_si256(end, 1),
                   base);
    }
    return n;
}

AVX512_POPCNT static size_t runs_avx512(const uint64_t *words, size_t from, size_t to,
                                        struct run_sink *sink)
{
    return walk_runs(words, from, to, sink, is_empty_group_avx512,
                     closed_group_avx512);
}

const struct bitmap_ops bitmap_avx512 = {"avx512", count_avx512, merge_avx512, runs_avx512};

#else
typedef int bitmap_avx512_is_not_built_here;
#endif
