// SPDX-License-Identifier: Apache-2.0
// How large a packet may be, by the channel's rate, the window and the bandwidth; and how many pages may be
// under way that take few bytes.
#include <chrono>
#include <cstdint>
#include <thread>

#include "tests/t_check.h"
#include "xfer/flow_control.hpp"

namespace {

using vmth::FlowControl;

constexpr uint64_t page = 4096;
constexpr uint64_t usual = 64 * page;
constexpr uint64_t most = 256 * page;

// What the channel carries in half a millisecond, in whole pages between the two sizes.
void test_a_fast_channel_has_larger_packets()
{
    const FlowControl flow(usual, most, page);
    T_EQUAL(flow.packet_payload(0), usual);
    T_EQUAL(flow.packet_payload(125000000), usual);
    T_EQUAL(flow.packet_payload(2000 * usual + 1999), usual);
    T_EQUAL(flow.packet_payload(2000 * (usual + page - 1)), usual);
    T_EQUAL(flow.packet_payload(2000 * (usual + page)), usual + page);
    T_EQUAL(flow.packet_payload(2000 * most), most);
    T_EQUAL(flow.packet_payload(UINT64_MAX), most);
}

void test_one_size_is_kept_at_any_rate()
{
    const FlowControl flow(usual, usual, page);
    T_EQUAL(flow.packet_payload(0), usual);
    T_EQUAL(flow.packet_payload(UINT64_MAX), usual);
}

// A quarter of the window, but not below 64 KiB; and what the bandwidth pays in half a millisecond, or, if
// that is less than the usual size, in 25.
void test_window_and_bandwidth_hold_fast_channels_too()
{
    FlowControl flow(usual, most, page);
    flow.set_window(2 * most);
    T_EQUAL(flow.packet_payload(UINT64_MAX), most / 2);
    flow.set_window(page);
    T_EQUAL(flow.packet_payload(UINT64_MAX), 16 * page);
    flow.set_window(0);
    T_EQUAL(flow.packet_payload(UINT64_MAX), most);
    flow.set_bandwidth(2000 * 100 * page);
    T_EQUAL(flow.packet_payload(UINT64_MAX), 100 * page);
    T_EQUAL(flow.packet_payload(0), usual);
    flow.set_bandwidth(40 * 100 * page);
    T_EQUAL(flow.packet_payload(UINT64_MAX), usual);
    flow.set_bandwidth(40 * 10 * page);
    T_EQUAL(flow.packet_payload(UINT64_MAX), 10 * page);
    flow.set_bandwidth(40);
    T_EQUAL(flow.packet_payload(UINT64_MAX), page);
}

// Whether a packet of `nbytes` may go out. One that may not is let go by a stop, so `flow` is of no use then.
bool goes_out(FlowControl &flow, uint64_t nbytes)
{
    std::thread stops([&flow] {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        flow.stop();
    });
    const bool went = flow.reserve(nbytes);
    stops.join();
    return went;
}

void test_pages_of_few_bytes_are_bounded_too()
{
    constexpr uint64_t many = FlowControl::most_made_pages;
    FlowControl full(usual, most, page);
    full.settle(0, 1000, many - 1);
    full.settle(0, 20, 1);
    T_CHECK(!goes_out(full, page));

    FlowControl landed(usual, most, page);
    landed.settle(0, 1000, many - 1);
    landed.settle(0, 20, 1);
    landed.acked(20, 1);
    T_CHECK(goes_out(landed, page));

    FlowControl bytes(usual, most, page);
    bytes.settle(0, 2 * many * page);
    T_CHECK(goes_out(bytes, page));
}

// As many more as a destination takes while a packet and its acknowledgement are under way: by the shortest of
// those trips, as the longer ones waited for something else.
void test_a_far_destination_is_sent_more_at_once()
{
    constexpr uint64_t far_ns = 100000000;
    constexpr uint64_t many =
        FlowControl::most_made_pages + FlowControl::made_pages_per_s / 10;
    for (uint64_t made : {many - 1, many}) {
        FlowControl flow(usual, most, page);
        flow.took(5 * far_ns);
        flow.took(far_ns);
        flow.took(2 * far_ns);
        flow.settle(0, 1000, made);
        T_EQUAL(goes_out(flow, page), made < many);
    }
    FlowControl lost(usual, most, page);
    lost.took(UINT64_MAX);
    lost.settle(0, 1000, FlowControl::most_made_pages + FlowControl::made_pages_per_s);
    T_CHECK(!goes_out(lost, page));
}

void test_who_waits_for_pages_goes_on_when_they_land()
{
    FlowControl flow(usual, most, page);
    flow.settle(0, 1000, FlowControl::most_made_pages);
    std::thread lands([&flow] { flow.acked(1000, FlowControl::most_made_pages); });
    T_CHECK(flow.reserve(page));
    lands.join();
    T_EQUAL(flow.in_flight(), 0);
}

}  // namespace

int main()
{
    test_pages_of_few_bytes_are_bounded_too();
    test_a_far_destination_is_sent_more_at_once();
    test_who_waits_for_pages_goes_on_when_they_land();
    test_a_fast_channel_has_larger_packets();
    test_one_size_is_kept_at_any_rate();
    test_window_and_bandwidth_hold_fast_channels_too();
    return T_PASS;
}
