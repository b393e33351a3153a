// SPDX-License-Identifier: Apache-2.0
// Page contents that were sent, within fixed memory: the bases of deltas.
//
//   set 0   | slot | slot | ... 16 |   slot: whose page, hash of the content, round it was last rewritten
//   set 1   | ...                 |   content: page_bytes, in one mapping beside
//
// Only the source has it: the destination's base is its own guest memory. A slot is a base only where its
// hash is that of the content known landed. A page that was sent for the first time is remembered where
// there is room; one that was rewritten may take the place of any that was not rewritten lately. So a
// working set that is larger than the cache keeps a part of itself in, instead of turning it over.
//
// Any thread; calls for one page come one at a time.
#ifndef VMTH_XFER_DELTA_CACHE_HPP
#define VMTH_XFER_DELTA_CACHE_HPP

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "vmth/common.h"

namespace vmth {

// A page of which the delta is wanted. `known`: the destination holds the content whose hash is `landed`.
struct DeltaPage {
    uint32_t block;
    uint64_t page;
    const uint8_t *content;
    vmth_u128 hash;
    bool known;
    vmth_u128 landed;
    uint32_t round;
};

class DeltaCache {
public:
    // Uses at most `nbytes`, and no more than `guest_pages` need; less than one set: nothing at all.
    DeltaCache(size_t page_bytes, uint64_t nbytes, uint64_t guest_pages);
    ~DeltaCache();
    DeltaCache(const DeltaCache &) = delete;
    DeltaCache &operator=(const DeltaCache &) = delete;

    // The delta that makes the page of what landed, in out[0, room): its size, or 0 where the base is not
    // here, nothing changed, or it does not fit. Remembers the page's content, where it has or finds a slot.
    size_t exchange(const DeltaPage &page, uint8_t *out, size_t room);

    uint64_t pages() const noexcept { return slots_.size(); }
    // What it may take once every slot was used.
    uint64_t bytes() const noexcept { return pages() * (page_bytes_ + sizeof(Slot)); }

private:
    static constexpr size_t ways = 16;
    static constexpr size_t locks = 64;

    struct Slot {
        uint64_t owner = 0;  // block + 1 and page; 0: empty
        vmth_u128 hash = {0, 0};
        uint32_t rewritten = 0;  // round + 1; 0: sent once
    };

    size_t find_locked(size_t set, uint64_t owner) const;
    size_t victim_locked(size_t set, const DeltaPage &page) const;

    const size_t page_bytes_;
    size_t nsets_ = 0;
    uint8_t *contents_ = nullptr;
    std::array<std::mutex, locks> mutexes_;  // of set s: s % locks
    std::vector<std::atomic<uint8_t>> filled_;  // used slots of each set; changes under its mutex
    std::vector<Slot> slots_;                // under their set's mutex, as are their contents
};

}  // namespace vmth

#endif
