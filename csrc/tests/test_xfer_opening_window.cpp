// SPDX-License-Identifier: Apache-2.0
// The window that opens by itself, over links that are only numbers.
#include <algorithm>
#include <cstdint>
#include <deque>
#include <vector>

#include "tests/t_check.h"
#include "xfer/channel_balance.hpp"
#include "xfer/opening_window.hpp"

namespace {

using vmth::ChannelBalance;
using vmth::OpeningWindow;
using vmth::Share;

constexpr int64_t ms = 1000000;
constexpr uint64_t kib = 1024;
constexpr uint64_t page_bytes = 4096;
constexpr uint64_t header_bytes = 80;
constexpr uint64_t socket_bytes = 64 * 1024 * kib;

// Channels of one sender, each on a link of its own that takes all at once, carries it at its rate and
// tells half a round trip later. Packets go out as soon as there is room.
class Links {
public:
    struct Line {
        double bytes_per_s;
        int64_t trip_ns;
    };

    explicit Links(std::vector<Line> lines) : lines_(std::move(lines)), channels_(lines_.size())
    {
        for (size_t i = 0; i < lines_.size(); i++) {
            balance.add_channel();
        }
    }

    ChannelBalance balance;

    // Endless pages of random content, until then.
    void run(int64_t until_ns)
    {
        while (now_ns_ < until_ns) {
            int64_t next_ns = until_ns;
            for (size_t i = 0; i < lines_.size(); i++) {
                send(i);
                if (!channels_[i].under_way.empty()) {
                    next_ns = std::min(next_ns, channels_[i].under_way.front().acked_ns);
                }
            }
            now_ns_ = next_ns;
            for (size_t i = 0; i < lines_.size(); i++) {
                land(i);
            }
        }
    }

    // Most that was under way, and what has landed.
    uint64_t most(size_t i) const { return channels_[i].most; }
    double landed(size_t i) const { return static_cast<double>(channels_[i].landed); }

private:
    struct Packet {
        uint64_t nbytes;
        int64_t acked_ns;
    };
    struct Channel {
        std::deque<Packet> under_way;
        uint64_t in_flight = 0;
        uint64_t most = 0;
        uint64_t landed = 0;
        int64_t free_ns = 0;  // its link is busy until then
    };

    void send(size_t i)
    {
        Channel &channel = channels_[i];
        while (channel.in_flight < socket_bytes) {
            const Share share = balance.share(i, 1 << 20);
            if (share.pages == 0) {
                break;
            }
            const uint64_t pages = std::min<uint64_t>(share.pages, 256);
            const uint64_t nbytes = pages * page_bytes + header_bytes;
            balance.taken(i, pages);
            balance.sent(i, pages, nbytes, pages * 700, now_ns_);
            const double ns = static_cast<double>(nbytes) * 1e9 / lines_[i].bytes_per_s;
            channel.free_ns = std::max(channel.free_ns, now_ns_) + static_cast<int64_t>(ns);
            channel.under_way.push_back({nbytes, channel.free_ns + lines_[i].trip_ns});
            channel.in_flight += nbytes;
            channel.most = std::max(channel.most, channel.in_flight);
        }
    }

    void land(size_t i)
    {
        Channel &channel = channels_[i];
        while (!channel.under_way.empty() && channel.under_way.front().acked_ns <= now_ns_) {
            const uint64_t nbytes = channel.under_way.front().nbytes;
            channel.under_way.pop_front();
            channel.in_flight -= nbytes;
            channel.landed += nbytes;
            balance.acked(i, nbytes, now_ns_);
        }
    }

