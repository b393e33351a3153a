/* SPDX-License-Identifier: Apache-2.0 */
/* Whole-word bitmap loops with AVX-512 (VPOPCNTDQ, VBMI2, BITALG).
 *
 * Why it equals the scalar twin: VPOPCNTQ counts the bits of each of eight words and sums are exact in
 * 64 bits; OR and AND-NOT are bitwise at any width; words past n are masked off, so they count as zero
 * and are not stored; runs: see runs_bmi.h, and words are skipped only outside a run and if vptestmq
 * finds the OR of them zero. */
#if defined(__x86_64__)

#include "core/kernel_ops.h"
#include "core/x86/runs_bmi.h"
#include "core/x86/vector.h"

#define WORDS 8u /* a register holds */
#define PREFETCH_BYTES 4096

/* The position of a block's word's first bit, in both halves of 32 bits. */
#define BASES_1(i) (64u * (i) * 0x10001u)
#define BASES_4(i) BASES_1(i), BASES_1((i) + 1), BASES_1((i) + 2), BASES_1((i) + 3)
#define BASES_16(i) BASES_4(i), BASES_4((i) + 4), BASES_4((i) + 8), BASES_4((i) + 12)
#define BASES_64(i) BASES_16(i), BASES_16((i) + 16), BASES_16((i) + 32), BASES_16((i) + 48)

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

AVX512_POPCNT static inline size_t skip_zero_avx512(const uint64_t *words, size_t from, size_t to)
{
    /* Eight cache lines a branch: as fast as reading. */
    for (; from + RUNS_SET <= to; from += RUNS_SET) {
        const uint64_t *set = words + from;
        __m512i any[2] = {_mm512_loadu_si512(set), _mm512_loadu_si512(set + WORDS)};

        for (size_t i = 2; i < RUNS_SET / WORDS; i += 2) {
            any[0] = _mm512_or_si512(any[0], _mm512_loadu_si512(set + i * WORDS));
            any[1] = _mm512_or_si512(any[1], _mm512_loadu_si512(set + (i + 1) * WORDS));
        }
        any[0] = _mm512_or_si512(any[0], any[1]);
        if (_mm512_test_epi64_mask(any[0], any[0]) != 0) {
            break;
        }
    }
    for (; from + WORDS <= to; from += WORDS) {
        const __m512i group = _mm512_loadu_si512(words + from);

        if (_mm512_test_epi64_mask(group, group) != 0) {
            break;
        }
    }
    return from;
}

/* Positions of the bits of a block's word: used as a mask, it compresses the numbers 0 to 63 down to
 * those of its bits. Writes at least 8 and at most 64. What is added comes from a table, of 32 bits an
 * entry, since those the load itself broadcasts: compressing keeps the port for shuffles busy. */
AVX512_POPCNT static inline size_t put_positions(uint16_t *out, uint64_t bits, size_t word,
                                                   const uint32_t *bases)
{
    const __m512i numbers = _mm512_set_epi8(
        63, 62, 61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46, 45, 44, 43, 42, 41,
        40, 39, 38, 37, 36, 35, 34, 33, 32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18,
        17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i at = _mm512_maskz_compress_epi8(bits, numbers);
    const size_t n = (size_t)_mm_popcnt_u64(bits);
    const __m128i few = _mm_cvtepu8_epi16(_mm512_castsi512_si128(at));

    _mm_storeu_si128((__m128i *)(void *)out, _mm_add_epi16(few, _mm_set1_epi32((int)bases[word])));
    if (__builtin_expect(n > 8, 0)) {
        const __m512i offset = _mm512_set1_epi16((short)(64 * word));
        const __m512i low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(at));
        const __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(at, 1));

        _mm512_storeu_si512(out, _mm512_add_epi16(low, offset));
        _mm512_storeu_si512(out + 32, _mm512_add_epi16(high, offset));
    }
    return n;
}

AVX512_POPCNT static inline size_t find_edges_avx512(const uint64_t *words, size_t n,
                                                     uint64_t before, uint16_t *edges)
{
    static const uint32_t bases[RUNS_BLOCK] = {BASES_64(0), BASES_64(64), BASES_64(128),
                                               BASES_64(192)};
    __m512i last = _mm512_set1_epi64((long long)(before << 63));
    uint16_t *next = edges;

    for (size_t set = 0; set < n; set += RUNS_SET) {
        const size_t end = n - set < RUNS_SET ? n - set : RUNS_SET;
        uint64_t differ[RUNS_SET];
        uint64_t used = 0; /* the words that have an edge */

        for (size_t i = 0; i < end; i += WORDS) {
            const __m512i group = _mm512_loadu_si512(words + set + i);
            const __m512i previous = _mm512_alignr_epi64(group, last, 7);
            const __m512i edge = _mm512_xor_si512(group, _mm512_shldi_epi64(group, previous, 1));

            _mm_prefetch((const char *)(words + set + i) + PREFETCH_BYTES, _MM_HINT_T0);
            _mm512_storeu_si512(differ + i, edge);
            used |= (uint64_t)_mm512_test_epi64_mask(edge, edge) << i;
            last = group;
        }
        for (; used != 0; used = _blsr_u64(used)) {
            const size_t i = _tzcnt_u64(used);

            next += put_positions(next, differ[i], set + i, bases);
        }
    }
    return (size_t)(next - edges);
}

AVX512_POPCNT static inline void write_runs_avx512(struct vmth_run *out, const uint16_t *edges,
                                                   size_t n, uint64_t base)
{
    const __m512i page_base = _mm512_maskz_set1_epi64(0x55, (long long)base);

    for (size_t i = 0; i < n; i += 4) {
        const __m128i at = _mm_loadu_si128((const __m128i *)(const void *)(edges + 2 * i));
        /* each end less its start */
        const __m128i runs = _mm_sub_epi16(at, _mm_slli_epi32(at, 16));

        _mm512_storeu_si512(out + i, _mm512_add_epi64(_mm512_cvtepu16_epi64(runs), page_base));
    }
}

AVX512_POPCNT static size_t runs_avx512(const uint64_t *words, size_t from, size_t to,
                                        struct run_sink *sink)
{
    static const struct runs_steps steps = {skip_zero_avx512, find_edges_avx512,
                                            write_runs_avx512};

    return walk_runs(words, from, to, sink, &steps);
}

const struct bitmap_ops bitmap_avx512 = {"avx512", count_avx512, merge_avx512, runs_avx512};

#else
typedef int bitmap_avx512_is_not_built_here;
#endif
