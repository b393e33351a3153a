// SPDX-License-Identifier: Apache-2.0
// Memory that the kernel is about to copy, brought into the caches of this core.
//
// sendmsg copies with one string instruction, which waits for memory more than loads do that run ahead
// of one another. bench/transfer_table.py shows it: bare sockets take longer than those that hash each
// portion before they send it. Belongs where a copy follows at once; zero-copy has no use for it.
#ifndef VMTH_XFER_NEAR_CACHE_HPP
#define VMTH_XFER_NEAR_CACHE_HPP

#include <cstddef>
#include <cstdint>

namespace vmth {

// `nbytes` a multiple of 64.
inline void fetch(const uint8_t *at, size_t nbytes) noexcept
{
    constexpr size_t line_bytes = 64;
    for (size_t i = 0; i < nbytes; i += line_bytes) {
        // volatile: the value is not what it is read for.
        (void)*reinterpret_cast<const volatile uint64_t *>(at + i);
    }
}

}  // namespace vmth

#endif
