// SPDX-License-Identifier: Apache-2.0
// What a channel may have under way until somebody sets a window: little at first, more for one that
// acknowledges it soon, anything after a second.
//
//   256 KiB / channels, not below 128 KiB
//     -- most of it landed in 5 ms + 1.5 round trips --> twice that --> ... 128 times: any
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
    static constexpr int64_t soon_ns = 5'000'000;
    static constexpr int64_t longest_ns = 1'000'000'000;

    // One of `channels` > 0. 0: it is open.
    uint64_t bytes(size_t channels) const noexcept
    {
        return doubled_ == doublings ? 0 : std::max(first_bytes / channels, least_bytes) << doubled_;
    }
    void open() noexcept { doubled_ = doublings; }

    // Nobody knows yet whether the window or the link is what holds the channel: what lands says nothing
    // of the link.
    bool growing(int64_t now_ns) const noexcept
    {
        if (doubled_ == doublings || first_ns_ < 0 || held_) {
            return false;
        }
        return trip_ns_ < 0 || now_ns - began_ns_ <= allowed_ns();
    }

    // A packet of pages goes out behind `ahead_bytes` that have not landed. The first tells how long a
    // round trip takes.
    void sent(uint64_t ahead_bytes, int64_t now_ns) noexcept
    {
        if (first_ns_ < 0) {
            first_ns_ = began_ns_ = now_ns;
            ahead_bytes_ = ahead_bytes;
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
        if (ahead_bytes_ > 0) {
            ahead_bytes_ -= std::min(ahead_bytes_, nbytes);
            return;
        }
        if (trip_ns_ < 0) {  // what landed with the first packet is not known to be the link's rate
            trip_ns_ = now_ns - began_ns_;
            began_ns_ = now_ns;
            return;
        }
        acked_bytes_ += nbytes;
        if (acked_bytes_ < bytes(channels) / 4 * 3) {  // whole packets are under way, not all of it
            return;
        }
        held_ = now_ns - began_ns_ > allowed_ns();
        doubled_ += held_ ? 0 : 1;
        acked_bytes_ = 0;
        began_ns_ = now_ns;
    }

private:
    int64_t allowed_ns() const noexcept { return soon_ns + trip_ns_ + trip_ns_ / 2; }

    unsigned doubled_ = 0;
    bool held_ = false;         // by the link: it did not double the last time
    uint64_t ahead_bytes_ = 0;  // not landed yet of what was sent before the first pages
    uint64_t acked_bytes_ = 0;  // since began_ns_
    int64_t first_ns_ = -1;     // -1: nothing was sent
    int64_t began_ns_ = -1;
    int64_t trip_ns_ = -1;  // -1: nothing was acknowledged
};

}  // namespace vmth

#endif
