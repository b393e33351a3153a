/* SPDX-License-Identifier: Apache-2.0 */
/* Dirty bitmaps: ranges, edges and runs. Loops over whole words are kernels. */
#include "vmth/bitmap.h"

#include <errno.h>

#include "core/endian.h"
#include "core/kernel_ops.h"
#include "core/popcount.h"
#include "core/run_sink.h"

/* The bits below `bit` of a word; bit in 0..63. */
static inline uint64_t low_bits(uint64_t bit)
{
    return (UINT64_C(1) << bit) - 1;
}

uint64_t vmth_bitmap_count(const uint64_t *words, uint64_t from, uint64_t n)
{
    const uint64_t end = from + n;
    const uint64_t first = from / 64;
    const uint64_t last = end / 64;

    if (n == 0) {
        return 0;
    }
    if (first == last) {
        return popcount64(words[first] & low_bits(end % 64) & ~low_bits(from % 64));
    }
    uint64_t bits = popcount64(words[first] & ~low_bits(from % 64));

    bits += kernel_bitmap()->count(words + first + 1, last - first - 1);
    if (end % 64 != 0) {
        bits += popcount64(words[last] & low_bits(end % 64));
    }
    return bits;
}

uint64_t vmth_bitmap_merge(uint64_t *into, const uint64_t *from, uint64_t npages)
{
    const uint64_t whole = npages / 64;
    uint64_t bits = kernel_bitmap()->merge(into, from, whole);

    if (npages % 64 != 0) {
        const uint64_t added = from[whole] & low_bits(npages % 64) & ~into[whole];

        into[whole] |= added;
        bits += popcount64(added);
    }
    return bits;
}

uint64_t vmth_bitmap_fetch_and_clear(uint64_t *live, uint64_t *into, uint64_t npages)
{
    const uint64_t whole = npages / 64;
    uint64_t bits = 0;

    for (uint64_t i = 0; i < whole; i++) {
        /* The plain look keeps clean words' cache lines shared; a bit that a writer sets after it
         * stays for the next fetch. The exchange pairs with the writer's atomic OR. */
        if (__atomic_load_n(&live[i], __ATOMIC_RELAXED) != 0) {
            const uint64_t fetched = __atomic_exchange_n(&live[i], 0, __ATOMIC_ACQ_REL);

            into[i] |= fetched;
            bits += popcount64(fetched);
        }
    }
    if (npages % 64 != 0) {
        const uint64_t ours = low_bits(npages % 64);
        const uint64_t fetched = __atomic_fetch_and(&live[whole], ~ours, __ATOMIC_ACQ_REL) & ours;

        into[whole] |= fetched;
        bits += popcount64(fetched);
    }
    return bits;
}

void vmth_bitmap_set_range(uint64_t *words, uint64_t page, uint64_t npages)
{
    const uint64_t end = page + npages;
    const uint64_t first = page / 64;
    const uint64_t last = end / 64;

    if (npages == 0) {
        return;
    }
    if (first == last) {
        words[first] |= low_bits(end % 64) & ~low_bits(page % 64);
        return;
    }
    words[first] |= ~low_bits(page % 64);
    for (uint64_t i = first + 1; i < last; i++) {
        words[i] = ~UINT64_C(0);
    }
    if (end % 64 != 0) {
        words[last] |= low_bits(end % 64);
    }
}

void vmth_bitmap_clear_range(uint64_t *words, uint64_t page, uint64_t npages)
{
    const uint64_t end = page + npages;
    const uint64_t first = page / 64;
    const uint64_t last = end / 64;

    if (npages == 0) {
        return;
    }
    if (first == last) {
        words[first] &= ~(low_bits(end % 64) & ~low_bits(page % 64));
        return;
    }
    words[first] &= low_bits(page % 64);
    for (uint64_t i = first + 1; i < last; i++) {
        words[i] = 0;
    }
    if (end % 64 != 0) {
        words[last] &= ~low_bits(end % 64);
    }
}

bool vmth_bitmap_test(const uint64_t *words, uint64_t page)
{
    return ((words[page / 64] >> (page % 64)) & 1) != 0;
}

/* Word i with everything outside [from, npages) cleared. */
static inline uint64_t word_within(const uint64_t *words, uint64_t i, uint64_t from, uint64_t npages)
{
    uint64_t word = words[i];

    if (i == from / 64) {
        word &= ~low_bits(from % 64);
    }
    if (i == npages / 64) {
        word &= low_bits(npages % 64);
    }
    return word;
}

int vmth_bitmap_runs(const uint64_t *words, uint64_t npages, uint64_t from, struct vmth_run *out,
                     size_t cap, size_t *nruns, uint64_t *resume)
{
    if ((words == NULL && npages > 0) || from > npages || cap == 0) {
        return -EINVAL;
    }
    const struct bitmap_ops *bitmap = kernel_bitmap();
    const uint64_t nwords = VMTH_BITMAP_WORDS(npages);
    const uint64_t whole_end = npages / 64;
    struct run_sink sink = {.out = out, .cap = cap};
    uint64_t i = from / 64;

    *resume = npages;
    while (i < nwords) {
        /* The first and the last word may be partial, and where room is short a word is walked to the
         * last entry: all that is done here, everything else by the kernel. */
        if (!sink_word(&sink, word_within(words, i, from, npages), 64 * i, resume)) {
            break;
        }
        i++;
        if (i < whole_end) {
            i = bitmap->runs(words, i, whole_end, &sink);
        }
    }
    if (sink.open) {
        sink_put(&sink, sink.start, npages);
    }
    *nruns = sink.n;
    return 0;
}

void vmth_bitmap_from_bytes(uint64_t *words, const uint8_t *bytes, uint64_t npages)
{
    const uint64_t whole = npages / 64;

    for (uint64_t i = 0; i < whole; i++) {
        words[i] = load_le64(bytes + 8 * i);
    }
    if (npages % 64 != 0) {
        uint64_t word = 0;

        for (uint64_t at = 0; at < (npages % 64 + 7) / 8; at++) {
            word |= (uint64_t)bytes[8 * whole + at] << (8 * at);
        }
        const uint64_t ours = low_bits(npages % 64);

        words[whole] = (words[whole] & ~ours) | (word & ours);
    }
}

void vmth_bitmap_to_bytes(uint8_t *bytes, const uint64_t *words, uint64_t npages)
{
    const uint64_t whole = npages / 64;

    for (uint64_t i = 0; i < whole; i++) {
        store_le64(bytes + 8 * i, words[i]);
    }
    if (npages % 64 != 0) {
        const uint64_t word = words[whole] & low_bits(npages % 64);

        for (uint64_t at = 0; at < (npages % 64 + 7) / 8; at++) {
            bytes[8 * whole + at] = (uint8_t)(word >> (8 * at));
        }
    }
}
