// SPDX-License-Identifier: Apache-2.0
// A file descriptor that is closed when its owner goes.
#ifndef VMTH_XFER_UNIQUE_FD_HPP
#define VMTH_XFER_UNIQUE_FD_HPP

#include <fcntl.h>
#include <unistd.h>

#include <utility>

namespace vmth {

class UniqueFd {
public:
    UniqueFd() noexcept = default;
    explicit UniqueFd(int fd) noexcept : fd_(fd) {}
    UniqueFd(UniqueFd &&other) noexcept : fd_(other.release()) {}
    UniqueFd &operator=(UniqueFd &&other) noexcept
    {
        reset(other.release());
        return *this;
    }
    UniqueFd(const UniqueFd &) = delete;
    UniqueFd &operator=(const UniqueFd &) = delete;
    ~UniqueFd() { reset(); }

    // A close-on-exec duplicate of `fd`; empty, with errno set, on failure.
    static UniqueFd duplicate(int fd) noexcept
    {
#ifdef __SANITIZE_THREAD__
        // Knows of dup alone that both descriptors are one socket: what a thread did before it wrote there
        // has happened before what another does that has read it.
        UniqueFd copy(dup(fd));
        if (copy && fcntl(copy.get(), F_SETFD, FD_CLOEXEC) != 0) {
            copy.reset();
        }
        return copy;
#else
        return UniqueFd(fcntl(fd, F_DUPFD_CLOEXEC, 3));
#endif
    }

    int get() const noexcept { return fd_; }
    explicit operator bool() const noexcept { return fd_ >= 0; }
    int release() noexcept { return std::exchange(fd_, -1); }
    void reset(int fd = -1) noexcept
    {
        int old = std::exchange(fd_, fd);
        if (old >= 0) {
            close(old);
        }
    }

private:
    int fd_ = -1;
};

}  // namespace vmth

#endif
