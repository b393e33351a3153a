/* SPDX-License-Identifier: Apache-2.0 */
/* Runs of whole words without a branch a bit, for the AVX2 and AVX-512 bitmap kernels.
 *
 *   word (bit 0 on the left)   0 0 1 1 1 0 0 1 | 1 0
 *   edges                      . . ^ . . ^ . ^ | . ^     differs from the bit before
 *
 * Why it equals the scalar twin: outside a run the first edge is a start, and starts and ends take
 * turns from there, so the positions of all edges, in order, are the runs:
 * {edge 2k, edge 2k+1 less edge 2k}. If a run is open, the first edge is its end. Blocks of words are
 * done in two steps: the positions of the edges go to a scratch array, which tells how many there are;
 * then they become runs.
 * Every word is read once, so no later change of it can make the two steps disagree.
 *
 * Where too little room is left for a block it is walked word by word, by the scalar twin. */
#ifndef VMTH_CORE_X86_RUNS_BMI_H
#define VMTH_CORE_X86_RUNS_BMI_H

#include "core/kernel_ops.h"
#include "core/run_sink.h"
#include "core/x86/vector.h"

#define RUNS_GROUP 8u                  /* words; what is skipped or done is a multiple */
#define RUNS_SET (8 * RUNS_GROUP)      /* words; a bit for each fits in a word */
#define RUNS_BLOCK (4 * RUNS_SET)      /* words; positions of bits within fit in 16 bits */
#define RUNS_SPARE 64u                 /* edges that may be written past the last */
#define RUNS_ROOM 512u                 /* entries below which blocks are not tried */

/* The steps of a kernel; constants at each call, so that they are inlined. */
struct runs_steps {
    /* The first group in [from, to) that is not zero, or the end of the last whole group. */
    size_t (*skip_zero)(const uint64_t *words, size_t from, size_t to);
    /* Positions of the edges in n words (a multiple of RUNS_GROUP, at most RUNS_BLOCK), counted from
     * the first word's bit 0; `before` is 1 if the bit before is set, else 0. Returns how many. */
    size_t (*find_edges)(const uint64_t *words, size_t n, uint64_t before, uint16_t *edges);
    /* 2 n edges into n runs; may read and write up to three entries more. */
    void (*write_runs)(struct vmth_run *out, const uint16_t *edges, size_t n, uint64_t base);
};

/* Put the n edges of a block whose first bit is page `base`. */
BMI static inline __attribute__((always_inline)) void
put_edges(struct run_sink *sink, const uint16_t *edges, size_t n, uint64_t base,
          const struct runs_steps *steps)
{
    if (n > 0 && sink->open) {
        sink_put(sink, sink->start, base + edges[0]);
        sink->open = false;
        edges++;
        n--;
    }
    steps->write_runs(sink->out + sink->n, edges, n / 2, base);
    sink->n += n / 2;
    if (n % 2 != 0) {
        sink->open = true;
        sink->start = base + edges[n - 1];
    }
}

BMI static inline __attribute__((always_inline)) size_t
walk_runs(const uint64_t *words, size_t from, size_t to, struct run_sink *sink,
          const struct runs_steps *steps)
{
    uint16_t edges[64 * RUNS_BLOCK + RUNS_SPARE];

    while (from < to) {
        if (!sink->open) {
            from = steps->skip_zero(words, from, to);
        }
        const size_t room = sink->cap - sink->n;
        const size_t left = to - from;
        const size_t n = (left < RUNS_BLOCK ? left : RUNS_BLOCK) / RUNS_GROUP * RUNS_GROUP;

        if (n > 0 && room >= RUNS_ROOM) {
            const size_t nedges = steps->find_edges(words + from, n, sink->open, edges);

            if (nedges / 2 + 5 <= room) { /* the open run, the three too many, one kept */
                put_edges(sink, edges, nedges, 64 * (uint64_t)from, steps);
                from += n;
                continue;
            }
        }
        const size_t end = left < RUNS_SET ? to : from + RUNS_SET;

        from = bitmap_scalar.runs(words, from, end, sink);
        if (from < end) {
            break;
        }
    }
    return from;
}

#endif
