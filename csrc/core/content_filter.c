/* SPDX-License-Identifier: Apache-2.0 */
/* Parts of a set of fingerprints: gaps as 16 bits and a unary rest, both ways. */
#include "vmth/content_filter.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "core/endian.h"

#define LOW_BITS 16u
#define LOW_BYTES ((size_t)2)
/* Room for unary bits beside the lows of a full part. */
#define UNARY_BYTES (VMTH_FILTER_PART_BYTES - LOW_BYTES * VMTH_FILTER_PART_ENTRIES)

unsigned vmth_filter_bits(uint64_t entries)
{
    unsigned bits = LOW_BITS;

    while (bits < 64 && entries > UINT64_C(1) << (bits - LOW_BITS)) {
        bits++;
    }
    return bits < VMTH_FILTER_MIN_BITS ? VMTH_FILTER_MIN_BITS : bits;
}

size_t vmth_filter_encode(const uint64_t *prints, size_t n, uint8_t *out, size_t *nbytes)
{
    uint8_t unary[UNARY_BYTES];
    const size_t most = n < VMTH_FILTER_PART_ENTRIES ? n : VMTH_FILTER_PART_ENTRIES;
    size_t used_bits = 0;
    size_t count = 1;

    memset(unary, 0, sizeof(unary));
    for (; count < most; count++) {
        const uint64_t gap = prints[count] - prints[count - 1] - 1;
        const uint64_t high = gap >> LOW_BITS;

        if (high >= 8 * UNARY_BYTES - used_bits) {
            break; /* the next part begins with it, and needs no gap */
        }
        for (uint64_t i = 0; i < high; i++, used_bits++) {
            unary[used_bits / 8] |= (uint8_t)(1u << (used_bits % 8));
        }
        used_bits++;
        store_le16(out + LOW_BYTES * (count - 1), (uint16_t)gap);
    }
    memcpy(out + LOW_BYTES * (count - 1), unary, (used_bits + 7) / 8);
    *nbytes = LOW_BYTES * (count - 1) + (used_bits + 7) / 8;
    return count;
}

int vmth_filter_decode(uint64_t base, size_t count, const uint8_t *data, size_t nbytes,
                       unsigned bits, uint64_t *prints)
{
    if (count == 0 || count > VMTH_FILTER_PART_ENTRIES || bits > 48 || base >> bits != 0 ||
        nbytes < LOW_BYTES * (count - 1)) {
        return -EPROTO;
    }
    const uint8_t *unary = data + LOW_BYTES * (count - 1);
    const size_t nbits = 8 * (nbytes - LOW_BYTES * (count - 1));
    size_t at = 0;

    prints[0] = base;
    for (size_t i = 1; i < count; i++) {
        uint64_t high = 0;

        while (at < nbits && (unary[at / 8] >> (at % 8) & 1) != 0) {
            high++;
            at++;
        }
        if (at == nbits) {
            return -EPROTO;
        }
        at++; /* the zero that ends it */
        /* No sum wraps: high is at most 8 * nbytes, the one before is below 2^48. */
        prints[i] = prints[i - 1] + 1 + (high << LOW_BITS | load_le16(data + LOW_BYTES * (i - 1)));
        if (prints[i] >> bits != 0) {
            return -EPROTO;
        }
    }
    if (nbits - at >= 8) {
        return -EPROTO;
    }
    for (; at < nbits; at++) {
        if ((unary[at / 8] >> (at % 8) & 1) != 0) {
            return -EPROTO;
        }
    }
    return 0;
}
