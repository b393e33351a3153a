/* SPDX-License-Identifier: Apache-2.0 */
/* Whole-word bitmap loops with AVX2 and POPCNT.
 *
 * Why it equals the scalar twin: POPCNT counts the same bits, OR is bitwise at any width; runs: see
 * runs_bmi.h, and words are skipped only outside a run and if the OR of them is zero. */
#if defined(__x86_64__)

#include "core/kernel_ops.h"
#include "core/x86/runs_bmi.h"
#include "core/x86/vector.h"

#define PREFETCH_BYTES 4096

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

AVX2 static inline __m256i load(const uint64_t *words)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)words);
}

AVX2 static inline size_t skip_zero_avx2(const uint64_t *words, size_t from, size_t to)
{
    /* Eight cache lines a branch: as fast as reading. */
    for (; from + RUNS_SET <= to; from += RUNS_SET) {
        const uint64_t *set = words + from;
        __m256i any[4] = {load(set), load(set + 4), load(set + 8), load(set + 12)};

        for (size_t i = 16; i < RUNS_SET; i += 16) {
            _mm_prefetch((const char *)(set + i) + PREFETCH_BYTES, _MM_HINT_T0);
            _mm_prefetch((const char *)(set + i + 8) + PREFETCH_BYTES, _MM_HINT_T0);
            for (size_t k = 0; k < 4; k++) {
                any[k] = _mm256_or_si256(any[k], load(set + i + 4 * k));
            }
        }
        any[0] = _mm256_or_si256(_mm256_or_si256(any[0], any[1]), _mm256_or_si256(any[2], any[3]));
        if (_mm256_testz_si256(any[0], any[0]) == 0) {
            break;
        }
    }
    for (; from + RUNS_GROUP <= to; from += RUNS_GROUP) {
        const __m256i any = _mm256_or_si256(load(words + from), load(words + from + 4));

        if (_mm256_testz_si256(any, any) == 0) {
            break;
        }
    }
    return from;
}

/* Positions of the bits of one word, plus base. Four are written always: a branch on how many there
 * are would be mispredicted too often, and TZCNT of zero is 64, which is harmless past the last. */
AVX2 static inline size_t put_positions(uint16_t *out, uint64_t bits, size_t base)
{
    const size_t n = (size_t)_mm_popcnt_u64(bits);
    size_t i = 0;

    do {
        for (unsigned k = 0; k < 4; k++) {
            out[i + k] = (uint16_t)(base + _tzcnt_u64(bits));
            bits = _blsr_u64(bits);
        }
        i += 4;
    } while (i < n);
    return n;
}

AVX2 static inline size_t find_edges_avx2(const uint64_t *words, size_t n, uint64_t before,
                                          uint16_t *edges)
{
    __m256i last = _mm256_set1_epi64x((long long)(before << 63)); /* lane 0: the word before */
    size_t nedges = 0;

    for (size_t set = 0; set < n; set += RUNS_SET) {
        const size_t end = n - set < RUNS_SET ? n - set : RUNS_SET;
        uint64_t differ[RUNS_SET];
        uint64_t used = 0; /* the words that have an edge */

        for (size_t i = 0; i < end; i += 4) {
            const __m256i group = load(words + set + i);
            const __m256i turned = _mm256_permute4x64_epi64(group, 0x93); /* words 3 0 1 2 */
            const __m256i previous = _mm256_blend_epi32(turned, last, 0x03);
            const __m256i shifted =
                _mm256_or_si256(_mm256_slli_epi64(group, 1), _mm256_srli_epi64(previous, 63));
            const __m256i same = _mm256_cmpeq_epi64(group, shifted);

            _mm_prefetch((const char *)(words + set + i) + PREFETCH_BYTES, _MM_HINT_T0);
            _mm256_storeu_si256((__m256i *)(void *)(differ + i),
                                _mm256_xor_si256(group, shifted));
            used |= (uint64_t)(~_mm256_movemask_pd(_mm256_castsi256_pd(same)) & 15) << i;
            last = turned;
        }
        for (; used != 0; used = _blsr_u64(used)) {
            const size_t i = _tzcnt_u64(used);

            nedges += put_positions(edges + nedges, differ[i], 64 * (set + i));
        }
    }
    return nedges;
}

AVX2 static inline void write_runs_avx2(struct vmth_run *out, const uint16_t *edges, size_t n,
                                        uint64_t base)
{
    const __m256i page_base = _mm256_set_epi64x(0, (long long)base, 0, (long long)base);

    for (size_t i = 0; i < n; i += 2) {
        const __m128i at = _mm_loadl_epi64((const __m128i *)(const void *)(edges + 2 * i));
        /* each end less its start */
        const __m128i runs = _mm_sub_epi16(at, _mm_slli_epi32(at, 16));

        _mm256_storeu_si256((__m256i *)(void *)(out + i),
                            _mm256_add_epi64(_mm256_cvtepu16_epi64(runs), page_base));
    }
}

AVX2 static size_t runs_avx2(const uint64_t *words, size_t from, size_t to, struct run_sink *sink)
{
    static const struct runs_steps steps = {skip_zero_avx2, find_edges_avx2, write_runs_avx2};

    return walk_runs(words, from, to, sink, &steps);
}

const struct bitmap_ops bitmap_avx2 = {"avx2", count_avx2, merge_avx2, runs_avx2};

#else
typedef int bitmap_avx2_is_not_built_here;
#endif
