/* SPDX-License-Identifier: Apache-2.0 */
/* Where the runs of a bitmap are collected while its words are walked in order.
 *
 *   out    | run 0 | run 1 | ... | run n-1 |  room for cap - n more  |
 *
 * `open` means that a run began at page `start` and reaches the end of the words walked so far; one
 * entry of the room is kept for it. */
#ifndef VMTH_CORE_RUN_SINK_H
#define VMTH_CORE_RUN_SINK_H

#include <stdbool.h>

#include "vmth/common.h"

/* At most 32 runs begin in a word, one from before may end in it, and one entry stays for a run that is
 * left open. */
#define RUN_SINK_ROOM 34u

struct run_sink {
    struct vmth_run *out;
    size_t cap;
    size_t n;
    uint64_t start;
    bool open;
};

static inline void sink_put(struct run_sink *sink, uint64_t start, uint64_t end)
{
    sink->out[sink->n].page = start;
    sink->out[sink->n].npages = end - start;
    sink->n++;
}

/* Walk one word whose bit 0 is page `base`. Returns true, or false with *resume set to the first page
 * of a run that has no room. */
static inline bool sink_word(struct run_sink *sink, uint64_t word, uint64_t base, uint64_t *resume)
{
    if (sink->open) {
        if (word == ~UINT64_C(0)) {
            return true;
        }
        const unsigned end = (unsigned)__builtin_ctzll(~word);

        sink_put(sink, sink->start, base + end);
        sink->open = false;
        word &= ~UINT64_C(0) << end;
    }
    while (word != 0) {
        const unsigned first = (unsigned)__builtin_ctzll(word);
        const uint64_t after = ~word & (~UINT64_C(0) << first); /* clear bits past the run's start */

        if (sink->n == sink->cap) {
            *resume = base + first;
            return false;
        }
        if (after == 0) {
            sink->start = base + first;
            sink->open = true;
            return true;
        }
        const unsigned end = (unsigned)__builtin_ctzll(after);

        sink_put(sink, base + first, base + end);
        word &= ~UINT64_C(0) << end;
    }
    return true;
}

#endif
