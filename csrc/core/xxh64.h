/* SPDX-License-Identifier: Apache-2.0 */
/* XXH64 in pieces: header bytes and descriptors are hashed as one message without a copy. */
#ifndef VMTH_CORE_XXH64_H
#define VMTH_CORE_XXH64_H

#include <stddef.h>
#include <stdint.h>

struct xxh64 {
    uint64_t lanes[4];
    uint64_t seed;
    uint64_t total;  /* bytes seen */
    uint8_t tail[32]; /* total % 32 bytes wait here */
};

void xxh64_init(struct xxh64 *state, uint64_t seed);
void xxh64_update(struct xxh64 *state, const void *data, size_t nbytes);
uint64_t xxh64_final(const struct xxh64 *state);

#endif
