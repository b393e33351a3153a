// SPDX-License-Identifier: Apache-2.0
// Who takes how much, simulated on a clock of its own: whatever the links' rates and the pages' costs,
// all channels end a round at nearly the same time, and that time is close to what the links allow.
#include <algorithm>
#include <cstdint>
#include <deque>
#include <vector>

#include "tests/t_check.h"
#include "xfer/channel_balance.hpp"

namespace {

using vmth::ChannelBalance;
using vmth::Share;

constexpr uint64_t page_bytes = 4096;
constexpr uint64_t max_pages = 64;  // of one packet of raw pages
constexpr double ms = 1e6;

struct Page {
    double bytes;  // on the wire
    double cpu_ns;
};

// Links that carry what is queued on them at their rate, each filled by a worker of its own, which builds
// a packet at a time and is blocked while its link has more than a socket buffer takes.
class Links {
public:
    Links(ChannelBalance &balance, std::vector<double> rates_bps)
        : balance_(balance), channels_(rates_bps.size()), rates_(std::move(rates_bps))
    {
    }

    // Sends pages from `next` on until none is left and all have landed; returns each channel's end.
    std::vector<double> run(const std::vector<Page> &pages, size_t &next)
    {
        std::vector<double> ends(channels_.size(), now_);
        while (true) {
            bool idle = true;
            for (size_t i = 0; i < channels_.size(); i++) {
                step(i, pages, next, ends[i]);
                idle = idle && channels_[i].packets.empty() && channels_[i].building == 0;
            }
            if (idle && next == pages.size()) {
                return ends;
            }
            now_ += tick_ns;
        }
    }

    double now() const { return now_; }
    uint64_t pages(size_t i) const { return channels_[i].pages; }
    double most_queued(size_t i) const { return channels_[i].most_queued; }

    static constexpr double tick_ns = 50e3;
    static constexpr double socket_bytes = 4e6;

private:
    struct Packet {
        double left;  // bytes that have not landed
        double bytes;
    };
    struct Channel {
        std::deque<Packet> packets;
        double queued = 0;
        double most_queued = 0;
        uint64_t building = 0;  // pages
        double built_at = 0;
        double bytes = 0;  // of what is being built
        double cpu_ns = 0;
        double held_since = -1;
        uint64_t pages = 0;
    };

    void land(size_t i, double &end)
    {
        Channel &channel = channels_[i];
        double room = rates_[i] * tick_ns / 1e9;
        while (room > 0 && !channel.packets.empty()) {
            Packet &first = channel.packets.front();
            const double part = std::min(room, first.left);
            first.left -= part;
            room -= part;
            channel.queued -= part;
            if (first.left > 0) {
                return;
            }
            balance_.acked(i, static_cast<uint64_t>(first.bytes), static_cast<int64_t>(now_));
            channel.packets.pop_front();
            end = now_;
        }
    }

    void step(size_t i, const std::vector<Page> &pages, size_t &next, double &end)
    {
        Channel &channel = channels_[i];
        land(i, end);
        if (channel.building > 0 && now_ >= channel.built_at && channel.queued < socket_bytes) {
            balance_.sent(i, channel.building, static_cast<uint64_t>(channel.bytes),
                          static_cast<uint64_t>(channel.cpu_ns), static_cast<int64_t>(now_));
            channel.packets.push_back({channel.bytes, channel.bytes});
            channel.queued += channel.bytes;
            channel.most_queued = std::max(channel.most_queued, channel.queued);
            channel.building = 0;
            end = now_;
        }
        if (channel.building == 0 && next < pages.size()) {
            take(i, pages, next);
        }
    }

    void take(size_t i, const std::vector<Page> &pages, size_t &next)
    {
        Channel &channel = channels_[i];
        const Share share = balance_.share(i, pages.size() - next);
        uint64_t allowed = share.pages;
        if (allowed == 0) {
            if (channel.held_since < 0) {
                channel.held_since = now_;
            }
            const bool waited = share.patience_ns >= 0 &&
                                now_ - channel.held_since >= static_cast<double>(share.patience_ns);
            if (!waited) {
                return;
            }
            allowed = balance_.least_pages();
        }
        channel.held_since = -1;
        channel.bytes = 64;
        channel.cpu_ns = 0;
        // A packet is full when its payload is, or at its share.
        while (channel.building < allowed && next < pages.size() &&
               channel.bytes < max_pages * page_bytes) {
            channel.bytes += pages[next].bytes;
            channel.cpu_ns += pages[next].cpu_ns;
            channel.building++;
            next++;
        }
        channel.bytes = static_cast<double>(static_cast<uint64_t>(channel.bytes));
        channel.pages += channel.building;
        channel.built_at = now_ + channel.cpu_ns;
        balance_.taken(i, channel.building);
    }

