/* SPDX-License-Identifier: Apache-2.0 */
/* The kernel's socket calls as an ops table, and reaping MSG_ZEROCOPY completions. */
#include "sys/sock_zerocopy.h"

#include <errno.h>
#include <linux/errqueue.h>
#include <netinet/in.h>
#include <string.h>

static ssize_t system_sendmsg(void *ctx, int fd, const struct msghdr *msg, int flags)
{
    (void)ctx;
    return sendmsg(fd, msg, flags);
}

static ssize_t system_recvmsg(void *ctx, int fd, struct msghdr *msg, int flags)
{
    (void)ctx;
    return recvmsg(fd, msg, flags);
}

static int system_poll(void *ctx, struct pollfd *fds, nfds_t nfds, int timeout_ms)
{
    (void)ctx;
    return poll(fds, nfds, timeout_ms);
}

const struct vmth_sock_ops *vmth_sock_system_ops(void)
{
    static const struct vmth_sock_ops ops = {
        .sendmsg = system_sendmsg,
        .recvmsg = system_recvmsg,
        .poll = system_poll,
        .ctx = NULL,
    };
    return &ops;
}

int vmth_zerocopy_enable(int fd)
{
    int one = 1;
    if (setsockopt(fd, SOL_SOCKET, SO_ZEROCOPY, &one, sizeof(one)) != 0) {
        return -errno;
    }
    return 0;
}

void vmth_zerocopy_sent(struct vmth_zerocopy *zc)
{
    zc->next++;
    zc->outstanding++;
    zc->sends++;
}

/* Calls lo..hi have completed. Both lie among the last `outstanding` numbers or before them where
 * ranges came out of order; all arithmetic is modulo 2^32. */
static int complete(struct vmth_zerocopy *zc, const struct sock_extended_err *err, uint32_t *reaped)
{
    uint32_t lo = err->ee_info;
    uint32_t hi = err->ee_data;
    uint32_t calls = hi - lo + 1;
    if (calls == 0 || calls > zc->outstanding || zc->next - hi - 1 >= UINT32_MAX / 2) {
        return -EPROTO;
    }
    zc->outstanding -= calls;
    *reaped += calls;
    if ((err->ee_code & SO_EE_CODE_ZEROCOPY_COPIED) != 0) {
        zc->copied += calls;
    }
    return 0;
}

static const struct sock_extended_err *zerocopy_error(const struct cmsghdr *cmsg)
{
    bool ip = cmsg->cmsg_level == SOL_IP && cmsg->cmsg_type == IP_RECVERR;
    bool ip6 = cmsg->cmsg_level == SOL_IPV6 && cmsg->cmsg_type == IPV6_RECVERR;
    if (!ip && !ip6) {
        return NULL;
    }
    const struct sock_extended_err *err = (const struct sock_extended_err *)CMSG_DATA(cmsg);
    if (err->ee_origin != SO_EE_ORIGIN_ZEROCOPY || err->ee_errno != 0) {
        return NULL;
    }
    return err;
}

int vmth_zerocopy_reap(const struct vmth_sock_ops *ops, int fd, struct vmth_zerocopy *zc,
                       uint32_t *reaped)
{
    *reaped = 0;
    while (zc->outstanding > 0) {
        union {
            char bytes[CMSG_SPACE(sizeof(struct sock_extended_err) + sizeof(struct sockaddr_in6))];
            struct cmsghdr align;
        } control;
        struct msghdr msg = {.msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)};
        if (ops->recvmsg(ops->ctx, fd, &msg, MSG_ERRQUEUE | MSG_DONTWAIT) < 0) {
            if (errno == EAGAIN || errno == EWOULDBLOCK) {
                return 0;
            }
            if (errno == EINTR) {
                continue;
            }
            return -errno;
        }
        for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg); cmsg != NULL;
             cmsg = CMSG_NXTHDR(&msg, cmsg)) {
            const struct sock_extended_err *err = zerocopy_error(cmsg);
            int result = err == NULL ? 0 : complete(zc, err, reaped);
            if (result != 0) {
                return result;
            }
        }
    }
    return 0;
}
