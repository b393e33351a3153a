// SPDX-License-Identifier: Apache-2.0
// Whole transfers between a sender and a receiver: channels, forms, windows, live writers, huge holes.
#include <sys/wait.h>

#include <csignal>

#include <atomic>
#include <thread>

#include "tests/xfer_fixture.hpp"

using namespace t;

namespace {

FdPair tcp4()
{
    return tcp_pair(AF_INET);
}

FdPair tcp6()
{
    return tcp_pair(AF_INET6);
}

void run_rounds(Pair &pair)
{
    for (uint32_t round = 0; round < 3; round++) {
        pair.source.randomize(round + 1);
        memset(pair.source.page(5), 0, 3 * page_bytes);
        pair.send_all(round);
        T_CHECK(pair.sender->barrier(round, 0));
        T_CHECK(pair.same());
    }
    T_EQUAL(pair.sender->in_flight(), 0);
    T_EQUAL(pair.sender->counters().zero_pages.get(), 9);
    T_EQUAL(pair.sender->counters().normal_pages.get(), 3 * (pair.source.npages() - 3));
    T_EQUAL(pair.sender->counters().acked_bytes.get(), pair.sender->counters().wire_bytes.get());
    pair.finish();
}

void test_rounds_over_every_kind_of_socket()
{
    for (unsigned channels : {1u, 3u, 64u}) {
        for (FdPair (*connect)() : {unix_pair, tcp4, tcp6}) {
            if (!connect().first) {
                fprintf(stderr, "no loopback of one family\n");
                continue;
            }
            Pair pair(700, channels, connect);
            run_rounds(pair);
        }
    }
}

void test_digest_off()
{
    vmth::SenderOptions options;
    options.digest = false;
    Pair pair(700, 2, unix_pair, options);
    run_rounds(pair);
    T_EQUAL(pair.sender->hashes().total().pages, 0);
    pair.receiver->close();
    T_CHECK(pair.source.equals(pair.destination));
}

void test_small_packets_window_and_bandwidth_that_change()
{
    Pair pair(2000, 2);
    pair.source.randomize(1);
    pair.sender->set_window(1);  // smaller than any packet: one at a time
    pair.sender->set_bandwidth(200u << 20);
    const uint64_t windows[] = {1, 100000, 5000000, 0};
    const uint64_t rates[] = {200u << 20, 0, 500u << 20, 0};
    for (uint64_t page = 0; page < 2000; page += 100) {
        pair.sender->send(0, page, 100, pair.bits.data(), pair.bits.size(), 0);
        pair.sender->set_window(windows[page / 100 % 4]);
        pair.sender->set_bandwidth(rates[page / 100 % 4]);
    }
    T_CHECK(pair.sender->barrier(0, 0));
    T_CHECK(pair.same());
    pair.finish();
}

// The bitmap decides, and only within the range; bits past it are ignored.
void test_range_and_bitmap()
{
    Pair pair(200, 1);
    pair.source.randomize(1);
    std::vector<uint64_t> bits(4);
    for (uint64_t page = 0; page < 200; page += 3) {
        bits[page / 64] |= uint64_t{1} << (page % 64);
    }
    pair.sender->send(0, 10, 100, bits.data(), bits.size(), 0);
    T_CHECK(pair.sender->barrier(0, 0));
    T_CHECK(pair.digests_equal());
    for (uint64_t page = 0; page < 200; page++) {
        bool sent = page >= 10 && page < 110 && page % 3 == 0;
        T_EQUAL(memcmp(pair.source.page(page), pair.destination.page(page), page_bytes) == 0, sent);
    }
}

void test_page_twice_between_barriers_is_our_callers_mistake()
{
    Pair pair(200, 1);
    pair.sender->send(0, 0, 100, pair.bits.data(), pair.bits.size(), 0);
    T_CHECK(expect_error([&] {
                pair.sender->send(0, 99, 2, pair.bits.data(), pair.bits.size(), 0);
            }).kind() == ErrorKind::usage);
    T_CHECK(expect_error([&] {
                pair.sender->send_told(VMTH_FORM_HOLE, 0, {{150, 2}, {151, 1}}, 0);
            }).kind() == ErrorKind::usage);
    T_CHECK(pair.sender->barrier(0, 0));
    pair.sender->send(0, 99, 2, pair.bits.data(), pair.bits.size(), 1);
    T_CHECK(pair.sender->barrier(1, 0));
    pair.finish();
}

void test_free_pages_leave_the_digest()
{
    Pair pair(100, 2);
    pair.source.randomize(1);
    pair.send_all(0);
    T_CHECK(pair.sender->barrier(0, 0));
    pair.sender->send_told(VMTH_FORM_FREE, 0, {{10, 20}, {50, 1}}, 1);
    T_CHECK(pair.sender->barrier(1, 0));
    T_EQUAL(pair.sender->hashes().total().pages, 79);
    T_CHECK(pair.digests_equal());
    pair.finish();
}

// A hole of 8 GiB costs packets, not pages: nothing is touched at either end.
void test_huge_holes()
{
    constexpr uint64_t npages = uint64_t{8} << 18;
    Pair pair(npages, 2, unix_pair, {}, MAP_NORESERVE, true);
    pair.sender->send_told(VMTH_FORM_HOLE, 0, {{0, npages - 1}}, 0);
    pair.source.page(npages - 1)[17] = 3;
    pair.sender->send(0, npages - 1, 1, pair.bits.data(), pair.bits.size(), 0);
    T_CHECK(pair.sender->barrier(0, 0));
    T_CHECK(pair.digests_equal());
    T_EQUAL(pair.receiver->hashes().total().pages, npages);
    T_EQUAL(pair.destination.page(npages - 1)[17], 3);
    T_CHECK(pair.sender->counters().wire_bytes.get() < 64 * 1024);
    unsigned char resident = 0;
    T_EQUAL(mincore(pair.destination.page(npages / 2 - 1), page_bytes, &resident), 0);
    T_EQUAL(resident & 1, 0);
    pair.sender->finish();  // nothing is compared: reading would allocate it
}

// Holes and zero pages over memory that held something.
void test_zeros_are_written_where_memory_was_used()
{
    Pair pair(300, 1, nullptr);
    pair.destination.randomize(9);
    pair.connect_channels(1, unix_pair);
    pair.sender->send_told(VMTH_FORM_HOLE, 0, {{0, 100}}, 0);
    pair.sender->send(0, 100, 200, pair.bits.data(), pair.bits.size(), 0);
    T_CHECK(pair.sender->barrier(0, 0));
    T_CHECK(pair.same());
    T_EQUAL(pair.receiver->counters().hole_pages.get(), 100);
    T_EQUAL(pair.receiver->counters().zero_pages.get(), 200);
}

// Writes to one page after it was hashed and before its packet is sent.
struct Tearing {
    static ssize_t sendmsg(void *ctx, int fd, const msghdr *msg, int flags)
    {
        auto *self = static_cast<Tearing *>(ctx);
        if (self->page != nullptr && msg->msg_iov[0].iov_len > VMTH_PACKET_HEADER_BYTES) {
            self->page[8]++;
            self->page = nullptr;
        }
        const vmth_sock_ops *system = vmth_sock_system_ops();
        return system->sendmsg(system->ctx, fd, msg, flags);
    }
    uint8_t *page = nullptr;
};

// One torn page in a packet of 16, some of them zero: only what is dirty goes again; with no dirty page to
// explain the digest, every page that had content.
void test_torn_page_alone_goes_again()
{
    for (bool dirty : {true, false}) {
        Tearing tearing;
        vmth_sock_ops ops = *vmth_sock_system_ops();
        ops.sendmsg = Tearing::sendmsg;
        ops.ctx = &tearing;
        vmth::SenderOptions options;
        options.ops = &ops;
        Pair pair(16, 1, unix_pair, options);
        pair.source.randomize(1);
        memset(pair.source.page(5), 0, 3 * page_bytes);
        tearing.page = pair.source.page(11);
        pair.send_all(0);
        T_CHECK(pair.sender->barrier(0, 0));
        T_EQUAL(pair.sender->counters().packets.get(), 1);
        T_EQUAL(pair.sender->counters().torn_packets.get(), 1);
        T_CHECK(!pair.digests_equal());
        // A zero page that was dirtied since explains nothing: its content was told.
        uint64_t bits = dirty ? uint64_t{1} << 11 : uint64_t{1} << 6;
        T_EQUAL(pair.sender->take_missed({&bits}, {1}), dirty ? 0 : 13);
        const uint64_t normal = ((uint64_t{1} << 16) - 1) & ~(uint64_t{7} << 5);
        T_EQUAL(bits, dirty ? uint64_t{1} << 11 : normal | uint64_t{1} << 6);
        T_EQUAL(pair.sender->counters().missed_pages.get(), dirty ? 0 : 13);
        pair.sender->send(0, 0, 16, &bits, 1, 1);
        T_CHECK(pair.sender->barrier(1, 0));
        T_CHECK(pair.same());
        bits = 0;
        T_EQUAL(pair.sender->take_missed({&bits}, {1}), 0);
        pair.finish();
    }
}

// Another process writes while pages are sent. Torn pages come back as missed (or land as some moment's
// content); after it stopped, one more pass makes both ends equal.
void test_concurrent_writer()
{
    Pair pair(512, 2, nullptr);  // forked before there are threads
    pair.source.randomize(1);
    pid_t writer = fork();
    T_CHECK(writer >= 0);
    if (writer == 0) {
        volatile uint8_t *bytes = pair.source.page(0);
        for (uint64_t state = 5;;) {
            uint64_t at = t_random(&state) % (512 * page_bytes);
            bytes[at] = static_cast<uint8_t>(bytes[at] + 1);
        }
    }
    pair.connect_channels(2, unix_pair);
    std::vector<uint64_t> missed(8);
    uint64_t taken = 0;
    for (uint32_t round = 0; round < 40; round++) {
        pair.send_all(round);
        T_CHECK(pair.sender->barrier(round, 0));
        taken += pair.sender->take_missed({missed.data()}, {missed.size()});
        // What was not reported as missed has equal digests on both ends.
        auto ours = pair.sender->hashes().copy(0, 0, 512);
        auto theirs = pair.receiver->hashes().copy(0, 0, 512);
        for (uint64_t page = 0; page < 512; page++) {
            bool again = ((missed[page / 64] >> (page % 64)) & 1) != 0;
            T_CHECK(again || (ours[page].lo == theirs[page].lo && ours[page].hi == theirs[page].hi));
        }
        std::fill(missed.begin(), missed.end(), 0);
    }
    kill(writer, SIGKILL);
    T_EQUAL(waitpid(writer, nullptr, 0), writer);
    T_EQUAL(pair.sender->counters().missed_pages.get(), taken);
    pair.send_all(40);
    T_CHECK(pair.sender->barrier(40, 0));
    T_CHECK(pair.same());
    T_EQUAL(pair.sender->take_missed({missed.data()}, {missed.size()}), 0);
    fprintf(stderr, "torn packets: %llu\n",
            static_cast<unsigned long long>(pair.sender->counters().torn_packets.get()));
    pair.finish();
}

void test_subdigests_find_a_page()
{
    Pair pair(256, 1);
    pair.source.randomize(1);
    pair.send_all(0);
    T_CHECK(pair.sender->barrier(0, 0));
    auto sums = pair.sender->hashes().subdigests(0, 0, 256, 100);
    auto theirs = pair.receiver->hashes().subdigests(0, 0, 256, 100);
    T_EQUAL(sums.size(), 3);
    for (size_t i = 0; i < sums.size(); i++) {
        T_CHECK(sums[i].lo == theirs[i].lo && sums[i].hi == theirs[i].hi);
    }
    T_CHECK(expect_error([&] { pair.sender->hashes().copy(0, 200, 100); }).kind() == ErrorKind::usage);
    T_CHECK(expect_error([&] { pair.sender->hashes().subdigests(1, 0, 1, 1); }).kind() ==
            ErrorKind::usage);
}

// Refused for want of a channel, or because its runs overlap: then the pages may be sent.
// The digest is that of all that was queued as soon as it was sent; the other end knows by itself when
// it has landed.
void test_what_was_sent_and_what_has_landed()
{
    for (const unsigned channels : {1u, 3u}) {
        Pair pair(1000, channels, [] { return tcp_pair(); });
        pair.source.randomize(1);
        T_CHECK(!pair.receiver->wait_barriers(1, 1));
        T_CHECK(pair.receiver->wait_barriers(0, 1));
        const uint32_t names[] = {0, 1, 1, 7};  // a round may have more than one
        for (uint64_t count = 1; count <= 4; count++) {
            const uint32_t round = names[count - 1];
            if (count != 3) {  // one without a page
                pair.send_all(round);
            }
            T_CHECK(pair.sender->sent(round, 0));
            T_CHECK(pair.sender->sent(round, 0));
            T_EQUAL(pair.sender->barriers(), count);
            T_EQUAL(pair.sender->hashes().total().pages, 1000);
            T_CHECK(pair.receiver->wait_barriers(count, 0));
            T_CHECK(pair.digests_equal());
            T_CHECK(expect_error([&] { pair.sender->sent(round + 1, 0); }).kind() ==
                    ErrorKind::usage);
            T_CHECK(expect_error([&] { pair.send_all(round); }).kind() == ErrorKind::usage);
            T_CHECK(pair.sender->barrier(round, 0));
            T_EQUAL(pair.sender->barriers(), count);
            T_CHECK(pair.sender->path_info().base_rtt_ns > 0);
            T_CHECK(!pair.receiver->wait_barriers(count + 1, 1));
        }
        pair.sender->finish();
        T_CHECK(pair.receiver->wait(0));
        T_CHECK(pair.receiver->wait_barriers(4, 0));
        T_CHECK(expect_error([&] { pair.receiver->wait_barriers(5, 0); }).kind() ==
                ErrorKind::protocol);
    }
}

void test_a_refused_send_claims_nothing()
{
    Pair pair(128, 1, nullptr);
    pair.source.randomize(1);
    expect_error([&] { pair.sender->send(0, 0, 64, pair.bits.data(), pair.bits.size(), 0); });
    expect_error([&] { pair.sender->send_told(VMTH_FORM_HOLE, 0, {{64, 32}}, 0); });
    pair.connect_channels(1, unix_pair);
    const TransferError error = expect_error(
        [&] { pair.sender->send_told(VMTH_FORM_HOLE, 0, {{96, 16}, {64, 33}}, 0); });
    T_CHECK(error.kind() == ErrorKind::usage && strstr(error.what(), "already sent") != nullptr);
    pair.send_all(0);
    T_CHECK(pair.sender->barrier(0, 0));
    T_CHECK(pair.destination.equals(pair.source));
}

// By another thread, from the first on.
void test_channels_are_counted_while_they_are_added()
{
    constexpr unsigned most = 32;
    for (int turn = 0; turn < 10; turn++) {
        Pair pair(64, most, nullptr);
        std::atomic<bool> done{false};
        std::thread counting([&] {
            while (!done.load()) {
                T_CHECK(pair.sender->channel_infos().size() <= most);
            }
        });
        pair.connect_channels(most, unix_pair);
        done.store(true);
        counting.join();
        T_EQUAL(pair.sender->channel_infos().size(), most);
    }
}

}  // namespace

int main()
{
    test_what_was_sent_and_what_has_landed();
    test_a_refused_send_claims_nothing();
    test_channels_are_counted_while_they_are_added();
    test_rounds_over_every_kind_of_socket();
    test_digest_off();
    test_small_packets_window_and_bandwidth_that_change();
    test_range_and_bitmap();
    test_page_twice_between_barriers_is_our_callers_mistake();
    test_free_pages_leave_the_digest();
    test_huge_holes();
    test_zeros_are_written_where_memory_was_used();
    test_torn_page_alone_goes_again();
    test_concurrent_writer();
    test_subdigests_find_a_page();
    return T_PASS;
}
