// SPDX-License-Identifier: Apache-2.0
// Whole reads and writes on one stream socket.
#include "xfer/channel.hpp"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <thread>
#include <utility>

#include "sys/sock_options.h"

namespace vmth {

namespace {

constexpr size_t max_vectors = IOV_MAX;
constexpr std::chrono::milliseconds error_queue_pause{1};

}  // namespace

size_t advance(iovec *iov, size_t count, size_t nbytes) noexcept
{
    size_t used = 0;
    while (used < count && nbytes >= iov[used].iov_len) {
        nbytes -= iov[used].iov_len;
        used++;
    }
    if (used < count) {
        iov[used].iov_base = static_cast<uint8_t *>(iov[used].iov_base) + nbytes;
        iov[used].iov_len -= nbytes;
    }
    return used;
}

Channel::Channel(int fd, unsigned index, const vmth_sock_ops *ops, std::string name)
    : index_(index), ops_(ops),
      name_(name.empty() ? "channel " + std::to_string(index) : std::move(name))
{
    int result = vmth_sock_check_stream(fd, &tcp_);
    if (result != 0) {
        throw TransferError(ErrorKind::usage,
                            name_ + ": fd " + std::to_string(fd) + " is no connected stream socket",
                            -result);
    }
    fd_ = UniqueFd::duplicate(fd);
    if (!fd_) {
        throw system_error(name_ + ": dup", errno);
    }
}

bool Channel::read(void *buffer, size_t nbytes, const std::function<void()> &before_block)
{
    iovec iov = {buffer, nbytes};
    return read_vec(&iov, 1, before_block);
}

bool Channel::read_vec(iovec *iov, size_t count, const std::function<void()> &before_block)
{
    bool ask = static_cast<bool>(before_block);
    bool started = false;
    while (count > 0) {
        msghdr msg = {};
        msg.msg_iov = iov;
        msg.msg_iovlen = std::min(count, max_vectors);
        ssize_t got = ops_->recvmsg(ops_->ctx, fd_.get(), &msg, ask ? MSG_DONTWAIT : MSG_WAITALL);
        if (got > 0) {
            started = true;
            size_t used = advance(iov, count, static_cast<size_t>(got));
            iov += used;
            count -= used;
        } else if (got == 0) {
            if (!started) {
                return false;
            }
            throw TransferError(ErrorKind::closed,
                                name_ + ": the peer closed the connection inside a packet");
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            if (ask) {
                before_block();
                ask = false;
            } else {
                wait_readable();
            }
        } else if (errno != EINTR) {
            throw system_error(name_ + ": receive", errno);
        }
    }
    return true;
}

ssize_t Channel::write_some(const iovec *iov, size_t count, int flags)
{
    msghdr msg = {};
    msg.msg_iov = const_cast<iovec *>(iov);  // sendmsg does not write through it
    msg.msg_iovlen = std::min(count, max_vectors);
    ssize_t sent = ops_->sendmsg(ops_->ctx, fd_.get(), &msg, flags | MSG_NOSIGNAL);
    if (sent >= 0) {
        return sent;
    }
    if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) {
        return 0;
    }
    if (errno == ENOBUFS) {
        return -ENOBUFS;
    }
    throw system_error(name_ + ": send", errno);
}

void Channel::write_vec(iovec *iov, size_t count, int flags)
{
    while (count > 0) {
        ssize_t sent = write_some(iov, count, flags);
        if (sent > 0) {
            size_t used = advance(iov, count, static_cast<size_t>(sent));
            iov += used;
            count -= used;
        } else if (sent == 0) {
            wait(POLLOUT, -1);
        } else {
            throw system_error(name_ + ": send", static_cast<int>(-sent));
        }
    }
}

short Channel::wait(short events, int timeout_ms)
{
    pollfd entry = {fd_.get(), events, 0};
    int ready = ops_->poll(ops_->ctx, &entry, 1, timeout_ms);
    if (ready < 0 && errno != EINTR) {
        throw system_error(name_ + ": poll", errno);
    }
    return ready > 0 ? entry.revents : static_cast<short>(0);
}

// Zero-copy completions in the error queue raise POLLERR until the sending thread takes them, so a
// reader that only asked poll() again would spin.
void Channel::wait_readable()
{
    short got = wait(POLLIN, -1);
    if ((got & POLLERR) != 0 && (got & (POLLIN | POLLHUP)) == 0) {
        std::this_thread::sleep_for(error_queue_pause);
    }
}

void Channel::shutdown() noexcept
{
    ::shutdown(fd_.get(), SHUT_RDWR);
}

void Channel::shutdown_read() noexcept
{
    ::shutdown(fd_.get(), SHUT_RD);
}

}  // namespace vmth
