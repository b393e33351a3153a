// SPDX-License-Identifier: Apache-2.0
// A token bucket in bytes: pure arithmetic, time is an argument.
//
// The level may go below zero (a packet is paid for after it was begun), so a taker waits until the debt
// is gone. Room for 20 ms of tokens and packets of at most 25 ms of the rate keep bursts under 50 ms.
#ifndef VMTH_XFER_TOKEN_BUCKET_HPP
#define VMTH_XFER_TOKEN_BUCKET_HPP

#include <algorithm>
#include <cstdint>

namespace vmth {

class TokenBucket {
public:
    bool limited() const noexcept { return rate_ != 0; }
    uint64_t rate() const noexcept { return rate_; }
    // Most payload that one packet should carry at this rate.
    uint64_t packet_bytes() const noexcept { return rate_ / 40; }

    // Bytes/s; 0: no limit. Old debt is cut to what the new rate pays within 25 ms.
    void set_rate(uint64_t rate, int64_t now_ns) noexcept
    {
        refill(now_ns);
        rate_ = rate;
        level_ = std::clamp(level_, -static_cast<double>(rate) / 40, capacity());
    }

    // Nanoseconds until something may be taken; 0: now.
    int64_t wait_ns(int64_t now_ns) noexcept
    {
        refill(now_ns);
        if (rate_ == 0 || level_ >= 0) {
            return 0;
        }
        return static_cast<int64_t>(-level_ * 1e9 / static_cast<double>(rate_)) + 1;
    }

    // Negative gives back.
    void take(int64_t nbytes) noexcept
    {
        if (rate_ != 0) {
            level_ = std::min(level_ - static_cast<double>(nbytes), capacity());
        }
    }

private:
    double capacity() const noexcept { return static_cast<double>(rate_) / 50; }
    void refill(int64_t now_ns) noexcept
    {
        if (rate_ != 0) {
            double gained = static_cast<double>(now_ns - last_ns_) * static_cast<double>(rate_) / 1e9;
            level_ = std::min(level_ + gained, capacity());
        }
        last_ns_ = now_ns;
    }

    uint64_t rate_ = 0;
    double level_ = 0;  // bytes
    int64_t last_ns_ = 0;
};

}  // namespace vmth

#endif
