/* SPDX-License-Identifier: Apache-2.0 */
/* The system calls that memory tracking makes, as a table that a test can replace.
 *
 * Every hook returns what the call returns, or a negative errno; none touches `errno`. `self` is
 * the table itself, so that a fake can stand at the head of a larger struct and keep its state
 * there. */
#ifndef VMTH_SYS_MEMORY_OPS_H
#define VMTH_SYS_MEMORY_OPS_H

#include <stdint.h>

#include "vmth/common.h"

VMTH_BEGIN_DECLS

struct vmth_memory_ops {
    /* Open `path` with `flags`; the caller closes the descriptor it gets. */
    int (*open)(const struct vmth_memory_ops *self, const char *path, int flags);
    int (*close)(const struct vmth_memory_ops *self, int fd);
    /* `arg` is a struct of the request's type, or an integer where the request takes one. */
    int64_t (*ioctl)(const struct vmth_memory_ops *self, int fd, unsigned long request, void *arg);
    /* userfaultfd(2); the caller closes the descriptor it gets. */
    int (*userfaultfd)(const struct vmth_memory_ops *self, int flags);
    /* lseek(2); the callers here only use SEEK_DATA and SEEK_HOLE. */
    int64_t (*lseek)(const struct vmth_memory_ops *self, int fd, int64_t offset, int whence);
    /* cachestat(2) (Linux 6.5): how many pages of bytes [offset, + nbytes) the file holds, in the page
     * cache or swapped out. */
    int64_t (*cached_pages)(const struct vmth_memory_ops *self, int fd, uint64_t offset,
                            uint64_t nbytes);
    /* fstat(2): how long the file is, and how many bytes its file system has allocated for it. */
    int (*file_bytes)(const struct vmth_memory_ops *self, int fd, uint64_t *nbytes,
                      uint64_t *allocated);
    /* fstatfs(2): *magic gets the type of the file system that holds `fd`. */
    int (*fs_magic)(const struct vmth_memory_ops *self, int fd, uint64_t *magic);
};

/* The table that calls the kernel. Immutable, lives for ever. */
const struct vmth_memory_ops *vmth_memory_ops_kernel(void);

VMTH_END_DECLS

#endif
