/* SPDX-License-Identifier: Apache-2.0 */
/* XXH3 accumulation with AVX512.
 *
 * Why it equals the scalar twin: the eight lanes are the eight 64-bit lanes of one register, and every
 * scalar step is one exact lane-wise instruction modulo 2^64, as in hash_avx2.c with twice the width:
 * XOR, the product of the two 32-bit halves, the swap of lanes i and i ^ 1 (vpshufd), additions.
 * The scramble's two XORs and its shift are one vpternlogq, which is an exact three-input XOR. */
#if defined(__x86_64__)

#include "core/kernel_ops.h"
#include "core/x86/vector.h"
#include "core/xxh3.h"

#define PREFETCH_BYTES 2048

AVX512 static inline __m512i load(const uint8_t *from)
{
    return _mm512_loadu_si512(from);
}

AVX512 static inline __m512i add_stripe(__m512i acc, const uint8_t *in, __m512i secret)
{
    const __m512i word = load(in);
    const __m512i keyed = _mm512_xor_si512(word, secret);
    const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
    const __m512i swapped = _mm512_shuffle_epi32(word, _MM_PERM_BADC);

    return _mm512_add_epi64(acc, _mm512_add_epi64(product, swapped));
}

AVX512 static inline __m512i scramble(__m512i acc, __m512i secret)
{
    const __m512i prime = _mm512_set1_epi32((int)XXH_PRIME32_1);
    const __m512i mixed = _mm512_ternarylogic_epi64(acc, _mm512_srli_epi64(acc, 47), secret, 0x96);
    const __m512i low = _mm512_mul_epu32(mixed, prime);
    const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(mixed, 32), prime);

    return _mm512_add_epi64(low, _mm512_slli_epi64(high, 32));
}

AVX512 static void accumulate_avx512(uint64_t out[8], const uint8_t *secret, const uint8_t *page,
                                     size_t page_bytes, size_t zero_blocks)
{
    const size_t last_block = page_bytes / XXH3_BLOCK_BYTES - 1;
    __m512i acc = load((const uint8_t *)xxh3_initial_acc);

    for (size_t block = 0; block <= last_block; block++) {
        const uint8_t *in =
            block < zero_blocks ? xxh3_zero_block : page + block * XXH3_BLOCK_BYTES;

        for (unsigned stripe = 0; stripe < XXH3_BLOCK_STRIPES - 1; stripe++) {
            const uint8_t *at = in + stripe * XXH3_STRIPE_BYTES;

            _mm_prefetch((const char *)at + PREFETCH_BYTES, _MM_HINT_T0);
            acc = add_stripe(acc, at, load(secret + 8 * stripe));
        }
        const uint8_t *at = in + (XXH3_BLOCK_STRIPES - 1) * XXH3_STRIPE_BYTES;
        const uint8_t *key =
            secret + (block < last_block ? 8 * (XXH3_BLOCK_STRIPES - 1) : XXH3_LAST_SECRET);

        _mm_prefetch((const char *)at + PREFETCH_BYTES, _MM_HINT_T0);
        acc = add_stripe(acc, at, load(key));
        if (block < last_block) {
            acc = scramble(acc, load(secret + XXH3_SCRAMBLE_SECRET));
        }
    }
    _mm512_storeu_si512(out, acc);
}

const struct hash_ops hash_avx512 = {"avx512", accumulate_avx512};

#else
typedef int hash_avx512_is_not_built_here;
#endif
