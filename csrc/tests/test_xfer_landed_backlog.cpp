// SPDX-License-Identifier: Apache-2.0
// Originals that landed before copies were looked for.
#include "xfer/landed_backlog.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "tests/xfer_fixture.hpp"

using namespace t;

namespace {

constexpr uint32_t same = vmth::form_bit(VMTH_FORM_SAME);
constexpr uint32_t dedup = vmth::form_bit(VMTH_FORM_DEDUP);

// These forms are agreed on, and none is on.
struct Agreed : Pair {
    Agreed(uint64_t npages, unsigned channels, uint32_t agreed)
        : Pair(npages, channels, unix_pair, with_forms(agreed))
    {
    }
    uint64_t copies() const { return sender->counters().forms[VMTH_FORM_DEDUP].pages.get(); }
};

// Whoever looks for copies only from the middle of a round on finds what went before, up to the last
// barrier; behind it nothing older is looked for, nor is anything wrong.
void test_originals_from_before_dedup_was_on()
{
    Agreed pair(256, 1, dedup);
    pair.source.randomize(1);
    for (uint64_t page = 0; page < 32; page++) {
        copy_page(pair.source, 128 + page, page);       // in the same round
        copy_page(pair.source, 192 + page, 32 + page);  // in the next one
    }
    uint64_t sent = 0;
    const auto send = [&](uint64_t page, uint64_t npages, uint32_t round) {
        pair.sender->send(0, page, npages, pair.bits.data(), pair.bits.size(), round);
        sent += npages;
        for (;;) {  // until it has landed, without a barrier
            const vmth::ChannelInfo info = pair.sender->channel_infos()[0];
            if (info.pages == sent && info.acked_bytes == info.wire_bytes) {
                return;
            }
            std::this_thread::yield();
        }
    };
    send(0, 32, 0);
    pair.sender->set_forms({dedup, 1});
    send(64, 1, 0);  // its acknowledgement takes the others with it
    send(66, 1, 0);  // a packet is counted before it is judged: with this one, those before it are
    send(128, 32, 0);
    T_CHECK(pair.copies() >= 30);  // a full bucket may have lost one
    pair.sender->set_forms({});
    send(32, 32, 0);
    T_CHECK(pair.sender->barrier(0, 0));
    pair.sender->set_forms({dedup, 1});
    const uint64_t before = pair.copies();
    send(65, 1, 1);
    send(192, 32, 1);
    T_CHECK(pair.sender->barrier(1, 0));
    T_EQUAL(pair.copies(), before);
    T_EQUAL(pair.sender->counters().missed_pages.get(), 0);
    pair.sender->send(0, 66, 62, pair.bits.data(), pair.bits.size(), 2);
    pair.sender->send(0, 160, 32, pair.bits.data(), pair.bits.size(), 2);
    pair.sender->send(0, 224, 32, pair.bits.data(), pair.bits.size(), 2);
    T_CHECK(pair.sender->barrier(2, 0));
    T_CHECK(pair.same());
    pair.finish();
}

void test_a_backlog_is_bounded()
{
    vmth::LandedBacklog backlog;
    backlog.add(1, {{5, 7}, {20, 1}});
    backlog.add(2, {{0, vmth::LandedBacklog::most_pages - 8}});
    backlog.add(3, {{100, 1}});
    backlog.add(3, {});
    std::vector<uint32_t> blocks;
    uint64_t npages = 0;
    backlog.take([&](uint32_t block, const std::vector<vmth_run> &runs) {
        blocks.push_back(block);
        for (const vmth_run &run : runs) {
            npages += run.npages;
        }
    });
    T_CHECK(blocks == (std::vector<uint32_t>{1, 2}));
    T_EQUAL(npages, vmth::LandedBacklog::most_pages);
    T_EQUAL(backlog.npages(), 0);
    backlog.add(3, {{100, 1}});
    T_EQUAL(backlog.npages(), 1);
    backlog.clear();
    T_EQUAL(backlog.npages(), 0);
}

// Forms that change while pages go out, as the choice of forms changes them: the readers take what was
// put off while workers hash.
void test_forms_that_change_on_the_way()
{
    Agreed pair(4096, 3, same | dedup);
    std::atomic<bool> ended{false};
    std::thread tuner([&] {
        for (unsigned i = 0; !ended.load(); i++) {
            pair.sender->set_forms({i % 2 != 0 ? dedup : 0, 1});
            std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
    });
    uint64_t state = 3;
    pair.source.randomize(1);
    for (uint32_t round = 0; round < 12; round++) {
        for (unsigned i = 0; i < 1024; i++) {
            copy_page(pair.source, t_random(&state) % 4096, t_random(&state) % 4096);
            pair.source.page(t_random(&state) % 4096)[9]++;
        }
        pair.send_all(round);
        T_CHECK(pair.sender->barrier(round, 0));
    }
    ended.store(true);
    tuner.join();
    T_CHECK(pair.copies() > 0);
    T_EQUAL(pair.sender->counters().torn_packets.get(), 0);
    std::vector<uint64_t> words(64);
    while (pair.sender->take_missed({words.data()}, {words.size()}) > 0) {
        pair.sender->set_forms({});
        pair.send_all(12);
        T_CHECK(pair.sender->barrier(12, 0));
        std::fill(words.begin(), words.end(), 0);
    }
    T_CHECK(pair.same());
    pair.finish();
}

}  // namespace

int main()
{
    test_originals_from_before_dedup_was_on();
    test_a_backlog_is_bounded();
    test_forms_that_change_on_the_way();
    return T_PASS;
}
