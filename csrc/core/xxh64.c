/* SPDX-License-Identifier: Apache-2.0 */
/* XXH64 (xxHash specification 0.8): the checksum of packet headers and descriptors. */
#include "core/xxh64.h"

#include <string.h>

#include "core/endian.h"
#include "core/xxh3.h"
#include "vmth/page_hash.h"

static inline uint64_t rotl(uint64_t value, unsigned bits)
{
    return (value << bits) | (value >> (64 - bits));
}

static inline uint64_t round_lane(uint64_t lane, uint64_t word)
{
    return rotl(lane + word * XXH_PRIME64_2, 31) * XXH_PRIME64_1;
}

static inline void add_stripe(uint64_t lanes[4], const uint8_t *in)
{
    for (unsigned i = 0; i < 4; i++) {
        lanes[i] = round_lane(lanes[i], load_le64(in + 8 * i));
    }
}

void xxh64_init(struct xxh64 *state, uint64_t seed)
{
    state->lanes[0] = seed + XXH_PRIME64_1 + XXH_PRIME64_2;
    state->lanes[1] = seed + XXH_PRIME64_2;
    state->lanes[2] = seed;
    state->lanes[3] = seed - XXH_PRIME64_1;
    state->seed = seed;
    state->total = 0;
}

void xxh64_update(struct xxh64 *state, const void *data, size_t nbytes)
{
    const uint8_t *in = data;
    const size_t waiting = state->total % 32;

    state->total += nbytes;
    if (waiting != 0) {
        const size_t missing = 32 - waiting;

        if (nbytes < missing) {
            if (nbytes != 0) {
                memcpy(state->tail + waiting, in, nbytes);
            }
            return;
        }
        memcpy(state->tail + waiting, in, missing);
        add_stripe(state->lanes, state->tail);
        in += missing;
        nbytes -= missing;
    }
    for (; nbytes >= 32; in += 32, nbytes -= 32) {
        add_stripe(state->lanes, in);
    }
    if (nbytes != 0) {
        memcpy(state->tail, in, nbytes);
    }
}

uint64_t xxh64_final(const struct xxh64 *state)
{
    const uint8_t *in = state->tail;
    size_t left = state->total % 32;
    uint64_t value;

    if (state->total < 32) {
        value = state->seed + XXH_PRIME64_5;
    } else {
        value = rotl(state->lanes[0], 1) + rotl(state->lanes[1], 7) + rotl(state->lanes[2], 12) +
                rotl(state->lanes[3], 18);
        for (unsigned i = 0; i < 4; i++) {
            value ^= round_lane(0, state->lanes[i]);
            value = value * XXH_PRIME64_1 + XXH_PRIME64_4;
        }
    }
    value += state->total;
    for (; left >= 8; in += 8, left -= 8) {
        value ^= round_lane(0, load_le64(in));
        value = rotl(value, 27) * XXH_PRIME64_1 + XXH_PRIME64_4;
    }
    if (left >= 4) {
        value ^= load_le32(in) * XXH_PRIME64_1;
        value = rotl(value, 23) * XXH_PRIME64_2 + XXH_PRIME64_3;
        in += 4;
        left -= 4;
    }
    for (; left > 0; in++, left--) {
        value ^= *in * XXH_PRIME64_5;
        value = rotl(value, 11) * XXH_PRIME64_1;
    }
    value ^= value >> 33;
    value *= XXH_PRIME64_2;
    value ^= value >> 29;
    value *= XXH_PRIME64_3;
    return value ^ (value >> 32);
}

uint64_t vmth_checksum64(const void *data, size_t nbytes, uint64_t seed)
{
    struct xxh64 state;

    xxh64_init(&state, seed);
    xxh64_update(&state, data, nbytes);
    return xxh64_final(&state);
}
