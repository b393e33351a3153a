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
#include "xfer/thread_clock.hpp"

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

    // Of n <= most staged pages those that were taken: bit i is page i. keep(page) is asked for each of
    // these first, and false leaves it.
    template <typename Keep>
    uint64_t take(const StagedPage *pages, size_t n, PacketParts &parts, Keep keep)
    {
        const uint64_t started_ns = thread_cpu_ns();
        vmth_u128 hashes[most];
        const uint64_t asked = hash(pages, n, hashes);
        uint64_t taken = 0;
        for (uint64_t rest = asked; rest != 0; rest &= rest - 1) {
            const auto i = static_cast<size_t>(__builtin_ctzll(rest));
            if (!state_.filter.has(hashes[i])) {
                continue;
            }
            uint8_t *payload = parts.room(VMTH_REUSE_HASH_BYTES);
            if (payload != nullptr && keep(pages[i])) {
                propose(pages[i], hashes[i], payload, parts);
                taken |= uint64_t{1} << i;
            }
        }
        count(asked, taken, thread_cpu_ns() - started_ns);
        return taken;
    }

private:
    // Of those that may be proposed, as bits.
    uint64_t hash(const StagedPage *pages, size_t n, vmth_u128 *hashes) const;
    void propose(const StagedPage &page, const vmth_u128 &hash, uint8_t *payload, PacketParts &parts);
    void count(uint64_t asked, uint64_t taken, uint64_t cpu_ns);

    const ReuseState &state_;
    FormCounters &counters_;
    const size_t page_bytes_;
};

}  // namespace vmth

#endif
