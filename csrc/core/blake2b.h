/* SPDX-License-Identifier: Apache-2.0 */
/* BLAKE2b (RFC 7693): what the implementations of the content hash share. */
#ifndef VMTH_CORE_BLAKE2B_H
#define VMTH_CORE_BLAKE2B_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BLAKE2B_BLOCK_BYTES ((size_t)128)
#define BLAKE2B_KEY_BYTES 32
#define BLAKE2B_DIGEST_BYTES 16

/* Of the first parameter word: digest and key length, fanout 1, depth 1; the others are zero. */
#define BLAKE2B_PARAMETERS                                                                         \
    (UINT64_C(0x01010000) | (uint64_t)BLAKE2B_KEY_BYTES << 8 | BLAKE2B_DIGEST_BYTES)

extern const uint64_t blake2b_iv[8];

/* Mix one block into the chain: counter is the number of bytes up to its end. */
void blake2b_compress(uint64_t chain[8], const uint8_t block[BLAKE2B_BLOCK_BYTES], uint64_t counter,
                      bool last);

/* The twelve rounds, each with the message words that its eight mixings take, in their order. */
/* clang-format off */
#define BLAKE2B_ROUNDS(ROUND)                                              \
    ROUND( 0,  1,  2,  3,  4,  5,  6,  7,  8,  9, 10, 11, 12, 13, 14, 15)  \
    ROUND(14, 10,  4,  8,  9, 15, 13,  6,  1, 12,  0,  2, 11,  7,  5,  3)  \
    ROUND(11,  8, 12,  0,  5,  2, 15, 13, 10, 14,  3,  6,  7,  1,  9,  4)  \
    ROUND( 7,  9,  3,  1, 13, 12, 11, 14,  2,  6,  5, 10,  4,  0, 15,  8)  \
    ROUND( 9,  0,  5,  7,  2,  4, 10, 15, 14,  1, 11, 12,  6,  8,  3, 13)  \
    ROUND( 2, 12,  6, 10,  0, 11,  8,  3,  4, 13,  7,  5, 15, 14,  1,  9)  \
    ROUND(12,  5,  1, 15, 14, 13,  4, 10,  0,  7,  6,  3,  9,  2,  8, 11)  \
    ROUND(13, 11,  7, 14, 12,  1,  3,  9,  5,  0, 15,  4,  8,  6,  2, 10)  \
    ROUND( 6, 15, 14,  9, 11,  3,  0,  8, 12,  2, 13,  7,  1,  4, 10,  5)  \
    ROUND(10,  2,  8,  4,  7,  6,  1,  5, 15, 11,  9, 14,  3, 12, 13,  0)  \
    ROUND( 0,  1,  2,  3,  4,  5,  6,  7,  8,  9, 10, 11, 12, 13, 14, 15)  \
    ROUND(14, 10,  4,  8,  9, 15, 13,  6,  1, 12,  0,  2, 11,  7,  5,  3)
/* clang-format on */

/* One round from its eight mixings: columns, then diagonals. */
#define BLAKE2B_ROUND(m0, m1, m2, m3, m4, m5, m6, m7, m8, m9, m10, m11, m12, m13, m14, m15)        \
    MIX(0, 4, 8, 12, m0, m1)                                                                       \
    MIX(1, 5, 9, 13, m2, m3)                                                                       \
    MIX(2, 6, 10, 14, m4, m5)                                                                      \
    MIX(3, 7, 11, 15, m6, m7)                                                                      \
    MIX(0, 5, 10, 15, m8, m9)                                                                      \
    MIX(1, 6, 11, 12, m10, m11)                                                                    \
    MIX(2, 7, 8, 13, m12, m13)                                                                     \
    MIX(3, 4, 9, 14, m14, m15)

#endif
