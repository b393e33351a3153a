// SPDX-License-Identifier: Apache-2.0
// What can go wrong on a page channel, and the latch that keeps the first failure of an end.
#ifndef VMTH_XFER_FAILURE_HPP
#define VMTH_XFER_FAILURE_HPP

#include <atomic>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

#include "vmth/packet.h"

namespace vmth {

enum class ErrorKind {
    closed,     // the peer went away
    io,         // a system call failed
    protocol,   // the peer sent what the protocol does not allow
    timeout,    // the connection or the kernel went silent
    cancelled,  // by our caller
    usage,      // our caller's mistake
};

const char *kind_name(ErrorKind kind) noexcept;

class TransferError : public std::runtime_error {
public:
    TransferError(ErrorKind kind, const std::string &message, int error = 0)
        : std::runtime_error(message), kind_(kind), error_(error)
    {
    }
    ErrorKind kind() const noexcept { return kind_; }
    int error() const noexcept { return error_; }  // errno, or 0

private:
    ErrorKind kind_;
    int error_;
};

// "<where>: <field> is <received>, allowed <allowed>"
TransferError packet_error(const std::string &where, const vmth_packet_error &error);

// A system call's failure, its kind derived from errno.
TransferError system_error(const std::string &what, int error);

// The first failure of one end. Any thread.
class FailureLatch {
public:
    // Returns true for the call that set it.
    bool set(const TransferError &error);
    bool failed() const noexcept { return failed_.load(std::memory_order_acquire); }
    // Throws the failure if there is one.
    void check() const;

private:
    mutable std::mutex mutex_;
    std::atomic<bool> failed_{false};      // release in set(), acquire in failed()
    std::optional<TransferError> first_;   // under mutex_
};

}  // namespace vmth

#endif
