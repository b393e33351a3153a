/* SPDX-License-Identifier: Apache-2.0 */
/* Big-endian loads and stores at any alignment, as QEMU's formats have them. */
#ifndef VMTH_CORE_BIG_ENDIAN_H
#define VMTH_CORE_BIG_ENDIAN_H

#include <stdint.h>
#include <string.h>

static inline uint64_t load_be(const uint8_t *from, unsigned nbytes)
{
    uint64_t value = 0;

    for (unsigned i = 0; i < nbytes; i++) {
        value = value << 8 | from[i];
    }
    return value;
}

static inline void store_be(uint8_t *to, uint64_t value, unsigned nbytes)
{
    for (unsigned i = nbytes; i-- > 0; value >>= 8) {
        to[i] = (uint8_t)value;
    }
}

static inline uint64_t load_be64(const uint8_t *from)
{
    uint64_t value;

    memcpy(&value, from, sizeof(value));
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    return __builtin_bswap64(value);
#else
    return value;
#endif
}

#endif
