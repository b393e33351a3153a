// SPDX-License-Identifier: Apache-2.0
// Cumulative counters of one end, written by its threads and read by any. Units in the names.
#ifndef VMTH_XFER_COUNTERS_HPP
#define VMTH_XFER_COUNTERS_HPP

#include <array>
#include <atomic>
#include <cstdint>

#include "vmth/packet.h"

namespace vmth {

class Counter {
public:
    void add(uint64_t n) noexcept { value_.fetch_add(n, std::memory_order_relaxed); }
    uint64_t get() const noexcept { return value_.load(std::memory_order_relaxed); }

private:
    std::atomic<uint64_t> value_{0};
};

// Of one form that was agreed on, at the sender; the receiver counts pages, wire_bytes and the cpu_ns of
// undoing it.
struct FormCounters {
    Counter pages;          // that took this form
    Counter tried_pages;    // given to its encoder; those it declined took another form
    Counter content_bytes;  // of the pages that took it
    Counter wire_bytes;     // they took: descriptors and payload
    Counter cpu_ns;         // of encoding, declined pages included
};

// What is live. Each counter stands alone; no order between two of them is promised.
struct Counters {
    Counter normal_pages;
    Counter zero_pages;
    Counter hole_pages;
    Counter free_pages;
    Counter missed_pages;
    Counter written_pages;  // at the receiver: holes that were filled by a write to their file
    Counter wire_bytes;
    Counter acked_bytes;
    Counter packets;
    Counter torn_packets;
    Counter zerocopy_sends;
    Counter zerocopy_copied;
    Counter cpu_ns;  // of the threads that send
    std::array<FormCounters, VMTH_FORM_REUSE + 1> forms;  // by vmth_page_form, from SAME on
};

// Of one channel of the sender.
struct ChannelCounters {
    Counter pages;  // told or sent; pages that were the same are on no channel
    Counter packets;
    Counter wire_bytes;
    Counter acked_bytes;
};

// What is told of one channel: its counters now, and its rate.
struct ChannelInfo {
    unsigned index = 0;
    uint64_t pages = 0;
    uint64_t packets = 0;
    uint64_t wire_bytes = 0;
    uint64_t acked_bytes = 0;
    uint64_t acked_bps = 0;  // bytes/s acknowledged while it had bytes under way, of late; 0: unknown
    bool opening = false;    // its window still grows: neither rate says what the link carries
};

// Of the slowest channel; zeros until something is known.
struct PathInfo {
    uint64_t rtt_ns = 0;       // TCP's smoothed one where that is more than the least trip
    // The least: TCP's, or that of a packet and its acknowledgement where it says that something lies
    // between the ends of the connection.
    uint64_t base_rtt_ns = 0;
    uint64_t retransmits = 0;
    uint64_t path_mtu = 0;
    // With bytes on the way that the peer had room for, over the life of the busiest channel; 0: not known.
    uint64_t carrying_ns = 0;
    uint64_t starved_ns = 0;  // nothing was queued to be sent
};

}  // namespace vmth

#endif
