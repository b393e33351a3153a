// SPDX-License-Identifier: Apache-2.0
// Proposes pages whose content a file at the destination is said to have: 16 bytes instead of a page.
//
// What the destination's filter says may be wrong (chance, or a file that was changed): such a page is
// missed, goes again in another form, and is not proposed any more in this session.
#ifndef VMTH_XFER_REUSE_ENCODER_HPP
#define VMTH_XFER_REUSE_ENCODER_HPP

#include <cstddef>
#include <cstdint>
#include <vector>

#include "xfer/atomic_bitmap.hpp"
#include "xfer/content_filter.hpp"
#include "xfer/counters.hpp"
#include "xfer/guest_memory.hpp"
#include "xfer/packet_parts.hpp"

namespace vmth {

// What all channels share.
class ReuseState {
public:
    // `enabled` false: no memory; nothing is ever proposed.
    ReuseState(const GuestMemory &memory, bool enabled)
    {
        for (size_t block = 0; enabled && block < memory.nblocks(); block++) {
            missed_.emplace_back(memory.npages(block));
        }
    }

    bool enabled() const noexcept { return !missed_.empty(); }
    // Before channels are added; then it only is read.
    ContentFilter filter;
    // Any thread: whether a page may be proposed, and pages that were missed, in whichever form.
    bool proposable(uint32_t block, uint64_t page) const noexcept
    {
        return enabled() && missed_[block].bits(page, 1) == 0;
    }
    void missed(uint32_t block, const std::vector<vmth_run> &runs) noexcept
    {
        for (const vmth_run &run : runs) {
            if (enabled()) {
                missed_[block].set_range(run.page, run.npages);
            }
        }
    }

private:
    std::vector<AtomicBitmap> missed_;
};

// Belongs to one worker thread.
class ReuseEncoder {
public:
    static constexpr size_t most = 64;  // pages a call

    ReuseEncoder(const ReuseState &state, FormCounters &counters, size_t page_bytes)
        : state_(state), counters_(counters), page_bytes_(page_bytes)
    {
    }

    // Of n <= most staged pages those that were taken: bit i is page i.
    uint64_t take(const StagedPage *pages, size_t n, PacketParts &parts);

private:
    bool propose(const StagedPage &page, const vmth_u128 &hash, PacketParts &parts);

    const ReuseState &state_;
    FormCounters &counters_;
    const size_t page_bytes_;
};

}  // namespace vmth

#endif
