/* SPDX-License-Identifier: Apache-2.0 */
/* Reading and writing files at a place, through an ops table that tests replace.
 *
 * Files that are only read are never mapped: one that is cut meanwhile gives short reads, where a mapping
 * would raise SIGBUS. Shared memory that is mapped is written to as well: the kernel does not clear a page
 * that a write fills, as it does at a fault. */
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
    /* As pwrite(2): bytes written, or -1 with errno. */
    ssize_t (*pwrite)(int fd, const void *buffer, size_t nbytes, off_t offset);
};

/* The kernel's. Static storage. */
const struct vmth_file_ops *vmth_file_system_ops(void);

/* Read `nbytes` at `offset` (their sum at most INT64_MAX). Returns the bytes read, fewer only where the
 * file ends, or a negative errno; `buffer` may then have been written to. Any thread. */
int64_t vmth_file_read_at(const struct vmth_file_ops *ops, int fd, void *buffer, size_t nbytes,
                          uint64_t offset);

/* Write `nbytes` at `offset` (their sum at most INT64_MAX). Returns 0, or a negative errno: an unknown part
 * of them may then have been written. -EIO also where the file takes nothing and says nothing. Any
 * thread. */
VMTH_MUST_CHECK int vmth_file_write_at(const struct vmth_file_ops *ops, int fd, const void *buffer,
                                       size_t nbytes, uint64_t offset);

/* Can `fd` be written to at a place? 0, -EBADF (not open, or not for writing) or -EINVAL (O_APPEND: Linux
 * would write at the file's end, whatever the place). */
VMTH_MUST_CHECK int vmth_file_writes_at(int fd);

VMTH_END_DECLS

#endif
