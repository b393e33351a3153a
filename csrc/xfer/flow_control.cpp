// SPDX-License-Identifier: Apache-2.0
// Window and bandwidth of all channels together.
#include "xfer/flow_control.hpp"

#include <algorithm>
#include <chrono>

#include "xfer/steady_clock.hpp"

namespace vmth {

namespace {

constexpr uint64_t min_window_packet = 64 * 1024;
constexpr uint64_t fast_packets_per_s = 2000;
constexpr uint64_t ns_per_s = 1000000000;
constexpr uint64_t longest_trip_ns = ns_per_s;

}  // namespace

FlowControl::FlowControl(uint64_t packet_bytes, uint64_t fast_packet_bytes, uint64_t page_bytes)
    : packet_bytes_(packet_bytes), fast_packet_bytes_(fast_packet_bytes), page_bytes_(page_bytes)
{
}

void FlowControl::set_window(uint64_t nbytes)
{
    std::lock_guard<std::mutex> lock(mutex_);
    window_ = nbytes;
    changed_.notify_all();
}

void FlowControl::set_bandwidth(uint64_t bytes_per_second)
{
    std::lock_guard<std::mutex> lock(mutex_);
    bucket_.set_rate(bytes_per_second, steady_ns());
    changed_.notify_all();
}

uint64_t FlowControl::packet_payload(uint64_t rate_bps) const
{
    std::lock_guard<std::mutex> lock(mutex_);
    if (bucket_.limited()) {
        rate_bps = std::min(rate_bps, bucket_.rate());
    }
    uint64_t nbytes =
        std::clamp(rate_bps / fast_packets_per_s, packet_bytes_, fast_packet_bytes_);
    if (window_ != 0) {
        nbytes = std::min(nbytes, std::max(min_window_packet, window_ / 4));
    }
    if (bucket_.limited()) {
        nbytes = std::min(nbytes, bucket_.packet_bytes());
    }
    return std::max(nbytes / page_bytes_, uint64_t{1}) * page_bytes_;
}

bool FlowControl::reserve(uint64_t nbytes)
{
    std::unique_lock<std::mutex> lock(mutex_);
    while (!stopped_) {
        uint64_t used = reserved_ + in_flight_;
        bool full = window_ != 0 && used != 0 && used + nbytes > window_;
        if (full || made_in_flight_ >= most_made_) {
            changed_.wait(lock);
            continue;
        }
        int64_t wait = bucket_.wait_ns(steady_ns());
        if (wait == 0) {
            reserved_ += nbytes;
            bucket_.take(static_cast<int64_t>(nbytes));
            return true;
        }
        changed_.wait_for(lock, std::chrono::nanoseconds(wait));
    }
    return false;
}

void FlowControl::settle(uint64_t reserved, uint64_t actual, uint64_t made_pages)
{
    std::lock_guard<std::mutex> lock(mutex_);
    reserved_ -= reserved;
    in_flight_ += actual;
    made_in_flight_ += made_pages;
    bucket_.take(static_cast<int64_t>(actual) - static_cast<int64_t>(reserved));
    if (actual < reserved && (window_ != 0 || bucket_.limited())) {
        changed_.notify_all();
    }
}

void FlowControl::acked(uint64_t nbytes, uint64_t made_pages)
{
    std::lock_guard<std::mutex> lock(mutex_);
    in_flight_ -= nbytes;
    made_in_flight_ -= made_pages;
    if (window_ != 0 || made_pages != 0) {
        changed_.notify_all();
    }
}

void FlowControl::took(uint64_t trip_ns)
{
    std::lock_guard<std::mutex> lock(mutex_);
    if (trip_ns < least_trip_ns_) {
        least_trip_ns_ = trip_ns;
        const uint64_t known_ns = std::min(trip_ns, longest_trip_ns);
        most_made_ = most_made_pages + made_pages_per_s * known_ns / ns_per_s;
    }
}

uint64_t FlowControl::in_flight() const
{
    std::lock_guard<std::mutex> lock(mutex_);
    return in_flight_;
}

void FlowControl::stop()
{
    std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
    changed_.notify_all();
}

}  // namespace vmth
