// SPDX-License-Identifier: Apache-2.0
// The pages to send again: missed by the peer, or of a packet that landed with another digest than was
// read.
//
//   packet   p p P p p     P was written between hash and send, so it is dirty: it goes again by itself,
//                          and the packet is explained; its other pages landed as they were read
//   packet   p p p p p     none is dirty: damaged on the way, nobody knows where; all go again
//
// A page that was damaged beside one that was torn stays wrong until the seal compares the digests.
#ifndef VMTH_XFER_MISSED_PAGES_HPP
#define VMTH_XFER_MISSED_PAGES_HPP

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "vmth/bitmap.h"
#include "xfer/guest_memory.hpp"
#include "xfer/kept_copies.hpp"

namespace vmth {

// Take `missed` out of `runs`; false, with `runs` of no meaning, if a page of it is not in them, or is
// named twice.
bool remove_runs(std::vector<vmth_run> &runs, std::vector<vmth_run> missed);

class MissedPages {
public:
    explicit MissedPages(const GuestMemory &memory) : memory_(memory), bitmaps_(memory.nblocks()) {}

    // Any thread: the peer asks for these.
    void add(uint32_t block, const std::vector<vmth_run> &runs)
    {
        std::lock_guard<std::mutex> lock(mutex_);
        add_locked(block, runs);
    }

    // Any thread: a packet with these pages of content landed with another digest.
    void add_differing(uint32_t block, std::vector<vmth_run> &&runs)
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (differing_runs_ + runs.size() > max_differing_runs) {
            add_locked(block, runs);
            return;
        }
        differing_runs_ += runs.size();
        differing_.push_back({block, std::move(runs)});
    }

    // `bitmaps` (one a block, of whole-block length) hold the pages dirtied since the packets were sent:
    // OR in what else must go again, and forget. Returns the pages taken.
    uint64_t take(const std::vector<uint64_t *> &bitmaps)
    {
        std::lock_guard<std::mutex> lock(mutex_);
        for (const Packet &packet : differing_) {
            if (!any_set(bitmaps[packet.block], packet.runs)) {
                add_locked(packet.block, packet.runs);
            }
        }
        differing_.clear();
        differing_runs_ = 0;
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

    // Any thread: of missed pages that were lent, the copies. Whoever takes them gives them back.
    struct Kept {
        uint32_t block;
        KeptCopy copy;
    };
    void keep(uint32_t block, const KeptCopy &copy)
    {
        std::lock_guard<std::mutex> lock(mutex_);
        kept_.push_back({block, copy});
    }
    std::vector<Kept> take_kept()
    {
        std::lock_guard<std::mutex> lock(mutex_);
        return std::exchange(kept_, {});
    }

private:
    struct Packet {
        uint32_t block;
        std::vector<vmth_run> runs;
    };

    // Bounds the memory of a round in which everything tears; what is beyond goes again as a whole.
    static constexpr size_t max_differing_runs = 1u << 18;

    static bool any_set(const uint64_t *bitmap, const std::vector<vmth_run> &runs)
    {
        return std::any_of(runs.begin(), runs.end(), [&](const vmth_run &run) {
            return vmth_bitmap_count(bitmap, run.page, run.npages) > 0;
        });
    }

    void add_locked(uint32_t block, const std::vector<vmth_run> &runs)
    {
        std::vector<uint64_t> &bitmap = bitmaps_[block];
        bitmap.resize(static_cast<size_t>(VMTH_BITMAP_WORDS(memory_.npages(block))));
        for (const vmth_run &run : runs) {
            vmth_bitmap_set_range(bitmap.data(), run.page, run.npages);
        }
    }

    const GuestMemory &memory_;
    std::mutex mutex_;
    std::vector<std::vector<uint64_t>> bitmaps_;  // empty: none missed
    std::vector<Packet> differing_;
    std::vector<Kept> kept_;
    size_t differing_runs_ = 0;
};

}  // namespace vmth

#endif
