// SPDX-License-Identifier: Apache-2.0
// The pages to send again: missed by the peer, damaged on the way, or torn while they were read.
#ifndef VMTH_XFER_MISSED_PAGES_HPP
#define VMTH_XFER_MISSED_PAGES_HPP

#include <cstdint>
#include <mutex>
#include <vector>

#include "vmth/bitmap.h"
#include "xfer/guest_memory.hpp"

namespace vmth {

class MissedPages {
public:
    explicit MissedPages(const GuestMemory &memory) : memory_(memory), bitmaps_(memory.nblocks()) {}

    // Any thread. Returns how many pages were not in it.
    uint64_t add(uint32_t block, const std::vector<vmth_run> &runs)
    {
        std::lock_guard<std::mutex> lock(mutex_);
        std::vector<uint64_t> &bitmap = bitmaps_[block];
        bitmap.resize(static_cast<size_t>(VMTH_BITMAP_WORDS(memory_.npages(block))));
        uint64_t added = 0;
        for (const vmth_run &run : runs) {
            added += run.npages - vmth_bitmap_count(bitmap.data(), run.page, run.npages);
            vmth_bitmap_set_range(bitmap.data(), run.page, run.npages);
        }
        return added;
    }

    // OR into `bitmaps` (one a block, of whole-block length) and forget. Returns the pages taken.
    uint64_t take(const std::vector<uint64_t *> &bitmaps)
    {
        std::lock_guard<std::mutex> lock(mutex_);
        uint64_t taken = 0;
        for (size_t block = 0; block < bitmaps_.size(); block++) {
            if (bitmaps_[block].empty()) {
                continue;
            }
            const uint64_t npages = memory_.npages(block);
            taken += vmth_bitmap_count(bitmaps_[block].data(), 0, npages);
            vmth_bitmap_merge(bitmaps[block], bitmaps_[block].data(), npages);
            std::vector<uint64_t>().swap(bitmaps_[block]);
        }
        return taken;
    }

private:
    const GuestMemory &memory_;
    std::mutex mutex_;
    std::vector<std::vector<uint64_t>> bitmaps_;  // empty: none missed
};

}  // namespace vmth

#endif
