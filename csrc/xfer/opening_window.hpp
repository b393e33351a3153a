// SPDX-License-Identifier: Apache-2.0
// What a channel may have under way until somebody sets a window: little at first, more for one that
// acknowledges it soon, anything after a second.
//
//   256 KiB / channels -- all of it landed in 10 ms + 1.5 round trips --> twice that --> ... 128 times: any
//
// A socket takes megabytes at once. On a slow link they would be on their way as they are before it is
// known that a cheaper form is worth its time. Where the link is fast, or far and fast, the window opens as
// TCP's own does.
#ifndef VMTH_XFER_OPENING_WINDOW_HPP
#define VMTH_XFER_OPENING_WINDOW_HPP

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace vmth {

// Of one channel, without a clock and a lock: both are the owner's.
class OpeningWindow {
public:
    static constexpr uint64_t first_bytes = 256 * 1024;  // over all channels,
    static constexpr uint64_t least_bytes = 128 * 1024;  // but a channel never has less
    static constexpr unsigned doublings = 7;
    static constexpr int64_t soon_ns = 10'000'000;
    static constexpr int64_t longest_ns = 1'000'000'000;

    // One of `channels` > 0. 0: it is open.
    uint64_t bytes(size_t channels) const noexcept
    {
        return doubled_ == doublings ? 0 : std::max(first_bytes / channels, least_bytes) << doubled_;
    }
    void open() noexcept { doubled_ = doublings; }

    // A packet of pages goes out. The first tells how long a round trip takes.
    void sent(int64_t now_ns) noexcept
    {
        if (first_ns_ < 0) {
            first_ns_ = began_ns_ = now_ns;
        }
    }

    // `nbytes` that went out have landed.
    void acked(uint64_t nbytes, size_t channels, int64_t now_ns) noexcept
    {
        if (doubled_ == doublings || first_ns_ < 0) {
            return;
        }
        if (now_ns - first_ns_ > longest_ns) {
            open();
            return;
        }
        if (trip_ns_ < 0) {  // what landed with the first packet is not known to be the link's rate
            trip_ns_ = now_ns - began_ns_;
            began_ns_ = now_ns;
            return;
        }
        acked_bytes_ += nbytes;
        if (acked_bytes_ < bytes(channels)) {
            return;
        }
        doubled_ += now_ns - began_ns_ <= soon_ns + trip_ns_ + trip_ns_ / 2 ? 1 : 0;
        acked_bytes_ = 0;
        began_ns_ = now_ns;
    }

private:
    unsigned doubled_ = 0;
    uint64_t acked_bytes_ = 0;  // since began_ns_
    int64_t first_ns_ = -1;     // -1: nothing was sent
    int64_t began_ns_ = -1;
    int64_t trip_ns_ = -1;  // -1: nothing was acknowledged
};

}  // namespace vmth

#endif
