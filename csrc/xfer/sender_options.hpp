// SPDX-License-Identifier: Apache-2.0
// What a sender is made with.
#ifndef VMTH_XFER_SENDER_OPTIONS_HPP
#define VMTH_XFER_SENDER_OPTIONS_HPP

#include <cstddef>
#include <cstdint>

#include "sys/populate.h"
#include "sys/sock_zerocopy.h"

namespace vmth {

struct SenderOptions {
    uint64_t hash_seed = 0;
    bool digest = true;
    bool zerocopy = true;
    uint32_t forms = 0;                      // bits of the cheaper forms that both ends agreed on
    uint64_t kept_copies_bytes = 64u << 20;  // at most, of lent pages on their way as a reference
    uint64_t dedup_index_bytes = 64u << 20;  // at most; 32 bytes a page of the guest are enough
    uint64_t delta_cache_bytes = 256u << 20;  // at most; it pays up to the size of what is rewritten
    uint32_t packet_bytes = 256 * 1024;      // payload of a full packet
    uint32_t fast_packet_bytes = 0;          // the same where that takes no time; below it: no more
    unsigned queue_jobs = 2;                 // send() calls that may wait unfinished
    uint32_t completion_timeout_ms = 10000;  // a zero-copy completion after everything was acknowledged
    const vmth_sock_ops *ops = nullptr;           // nullptr: the kernel's
    const vmth_populate_ops *populate = nullptr;  // nullptr: the kernel's
};

// With what is left to us filled in. Throws what names a value that is not allowed.
SenderOptions checked(SenderOptions options, size_t page_bytes);

}  // namespace vmth

#endif
