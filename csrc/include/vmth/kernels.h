/* SPDX-License-Identifier: Apache-2.0 */
/* Which implementation of each kernel family runs: list, select, ask.
 *
 *   family   what it speeds up                         implementations
 *   bitmap   count, merge, runs                        scalar avx2 avx512 neon
 *   zero     zero test, scan, partition                scalar avx2 avx512 neon
 *   hash     page hash, also fused with the zero test  scalar avx2 avx512 neon
 *   delta    the bytes of a page that changed          scalar avx2 avx512 neon
 *   content  cryptographic hash of a page's content    scalar avx2 avx512
 *
 * All implementations of a family give the same answers; the scalar one defines them. Until one is
 * selected a family runs its default: the first that this build has and this CPU can run, in an
 * order that comes from measurement (core/kernel_table.c). A selection holds for this copy of the
 * library (each extension module links its own) and is the core's only mutable state; select before
 * threads use the family, or accept that a call under way finishes with the old one. */
#ifndef VMTH_KERNELS_H
#define VMTH_KERNELS_H

#include "vmth/common.h"

VMTH_BEGIN_DECLS

/* Run `name` for `family` from now on. Returns 0, or, because they need different fixes,
 *   -EINVAL   no such family
 *   -ENOENT   no implementation of that name exists
 *   -ENOSYS   it exists, but not in this build (another architecture's)
 *   -ENOTSUP  it is built, but this CPU cannot run it
 * and then nothing has changed. */
VMTH_MUST_CHECK int vmth_kernel_select(const char *family, const char *name);

/* The name that `family` runs now, or NULL if there is no such family. Static storage. */
const char *vmth_kernel_selected(const char *family);

/* The families: the index-th name, or NULL past the last. Static storage. */
const char *vmth_kernel_family(size_t index);

/* The implementations of `family` that vmth_kernel_select would accept here, the default first: the
 * index-th name, or NULL past the last (or if there is no such family). Static storage. */
const char *vmth_kernel_name(const char *family, size_t index);

VMTH_END_DECLS

#endif
