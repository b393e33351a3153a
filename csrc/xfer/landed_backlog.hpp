// SPDX-License-Identifier: Apache-2.0
// What has landed on one channel since the last barrier, while nobody wanted to know where contents are.
//
// At first all pages go as they are, until the link is known to be worth more; whoever then looks for
// copies wants the originals that went before, too. They are read from the table only when they are
// asked for, and only before the barrier: behind it the table's entries have a writer again.
#ifndef VMTH_XFER_LANDED_BACKLOG_HPP
#define VMTH_XFER_LANDED_BACKLOG_HPP

#include <cstdint>
#include <utility>
#include <vector>

#include "vmth/packet.h"

namespace vmth {

// One thread's: the channel's reader.
class LandedBacklog {
public:
    // 64 MiB of memory; with single pages the list has 256 KiB. What comes later is not kept.
    static constexpr uint64_t most_pages = 16384;

    void add(uint32_t block, std::vector<vmth_run> &&runs)
    {
        uint64_t npages = 0;
        for (const vmth_run &run : runs) {
            npages += run.npages;
        }
        if (npages > 0 && npages_ + npages <= most_pages) {
            npages_ += npages;
            packets_.emplace_back(block, std::move(runs));
        }
    }

    // Calls each(block, runs), oldest first, and has nothing afterwards.
    template <typename Each> void take(Each each)
    {
        for (const auto &[block, runs] : packets_) {
            each(block, runs);
        }
        clear();
    }

    void clear() noexcept
    {
        packets_.clear();
        npages_ = 0;
    }

    uint64_t npages() const noexcept { return npages_; }

private:
    std::vector<std::pair<uint32_t, std::vector<vmth_run>>> packets_;
    uint64_t npages_ = 0;
};

}  // namespace vmth

#endif
