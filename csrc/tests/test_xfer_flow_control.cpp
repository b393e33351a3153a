// SPDX-License-Identifier: Apache-2.0
// How large a packet may be: by the channel's rate, the window and the bandwidth.
#include <cstdint>

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

}  // namespace

int main()
{
    test_a_fast_channel_has_larger_packets();
    test_one_size_is_kept_at_any_rate();
    test_window_and_bandwidth_hold_fast_channels_too();
    return T_PASS;
}
