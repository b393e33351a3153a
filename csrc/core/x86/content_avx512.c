/* SPDX-License-Identifier: Apache-2.0 */
/* BLAKE2b over eight pages at once with AVX-512: a 64-bit lane a page.
 *
 * Why it equals the scalar twin: as in content_avx2.c with twice the lanes; a rotation is one exact
 * instruction (vprorq). The message words are transposed eight by eight: pairs of words, then of
 * pairs, then of halves. Lanes past the last page repeat it and are not stored. */
#if defined(__x86_64__)

#include "core/blake2b.h"
#include "core/kernel_ops.h"
#include "core/x86/vector.h"

#define LANES 8u

/* Eight words at `at` of each page: register i gets word i of all pages, in their order. */
AVX512 static inline void load_words(__m512i m[LANES], const uint8_t *const page[LANES], size_t at)
{
    __m512i pair[LANES]; /* [2 k]: words 0 2 4 6 of pages 2 k and 2 k + 1, [2 k + 1]: words 1 3 5 7 */
    __m512i quad[LANES]; /* [4 k + w]: words w and w + 4 of pages 4 k to 4 k + 3 */

    for (unsigned i = 0; i < LANES; i += 2) {
        const __m512i a = _mm512_loadu_si512(page[i] + at);
        const __m512i b = _mm512_loadu_si512(page[i + 1] + at);

        pair[i] = _mm512_unpacklo_epi64(a, b);
        pair[i + 1] = _mm512_unpackhi_epi64(a, b);
    }
    for (unsigned i = 0; i < LANES; i += 4) {
        for (unsigned odd = 0; odd < 2; odd++) {
            const __m512i a = pair[i + odd];
            const __m512i b = pair[i + 2 + odd];
            /* 128-bit parts of a and b: words w, w + 2, w + 4, w + 6 of two pages each. */
            const __m512i low = _mm512_shuffle_i64x2(a, b, 0x88);  /* a0 a2 b0 b2 */
            const __m512i high = _mm512_shuffle_i64x2(a, b, 0xdd); /* a1 a3 b1 b3 */

            quad[i + odd] = low;
            quad[i + 2 + odd] = high;
        }
    }
    for (unsigned word = 0; word < 4; word++) {
        /* quad: word w of pages 0 1, word w + 4 of pages 0 1, word w of pages 2 3, ... */
        m[word] = _mm512_shuffle_i64x2(quad[word], quad[4 + word], 0x88);
        m[word + 4] = _mm512_shuffle_i64x2(quad[word], quad[4 + word], 0xdd);
    }
}

#define MIX(a, b, c, d, x, y)                                                                      \
    v[a] = _mm512_add_epi64(_mm512_add_epi64(v[a], v[b]), m[x]);                                   \
    v[d] = _mm512_ror_epi64(_mm512_xor_si512(v[d], v[a]), 32);                                     \
    v[c] = _mm512_add_epi64(v[c], v[d]);                                                           \
    v[b] = _mm512_ror_epi64(_mm512_xor_si512(v[b], v[c]), 24);                                     \
    v[a] = _mm512_add_epi64(_mm512_add_epi64(v[a], v[b]), m[y]);                                   \
    v[d] = _mm512_ror_epi64(_mm512_xor_si512(v[d], v[a]), 16);                                     \
    v[c] = _mm512_add_epi64(v[c], v[d]);                                                           \
    v[b] = _mm512_ror_epi64(_mm512_xor_si512(v[b], v[c]), 63);

AVX512 static void compress(__m512i chain[8], const uint8_t *const page[LANES], size_t at,
                            bool last)
{
    __m512i m[16];
    __m512i v[16];

    load_words(m, page, at);
    load_words(m + LANES, page, at + 8 * LANES);
    for (unsigned i = 0; i < 8; i++) {
        v[i] = chain[i];
        v[i + 8] = _mm512_set1_epi64((long long)blake2b_iv[i]);
    }
    v[12] = _mm512_xor_si512(v[12], _mm512_set1_epi64((long long)(at + 2 * BLAKE2B_BLOCK_BYTES)));
    v[14] = _mm512_xor_si512(v[14], _mm512_set1_epi64(last ? -1 : 0));
    BLAKE2B_ROUNDS(BLAKE2B_ROUND)
    for (unsigned i = 0; i < 8; i++) {
        chain[i] = _mm512_xor_si512(chain[i], _mm512_xor_si512(v[i], v[i + 8]));
    }
}

AVX512 static void hash_avx512_pages(const uint64_t start[8], const uint8_t *const *pages,
                                     size_t page_bytes, size_t npages, struct vmth_u128 *out)
{
    for (size_t i = 0; i < npages; i += LANES) {
        const size_t used = npages - i < LANES ? npages - i : LANES;
        const uint8_t *page[LANES];
        uint64_t words[2][LANES];
        __m512i chain[8];

        for (size_t lane = 0; lane < LANES; lane++) {
            page[lane] = pages[i + (lane < used ? lane : used - 1)];
        }
        for (unsigned word = 0; word < 8; word++) {
            chain[word] = _mm512_set1_epi64((long long)start[word]);
        }
        for (size_t at = 0; at < page_bytes; at += BLAKE2B_BLOCK_BYTES) {
            compress(chain, page, at, at + BLAKE2B_BLOCK_BYTES == page_bytes);
        }
        _mm512_storeu_si512(words[0], chain[0]);
        _mm512_storeu_si512(words[1], chain[1]);
        for (size_t lane = 0; lane < used; lane++) {
            out[i + lane].lo = words[0][lane];
            out[i + lane].hi = words[1][lane];
        }
    }
}

const struct content_ops content_avx512 = {"avx512", hash_avx512_pages};

#else
typedef int content_avx512_is_not_built_here;
#endif
