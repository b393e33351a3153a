// SPDX-License-Identifier: Apache-2.0
// CPU time of the calling thread. A system call: once a packet or a frame, never once a page.
#ifndef VMTH_XFER_THREAD_CLOCK_HPP
#define VMTH_XFER_THREAD_CLOCK_HPP

#include <cstdint>
#include <ctime>

namespace vmth {

inline uint64_t thread_cpu_ns() noexcept
{
    timespec now = {};
    (void)clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);  // fails for no clock that exists
    return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}

}  // namespace vmth

#endif
