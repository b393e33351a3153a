/* SPDX-License-Identifier: Apache-2.0 */
/* What every vmth header shares: the run, the result convention, the check attribute.
 *
 * Functions return 0 or a negative errno and write results through out-pointers that stay
 * untouched on error; functions that cannot fail return their value. Nothing here allocates. */
#ifndef VMTH_COMMON_H
#define VMTH_COMMON_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
#define VMTH_BEGIN_DECLS extern "C" {
#define VMTH_END_DECLS }
#else
#define VMTH_BEGIN_DECLS
#define VMTH_END_DECLS
#endif

#define VMTH_MUST_CHECK __attribute__((warn_unused_result))

/* A maximal stretch of pages of one ramblock: pages [page, page + npages). */
struct vmth_run {
    uint64_t page;
    uint64_t npages;
};

/* 128-bit value in two little-endian halves: a page hash or a digest. */
struct vmth_u128 {
    uint64_t lo;
    uint64_t hi;
};

#endif
