/* SPDX-License-Identifier: Apache-2.0 */
/* XXH3 accumulation with AVX2.
 *
 * Why it equals the scalar twin: the eight lanes are two registers of four 64-bit lanes, and every
 * scalar step is one exact lane-wise instruction modulo 2^64: XOR; the product of the low and high
 * 32 bits (vpmuludq of the value and itself with its halves swapped); the neighbour's word (vpshufd
 * swaps the 64-bit halves of each 128, that is lane i and lane i ^ 1); additions, which commute.
 * The scramble multiplies by a 32-bit prime: low half times prime plus (high half times prime) << 32
 * is the product modulo 2^64. Zero blocks are read from the same block of zeros. */
#if defined(__x86_64__)

#include "core/kernel_ops.h"
#include "core/x86/vector.h"
#include "core/xxh3.h"

#define PREFETCH_BYTES 2048

AVX2 static inline __m256i load(const uint8_t *from)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)from);
}

AVX2 static inline __m256i add_half(__m256i acc, const uint8_t *in, const uint8_t *secret)
{
    const __m256i word = load(in);
    const __m256i keyed = _mm256_xor_si256(word, load(secret));
    const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
    const __m256i swapped = _mm256_shuffle_epi32(word, _MM_SHUFFLE(1, 0, 3, 2));

    return _mm256_add_epi64(acc, _mm256_add_epi64(product, swapped));
}

AVX2 static inline __m256i scramble_half(__m256i acc, const uint8_t *secret)
{
    const __m256i prime = _mm256_set1_epi32((int)XXH_PRIME32_1);
    const __m256i mixed =
        _mm256_xor_si256(_mm256_xor_si256(acc, _mm256_srli_epi64(acc, 47)), load(secret));
    const __m256i low = _mm256_mul_epu32(mixed, prime);
    const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);

    return _mm256_add_epi64(low, _mm256_slli_epi64(high, 32));
}

AVX2 static void accumulate_avx2(uint64_t out[8], const uint8_t *secret, const uint8_t *page,
                                 size_t page_bytes, size_t zero_blocks)
{
    const size_t last_block = page_bytes / XXH3_BLOCK_BYTES - 1;
    __m256i acc0 = load((const uint8_t *)xxh3_initial_acc);
    __m256i acc1 = load((const uint8_t *)(xxh3_initial_acc + 4));

    for (size_t block = 0; block <= last_block; block++) {
        const uint8_t *in =
            block < zero_blocks ? xxh3_zero_block : page + block * XXH3_BLOCK_BYTES;

        for (unsigned stripe = 0; stripe < XXH3_BLOCK_STRIPES - 1; stripe++) {
            const uint8_t *at = in + stripe * XXH3_STRIPE_BYTES;

            _mm_prefetch((const char *)at + PREFETCH_BYTES, _MM_HINT_T0);
            acc0 = add_half(acc0, at, secret + 8 * stripe);
            acc1 = add_half(acc1, at + 32, secret + 8 * stripe + 32);
        }
        const uint8_t *at = in + (XXH3_BLOCK_STRIPES - 1) * XXH3_STRIPE_BYTES;
        const uint8_t *key =
            secret + (block < last_block ? 8 * (XXH3_BLOCK_STRIPES - 1) : XXH3_LAST_SECRET);

        _mm_prefetch((const char *)at + PREFETCH_BYTES, _MM_HINT_T0);
        acc0 = add_half(acc0, at, key);
        acc1 = add_half(acc1, at + 32, key + 32);
        if (block < last_block) {
            acc0 = scramble_half(acc0, secret + XXH3_SCRAMBLE_SECRET);
            acc1 = scramble_half(acc1, secret + XXH3_SCRAMBLE_SECRET + 32);
        }
    }
    _mm256_storeu_si256((__m256i *)(void *)out, acc0);
    _mm256_storeu_si256((__m256i *)(void *)(out + 4), acc1);
}

const struct hash_ops hash_avx2 = {"avx2", accumulate_avx2};

#else
typedef int hash_avx2_is_not_built_here;
#endif
