// SPDX-License-Identifier: Apache-2.0
// A bit a page of one ramblock, set, cleared and read by several threads; and the claims of one round.
//
// Words live in an anonymous mapping, so that what is never set costs no memory. Setting is relaxed: a
// bit publishes nothing but itself. What a claimed page's bytes and entry need is ordered by the barrier's
// mutex, which every channel passes between two claims of one page. Clearing releases, and bits() acquires:
// a page that is queued no more may be a base at once, in the same round, for a page on another channel;
// what happened before its acknowledgement was read has then happened before the other packet is sent.
#ifndef VMTH_XFER_ATOMIC_BITMAP_HPP
#define VMTH_XFER_ATOMIC_BITMAP_HPP

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "vmth/common.h"

namespace vmth {

class AtomicBitmap {
public:
    explicit AtomicBitmap(uint64_t npages);
    AtomicBitmap(AtomicBitmap &&other) noexcept;
    AtomicBitmap(const AtomicBitmap &) = delete;
    AtomicBitmap &operator=(const AtomicBitmap &) = delete;
    AtomicBitmap &operator=(AtomicBitmap &&) = delete;
    ~AtomicBitmap();

    uint64_t npages() const noexcept { return npages_; }
    // OR in plain words (before other threads see the object).
    void assign(const uint64_t *words) noexcept;
    void set_range(uint64_t page, uint64_t npages) noexcept;
    // Set the range; returns false if any bit of it was set already (the rest is set all the same).
    bool claim_range(uint64_t page, uint64_t npages) noexcept;
    // Whoever then sees the bits cleared, with bits(), also sees what this thread saw before.
    void clear_range(uint64_t page, uint64_t npages) noexcept;
    // Set every bit set in `words`, which start at page `base` (a multiple of 64).
    void set_words(uint64_t base, const uint64_t *words, size_t nwords) noexcept;
    // The bits of [page, page + npages), the first of them in bit 0; npages at most 64.
    uint64_t bits(uint64_t page, uint64_t npages) const noexcept;
    // Claim every bit set in `words`, which start at page `base` (a multiple of 64); claims nothing and
    // returns false if one of them is set already. For a single claiming thread.
    bool claim_words(uint64_t base, const uint64_t *words, size_t nwords) noexcept;
    // The first run of set bits in [page, page + npages), if any.
    std::optional<vmth_run> first_run(uint64_t page, uint64_t npages) const noexcept;
    // All bits to 0, touching only memory that was ever set. No other thread may be in a call.
    void reset() noexcept;

private:
    uint64_t find(uint64_t page, uint64_t end, uint64_t invert) const noexcept;

    uint64_t npages_;
    size_t nwords_;
    std::atomic<uint64_t> *words_;
    // Words [low, high) hold every set bit: what reset() has to clear.
    std::atomic<size_t> low_;
    std::atomic<size_t> high_;
};

}  // namespace vmth

#endif
