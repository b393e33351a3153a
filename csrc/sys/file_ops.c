/* SPDX-License-Identifier: Apache-2.0 */
/* pread and pwrite until all is done or no more can be. */
#include "sys/file_ops.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

const struct vmth_file_ops *vmth_file_system_ops(void)
{
    static const struct vmth_file_ops ops = {pread, pwrite};

    return &ops;
}

int64_t vmth_file_read_at(const struct vmth_file_ops *ops, int fd, void *buffer, size_t nbytes,
                          uint64_t offset)
{
    size_t done = 0;

    if (offset > INT64_MAX || nbytes > INT64_MAX - offset) {
        return -EINVAL;
    }
    while (done < nbytes) {
        const ssize_t got = ops->pread(fd, (uint8_t *)buffer + done, nbytes - done,
                                       (off_t)(offset + done));

        if (got == 0) {
            break;
        }
        if (got > 0) {
            done += (size_t)got;
        } else if (errno != EINTR) {
            return -errno;
        }
    }
    return (int64_t)done;
}

int vmth_file_write_at(const struct vmth_file_ops *ops, int fd, const void *buffer, size_t nbytes,
                       uint64_t offset)
{
    size_t done = 0;

    if (offset > INT64_MAX || nbytes > INT64_MAX - offset) {
        return -EINVAL;
    }
    while (done < nbytes) {
        const ssize_t put = ops->pwrite(fd, (const uint8_t *)buffer + done, nbytes - done,
                                        (off_t)(offset + done));

        if (put == 0) {
            return -EIO;
        }
        if (put > 0) {
            done += (size_t)put;
        } else if (errno != EINTR) {
            return -errno;
        }
    }
    return 0;
}

int vmth_file_writes_at(int fd)
{
    const int flags = fcntl(fd, F_GETFL);

    if (flags < 0) {
        return -errno;
    }
    if ((flags & O_ACCMODE) != O_WRONLY && (flags & O_ACCMODE) != O_RDWR) {
        return -EBADF;
    }
    return (flags & O_APPEND) != 0 ? -EINVAL : 0;
}
