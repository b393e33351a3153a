/* SPDX-License-Identifier: Apache-2.0 */
/* Dirty bitmaps: count, merge, fetch-and-clear, runs.
 *
 * Bit b of word w is page 64*w + b of one ramblock (LSB first, the order KVM reports; QEMU's
 * recv-bitmaps are the same bits as little-endian bytes, so on a little-endian host the layouts
 * are one; vmth_bitmap_from_bytes reads either on any host).
 *
 *   word 0 (bit 0 on the left):  0 0 1 1 1 0 ... 1     word 1:  1 0 ...
 *   runs:                            {2,3}      {63,2}  <- a run may cross words
 *
 * Pure: no allocation, no I/O; callers own every buffer. Bits at or past `npages` are ignored on
 * reading and left alone on writing, even if set. */
#ifndef VMTH_BITMAP_H
#define VMTH_BITMAP_H

#include <stdbool.h>

#include "vmth/common.h"

VMTH_BEGIN_DECLS

#define VMTH_BITMAP_WORDS(npages) (((uint64_t)(npages) + 63) / 64)

/* Set bits among pages [from, from + n). */
uint64_t vmth_bitmap_count(const uint64_t *words, uint64_t from, uint64_t n);

/* into |= from, for npages. Returns how many bits became set that were not. */
uint64_t vmth_bitmap_merge(uint64_t *into, const uint64_t *from, uint64_t npages);

/* into |= live; live = 0, each word exchanged atomically, so that a writer that sets bits in `live`
 * with atomic OR loses none. Returns the bits fetched. */
uint64_t vmth_bitmap_fetch_and_clear(uint64_t *live, uint64_t *into, uint64_t npages);

void vmth_bitmap_set_range(uint64_t *words, uint64_t page, uint64_t npages);
void vmth_bitmap_clear_range(uint64_t *words, uint64_t page, uint64_t npages);
bool vmth_bitmap_test(const uint64_t *words, uint64_t page);

/* Write at most `cap` runs of set bits in page order, from page `from`; *nruns is the number written
 * and *resume the first page not examined (== npages when done). A run that meets the end of room is
 * not split: it is reported whole or left for the next call. Entries of `out` past *nruns hold nothing
 * of meaning afterwards. Returns 0, or -EINVAL if words is NULL while npages > 0, or from > npages, or
 * cap is 0. */
VMTH_MUST_CHECK int vmth_bitmap_runs(const uint64_t *words, uint64_t npages, uint64_t from,
                                     struct vmth_run *out, size_t cap, size_t *nruns,
                                     uint64_t *resume);

/* Little-endian bytes (QEMU's RECV_BITMAP, our wire) to words and back. */
void vmth_bitmap_from_bytes(uint64_t *words, const uint8_t *bytes, uint64_t npages);
void vmth_bitmap_to_bytes(uint8_t *bytes, const uint64_t *words, uint64_t npages);

VMTH_END_DECLS

#endif
