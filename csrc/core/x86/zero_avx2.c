/* SPDX-License-Identifier: Apache-2.0 */
/* Length of the zero prefix with AVX2.
 *
 * Why it equals the scalar twin: the OR of all bytes of a group of cache lines is zero exactly if each
 * byte is, and a group that is not zero ends the scan at its first byte, a multiple of 64. The groups
 * are single lines at first, then four lines, so a page that differs early costs a line or two. */
#if defined(__x86_64__)

#include "core/kernel_ops.h"
#include "core/x86/vector.h"

#define PREFETCH_BYTES 1024

AVX2 static inline __m256i load(const uint8_t *from)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)from);
}

AVX2 static inline __m256i line(const uint8_t *at)
{
    return _mm256_or_si256(load(at), load(at + 32));
}

AVX2 static size_t zero_prefix_avx2(const uint8_t *bytes, size_t nbytes)
{
    size_t at = 0;

    for (; at < nbytes && at < 256; at += 64) {
        const __m256i any = line(bytes + at);

        if (!_mm256_testz_si256(any, any)) {
            return at;
        }
    }
    for (; at + 256 <= nbytes; at += 256) {
        const uint8_t *from = bytes + at;
        const __m256i any =
            _mm256_or_si256(_mm256_or_si256(line(from), line(from + 64)),
                            _mm256_or_si256(line(from + 128), line(from + 192)));

        _mm_prefetch((const char *)from + PREFETCH_BYTES, _MM_HINT_T0);
        _mm_prefetch((const char *)from + PREFETCH_BYTES + 64, _MM_HINT_T0);
        _mm_prefetch((const char *)from + PREFETCH_BYTES + 128, _MM_HINT_T0);
        _mm_prefetch((const char *)from + PREFETCH_BYTES + 192, _MM_HINT_T0);
        if (!_mm256_testz_si256(any, any)) {
            return at;
        }
    }
    for (; at < nbytes; at += 64) {
        const __m256i any = line(bytes + at);

        if (!_mm256_testz_si256(any, any)) {
            return at;
        }
    }
    return nbytes;
}

const struct zero_ops zero_avx2 = {"avx2", zero_prefix_avx2};

#else
typedef int zero_avx2_is_not_built_here;
#endif
