/* SPDX-License-Identifier: Apache-2.0 */
/* The kernel's side of the memory-tracking system calls. */
#define _GNU_SOURCE
#include "sys/memory_ops.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

static int kernel_open(const struct vmth_memory_ops *self, const char *path, int flags)
{
    int fd = open(path, flags);

    (void)self;
    return fd < 0 ? -errno : fd;
}

static int kernel_close(const struct vmth_memory_ops *self, int fd)
{
    (void)self;
    return close(fd) < 0 ? -errno : 0;
}

static int64_t kernel_ioctl(const struct vmth_memory_ops *self, int fd, unsigned long request,
                            void *arg)
{
    int result = ioctl(fd, request, arg);

    (void)self;
    return result < 0 ? -errno : result;
}

static int kernel_userfaultfd(const struct vmth_memory_ops *self, int flags)
{
    long fd = syscall(SYS_userfaultfd, flags);

    (void)self;
    return fd < 0 ? -errno : (int)fd;
}

static int64_t kernel_lseek(const struct vmth_memory_ops *self, int fd, int64_t offset, int whence)
{
    off_t result = lseek(fd, (off_t)offset, whence);

    (void)self;
    return result < 0 ? -errno : (int64_t)result;
}

#if !defined(SYS_cachestat) && !defined(__alpha__) && !defined(__mips__)
#define SYS_cachestat 451 /* a header older than the call */
#endif

/* The structs of linux/mman.h, which older headers do not have. */
struct cachestat_query {
    uint64_t offset;
    uint64_t nbytes;
};

struct cachestat_answer {
    uint64_t cached;
    uint64_t dirty;
    uint64_t writeback;
    uint64_t evicted;
    uint64_t recently_evicted;
};

static int64_t kernel_cached_pages(const struct vmth_memory_ops *self, int fd, uint64_t offset,
                                   uint64_t nbytes)
{
    struct cachestat_query query = {.offset = offset, .nbytes = nbytes};
    struct cachestat_answer answer = {0};
#ifdef SYS_cachestat
    long result = syscall(SYS_cachestat, fd, &query, &answer, 0);
#else
    long result = -1;

    errno = ENOSYS;
#endif
    (void)self;
    /* A swapped page of tmpfs counts as evicted. */
    return result < 0 ? -errno : (int64_t)(answer.cached + answer.evicted);
}

static int kernel_file_bytes(const struct vmth_memory_ops *self, int fd, uint64_t *nbytes,
                             uint64_t *allocated)
{
    struct stat info;

    (void)self;
    if (fstat(fd, &info) < 0) {
        return -errno;
    }
    *nbytes = (uint64_t)info.st_size;
    *allocated = (uint64_t)info.st_blocks * 512; /* whatever st_blksize is: stat(3type) */
    return 0;
}

static int kernel_fs_magic(const struct vmth_memory_ops *self, int fd, uint64_t *magic)
{
    struct statfs info;

    (void)self;
    if (fstatfs(fd, &info) < 0) {
        return -errno;
    }
    /* f_type is signed in some ABIs; the magic numbers are 32 bits wide. */
    *magic = (uint32_t)info.f_type;
    return 0;
}

const struct vmth_memory_ops *vmth_memory_ops_kernel(void)
{
    static const struct vmth_memory_ops kernel = {
        .open = kernel_open,
        .close = kernel_close,
        .ioctl = kernel_ioctl,
        .userfaultfd = kernel_userfaultfd,
        .lseek = kernel_lseek,
        .cached_pages = kernel_cached_pages,
        .file_bytes = kernel_file_bytes,
        .fs_magic = kernel_fs_magic,
    };

    return &kernel;
}
