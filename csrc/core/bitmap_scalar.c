/* SPDX-License-Identifier: Apache-2.0 */
/* Whole-word bitmap loops, scalar: defines the answer for every other implementation. */
#include "core/kernel_ops.h"
#include "core/popcount.h"
#include "core/run_sink.h"

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

static size_t runs_scalar(const uint64_t *words, size_t from, size_t to, struct run_sink *sink)
{
    for (; from < to; from++) {
        uint64_t resume; /* stays unset: there is room */

        if (words[from] == 0 && !sink->open) {
            continue;
        }
        if (sink->cap - sink->n < RUN_SINK_ROOM) {
            break;
        }
        (void)sink_word(sink, words[from], 64 * (uint64_t)from, &resume);
    }
    return from;
}

const struct bitmap_ops bitmap_scalar = {"scalar", count_scalar, merge_scalar, runs_scalar};
