/* SPDX-License-Identifier: Apache-2.0 */
/* recv(2) as long as something is there, ppoll(2) for a little longer: poll(2) counts milliseconds. */
#define _GNU_SOURCE
#include "sys/sock_take.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <time.h>

enum { NS_PER_S = 1000000000 };

int vmth_sock_wait(int fd, int64_t patience_ns)
{
    const struct timespec patience = {patience_ns / NS_PER_S, patience_ns % NS_PER_S};
    struct pollfd entry = {fd, POLLIN, 0};
    int ready;

    do {
        ready = ppoll(&entry, 1, &patience, NULL);
    } while (ready < 0 && errno == EINTR);
    return ready < 0 ? -errno : ready;
}

int vmth_sock_take(int fd, uint8_t *buffer, size_t nbytes, int64_t patience_ns, size_t *got,
                   bool *ended)
{
    size_t filled = 0;
    bool closed = false;

    while (filled < nbytes && !closed) {
        const ssize_t n = recv(fd, buffer + filled, nbytes - filled, MSG_DONTWAIT);

        if (n >= 0) {
            filled += (size_t)n;
            closed = n == 0;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            const int ready = filled > 0 ? vmth_sock_wait(fd, patience_ns) : 0;

            if (ready < 0) {
                return ready;
            }
            if (ready == 0) {
                break;
            }
        } else if (errno != EINTR) {
            return -errno;
        }
    }
    *got = filled;
    *ended = closed;
    return 0;
}
