// SPDX-License-Identifier: Apache-2.0
// What one channel has sent and the peer has not acknowledged, in sequence order.
//
//   seq    7        8        9        10
//        | PAGES  | PAGES  | PAGES  | BARRIER |    an ACK names the front, then the next, ...
//          digest of what was read, bytes, pages
#ifndef VMTH_XFER_LEDGER_HPP
#define VMTH_XFER_LEDGER_HPP

#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <vector>

#include "vmth/packet.h"
#include "xfer/kept_copies.hpp"

namespace vmth {

struct SentPacket {
    uint64_t seq = 0;
    vmth_packet_kind kind = VMTH_PACKET_PAGES;
    uint32_t block = 0;
    uint64_t bytes = 0;          // on the wire
    uint64_t made_pages = 0;     // of what the destination has
    int64_t sent_ns = 0;         // before its first byte was sent
    vmth_u128 digest = {0, 0};   // of what was read; zero when the digest is off
    bool whole = true;           // false: some of it is still to be read, and to be sent
    std::vector<vmth_run> runs;  // PAGES: those whose content was sent; what is told cannot tear
    std::vector<vmth_run> zero_runs;  // told to be zero, where it matters what is known landed
    std::vector<KeptCopy> kept;       // of lent pages that may be missed
};

class Ledger {
public:
    // Before its first byte is sent: the acknowledgement may come before the send call returns.
    void push(SentPacket &&packet)
    {
        std::lock_guard<std::mutex> lock(mutex_);
        packets_.push_back(std::move(packet));
    }

    // All of it was read: before its last byte is sent.
    void complete(uint64_t seq, const vmth_u128 &digest)
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!packets_.empty() && packets_.back().seq == seq) {
            packets_.back().digest = digest;
            packets_.back().whole = true;
        }
    }

    // Sequence number of the front, 0 when nothing is under way.
    uint64_t next() const
    {
        std::lock_guard<std::mutex> lock(mutex_);
        return packets_.empty() ? 0 : packets_.front().seq;
    }

    // Takes the front if it has this number.
    std::optional<SentPacket> pop(uint64_t seq)
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (packets_.empty() || packets_.front().seq != seq) {
            return std::nullopt;
        }
        SentPacket packet = std::move(packets_.front());
        packets_.pop_front();
        return packet;
    }

private:
    mutable std::mutex mutex_;
    std::deque<SentPacket> packets_;
};

}  // namespace vmth

#endif
