// SPDX-License-Identifier: Apache-2.0
// Which channel takes how much of the waiting pages, so that all channels end a round together.
//
//   under way   channel 0  ==========|            rate 4   all of it would be done at |all|, so
//               channel 1  ===|                   rate 1   channel 1 may take a little, channel 0
//   waiting     ------------------                         the rest; with less waiting, channel 1
//               |        all        |                      leaves it to channel 0
//
// Pages are weighed by what recent ones cost: bytes on the wire, and CPU time of building packets. A
// channel's rate is what its peer acknowledged while it had bytes under way. Arithmetic only: no lock, no
// clock.
#ifndef VMTH_XFER_CHANNEL_BALANCE_HPP
#define VMTH_XFER_CHANNEL_BALANCE_HPP

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "xfer/opening_window.hpp"

namespace vmth {

struct Share {
    uint64_t pages = 0;    // 0: none for this channel now
    int64_t patience_ns = 0;  // with 0 pages: by then others should have taken all; -1: until an
                              // acknowledgement makes room in this channel's window
};

class ChannelBalance {
public:
    // A packet takes at most so many pages, however cheap they are.
    static constexpr uint64_t most_pages = 16384;

    // Returns the channel's place, from 0 on.
    size_t add_channel();

    // Most bytes under way over all channels, shared by their rates; 0: no limit. Until it is called each
    // channel has one that opens by itself.
    void set_window(uint64_t nbytes) noexcept;

    // The life of a batch: taken, sent (`nbytes` with all headers, 0 if nothing had to be), acknowledged.
    void taken(size_t channel, uint64_t pages) noexcept;
    void sent(size_t channel, uint64_t pages, uint64_t nbytes, uint64_t cpu_ns, int64_t now_ns) noexcept;
    // `nbytes` as they were sent. Barriers are sent and acknowledged with 0 pages.
    void acked(size_t channel, uint64_t nbytes, int64_t now_ns) noexcept;

    // Of `left` > 0 waiting pages.
    Share share(size_t channel, uint64_t left) const noexcept;
    // The least pages that are worth a packet.
    uint64_t least_pages() const noexcept;
    // Bytes/s acknowledged while busy; 0: not known yet.
    uint64_t rate_bps(size_t channel) const noexcept;
    // Its own window may be what holds it, and not the link.
    bool opening(size_t channel, int64_t now_ns) const noexcept;

private:
    static constexpr size_t samples = 5;

    struct Sample {
        double bytes = 0;  // acknowledged
        double ns = 0;     // with bytes under way
    };
    struct Channel {
        uint64_t taken_pages = 0;
        uint64_t in_flight = 0;
        int64_t busy_since_ns = 0;  // or since the last acknowledgement; while in_flight
        std::array<Sample, samples> sampled = {};
        size_t current = 0;  // the sample being made
        OpeningWindow opening;
    };

    double rate(const Channel &channel) const noexcept;
    double mean_rate() const noexcept;
    double queued_bytes(const Channel &channel) const noexcept;
    uint64_t window_room(const Channel &channel, double total_rate) const noexcept;
    double page_bytes() const noexcept;
    double page_ns() const noexcept;

    std::vector<Channel> channels_;
    uint64_t window_ = 0;
    bool window_set_ = false;
    // Sums over recent pages:
    double pages_ = 0;
    double bytes_ = 0;
    double cpu_ns_ = 0;
};

}  // namespace vmth

#endif
