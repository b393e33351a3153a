// SPDX-License-Identifier: Apache-2.0
// Which pages the destination is known to hold as the source's table has them.
//
//   queued again              -> unknown
//   acknowledged with the digest of what was hashed here -> known
//
// A page may be torn: written between being hashed and being sent. Hash A, send torn T, the guest writes A
// back: the next hash says A, and the destination holds T. So a hash alone never says "same": only content
// known landed does, and a packet that landed with another digest makes none of its pages known.
#ifndef VMTH_XFER_KNOWN_LANDED_HPP
#define VMTH_XFER_KNOWN_LANDED_HPP

#include <cstdint>
#include <vector>

#include "xfer/atomic_bitmap.hpp"
#include "xfer/guest_memory.hpp"

namespace vmth {

// Any thread; between two barriers a page is sent at most once, so its bit has one writer at a time.
class KnownLanded {
public:
    // `enabled` false: no memory; nothing is ever known.
    KnownLanded(const GuestMemory &memory, bool enabled) : enabled_(enabled)
    {
        for (size_t block = 0; enabled && block < memory.nblocks(); block++) {
            bits_.emplace_back(memory.npages(block));
        }
    }

    bool enabled() const noexcept { return enabled_; }
    // Bit i: page + i is known; npages at most 64.
    uint64_t known(uint32_t block, uint64_t page, uint64_t npages) const noexcept
    {
        return enabled_ ? bits_[block].bits(page, npages) : 0;
    }
    void landed(uint32_t block, const std::vector<vmth_run> &runs) noexcept
    {
        for (const vmth_run &run : runs) {
            if (enabled_) {
                bits_[block].set_range(run.page, run.npages);
            }
        }
    }
    void forget(uint32_t block, uint64_t page, uint64_t npages) noexcept
    {
        if (enabled_) {
            bits_[block].clear_range(page, npages);
        }
    }

private:
    const bool enabled_;
    std::vector<AtomicBitmap> bits_;
};

}  // namespace vmth

#endif