    ChannelBalance &balance_;
    std::vector<Channel> channels_;
    std::vector<double> rates_;
    double now_ = 0;
};

std::vector<Page> pages_of(size_t n, Page page)
{
    return std::vector<Page>(n, page);
}

constexpr Page raw = {4112, 700};
constexpr Page zero = {0.25, 300};
constexpr Page zstd = {1400, 12000};

struct Ran {
    double spread_ns;  // between the first and the last channel's end
    double total_ns;
};

Ran runs(Links &links, const std::vector<Page> &pages)
{
    const double began = links.now();
    size_t next = 0;
    const std::vector<double> ends = links.run(pages, next);
    const auto [first, last] = std::minmax_element(ends.begin(), ends.end());
    return {*last - *first, *last - began};
}

double sum_of(const std::vector<double> &values)
{
    double sum = 0;
    for (double value : values) {
        sum += value;
    }
    return sum;
}

// What one least packet takes on the slowest link: it cannot end more evenly than that, and neither than
// a packet of the largest size that the estimate let through.
double one_packet_ns(const std::vector<double> &rates)
{
    return 64 * 1024 / *std::min_element(rates.begin(), rates.end()) * 1e9;
}

// Once the rates are known, every kind of page over every mix of links.
void test_channels_end_together()
{
    const std::vector<std::vector<double>> links = {
        {25e6, 6.25e6}, {125e6, 12.5e6}, {1e9, 100e6}, {100e6, 100e6, 10e6}, {50e6, 40e6, 30e6, 20e6}};
    for (const std::vector<double> &rates : links) {
        for (const Page &page : {raw, zstd}) {
            ChannelBalance balance;
            for (size_t i = 0; i < rates.size(); i++) {
                balance.add_channel();
            }
            Links world(balance, rates);
            (void)runs(world, pages_of(40000, page));  // measures
            const double cpu_ns = 20000 * page.cpu_ns / static_cast<double>(rates.size());
            for (int round = 0; round < 3; round++) {
                const Ran ran = runs(world, pages_of(20000, page));
                const double ideal_ns =
                    std::max(20000 * page.bytes / sum_of(rates) * 1e9, cpu_ns);
                T_CHECK(ran.spread_ns <= 2 * one_packet_ns(rates) + 5 * ms);
                T_CHECK(ran.total_ns <= 1.15 * ideal_ns + one_packet_ns(rates) + 5 * ms);
            }
        }
    }
}

// Before anything is known, too, a slow link only gets what it took until its first acknowledgements.
void test_a_slow_link_does_not_hold_the_first_round_back()
{
    ChannelBalance balance;
    balance.add_channel();
    balance.add_channel();
    const std::vector<double> rates = {100e6, 10e6};
    Links world(balance, rates);
    const Ran ran = runs(world, pages_of(100000, raw));
    T_CHECK(ran.total_ns <= 1.1 * 100000 * raw.bytes / 110e6 * 1e9);
    const double share = static_cast<double>(world.pages(1)) / 100000;
    T_CHECK(share > 0.07 && share < 0.13);
}

// The pages of a short last round, less than the slow link's buffers would take.
void test_a_short_round_goes_where_it_lands_first()
{
    ChannelBalance balance;
    balance.add_channel();
    balance.add_channel();
    Links world(balance, {100e6, 10e6});
    (void)runs(world, pages_of(40000, raw));
    const Ran ran = runs(world, pages_of(500, raw));
    T_CHECK(ran.total_ns <= 1.5 * 500 * raw.bytes / 110e6 * 1e9 + 2 * ms);
}

// A batch of cheap pages has more of them than one of dear pages.
void test_batches_are_sized_by_cost()
{
    const auto least_of = [](Page page) {
        ChannelBalance balance;
        balance.add_channel();
        balance.add_channel();
        Links world(balance, {100e6, 100e6});
        (void)runs(world, pages_of(20000, page));
        return balance.least_pages();
    };
    T_EQUAL(least_of(raw), 16);
    T_EQUAL(least_of(zstd), 16);
    const uint64_t zeros = least_of(zero);
    T_CHECK(zeros > 600 && zeros < 700);  // 200 us of reading
}

// Dense pages first and zeros last, or mixed: the estimate follows what was sent of late.
void test_mixed_pages()
{
    uint64_t state = 7;
    for (int mix = 0; mix < 3; mix++) {
        std::vector<Page> pages;
        for (size_t i = 0; i < 40000; i++) {
            const bool dense = mix == 0 ? i < 20000 : mix == 1 ? i >= 20000 : t_random(&state) % 2 == 0;
            pages.push_back(dense ? raw : zero);
        }
        ChannelBalance balance;
        balance.add_channel();
        balance.add_channel();
        const std::vector<double> rates = {50e6, 10e6};
        Links world(balance, rates);
        (void)runs(world, pages);
        const Ran ran = runs(world, pages);
        T_CHECK(ran.total_ns <= 1.25 * 20000 * raw.bytes / 60e6 * 1e9);
    }
}

// Under way on each channel is at most its part of the window, once the rates are known.
void test_the_window_is_shared_by_rate()
{
    ChannelBalance balance;
    balance.add_channel();
    balance.add_channel();
    {
        Links world(balance, {100e6, 10e6});
        (void)runs(world, pages_of(40000, raw));
    }
    balance.set_window(4400000);  // 40 ms of both
    Links world(balance, {100e6, 10e6});
    (void)runs(world, pages_of(40000, raw));
    T_CHECK(world.most_queued(1) <= 1.3 * 400000);
    T_CHECK(world.most_queued(0) <= 1.1 * 4000000);
}

// With nothing under way one batch may go however small the window is, and after that none.
void test_a_tiny_window_lets_one_batch_go()
{
    ChannelBalance balance;
    balance.add_channel();
    balance.set_window(1);
    const Share first = balance.share(0, 1000);
    T_EQUAL(first.pages, balance.least_pages());
    balance.taken(0, 16);
    T_EQUAL(balance.share(0, 984).pages, 0);
    T_EQUAL(balance.share(0, 984).patience_ns, -1);
    balance.sent(0, 16, 65600, 1000, 0);
    T_EQUAL(balance.share(0, 984).pages, 0);
    balance.acked(0, 65600, 1000000);
    T_CHECK(balance.share(0, 984).pages > 0);
}

// Whatever is measured, some channel may always take where no window holds it: that with the earliest end.
void test_somebody_may_always_take()
{
    uint64_t state = 3;
    for (int trial = 0; trial < 20000; trial++) {
        ChannelBalance balance;
        const size_t n = 1 + t_random(&state) % 8;
        int64_t now = 0;
        std::vector<uint64_t> in_flight(n);
        balance.set_window(0);
        for (size_t i = 0; i < n; i++) {
            balance.add_channel();
        }
        for (size_t event = t_random(&state) % 40; event > 0; event--) {
            const size_t i = t_random(&state) % n;
            now += static_cast<int64_t>(t_random(&state) % 30000000);
            if (in_flight[i] > 0 && t_random(&state) % 2 == 0) {
                balance.acked(i, in_flight[i], now);
                in_flight[i] = 0;
                continue;
            }
            const uint64_t pages = t_random(&state) % 300;
            const uint64_t nbytes = t_random(&state) % 2 == 0 ? 0 : t_random(&state) % (1 << 20);
            balance.taken(i, pages);
            balance.sent(i, pages, nbytes, t_random(&state) % 1000000, now);
            in_flight[i] += nbytes;
        }
        const uint64_t left = 1 + t_random(&state) % 100000;
        bool somebody = false;
        for (size_t i = 0; i < n; i++) {
            const Share share = balance.share(i, left);
            somebody = somebody || share.pages > 0;
            T_CHECK(share.pages > 0 || share.patience_ns > 0);
            T_CHECK(share.pages <= ChannelBalance::most_pages);
        }
        T_CHECK(somebody);
    }
}

}  // namespace

int main()
{
    test_channels_end_together();
    test_a_slow_link_does_not_hold_the_first_round_back();
    test_a_short_round_goes_where_it_lands_first();
    test_batches_are_sized_by_cost();
    test_mixed_pages();
    test_the_window_is_shared_by_rate();
    test_a_tiny_window_lets_one_batch_go();
    test_somebody_may_always_take();
    return T_PASS;
}
