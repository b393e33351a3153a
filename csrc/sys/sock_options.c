/* SPDX-License-Identifier: Apache-2.0 */
/* Options and statistics of stream sockets. */
#include "sys/sock_options.h"

#include <errno.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>

enum { KEEPALIVE_PROBES = 5, DSCP_MAX = 63 };

static int get_int(int fd, int level, int name, int *value)
{
    socklen_t length = sizeof(*value);
    return getsockopt(fd, level, name, value, &length) == 0 ? 0 : -errno;
}

static int set_int(int fd, int level, int name, int value)
{
    return setsockopt(fd, level, name, &value, sizeof(value)) == 0 ? 0 : -errno;
}

static bool is_tcp(int fd)
{
    int protocol = 0;
    return get_int(fd, SOL_SOCKET, SO_PROTOCOL, &protocol) == 0 && protocol == IPPROTO_TCP;
}

int vmth_sock_check_stream(int fd, bool *tcp)
{
    int type = 0;
    int result = get_int(fd, SOL_SOCKET, SO_TYPE, &type);
    if (result != 0) {
        return result;
    }
    if (type != SOCK_STREAM) {
        return -EPROTOTYPE;
    }
    struct sockaddr_storage peer;
    socklen_t length = sizeof(peer);
    if (getpeername(fd, (struct sockaddr *)&peer, &length) != 0) {
        return -errno;
    }
    *tcp = is_tcp(fd);
    return 0;
}

static int set_dscp(int fd, int dscp)
{
    int domain = 0;
    int result = get_int(fd, SOL_SOCKET, SO_DOMAIN, &domain);
    if (result != 0) {
        return result;
    }
    /* The two low bits of the traffic class are the kernel's (ECN). */
    if (domain == AF_INET6) {
        return set_int(fd, IPPROTO_IPV6, IPV6_TCLASS, dscp << 2);
    }
    return set_int(fd, IPPROTO_IP, IP_TOS, dscp << 2);
}

struct setting {
    const char *name;
    int level;
    int option;
    int value; /* 0: leave */
};

static int apply(int fd, const struct setting *settings, size_t n, const char **option)
{
    for (size_t i = 0; i < n; i++) {
        if (settings[i].value == 0) {
            continue;
        }
        *option = settings[i].name;
        int result = set_int(fd, settings[i].level, settings[i].option, settings[i].value);
        if (result != 0) {
            return result;
        }
    }
    return 0;
}

static int check_ranges(const struct vmth_sock_options *options, const char **option)
{
    *option = "dscp";
    if (options->dscp < -1 || options->dscp > DSCP_MAX) {
        return -EINVAL;
    }
    *option = "keepalive_s";
    if (options->keepalive_s < 0 || options->keepalive_s > 32767) {
        return -EINVAL;
    }
    *option = "user_timeout_ms";
    if (options->user_timeout_ms < 0) {
        return -EINVAL;
    }
    *option = "send_buffer_bytes";
    if (options->send_buffer_bytes < 0) {
        return -EINVAL;
    }
    *option = "receive_buffer_bytes";
    return options->receive_buffer_bytes < 0 ? -EINVAL : 0;
}

int vmth_sock_set_options(int fd, const struct vmth_sock_options *options, const char **option)
{
    int result = check_ranges(options, option);
    if (result != 0) {
        return result;
    }
    const struct setting any[] = {
        {"send_buffer_bytes", SOL_SOCKET, SO_SNDBUF, options->send_buffer_bytes},
        {"receive_buffer_bytes", SOL_SOCKET, SO_RCVBUF, options->receive_buffer_bytes},
    };
    result = apply(fd, any, sizeof(any) / sizeof(any[0]), option);
    if (result != 0 || !is_tcp(fd)) {
        return result;
    }
    int interval_s = options->keepalive_s / KEEPALIVE_PROBES;
    if (options->keepalive_s > 0 && interval_s == 0) {
        interval_s = 1;
    }
    const struct setting tcp[] = {
        {"nodelay", IPPROTO_TCP, TCP_NODELAY, 1},
        {"keepalive_s", SOL_SOCKET, SO_KEEPALIVE, options->keepalive_s > 0 ? 1 : 0},
        {"keepalive_s", IPPROTO_TCP, TCP_KEEPIDLE, options->keepalive_s},
        {"keepalive_s", IPPROTO_TCP, TCP_KEEPINTVL, interval_s},
        {"keepalive_s", IPPROTO_TCP, TCP_KEEPCNT, options->keepalive_s > 0 ? KEEPALIVE_PROBES : 0},
        {"user_timeout_ms", IPPROTO_TCP, TCP_USER_TIMEOUT, options->user_timeout_ms},
    };
    result = apply(fd, tcp, sizeof(tcp) / sizeof(tcp[0]), option);
    if (result != 0 || options->dscp < 0) {
        return result;
    }
    *option = "dscp";
    return set_dscp(fd, options->dscp);
}

int vmth_sock_get_info(int fd, struct vmth_sock_info *info)
{
    struct tcp_info tcp;
    memset(&tcp, 0, sizeof(tcp));
    memset(info, 0, sizeof(*info));
    if (!is_tcp(fd)) {
        int type = 0;
        return get_int(fd, SOL_SOCKET, SO_TYPE, &type);
    }
    socklen_t length = sizeof(tcp);
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &tcp, &length) != 0) {
        return -errno;
    }
    info->tcp = true;
    info->rtt_ns = (uint64_t)tcp.tcpi_rtt * 1000;
    info->base_rtt_ns = tcp.tcpi_min_rtt == UINT32_MAX ? 0 : (uint64_t)tcp.tcpi_min_rtt * 1000;
    info->rttvar_ns = (uint64_t)tcp.tcpi_rttvar * 1000;
    info->retransmits = tcp.tcpi_total_retrans;
    info->path_mtu = tcp.tcpi_pmtu;
    info->congestion_window = tcp.tcpi_snd_cwnd;
    info->delivery_bps = tcp.tcpi_delivery_rate;
    info->busy_ns = tcp.tcpi_busy_time * 1000;
    info->peer_full_ns = tcp.tcpi_rwnd_limited * 1000;
    return 0;
}
