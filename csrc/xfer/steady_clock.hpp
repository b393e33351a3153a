// SPDX-License-Identifier: Apache-2.0
// The monotonic clock that times in this library are of.
#ifndef VMTH_XFER_STEADY_CLOCK_HPP
#define VMTH_XFER_STEADY_CLOCK_HPP

#include <chrono>
#include <cstdint>

namespace vmth {

inline int64_t steady_ns() noexcept
{
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

}  // namespace vmth

#endif
