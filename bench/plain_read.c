/* SPDX-License-Identifier: Apache-2.0 */
/* The baseline of bench/kernels_table.py: read a buffer and keep nothing but one OR of it. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint64_t wide __attribute__((vector_size(64)));

uint64_t plain_read(const uint8_t *bytes, size_t nbytes);

/* Compiled for the machine it runs on: the fastest read that a compiler makes of it. */
uint64_t plain_read(const uint8_t *bytes, size_t nbytes)
{
    wide any[4] = {{0}, {0}, {0}, {0}};
    uint64_t result = 0;

    for (size_t at = 0; at + 256 <= nbytes; at += 256) {
        for (unsigned i = 0; i < 4; i++) {
            wide line;

            memcpy(&line, bytes + at + 64 * i, sizeof(line));
            any[i] |= line;
        }
    }
    any[0] |= any[1] | any[2] | any[3];
    for (unsigned i = 0; i < 8; i++) {
        result |= any[0][i];
    }
    return result;
}