    std::vector<Line> lines_;
    std::vector<Channel> channels_;
    int64_t now_ns_ = 0;
};

// What is queued before the choice of forms has looked often is little: 40 ms of the link, or five round trips more.
void test_a_slow_link_is_not_filled()
{
    for (const double bytes_per_s : {1.25e5, 1.25e6, 12.5e6, 25e6}) {
        for (const int64_t trip_ns : {ms / 20, ms, 10 * ms}) {
            Links links({{bytes_per_s, trip_ns}});
            links.run(900 * ms);
            const double little = bytes_per_s * static_cast<double>(40 * ms + 5 * trip_ns) / 1e9;
            T_CHECK(static_cast<double>(links.most(0)) <= std::max<double>(512 * kib, little));
        }
    }
}

// And it is not slower for that.
void test_a_slow_link_is_used()
{
    for (const size_t channels : {1u, 2u, 8u}) {
        Links links(std::vector<Links::Line>(channels, {12.5e6 / static_cast<double>(channels), ms / 2}));
        links.run(900 * ms);
        double landed = 0;
        uint64_t most = 0;
        for (size_t i = 0; i < channels; i++) {
            landed += links.landed(i);
            most += links.most(i);
        }
        T_CHECK(landed > 0.96 * 0.9 * 12.5e6);
        T_CHECK(most <= (256 * channels + 256) * kib);
    }
}

void test_a_fast_link_opens_it_at_once()
{
    Links links({{4e9, ms / 10}});
    links.run(20 * ms);
    T_CHECK(links.most(0) >= socket_bytes);
}

// 5 ms of the link at least, however far it is: bandwidth x round trip fits into it soon.
void test_a_link_that_is_far_is_filled()
{
    for (const Links::Line &far : std::vector<Links::Line>{
             {125e6, ms / 5}, {125e6, 20 * ms}, {125e6, 100 * ms}, {1.25e9, 50 * ms}}) {
        for (const size_t channels : {1u, 2u, 8u}) {
            const double bytes_per_s = far.bytes_per_s / static_cast<double>(channels);
            Links links(std::vector<Links::Line>(channels, {bytes_per_s, far.trip_ns}));
            links.run(20 * ms + 10 * far.trip_ns);
            const double filled = bytes_per_s * static_cast<double>(far.trip_ns + 5 * ms) / 1e9;
            for (size_t i = 0; i < channels; i++) {
                T_CHECK(static_cast<double>(links.most(i)) >= std::min<double>(filled, socket_bytes));
            }
        }
    }
}

// Each channel opens for itself: a slow one neither fills nor holds the others back.
void test_channels_that_are_not_alike()
{
    for (const double slow : {1e6, 10e6}) {
        Links links({{400e6, ms / 5}, {slow, ms / 5}});
        links.run(500 * ms);
        T_CHECK(links.landed(0) > 0.9 * 0.5 * 400e6);
        T_CHECK(links.landed(1) > 0.8 * 0.5 * slow);
        T_CHECK(links.most(1) <= 512 * kib);
    }
}

// What was sent before the first pages tells of no round trip: neither a barrier nor told pages, if
// they are acknowledged just after those were sent. (With a trip of 1 ms, 100 ms would never be soon.)
void test_a_trip_is_that_of_pages()
{
    OpeningWindow window;
    window.sent(300, 0);
    window.acked(200, 1, 1 * ms);
    window.acked(100, 1, 2 * ms);
    window.acked(64 * kib, 1, 100 * ms);
    window.acked(OpeningWindow::first_bytes, 1, 200 * ms);
    T_EQUAL(window.bytes(1), 2 * OpeningWindow::first_bytes);
    ChannelBalance balance;
    balance.add_channel();
    balance.sent(0, 0, 64, 0, 0);  // a barrier
    balance.acked(0, 64, 1 * ms);
    T_CHECK(!balance.opening(0, 500 * ms));
    balance.taken(0, 16);
    balance.sent(0, 16, 65616, 1000, 500 * ms);
    T_CHECK(balance.opening(0, 900 * ms));
    balance.acked(0, 65616, 900 * ms);  // the trip takes 400 ms
    T_CHECK(balance.opening(0, 1300 * ms));
    T_CHECK(!balance.opening(0, 1600 * ms));  // long enough for a link that is no slower than its trip
    ChannelBalance told;
    told.add_channel();
    told.taken(0, 16);
    told.sent(0, 16, 0, 1000, 0);  // pages that were the same: no packet
    T_CHECK(!told.opening(0, 1 * ms));
    told.sent(0, 0, 300, 0, 10 * ms);
    told.taken(0, 16);
    told.sent(0, 16, 65616, 1000, 10 * ms);
    told.acked(0, 300, 11 * ms);
    told.acked(0, 65616, 110 * ms);
    T_CHECK(told.opening(0, 260 * ms));  // 5 ms + 1.5 x 100 ms after the trip
}

void test_it_begins_small()
{
    const OpeningWindow window;
    T_EQUAL(window.bytes(1), 256 * kib);
    T_EQUAL(window.bytes(2), 128 * kib);
    T_EQUAL(window.bytes(8), 128 * kib);
}

// What lands says nothing of the link while the window grows, and does once the link holds it.
void test_it_is_known_when_the_link_holds_it()
{
    for (const Links::Line &far :
         std::vector<Links::Line>{{1.25e9, 20 * ms}, {1.25e9, 100 * ms}, {1e8, 150 * ms}}) {
        Links links({far, far});
        bool opened = false;
        for (int64_t now = 25 * ms; now < 900 * ms; now += 25 * ms) {
            links.run(now);
            opened = opened || links.most(0) >= 32 * 128 * kib;
            T_CHECK(opened || links.balance.opening(0, now));
        }
    }
    for (const double bytes_per_s : {1.25e6, 6.25e6, 12.5e6}) {
        Links links({{bytes_per_s, ms / 2}, {bytes_per_s, ms / 2}});
        links.run(400 * ms);
        T_CHECK(!links.balance.opening(0, 400 * ms) && !links.balance.opening(1, 400 * ms));
    }
    Links near({{4e9, ms / 10}});
    near.run(50 * ms);
    T_CHECK(!near.balance.opening(0, 50 * ms));
}

// Whatever it acknowledges, and if the way has become longer since: it is a matter of the first second.
void test_it_is_over_after_a_second()
{
    OpeningWindow window;
    window.sent(0, 0);
    window.acked(1, 1, ms / 10);
    for (int64_t now = 50 * ms; now <= 1000 * ms; now += 50 * ms) {
        window.acked(OpeningWindow::first_bytes, 1, now);
        T_EQUAL(window.bytes(1), OpeningWindow::first_bytes);
    }
    window.acked(1, 1, 1001 * ms);
    T_EQUAL(window.bytes(1), 0);
}

// A channel that has nothing under way may always send one packet, and then waits for its
// acknowledgement only.
void test_nothing_under_way_is_never_stuck()
{
    uint64_t state = 11;
    for (int trial = 0; trial < 2000; trial++) {
        ChannelBalance balance;
        const size_t n = 1 + t_random(&state) % 8;
        std::vector<uint64_t> in_flight(n);
        for (size_t i = 0; i < n; i++) {
            balance.add_channel();
        }
        int64_t now = 0;
        for (size_t event = t_random(&state) % 100; event > 0; event--) {
            const size_t i = t_random(&state) % n;
            now += static_cast<int64_t>(t_random(&state) % 30000000);
            const Share share = balance.share(i, 1 << 20);
            T_CHECK(share.pages > 0 || share.patience_ns > 0 || in_flight[i] > 0);
            if (in_flight[i] > 0 && (share.pages == 0 || t_random(&state) % 2 == 0)) {
                balance.acked(i, in_flight[i], now);
                in_flight[i] = 0;
            } else {
                const uint64_t pages = t_random(&state) % 4 == 0 ? 0 : share.pages;
                const uint64_t nbytes = pages * page_bytes + 64;
                balance.taken(i, pages);
                balance.sent(i, pages, nbytes, pages * 700, now);
                in_flight[i] += nbytes;
            }
        }
    }
}

// Also for a channel that comes later.
void test_until_a_window_is_set()
{
    ChannelBalance balance;
    balance.add_channel();
    T_EQUAL(balance.share(0, 1 << 20).pages, OpeningWindow::first_bytes / 4 / page_bytes);
    balance.set_window(0);
    T_EQUAL(balance.share(0, 1 << 20).pages, ChannelBalance::most_pages);
    ChannelBalance later;
    later.set_window(0);
    later.add_channel();
    T_EQUAL(later.share(0, 1 << 20).pages, ChannelBalance::most_pages);
}

}  // namespace

int main()
{
    test_a_slow_link_is_not_filled();
    test_a_slow_link_is_used();
    test_a_fast_link_opens_it_at_once();
    test_a_link_that_is_far_is_filled();
    test_channels_that_are_not_alike();
    test_a_trip_is_that_of_pages();
    test_it_begins_small();
    test_it_is_known_when_the_link_holds_it();
    test_it_is_over_after_a_second();
    test_nothing_under_way_is_never_stuck();
    test_until_a_window_is_set();
    return T_PASS;
}
