/* SPDX-License-Identifier: Apache-2.0 */
/* What a destination has, in some 18 bits a page: parts of a set of fingerprints on the wire.
 *
 *   content hash     | fingerprint: the first `bits` of lo | ...
 *   the set, sorted    f0 < f1 < f2 < ...
 *   a part             base = f0 | low 16 bits of gap 1, of gap 2, ... | high parts, unary |
 *
 * Gap i is f(i) - f(i - 1) - 1. A high part h is h one bits and a zero bit, least significant bit of
 * each byte first; the last byte is filled with zeros. With bits = 16 + log2 of the entries a page that
 * is not in the set looks as if it were once in 65536 times. Parts stand for themselves.
 *
 * Decoding trusts nothing. Pure: no allocation, no I/O, no locks; callers own every buffer. */
#ifndef VMTH_CONTENT_FILTER_H
#define VMTH_CONTENT_FILTER_H

#include "vmth/common.h"

VMTH_BEGIN_DECLS

#define VMTH_FILTER_MIN_BITS 20u
#define VMTH_FILTER_MAX_ENTRIES (UINT64_C(1) << 26) /* 256 GiB of 4 KiB pages */
#define VMTH_FILTER_PART_ENTRIES 16384u
#define VMTH_FILTER_PART_BYTES 61440u

/* The fingerprints' width for a set of up to `entries`: 16 + log2, rounded up, at least the minimum. */
unsigned vmth_filter_bits(uint64_t entries);

/* Put as many of the n > 0 strictly rising fingerprints as fit into one part, whose base is the first.
 * `out` has room for VMTH_FILTER_PART_BYTES; *nbytes gets the length. Returns how many: at least one. */
size_t vmth_filter_encode(const uint64_t *prints, size_t n, uint8_t *out, size_t *nbytes);

/* The `count` fingerprints of a part, strictly rising, into `prints`. Returns 0, or -EPROTO if count is 0
 * or over VMTH_FILTER_PART_ENTRIES, a fingerprint does not fit `bits` (at most 48), or the part is not
 * exactly `nbytes` long; then `prints` holds nothing of meaning. */
VMTH_MUST_CHECK int vmth_filter_decode(uint64_t base, size_t count, const uint8_t *data,
                                       size_t nbytes, unsigned bits, uint64_t *prints);

VMTH_END_DECLS

#endif
