/* SPDX-License-Identifier: Apache-2.0 */
/* Socket calls behind an ops table, and the bookkeeping of MSG_ZEROCOPY completions.
 *
 *   sends        #0 #1 #2 #3 #4 #5        every successful MSG_ZEROCOPY call takes the next u32
 *   completions  [0,1]      [4,5]  [2,3]  inclusive ranges, in any order, wrapping at 2^32
 *   outstanding   6 -> 4     -> 2   -> 0  the pages of these calls must stay mapped
 *
 * A completion means that the kernel no longer reads the pages, not that the peer has them. Tests
 * replace the ops table to make short sends, EAGAIN, ENOBUFS and completions that never come. */
#ifndef VMTH_SYS_SOCK_ZEROCOPY_H
#define VMTH_SYS_SOCK_ZEROCOPY_H

#include <poll.h>
#include <stdbool.h>
#include <sys/socket.h>
#include <sys/types.h>

#include "vmth/common.h"

VMTH_BEGIN_DECLS

/* Each hook has the contract of the system call of its name (-1 and errno). */
struct vmth_sock_ops {
    /* Any thread; the channel adds MSG_NOSIGNAL itself. */
    ssize_t (*sendmsg)(void *ctx, int fd, const struct msghdr *msg, int flags);
    /* Payload and, with MSG_ERRQUEUE, completions. */
    ssize_t (*recvmsg)(void *ctx, int fd, struct msghdr *msg, int flags);
    int (*poll)(void *ctx, struct pollfd *fds, nfds_t nfds, int timeout_ms);
    void *ctx; /* handed to every hook; owned by whoever filled the table */
};

/* The kernel's own calls. Static storage, read-only. */
const struct vmth_sock_ops *vmth_sock_system_ops(void);

/* Owned by one sending thread. */
struct vmth_zerocopy {
    uint32_t next;        /* number of the next call */
    uint32_t outstanding; /* calls whose completion has not been seen */
    uint64_t sends;
    uint64_t copied;      /* completed calls that the kernel served with a copy after all */
};

/* Set SO_ZEROCOPY. Returns 0, or a negative errno where this kind of socket cannot. */
VMTH_MUST_CHECK int vmth_zerocopy_enable(int fd);

/* Count one successful MSG_ZEROCOPY call. */
void vmth_zerocopy_sent(struct vmth_zerocopy *zc);

/* Take every completion that has arrived; never blocks. *reaped gets the calls completed. Returns 0,
 * -EPROTO for a completion of calls that were not made, or a negative errno of recvmsg. */
VMTH_MUST_CHECK int vmth_zerocopy_reap(const struct vmth_sock_ops *ops, int fd,
                                       struct vmth_zerocopy *zc, uint32_t *reaped);

VMTH_END_DECLS

#endif
