/* SPDX-License-Identifier: Apache-2.0 */
/* Little-endian loads and stores at any alignment; a compiler makes one instruction of each. */
#ifndef VMTH_CORE_ENDIAN_H
#define VMTH_CORE_ENDIAN_H

#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define VMTH_LE(bits, value) (value)
#else
#define VMTH_LE(bits, value) __builtin_bswap##bits(value)
#endif

static inline uint16_t load_le16(const uint8_t *from)
{
    uint16_t value;
    memcpy(&value, from, sizeof(value));
    return VMTH_LE(16, value);
}

static inline uint32_t load_le32(const uint8_t *from)
{
    uint32_t value;
    memcpy(&value, from, sizeof(value));
    return VMTH_LE(32, value);
}

static inline uint64_t load_le64(const uint8_t *from)
{
    uint64_t value;
    memcpy(&value, from, sizeof(value));
    return VMTH_LE(64, value);
}

static inline void store_le16(uint8_t *to, uint16_t value)
{
    value = VMTH_LE(16, value);
    memcpy(to, &value, sizeof(value));
}

static inline void store_le32(uint8_t *to, uint32_t value)
{
    value = VMTH_LE(32, value);
    memcpy(to, &value, sizeof(value));
}

static inline void store_le64(uint8_t *to, uint64_t value)
{
    value = VMTH_LE(64, value);
    memcpy(to, &value, sizeof(value));
}

#endif
