/* SPDX-License-Identifier: Apache-2.0 */
/* Runs of whole words without a branch a bit, for the AVX2 and AVX-512 bitmap kernels.
 *
 *   word (bit 0 on the left)   0 0 1 1 1 0 0 1
 *   starts                     . . ^ . . . . ^     set, and the bit before is not
 *   ends                       . . . . . ^ . .     clear, and the bit before is set
 *
 * Why it equals the scalar twin: the k-th start and the k-th end belong to the k-th run, so the two
 * streams are written independently: TZCNT and BLSR give the positions in order, and the number of
 * entries that count is POPCNT. Two of each are written always, since a branch on how many there are
 * would be mispredicted in every second word of a random bitmap; entries past the count are written
 * again by the next word. TZCNT of zero is 64, which is harmless in such an entry. */
#ifndef VMTH_CORE_X86_RUNS_BMI_H
#define VMTH_CORE_X86_RUNS_BMI_H

#include "core/run_sink.h"
#include "core/x86/vector.h"

BMI static inline size_t write_starts(struct vmth_run *out, uint64_t starts, uint64_t base)
{
    const size_t n = (size_t)_mm_popcnt_u64(starts);

    out[0].page = base + _tzcnt_u64(starts);
    starts = _blsr_u64(starts);
    out[1].page = base + _tzcnt_u64(starts);
    for (size_t i = 2; i < n; i++) {
        starts = _blsr_u64(starts);
        out[i].page = base + _tzcnt_u64(starts);
    }
    return n;
}

/* The pages of the entries are there already: a run's end comes after its start. */
BMI static inline size_t write_ends(struct vmth_run *out, uint64_t ends, uint64_t base)
{
    const size_t n = (size_t)_mm_popcnt_u64(ends);

    out[0].npages = base + _tzcnt_u64(ends) - out[0].page;
    ends = _blsr_u64(ends);
    out[1].npages = base + _tzcnt_u64(ends) - out[1].page;
    for (size_t i = 2; i < n; i++) {
        ends = _blsr_u64(ends);
        out[i].npages = base + _tzcnt_u64(ends) - out[i].page;
    }
    return n;
}

/* The walk over whole words that both kernels share. `is_empty_group(words)` tells that 8 words are zero;
 * `closed_group`, if not NULL, writes the runs of 8 words at once and returns their number, or 0 if it
 * cannot. Both are constants at each call and are inlined. */
BMI static inline __attribute__((always_inline)) size_t
walk_runs(const uint64_t *words, size_t from, size_t to, struct run_sink *sink,
          bool (*is_empty_group)(const uint64_t *words),
          size_t (*closed_group)(const uint64_t *words, uint64_t base, struct vmth_run *out))
{
    struct vmth_run *out = sink->out;
    uint64_t carry = sink->open; /* the last bit of the word before */
    size_t nends = sink->n;
    size_t nstarts = nends + carry;

    if (sink->open) {
        out[nends].page = sink->start;
    }
    while (from < to) {
        size_t group_end = from + 8 < to ? from + 8 : to;

        if (carry == 0 && group_end == from + 8 && is_empty_group(words + from)) {
            from = group_end;
            continue;
        }
        if (sink->cap - nends < 8 * RUN_SINK_ROOM) {
            group_end = from + 1; /* the room is checked for every word */
            if (carry == 0 && words[from] == 0) {
                from++;
                continue;
            }
            if (sink->cap - nends < RUN_SINK_ROOM) {
                break;
            }
        }
        if (closed_group != NULL && carry == 0 && group_end == from + 8) {
            const size_t n = closed_group(words + from, 64 * (uint64_t)from, out + nends);

            if (n != 0) {
                nends += n;
                nstarts = nends;
                from = group_end;
                continue;
            }
        }
        for (; from < group_end; from++) {
            const uint64_t word = words[from];
            const uint64_t before = (word << 1) | carry;

            nstarts += write_starts(out + nstarts, word & ~before, 64 * (uint64_t)from);
            nends += write_ends(out + nends, before & ~word, 64 * (uint64_t)from);
            carry = word >> 63;
        }
    }
    sink->n = nends;
    sink->open = carry != 0;
    if (sink->open) {
        sink->start = out[nends].page;
    }
    return from;
}

#endif
