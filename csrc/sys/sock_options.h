/* SPDX-License-Identifier: Apache-2.0 */
/* Options and statistics of stream sockets: DSCP, keepalive, timeouts, buffers, TCP_INFO.
 *
 * TCP and unix stream sockets share the calls: what a unix socket does not have is skipped. */
#ifndef VMTH_SYS_SOCK_OPTIONS_H
#define VMTH_SYS_SOCK_OPTIONS_H

#include <stdbool.h>

#include "vmth/common.h"

VMTH_BEGIN_DECLS

struct vmth_sock_options {
    int dscp;                 /* 0 to 63; -1: leave */
    int keepalive_s;          /* idle seconds before the first probe; 0: leave */
    int user_timeout_ms;      /* unacknowledged data ends the connection; 0: leave */
    int send_buffer_bytes;    /* 0: leave (the kernel tunes it) */
    int receive_buffer_bytes; /* 0: leave */
};

/* Statistics of a connection; zeros where the socket is not TCP. */
struct vmth_sock_info {
    bool tcp;
    uint64_t rtt_ns;      /* smoothed */
    uint64_t base_rtt_ns; /* the least of the last minutes, as with empty queues; 0: none measured */
    uint64_t rttvar_ns;
    uint64_t retransmits; /* segments, over the life of the connection */
    uint32_t path_mtu;
    uint32_t congestion_window; /* segments */
    uint64_t delivery_bps;      /* bytes/s, the kernel's estimate */
    uint64_t busy_ns;           /* with bytes to send or unacknowledged, over its life */
    uint64_t peer_full_ns;      /* of that: the peer's receive window was the limit */
};

/* Is it a connected stream socket? 0, -ENOTSOCK, -EPROTOTYPE for another type, -ENOTCONN. */
VMTH_MUST_CHECK int vmth_sock_check_stream(int fd, bool *tcp);

/* TCP_NODELAY is always set on TCP. Returns 0, -EINVAL for a value outside its range (*option names
 * it), or the errno of the option that failed, named as well. Options before it stay set. */
VMTH_MUST_CHECK int vmth_sock_set_options(int fd, const struct vmth_sock_options *options,
                                          const char **option);

VMTH_MUST_CHECK int vmth_sock_get_info(int fd, struct vmth_sock_info *info);

VMTH_END_DECLS

#endif
