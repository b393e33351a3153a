/* SPDX-License-Identifier: Apache-2.0 */
/* The delta of a page: the bytes that differ from what landed before, and where they stand.
 *
 *   base    a a a a a a a a a a a a a a a a a a a
 *   now     a a a X Y a a a a a a Z a a a a a a a
 *   delta   |skip 3|length 2|X Y|skip 6|length 1|Z|
 *
 * `skip` counts unchanged bytes since the end of the last run, `length` the changed bytes that follow;
 * both are LEB128 (seven bits a byte, the lowest first, the top bit says that more follow), in at most
 * 4 bytes. The bytes are the new ones themselves, so a delta applied twice does no harm. Unchanged
 * bytes that are fewer than VMTH_DELTA_MIN_SKIP between two changes count as changed: a run of its
 * own would cost as much. What follows the last run is unchanged.
 *
 * Pure: no allocation, no I/O, no locks; callers own every buffer. Kernel family "delta". */
#ifndef VMTH_DELTA_H
#define VMTH_DELTA_H

#include "vmth/common.h"

VMTH_BEGIN_DECLS

#define VMTH_DELTA_MIN_SKIP 3u

/* Write the delta that makes `now` of `base` (page_bytes each) to out[0, room); *nbytes gets its size, 0
 * if the pages are equal. Returns 0; -ENOSPC if it takes more than `room`, which should be what still
 * pays: `out` then holds nothing of meaning; -EINVAL for a page size that is no power of two from 4096
 * to 2 MiB. `now` must not change meanwhile. */
VMTH_MUST_CHECK int vmth_delta_encode(const uint8_t *base, const uint8_t *now, size_t page_bytes,
                                      uint8_t *out, size_t room, size_t *nbytes);

/* Overwrite in `page`, which holds the base, what delta[0, nbytes) says; the delta comes from the peer.
 * Returns 0, or -EPROTO if a number is cut short, too long or leads outside the page or the delta, or a
 * run is empty; the page then holds some of the changes. Whether the result is right only its hash can
 * tell. */
VMTH_MUST_CHECK int vmth_delta_apply(uint8_t *page, size_t page_bytes, const uint8_t *delta,
                                     size_t nbytes);

VMTH_END_DECLS

#endif
