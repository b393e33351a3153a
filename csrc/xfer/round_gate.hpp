// SPDX-License-Identifier: Apache-2.0
// Holds the peer to "a page is sent at most once between two barriers".
//
//   channel 0   p p p | barrier            | p p      A barrier ends the round when all channels passed
//   channel 1   p p p p p | barrier        | p        it; until then a channel that passed may send no
//                          ^ claims cleared           page, so no page is claimed while they clear.
//
// A page's claim makes its channel the only writer of its bytes and of its hash until the round ends.
#ifndef VMTH_XFER_ROUND_GATE_HPP
#define VMTH_XFER_ROUND_GATE_HPP

#include <array>
#include <cstdint>
#include <mutex>
#include <vector>

#include "xfer/atomic_bitmap.hpp"
#include "xfer/guest_memory.hpp"

namespace vmth {

class RoundGate {
public:
    RoundGate(const GuestMemory &memory, unsigned channels) : channels_(channels)
    {
        claims_.reserve(memory.nblocks());
        for (size_t block = 0; block < memory.nblocks(); block++) {
            claims_.emplace_back(memory.npages(block));
        }
    }

    // The calling channel has had its barrier and the others have not: it may send nothing then.
    // Throws TransferError(protocol).
    void check_open(unsigned channel, const std::string &name)
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (passed_[channel]) {
            throw TransferError(ErrorKind::protocol,
                                name + ": received a packet after its barrier, which " +
                                    std::to_string(arrived_) + " of " + std::to_string(channels_) +
                                    " channels have had, allowed after all have");
        }
    }

    // Throws TransferError(protocol) if a page of the run was sent in this round already.
    void claim(uint32_t block, const vmth_run &run, const std::string &name)
    {
        if (!claims_[block].claim_range(run.page, run.npages)) {
            throw TransferError(ErrorKind::protocol,
                                name + ": received a page of block " + std::to_string(block) +
                                    " in [" + std::to_string(run.page) + ", " +
                                    std::to_string(run.page + run.npages) +
                                    ") twice between two barriers, allowed once");
        }
    }

    // The channel's barrier was read (after check_open, by the same thread). True of the last one.
    bool pass(unsigned channel)
    {
        std::lock_guard<std::mutex> lock(mutex_);
        passed_[channel] = true;
        if (++arrived_ == channels_) {
            for (AtomicBitmap &claims : claims_) {
                claims.reset();
            }
            passed_.fill(false);
            arrived_ = 0;
            return true;
        }
        return false;
    }

private:
    const unsigned channels_;
    std::mutex mutex_;
    // Under mutex_:
    std::array<bool, VMTH_MAX_CHANNELS> passed_ = {};
    unsigned arrived_ = 0;
    // Set by any channel that has not passed; reset under mutex_ when all have.
    std::vector<AtomicBitmap> claims_;
};

}  // namespace vmth

#endif
