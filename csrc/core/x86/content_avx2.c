/* SPDX-License-Identifier: Apache-2.0 */
/* BLAKE2b over four pages at once with AVX2: a 64-bit lane a page.
 *
 * Why it equals the scalar twin: lane p of every register is the scalar variable of page p, and every
 * scalar step is one exact lane-wise operation modulo 2^64: additions, XOR, and rotations by whole
 * bytes (vpshufd, vpshufb) or by 63 (a shift by 63 and the doubled value, which share no bit). The
 * message words are the pages' words, transposed four by four. Lanes past the last page repeat it and
 * are not stored. */
#if defined(__x86_64__)

#include "core/blake2b.h"
#include "core/kernel_ops.h"
#include "core/x86/vector.h"

#define LANES 4u

AVX2 static inline __m256i rotate32(__m256i value)
{
    return _mm256_shuffle_epi32(value, _MM_SHUFFLE(2, 3, 0, 1));
}

AVX2 static inline __m256i rotate24(__m256i value)
{
    return _mm256_shuffle_epi8(
        value, _mm256_setr_epi8(3, 4, 5, 6, 7, 0, 1, 2, 11, 12, 13, 14, 15, 8, 9, 10, 3, 4, 5, 6, 7,
                                0, 1, 2, 11, 12, 13, 14, 15, 8, 9, 10));
}

AVX2 static inline __m256i rotate16(__m256i value)
{
    return _mm256_shuffle_epi8(
        value, _mm256_setr_epi8(2, 3, 4, 5, 6, 7, 0, 1, 10, 11, 12, 13, 14, 15, 8, 9, 2, 3, 4, 5, 6,
                                7, 0, 1, 10, 11, 12, 13, 14, 15, 8, 9));
}

AVX2 static inline __m256i rotate63(__m256i value)
{
    return _mm256_or_si256(_mm256_srli_epi64(value, 63), _mm256_add_epi64(value, value));
}

/* Words [word, word + 4) of the block at `at` of each page: register i gets word i of all pages. */
AVX2 static inline void load_words(__m256i m[LANES], const uint8_t *const page[LANES], size_t at)
{
    const __m256i a = _mm256_loadu_si256((const __m256i *)(const void *)(page[0] + at));
    const __m256i b = _mm256_loadu_si256((const __m256i *)(const void *)(page[1] + at));
    const __m256i c = _mm256_loadu_si256((const __m256i *)(const void *)(page[2] + at));
    const __m256i d = _mm256_loadu_si256((const __m256i *)(const void *)(page[3] + at));
    const __m256i ab0 = _mm256_unpacklo_epi64(a, b); /* a0 b0 a2 b2 */
    const __m256i ab1 = _mm256_unpackhi_epi64(a, b); /* a1 b1 a3 b3 */
    const __m256i cd0 = _mm256_unpacklo_epi64(c, d);
    const __m256i cd1 = _mm256_unpackhi_epi64(c, d);

    m[0] = _mm256_permute2x128_si256(ab0, cd0, 0x20);
    m[1] = _mm256_permute2x128_si256(ab1, cd1, 0x20);
    m[2] = _mm256_permute2x128_si256(ab0, cd0, 0x31);
    m[3] = _mm256_permute2x128_si256(ab1, cd1, 0x31);
}

#define MIX(a, b, c, d, x, y)                                                                      \
    v[a] = _mm256_add_epi64(_mm256_add_epi64(v[a], v[b]), m[x]);                                   \
    v[d] = rotate32(_mm256_xor_si256(v[d], v[a]));                                                 \
    v[c] = _mm256_add_epi64(v[c], v[d]);                                                           \
    v[b] = rotate24(_mm256_xor_si256(v[b], v[c]));                                                 \
    v[a] = _mm256_add_epi64(_mm256_add_epi64(v[a], v[b]), m[y]);                                   \
    v[d] = rotate16(_mm256_xor_si256(v[d], v[a]));                                                 \
    v[c] = _mm256_add_epi64(v[c], v[d]);                                                           \
    v[b] = rotate63(_mm256_xor_si256(v[b], v[c]));

AVX2 static void compress(__m256i chain[8], const uint8_t *const page[LANES], size_t at, bool last)
{
    __m256i m[16];
    __m256i v[16];

    for (unsigned i = 0; i < 16; i += LANES) {
        load_words(m + i, page, at + 8 * i);
    }
    for (unsigned i = 0; i < 8; i++) {
        v[i] = chain[i];
        v[i + 8] = _mm256_set1_epi64x((long long)blake2b_iv[i]);
    }
    v[12] = _mm256_xor_si256(v[12], _mm256_set1_epi64x((long long)(at + 2 * BLAKE2B_BLOCK_BYTES)));
    v[14] = _mm256_xor_si256(v[14], _mm256_set1_epi64x(last ? -1 : 0));
    BLAKE2B_ROUNDS(BLAKE2B_ROUND)
    for (unsigned i = 0; i < 8; i++) {
        chain[i] = _mm256_xor_si256(chain[i], _mm256_xor_si256(v[i], v[i + 8]));
    }
}

AVX2 static void hash_avx2_pages(const uint64_t start[8], const uint8_t *const *pages,
                                 size_t page_bytes, size_t npages, struct vmth_u128 *out)
{
    for (size_t i = 0; i < npages; i += LANES) {
        const size_t used = npages - i < LANES ? npages - i : LANES;
        const uint8_t *page[LANES];
        uint64_t words[2][LANES];
        __m256i chain[8];

        for (size_t lane = 0; lane < LANES; lane++) {
            page[lane] = pages[i + (lane < used ? lane : used - 1)];
        }
        for (unsigned word = 0; word < 8; word++) {
            chain[word] = _mm256_set1_epi64x((long long)start[word]);
        }
        for (size_t at = 0; at < page_bytes; at += BLAKE2B_BLOCK_BYTES) {
            compress(chain, page, at, at + BLAKE2B_BLOCK_BYTES == page_bytes);
        }
        _mm256_storeu_si256((__m256i *)(void *)words[0], chain[0]);
        _mm256_storeu_si256((__m256i *)(void *)words[1], chain[1]);
        for (size_t lane = 0; lane < used; lane++) {
            out[i + lane].lo = words[0][lane];
            out[i + lane].hi = words[1][lane];
        }
    }
}

const struct content_ops content_avx2 = {"avx2", hash_avx2_pages};

#else
typedef int content_avx2_is_not_built_here;
#endif
