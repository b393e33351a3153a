// SPDX-License-Identifier: Apache-2.0
// reuse end to end: what files of the destination save.
#include "tests/reuse_fixture.hpp"

using namespace t;

namespace {

// ---- what it saves ----------------------------------------------------------------------------------

void test_what_a_file_has_is_not_sent()
{
    for (size_t packed : {0u, 1u, 7u, 64u}) {
        for (unsigned channels : {1u, 3u}) {
            Memory before(512);
            fill(before, 1);
            const Stored file(pages_of(before, 0, 512), packed);
            ReusePair pair(512, reuse, {file.source()}, channels);
            for (uint64_t page = 0; page < 512; page++) {  // in places of their own
                memcpy(pair.source.page(page), before.page(511 - page), page_bytes);
            }
            pair.source.page(100)[5]++;
            pair.round(0);
            T_EQUAL(pair.reused(), 511);
            T_EQUAL(pair.receiver->reused()[0], 511);
            T_CHECK(pair.sender->counters().wire_bytes.get() <
                    511 * 20 + page_bytes + channels * 1000);
            T_CHECK(10 * pair.filter_bytes < 512 * 24);
            T_EQUAL(pair.repair(1), 0);
            pair.finish();
        }
    }
}

void test_several_files_are_asked_in_their_order()
{
    Memory before(192);
    fill(before, 1);
    const Stored first(pages_of(before, 0, 128));
    const Stored second(pages_of(before, 64, 128), 16);
    ReusePair pair(192, reuse, {first.source(), second.source()});
    memcpy(pair.source.page(0), before.page(0), 192 * page_bytes);
    pair.round(0);
    T_EQUAL(pair.reused(), 192);
    T_EQUAL(pair.receiver->reused()[0], 128);
    T_EQUAL(pair.receiver->reused()[1], 64);
    // What the first has no more, the second may have.
    T_EQUAL(ftruncate(first.fd(), 0), 0);
    pair.round(1);
    T_EQUAL(pair.receiver->reused()[0], 128);
    T_EQUAL(pair.receiver->reused()[1], 64 + 128);
    T_EQUAL(pair.repair(2), 64);
    pair.finish();
}

void test_what_was_reused_is_known_landed()
{
    Memory before(64);
    fill(before, 1);
    const Stored file(pages_of(before, 0, 64));
    ReusePair pair(64, reuse | same | delta, {file.source()});
    memcpy(pair.source.page(0), before.page(0), 64 * page_bytes);
    pair.round(0);
    T_EQUAL(pair.reused(), 64);
    pair.round(1);
    T_EQUAL(pair.sender->counters().forms[VMTH_FORM_SAME].pages.get(), 64);
    for (uint64_t page = 0; page < 64; page++) {
        pair.source.page(page)[page]++;
    }
    pair.round(2);
    T_CHECK(pair.sender->counters().forms[VMTH_FORM_DELTA].pages.get() >= 62);
    memcpy(pair.source.page(0), before.page(0), 64 * page_bytes);  // as it was: A, B, A
    pair.round(3);
    pair.repair(4);
    pair.finish();
}

// ---- any mixture ------------------------------------------------------------------------------------

void test_any_mixture_ends_equal()
{
    uint64_t state = 42;
    for (unsigned run = 0; run < 12; run++) {
        const uint64_t npages = 64 + t_random(&state) % 400;
        Memory before(npages);
        fill(before, run + 1);
        const Stored raw(pages_of(before, 0, npages / 2));
        const Stored packed(pages_of(before, npages / 3, npages / 2), 1 + run);
        ReusePair pair(npages, reuse | same | dedup | delta | zstd, {raw.source(), packed.source()},
                       1 + run % 3);
        for (uint32_t number = 0; number < 8; number += 2) {
            for (uint64_t page = 0; page < npages; page++) {
                uint8_t *at = pair.source.page(page);
                switch (t_random(&state) % 8) {
                case 0:
                    memset(at, 0, page_bytes);
                    break;
                case 1:
                    at[t_random(&state) % page_bytes]++;
                    break;
                case 2:
                    t_fill(&state, at, page_bytes);
                    break;
                case 3:
                case 4:
                    memcpy(at, before.page(t_random(&state) % npages), page_bytes);
                    break;
                case 5:
                    memcpy(at, pair.source.page(t_random(&state) % npages), page_bytes);
                    break;
                default:
                    break;
                }
            }
            if (number == 4) {
                T_EQUAL(ftruncate(raw.fd(), static_cast<off_t>(npages / 4 * page_bytes)), 0);
            }
            pair.round(number);
            pair.repair(number + 1);
            pair.repair(number + 1);  // a delta on a page that was missed
            T_CHECK(pair.equal());
        }
        T_CHECK(pair.reused() > 0);
        pair.finish();
    }
}

void test_a_lost_channel_and_another_attempt()
{
    Memory before(256);
    fill(before, 1);
    const Stored file(pages_of(before, 0, 256));
    for (bool lost : {true, false}) {
        ReusePair pair(256, reuse, {file.source()}, 2);
        memcpy(pair.source.page(0), before.page(0), 256 * page_bytes);
        if (lost) {
            pair.receiver->cancel("lost");
            expect_error([&] {
                pair.sender->send(0, 0, 256, pair.bits.data(), pair.bits.size(), 0);
                pair.sender->barrier(0, 0);
            });
            continue;
        }
        pair.round(0);
        T_EQUAL(pair.reused(), 256);
        pair.finish();
    }
}

}  // namespace

int main()
{
    test_what_a_file_has_is_not_sent();
    test_several_files_are_asked_in_their_order();
    test_what_was_reused_is_known_landed();
    test_any_mixture_ends_equal();
    test_a_lost_channel_and_another_attempt();
    return T_PASS;
}
