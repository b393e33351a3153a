/* SPDX-License-Identifier: Apache-2.0 */
/* Whole-word bitmap loops, scalar: defines the answer for every other implementation. */
#include "core/kernel_ops.h"
#include "core/popcount.h"

static uint64_t count_scalar(const uint64_t *words, size_t n)
{
    uint64_t bits = 0;

    for (size_t i = 0; i < n; i++) {
        bits += popcount64(words[i]);
    }
    return bits;
}

static uint64_t merge_scalar(uint64_t *into, const uint64_t *from, size_t n)
{
    uint64_t bits = 0;

    for (size_t i = 0; i < n; i++) {
        bits += popcount64(from[i] & ~into[i]);
        into[i] |= from[i];
    }
    return bits;
}

static size_t skip_empty_scalar(const uint64_t *words, size_t from, size_t n)
{
    while (from < n && words[from] == 0) {
        from++;
    }
    return from;
}

const struct bitmap_ops bitmap_scalar = {"scalar", count_scalar, merge_scalar, skip_empty_scalar};
