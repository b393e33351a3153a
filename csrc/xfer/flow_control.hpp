// SPDX-License-Identifier: Apache-2.0
// How much may be under way: the window of unacknowledged bytes and the bandwidth, over all channels; and
// pages that the destination makes of what it has. They take few bytes, and time there: without a bound a
// whole round of them would be under way, and what the destination takes be seen only at the round's end.
//
//   reserve(most)  before the pages are read, so that little time passes between hash and send
//   settle         when the packet's size is known, and how many such pages it has: the rest goes back
//   acked          when it has landed
#ifndef VMTH_XFER_FLOW_CONTROL_HPP
#define VMTH_XFER_FLOW_CONTROL_HPP

#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "xfer/token_bucket.hpp"

namespace vmth {

class FlowControl {
public:
    // `fast_packet_bytes` of at least `packet_bytes`.
    FlowControl(uint64_t packet_bytes, uint64_t fast_packet_bytes, uint64_t page_bytes);

    void set_window(uint64_t nbytes);
    void set_bandwidth(uint64_t bytes_per_second);
    // Payload of a full packet now, for a channel on which so much lands (0: not known): whole pages, at
    // least one. A packet costs both ends some 36 us beside its bytes, and on a fast channel those take no
    // longer: there it has what the channel carries in half a millisecond.
    uint64_t packet_payload(uint64_t rate_bps) const;

    // Made pages under way, beyond which no packet goes out: 32 MiB of them, which a destination takes 20 to
    // 80 ms for; and as many as it may take during a round trip.
    static constexpr uint64_t most_made_pages = 8192;
    static constexpr uint64_t made_pages_per_s = 500000;

    // Blocks until `nbytes` may be sent. With nothing in flight a packet always may, however small the
    // window is. Returns false when stopped.
    bool reserve(uint64_t nbytes);
    void settle(uint64_t reserved, uint64_t actual, uint64_t made_pages = 0);
    void acked(uint64_t nbytes, uint64_t made_pages = 0);
    // So long at least a packet and its acknowledgement were under way on one of the channels.
    void took(uint64_t trip_ns);
    uint64_t in_flight() const;
    void stop();

private:
    const uint64_t packet_bytes_;
    const uint64_t fast_packet_bytes_;
    const uint64_t page_bytes_;
    mutable std::mutex mutex_;
    std::condition_variable changed_;
    // Under mutex_:
    TokenBucket bucket_;
    uint64_t window_ = 0;
    uint64_t reserved_ = 0;
    uint64_t in_flight_ = 0;
    uint64_t made_in_flight_ = 0;  // pages
    uint64_t most_made_ = most_made_pages;
    uint64_t least_trip_ns_ = UINT64_MAX;
    bool stopped_ = false;
};

}  // namespace vmth

#endif
