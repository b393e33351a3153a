// SPDX-License-Identifier: Apache-2.0
// The token bucket on a clock that only the test moves.
#include <cstdint>

#include "tests/t_check.h"
#include "xfer/token_bucket.hpp"

namespace {

using vmth::TokenBucket;

constexpr int64_t ms = 1000000;
constexpr uint64_t rate = 100000000;  // 100 kB a millisecond

void test_no_rate_never_waits()
{
    TokenBucket bucket;
    T_CHECK(!bucket.limited());
    bucket.take(int64_t{1} << 50);
    T_EQUAL(bucket.wait_ns(0), 0);
    T_EQUAL(bucket.wait_ns(ms), 0);
}

// A debt is waited for to the nanosecond above it.
void test_debt_is_paid_at_the_rate()
{
    TokenBucket bucket;
    bucket.set_rate(rate, 0);
    T_EQUAL(bucket.rate(), rate);
    T_EQUAL(bucket.wait_ns(0), 0);
    bucket.take(1000000);  // 10 ms
    T_EQUAL(bucket.wait_ns(0), 10 * ms + 1);
    T_EQUAL(bucket.wait_ns(4 * ms), 6 * ms + 1);
    T_EQUAL(bucket.wait_ns(10 * ms), 0);
    bucket.take(300000);
    bucket.take(-300000);  // reserved, and not used
    T_EQUAL(bucket.wait_ns(10 * ms), 0);
}

// However long nothing was sent, a burst is at most 20 ms of the rate; giving back adds no more.
void test_idle_time_saves_little()
{
    TokenBucket bucket;
    bucket.set_rate(rate, 0);
    T_EQUAL(bucket.wait_ns(3600 * 1000 * ms), 0);
    bucket.take(-5000000);
    bucket.take(2000000);  // 20 ms: all there is
    T_EQUAL(bucket.wait_ns(3600 * 1000 * ms), 0);
    bucket.take(100000);
    T_EQUAL(bucket.wait_ns(3600 * 1000 * ms), ms + 1);
}

// A debt of the old rate is at most 25 ms of the new one; none is owed without a rate.
void test_change_of_rate()
{
    TokenBucket bucket;
    bucket.set_rate(rate, 0);
    bucket.take(100000000);  // a second
    bucket.set_rate(rate / 100, 0);
    T_EQUAL(bucket.wait_ns(0), 25 * ms + 1);
    bucket.set_rate(0, 0);
    T_EQUAL(bucket.wait_ns(0), 0);
    bucket.set_rate(rate, 5 * ms);
    T_EQUAL(bucket.wait_ns(5 * ms), 0);
    T_EQUAL(bucket.packet_bytes(), rate / 40);
}

// Over any second, packets that wait their turn carry the rate, and one burst and one packet beyond it.
void test_long_run_keeps_the_rate()
{
    TokenBucket bucket;
    bucket.set_rate(rate, 0);
    int64_t now = 0;
    uint64_t sent = 0;
    while (now < 1000 * ms) {
        const int64_t wait = bucket.wait_ns(now);
        if (wait > 0) {
            now += wait;
            continue;
        }
        const uint64_t packet = bucket.packet_bytes();
        bucket.take(static_cast<int64_t>(packet));
        sent += packet;
    }
    T_CHECK(sent >= rate - rate / 40);
    T_CHECK(sent <= rate + rate / 50 + 2 * (rate / 40));
}

}  // namespace

int main()
{
    test_no_rate_never_waits();
    test_debt_is_paid_at_the_rate();
    test_idle_time_saves_little();
    test_change_of_rate();
    test_long_run_keeps_the_rate();
    return T_PASS;
}
