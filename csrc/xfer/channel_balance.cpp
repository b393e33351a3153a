// SPDX-License-Identifier: Apache-2.0
// Weighing pages and measuring channels.
#include "xfer/channel_balance.hpp"

#include <algorithm>

namespace vmth {

namespace {

// Of a page before any was sent: raw.
constexpr double first_page_bytes = 4096;
// So many pages are remembered by half.
constexpr double recent_pages = 4096;
// A batch is worth its packet from one of these on. Smaller ones would end more evenly still, but each
// costs a header, a system call and an acknowledgement.
constexpr double least_bytes = 64 * 1024;
constexpr double least_ns = 200e3;
constexpr uint64_t fewest_pages = 16;
// Channels that end within this of each other end together.
constexpr double grace_s = 1e-3;
// A sample of a rate has both, and so some acknowledgements (the peer holds them for up to 20 ms), or
// lasted long.
constexpr double sample_ns = 10e6;
constexpr double sample_bytes = 256 * 1024;
constexpr double long_sample_ns = 200e6;
constexpr double least_patience_s = 20e-3;
constexpr double longest_s = 3600;

uint64_t whole_pages(double pages, uint64_t least, uint64_t most)
{
    if (!(pages > static_cast<double>(least))) {
        return least;
    }
    return pages < static_cast<double>(most) ? static_cast<uint64_t>(pages) : most;
}

}  // namespace

size_t ChannelBalance::add_channel()
{
    channels_.emplace_back();
    if (window_set_) {
        channels_.back().opening.open();
    }
    return channels_.size() - 1;
}

void ChannelBalance::set_window(uint64_t nbytes) noexcept
{
    window_ = nbytes;
    window_set_ = true;
    for (Channel &channel : channels_) {
        channel.opening.open();
    }
}

void ChannelBalance::taken(size_t channel, uint64_t pages) noexcept
{
    channels_[channel].taken_pages += pages;
}

void ChannelBalance::sent(size_t channel, uint64_t pages, uint64_t nbytes, uint64_t cpu_ns,
                          int64_t now_ns) noexcept
{
    Channel &of = channels_[channel];
    of.taken_pages -= pages;
    const uint64_t ahead_bytes = of.in_flight;
    if (nbytes > 0 && of.in_flight == 0) {
        of.busy_since_ns = now_ns;
    }
    of.in_flight += nbytes;
    if (pages == 0) {
        return;
    }
    if (nbytes > 0) {
        of.opening.sent(ahead_bytes, now_ns);
    }
    pages_ += static_cast<double>(pages);
    bytes_ += static_cast<double>(nbytes);
    cpu_ns_ += static_cast<double>(cpu_ns);
    if (pages_ > recent_pages) {
        pages_ /= 2;
        bytes_ /= 2;
        cpu_ns_ /= 2;
    }
}

void ChannelBalance::acked(size_t channel, uint64_t nbytes, int64_t now_ns) noexcept
{
    Channel &of = channels_[channel];
    of.in_flight -= nbytes;
    of.opening.acked(nbytes, channels_.size(), now_ns);
    Sample &sample = of.sampled[of.current];
    sample.bytes += static_cast<double>(nbytes);
    sample.ns += static_cast<double>(now_ns - of.busy_since_ns);
    of.busy_since_ns = now_ns;
    if ((sample.ns >= sample_ns && sample.bytes >= sample_bytes) || sample.ns >= long_sample_ns) {
        of.current = (of.current + 1) % samples;
        of.sampled[of.current] = {};
    }
}

// Over the latest samples together: after a lost segment nothing is acknowledged for a while and then all
// at once, so that each of both tells a wrong rate.
double ChannelBalance::rate(const Channel &channel) const noexcept
{
    Sample sum;
    for (size_t i = 0; i < samples; i++) {
        if (i != channel.current) {
            sum.bytes += channel.sampled[i].bytes;
            sum.ns += channel.sampled[i].ns;
        }
    }
    return sum.ns > 0 ? sum.bytes * 1e9 / sum.ns : 0;
}

// Of the channels that were measured; a new one is taken to be like them. 0: none was.
double ChannelBalance::mean_rate() const noexcept
{
    double sum = 0;
    double known = 0;
    for (const Channel &channel : channels_) {
        const double one = rate(channel);
        sum += one;
        known += one > 0 ? 1 : 0;
    }
    return known > 0 ? sum / known : 0;
}

double ChannelBalance::page_bytes() const noexcept
{
    // Never nothing, so that it may divide.
    return pages_ > 0 ? std::max(bytes_ / pages_, 1e-3) : first_page_bytes;
}

double ChannelBalance::page_ns() const noexcept
{
    return pages_ > 0 ? cpu_ns_ / pages_ : 0;
}

double ChannelBalance::queued_bytes(const Channel &channel) const noexcept
{
    return static_cast<double>(channel.in_flight) +
           static_cast<double>(channel.taken_pages) * page_bytes();
}

uint64_t ChannelBalance::least_pages() const noexcept
{
    const double by_bytes = least_bytes / page_bytes();
    const double by_time = page_ns() > 0 ? least_ns / page_ns() : by_bytes;
    return whole_pages(std::min(by_bytes, by_time), fewest_pages, most_pages);
}

// Pages that the channel's part of the window has room for. With nothing under way one batch always
// may go, however small the window is.
uint64_t ChannelBalance::window_room(const Channel &channel, double total_rate) const noexcept
{
    const uint64_t least = least_pages();
    const uint64_t opening = channel.opening.bytes(channels_.size());
    if (window_ == 0 && opening == 0) {
        return most_pages;
    }
    const double n = static_cast<double>(channels_.size());
    const double part = total_rate > 0 ? rate(channel) / total_rate : 0;
    const double window = opening > 0 ? static_cast<double>(opening)
                                      : static_cast<double>(window_) * (part > 0 ? part : 1 / n);
    double room = (window - queued_bytes(channel)) / page_bytes();
    // While it opens, some packets are under way, so that the link has one while another is acknowledged:
    // the least has two of the smallest, and their headers.
    if (room < static_cast<double>(least) / (opening > 0 ? 2 : 1)) {
        return channel.in_flight == 0 && channel.taken_pages == 0 ? least : 0;
    }
    if (opening > 0) {
        room = std::min(room, window / 4 / page_bytes());
    }
    return whole_pages(room, least, most_pages);
}

Share ChannelBalance::share(size_t channel, uint64_t left) const noexcept
{
    const Channel &self = channels_[channel];
    const double n = static_cast<double>(channels_.size());
    const uint64_t least = least_pages();
    const double mean = mean_rate();
    const uint64_t room = window_room(self, mean * n);
    if (room == 0) {
        return {0, -1};
    }
    if (channels_.size() == 1) {
        return {room, 0};
    }
    if (mean == 0) {
        return {std::min(room, whole_pages(static_cast<double>(left) / (2 * n), least, most_pages)), 0};
    }
    const auto rate_of = [&](const Channel &one) { return rate(one) > 0 ? rate(one) : mean; };
    const double batch_bytes = static_cast<double>(least) * page_bytes();
    const auto end_s = [&](const Channel &one) {
        return (queued_bytes(one) + batch_bytes) / rate_of(one);
    };
    double all_bytes = static_cast<double>(left) * page_bytes();
    double all_rate = 0;
    double earliest_s = end_s(self);
    for (const Channel &one : channels_) {
        all_bytes += queued_bytes(one);
        all_rate += rate_of(one);
        earliest_s = std::min(earliest_s, end_s(one));
    }
    const double cpu_s = static_cast<double>(left) * page_ns() / n / 1e9;
    const double all_s = std::max(all_bytes / all_rate, cpu_s);
    const double self_s = end_s(self);
    if (self_s > all_s + grace_s && self_s > earliest_s) {
        const double patience_s = std::clamp(2 * all_s, least_patience_s, longest_s);
        return {0, static_cast<int64_t>(patience_s * 1e9)};
    }
    // Half of what would end with the others: the estimate is corrected with each batch.
    double pages = (all_s * rate_of(self) - queued_bytes(self)) / page_bytes() / 2;
    if (page_ns() > 0) {
        pages = std::min(pages, all_s * 1e9 / page_ns() / 2);
    }
    return {std::min(room, whole_pages(pages, least, most_pages)), 0};
}

bool ChannelBalance::opening(size_t channel, int64_t now_ns) const noexcept
{
    return channels_[channel].opening.growing(now_ns);
}

uint64_t ChannelBalance::rate_bps(size_t channel) const noexcept
{
    return static_cast<uint64_t>(rate(channels_[channel]));
}

}  // namespace vmth
