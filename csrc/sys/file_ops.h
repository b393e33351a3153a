/* SPDX-License-Identifier: Apache-2.0 */
/* Reading files at a place, through an ops table that tests replace. Files are read and never mapped: one
 * that is cut meanwhile gives short reads, where a mapping would raise SIGBUS. */
#ifndef VMTH_SYS_FILE_OPS_H
#define VMTH_SYS_FILE_OPS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "vmth/common.h"

VMTH_BEGIN_DECLS

struct vmth_file_ops {
    /* As pread(2): bytes read, 0 at the end, or -1 with errno. */
    ssize_t (*pread)(int fd, void *buffer, size_t nbytes, off_t offset);
};

/* The kernel's. Static storage. */
const struct vmth_file_ops *vmth_file_system_ops(void);

/* Read `nbytes` at `offset` (their sum at most INT64_MAX). Returns the bytes read, fewer only where the
 * file ends, or a negative errno; `buffer` may then have been written to. Any thread. */
int64_t vmth_file_read_at(const struct vmth_file_ops *ops, int fd, void *buffer, size_t nbytes,
                          uint64_t offset);

VMTH_END_DECLS

#endif
