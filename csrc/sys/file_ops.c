/* SPDX-License-Identifier: Apache-2.0 */
/* pread until all is there or the file ends. */
#include "sys/file_ops.h"

#include <errno.h>
#include <unistd.h>

const struct vmth_file_ops *vmth_file_system_ops(void)
{
    static const struct vmth_file_ops ops = {pread};

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
