/* SPDX-License-Identifier: Apache-2.0 */
/* Length of the zero prefix with NEON.
 *
 * Why it equals the scalar twin: the OR of all bytes of a group of cache lines is zero exactly if each
 * byte is (UMAXV takes the largest 32-bit part of it), and a group that is not zero ends the scan at
 * its first byte, a multiple of 64. */
#if defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__

#include <arm_neon.h>
#include <stdbool.h>

#include "core/kernel_ops.h"

static inline uint8x16_t line(const uint8_t *at)
{
    return vorrq_u8(vorrq_u8(vld1q_u8(at), vld1q_u8(at + 16)),
                    vorrq_u8(vld1q_u8(at + 32), vld1q_u8(at + 48)));
}

static inline bool is_empty(uint8x16_t any)
{
    return vmaxvq_u32(vreinterpretq_u32_u8(any)) == 0;
}

static size_t zero_prefix_neon(const uint8_t *bytes, size_t nbytes)
{
    size_t at = 0;

    for (; at < nbytes && at < 256; at += 64) {
        if (!is_empty(line(bytes + at))) {
            return at;
        }
    }
    for (; at + 256 <= nbytes; at += 256) {
        const uint8_t *from = bytes + at;

        if (!is_empty(vorrq_u8(vorrq_u8(line(from), line(from + 64)),
                               vorrq_u8(line(from + 128), line(from + 192))))) {
            return at;
        }
    }
    for (; at < nbytes; at += 64) {
        if (!is_empty(line(bytes + at))) {
            return at;
        }
    }
    return nbytes;
}

const struct zero_ops zero_neon = {"neon", zero_prefix_neon};

#else
typedef int zero_neon_is_not_built_here;
#endif
