/* SPDX-License-Identifier: Apache-2.0 */
/* Length of the zero prefix with AVX-512.
 *
 * Why it equals the scalar twin: as in zero_avx2.c; a register holds one cache line, and vptestmq gives
 * a mask that is zero exactly if all its bytes are. */
#if defined(__x86_64__)

#include "core/kernel_ops.h"
#include "core/x86/vector.h"

#define PREFETCH_BYTES 1024

AVX512 static size_t zero_prefix_avx512(const uint8_t *bytes, size_t nbytes)
{
    size_t at = 0;

    for (; at < nbytes && at < 256; at += 64) {
        const __m512i any = _mm512_loadu_si512(bytes + at);

        if (_mm512_test_epi64_mask(any, any) != 0) {
            return at;
        }
    }
    for (; at + 256 <= nbytes; at += 256) {
        const uint8_t *from = bytes + at;
        const __m512i pair =
            _mm512_or_si512(_mm512_loadu_si512(from), _mm512_loadu_si512(from + 64));
        const __m512i any = _mm512_ternarylogic_epi64(pair, _mm512_loadu_si512(from + 128),
                                                      _mm512_loadu_si512(from + 192), 0xfe);

        _mm_prefetch((const char *)from + PREFETCH_BYTES, _MM_HINT_T0);
        _mm_prefetch((const char *)from + PREFETCH_BYTES + 64, _MM_HINT_T0);
        _mm_prefetch((const char *)from + PREFETCH_BYTES + 128, _MM_HINT_T0);
        _mm_prefetch((const char *)from + PREFETCH_BYTES + 192, _MM_HINT_T0);
        if (_mm512_test_epi64_mask(any, any) != 0) {
            return at;
        }
    }
    for (; at < nbytes; at += 64) {
        const __m512i any = _mm512_loadu_si512(bytes + at);

        if (_mm512_test_epi64_mask(any, any) != 0) {
            return at;
        }
    }
    return nbytes;
}

const struct zero_ops zero_avx512 = {"avx512", zero_prefix_avx512};

#else
typedef int zero_avx512_is_not_built_here;
#endif
