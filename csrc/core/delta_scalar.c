/* SPDX-License-Identifier: Apache-2.0 */
/* Masks of changed bytes, scalar: defines the answer for every other implementation. */
#include "core/endian.h"
#include "core/kernel_ops.h"

/* Bit i: byte i of the difference is not zero. */
static uint64_t changed_bytes(uint64_t difference)
{
    uint64_t mask = 0;

    for (unsigned i = 0; difference != 0; i++, difference >>= 8) {
        mask |= (uint64_t)((difference & 0xff) != 0) << i;
    }
    return mask;
}

static uint64_t changed_scalar(const uint8_t *base, const uint8_t *now,
                               uint64_t masks[DELTA_PIECE_LINES])
{
    uint64_t lines = 0;

    for (unsigned line = 0; line < DELTA_PIECE_LINES; line++) {
        uint64_t mask = 0;

        for (unsigned word = 0; word < 8; word++) {
            const size_t at = 64 * (size_t)line + 8 * word;

            mask |= changed_bytes(load_le64(base + at) ^ load_le64(now + at)) << (8 * word);
        }
        masks[line] = mask;
        lines |= (uint64_t)(mask != 0) << line;
    }
    return lines;
}

const struct delta_ops delta_scalar = {"scalar", changed_scalar};
