// SPDX-License-Identifier: Apache-2.0
// Error kinds, their messages, and the latch of the first failure.
#include "xfer/failure.hpp"

#include <cerrno>
#include <cstring>

namespace vmth {

const char *kind_name(ErrorKind kind) noexcept
{
    switch (kind) {
    case ErrorKind::closed:
        return "closed";
    case ErrorKind::io:
        return "io";
    case ErrorKind::protocol:
        return "protocol";
    case ErrorKind::timeout:
        return "timeout";
    case ErrorKind::cancelled:
        return "cancelled";
    case ErrorKind::usage:
        return "usage";
    }
    return "io";
}

TransferError packet_error(const std::string &where, const vmth_packet_error &error)
{
    return TransferError(ErrorKind::protocol, where + ": received " +
                                                  (error.field == nullptr ? "field" : error.field) +
                                                  " " + std::to_string(error.received) +
                                                  ", allowed " + std::to_string(error.allowed));
}

TransferError system_error(const std::string &what, int error)
{
    ErrorKind kind = ErrorKind::io;
    if (error == EPIPE || error == ECONNRESET || error == ECONNABORTED) {
        kind = ErrorKind::closed;
    } else if (error == ETIMEDOUT) {
        kind = ErrorKind::timeout;
    }
    char text[128];
    return TransferError(kind, what + ": " + strerror_r(error, text, sizeof(text)), error);
}

bool FailureLatch::set(const TransferError &error)
{
    std::lock_guard<std::mutex> lock(mutex_);
    if (first_) {
        return false;
    }
    first_.emplace(error);
    failed_.store(true, std::memory_order_release);
    return true;
}

void FailureLatch::check() const
{
    if (!failed()) {
        return;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    throw TransferError(*first_);
}

}  // namespace vmth
