// SPDX-License-Identifier: Apache-2.0
// Where the destination already holds a content: the bases of dedup pages.
//
//   queued()    the page will change at the destination: no base until it has landed
//   landed()    acknowledged as hashed here: its content is at this place
//   replaced()  its content is another now
//   unchanged() it was queued and is not sent: the destination holds it already
//   missed()    the destination did not find a content where it should be
//   find()      a place for a hash, of a page known landed that is not queued
//
// A hint: what it says may be overtaken, when the base is queued before the dedup page arrives. The
// destination compares the hash of what it copied and reports a miss. Any thread.
#ifndef VMTH_XFER_CONTENT_PLACES_HPP
#define VMTH_XFER_CONTENT_PLACES_HPP

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "sys/populate.h"
#include "vmth/content_index.h"
#include "xfer/atomic_bitmap.hpp"
#include "xfer/guest_memory.hpp"
#include "xfer/hash_table.hpp"
#include "xfer/known_landed.hpp"

namespace vmth {

struct ContentPlace {
    uint16_t block;
    uint64_t page;
};

class ContentPlaces {
public:
    // Uses at most `nbytes`, and no more than the pages need that the destination keeps; less than a
    // bucket: nothing at all.
    ContentPlaces(const GuestMemory &memory, const HashTable &hashes, const KnownLanded &known,
                  uint64_t nbytes);
    ~ContentPlaces();
    ContentPlaces(const ContentPlaces &) = delete;
    ContentPlaces &operator=(const ContentPlaces &) = delete;

    bool enabled() const noexcept { return nbytes_ != 0; }
    // Before entries are wanted, by whoever has the time: allocates the index, once. Contents are spread
    // over all of it, so else the first packet to land would wait, and all acknowledgements behind it.
    // Where the kernel refuses, it does. `ops` nullptr: the kernel's. Any thread.
    void make_ready(const vmth_populate_ops *ops) noexcept;
    // Has anything landed here yet? Until then the index is empty.
    bool used() const noexcept { return used_.load(std::memory_order_relaxed); }
    uint64_t bytes() const noexcept { return nbytes_; }

    // The sender's caller: pages of `words`, which start at page `base` (a multiple of 64), are queued.
    void queued(uint32_t block, uint64_t base, const std::vector<uint64_t> &words) noexcept;
    void queued(uint32_t block, const vmth_run &run) noexcept;
    // A reader: these pages of a packet have landed as the table has them. Those that were handed on
    // there are no place to copy from.
    void landed(uint32_t block, const std::vector<vmth_run> &runs);
    // The page's worker: its content was `hash`, known landed, and is sent anew.
    void replaced(uint32_t block, uint64_t page, const vmth_u128 &hash) noexcept;
    // The same for those of the run that are known landed, by the table's hashes: before these change.
    void replaced(uint32_t block, const vmth_run &run) noexcept;
    // The page's worker.
    void unchanged(uint32_t block, const vmth_run &run) noexcept;
    // A reader: these pages' contents, as the table has them, have no place any more, whichever they had.
    void missed(uint32_t block, const std::vector<vmth_run> &runs) noexcept;
    std::optional<ContentPlace> find(const vmth_u128 &hash) const noexcept;

private:
    const GuestMemory &memory_;
    const HashTable &hashes_;
    const KnownLanded &known_;
    size_t nbytes_ = 0;
    void *entries_ = nullptr;
    vmth_content_index index_ = {};
    std::atomic<bool> used_{false};
    std::atomic<bool> ready_{false};
    std::vector<AtomicBitmap> queued_;
};

}  // namespace vmth

#endif
