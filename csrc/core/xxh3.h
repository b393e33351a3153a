/* SPDX-License-Identifier: Apache-2.0 */
/* Constants of XXH64 and XXH3 (xxHash specification 0.8), shared by every hash implementation.
 *
 * One page as XXH3 sees it:
 *
 *   | block 0: 16 stripes of 64 bytes | block 1 | ... | last block: 15 stripes + the last stripe |
 *     stripe n uses secret + 8 n        scramble          the last stripe uses secret + 121
 *     scramble after 16 stripes                           no scramble
 *
 * Eight 64-bit lanes run through all stripes; a stripe's lane i adds its word to lane i ^ 1 and the
 * product of the two 32-bit halves of (word ^ secret word) to lane i, all modulo 2^64. */
#ifndef VMTH_CORE_XXH3_H
#define VMTH_CORE_XXH3_H

#include <stdint.h>

#define XXH_PRIME32_1 0x9E3779B1u
#define XXH_PRIME32_2 0x85EBCA77u
#define XXH_PRIME32_3 0xC2B2AE3Du
#define XXH_PRIME64_1 0x9E3779B185EBCA87u
#define XXH_PRIME64_2 0xC2B2AE3D27D4EB4Fu
#define XXH_PRIME64_3 0x165667B19E3779F9u
#define XXH_PRIME64_4 0x85EBCA77C2B2AE63u
#define XXH_PRIME64_5 0x27D4EB2F165667C5u

#define XXH3_STRIPE_BYTES 64u
#define XXH3_BLOCK_STRIPES 16u
#define XXH3_BLOCK_BYTES (XXH3_STRIPE_BYTES * XXH3_BLOCK_STRIPES)
#define XXH3_SCRAMBLE_SECRET 128u /* secret length - stripe */
#define XXH3_LAST_SECRET 121u     /* secret length - stripe - 7 */

/* One block of zero bytes: what accumulate() runs over instead of memory known to be zero. */
extern const uint8_t xxh3_zero_block[XXH3_BLOCK_BYTES];

/* What the eight lanes start from. */
extern const uint64_t xxh3_initial_acc[8];

#endif
