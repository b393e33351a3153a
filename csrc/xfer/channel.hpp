// SPDX-License-Identifier: Apache-2.0
// One connected stream socket: whole reads and writes of vectors, and a shutdown that wakes both.
//
// One thread reads and one writes at a time; shutdown() comes from any. Works on blocking and on
// non-blocking descriptors (the flag is shared with whoever holds the original).
#ifndef VMTH_XFER_CHANNEL_HPP
#define VMTH_XFER_CHANNEL_HPP

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "sys/sock_zerocopy.h"
#include "xfer/failure.hpp"
#include "xfer/unique_fd.hpp"

namespace vmth {

class Channel {
public:
    // Throws TransferError(usage) unless `fd` is a connected stream socket; duplicates it. `name` is what
    // errors call it; empty: "channel <index>".
    Channel(int fd, unsigned index, const vmth_sock_ops *ops, std::string name = {});

    unsigned index() const noexcept { return index_; }
    int fd() const noexcept { return fd_.get(); }
    bool tcp() const noexcept { return tcp_; }
    const vmth_sock_ops &ops() const noexcept { return *ops_; }
    const std::string &name() const noexcept { return name_; }

    // Fill the vectors wholly (they are consumed). `before_block`, if not empty, is called once, just
    // before the call would have to wait for the peer. Returns false at an end of stream before the
    // first byte; throws on one inside, and on any error.
    bool read_vec(iovec *iov, size_t count, const std::function<void()> &before_block = {});
    bool read(void *buffer, size_t nbytes, const std::function<void()> &before_block = {});

    // Send the vectors wholly (they are consumed), whatever the socket takes at a time.
    void write_vec(iovec *iov, size_t count, int flags = 0);

    // One sendmsg of as many vectors as the kernel takes. Returns bytes taken (> 0), or 0 if it would
    // block or was interrupted; -ENOBUFS is returned, other errors are thrown.
    ssize_t write_some(const iovec *iov, size_t count, int flags);

    // Wait for any of `events`, at most `timeout_ms` (-1: for ever). Returns revents, 0 at the timeout.
    short wait(short events, int timeout_ms);

    void shutdown() noexcept;       // both directions; wakes blocked calls
    void shutdown_read() noexcept;  // wakes a blocked read only

private:
    void wait_readable();

    UniqueFd fd_;
    unsigned index_;
    const vmth_sock_ops *ops_;
    bool tcp_ = false;
    std::string name_;
};

// Drop the first `nbytes` of a vector list; returns how many entries are used up.
size_t advance(iovec *iov, size_t count, size_t nbytes) noexcept;

}  // namespace vmth

#endif
