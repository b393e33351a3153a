// SPDX-License-Identifier: Apache-2.0
// The cache of delta bases: what it remembers, what it takes for a base, what it keeps when it is full.
#include <cstring>
#include <thread>
#include <vector>

#include "tests/t_check.h"
#include "vmth/delta.h"
#include "xfer/delta_cache.hpp"

using vmth::DeltaCache;
using vmth::DeltaPage;

namespace {

constexpr size_t page_bytes = 4096;
constexpr size_t slot_bytes = page_bytes + 32;

struct Page {
    explicit Page(uint64_t state) { t_fill(&state, bytes, page_bytes); }
    uint8_t bytes[page_bytes];
};

vmth_u128 hash_of(uint64_t content)
{
    return {content, ~content};
}

DeltaPage sent(uint64_t page, const Page &content, uint64_t hash, uint32_t round)
{
    return {0, page, content.bytes, hash_of(hash), false, {0, 0}, round};
}

DeltaPage sent_again(uint64_t page, const Page &content, uint64_t hash, uint64_t landed,
                     uint32_t round)
{
    return {0, page, content.bytes, hash_of(hash), true, hash_of(landed), round};
}

void test_a_delta_against_what_landed()
{
    DeltaCache cache(page_bytes, 100 * slot_bytes, 1000);
    uint8_t out[page_bytes];
    Page first(1);
    T_EQUAL(cache.exchange(sent(5, first, 10, 0), out, sizeof(out)), 0);
    Page second = first;
    second.bytes[100] ^= 1;
    const size_t nbytes = cache.exchange(sent_again(5, second, 11, 10, 1), out, sizeof(out));
    T_EQUAL(nbytes, 3);
    T_EQUAL(vmth_delta_apply(first.bytes, page_bytes, out, nbytes), 0);
    T_CHECK(memcmp(first.bytes, second.bytes, page_bytes) == 0);
    // The new content is the next base: nothing changed, so there is no delta.
    T_EQUAL(cache.exchange(sent_again(5, second, 11, 11, 2), out, sizeof(out)), 0);
}

void test_what_is_no_base()
{
    DeltaCache cache(page_bytes, 100 * slot_bytes, 1000);
    uint8_t out[page_bytes];
    Page base(1);
    Page now = base;
    now.bytes[7] ^= 1;
    cache.exchange(sent(5, base, 10, 0), out, sizeof(out));
    // Another page, the same page of another block, and one that is not known landed.
    T_EQUAL(cache.exchange(sent_again(6, now, 11, 10, 1), out, sizeof(out)), 0);
    DeltaPage other = sent_again(5, now, 11, 10, 1);
    other.block = 1;
    T_EQUAL(cache.exchange(other, out, sizeof(out)), 0);
    T_EQUAL(cache.exchange(sent(5, now, 11, 1), out, sizeof(out)), 0);
    // What landed is not what is remembered: sent meanwhile by another way.
    cache.exchange(sent(5, base, 10, 1), out, sizeof(out));
    T_EQUAL(cache.exchange(sent_again(5, now, 11, 12, 2), out, sizeof(out)), 0);
    // It does not fit: still remembered.
    Page far(2);
    T_EQUAL(cache.exchange(sent_again(5, far, 13, 11, 3), out, 100), 0);
    now = far;
    now.bytes[0] ^= 1;
    T_CHECK(cache.exchange(sent_again(5, now, 14, 13, 4), out, 100) > 0);
}

void test_bounds()
{
    uint8_t out[64];
    Page content(1);
    DeltaCache none(page_bytes, 16 * slot_bytes - 1, 1000);
    T_EQUAL(none.pages(), 0);
    T_EQUAL(none.bytes(), 0);
    T_EQUAL(none.exchange(sent(5, content, 1, 0), out, sizeof(out)), 0);
    DeltaCache some(page_bytes, 100 * slot_bytes, 1000);
    T_EQUAL(some.pages(), 96);
    T_CHECK(some.bytes() <= 100 * slot_bytes);
    DeltaCache enough(page_bytes, uint64_t{1} << 40, 1000);
    T_CHECK(enough.pages() >= 2000 && enough.pages() < 2100);
}

// Sends `npages` pages round after round, each with one byte changed; returns the deltas of a late round.
unsigned deltas_of_a_working_set(DeltaCache &cache, uint64_t npages)
{
    uint8_t out[64];
    unsigned found = 0;
    for (uint32_t round = 0; round < 6; round++) {
        for (uint64_t page = 0; page < npages; page++) {
            Page content(page);
            content.bytes[0] = static_cast<uint8_t>(round);
            const uint64_t hash = page << 8 | round;
            const size_t nbytes = cache.exchange(
                round == 0 ? sent(page, content, hash, 0)
                           : sent_again(page, content, hash, page << 8 | (round - 1), round),
                out, sizeof(out));
            found += round == 5 && nbytes > 0;
        }
    }
    return found;
}

void test_a_working_set_that_is_too_large_keeps_a_part_in()
{
    DeltaCache roomy(page_bytes, 400 * slot_bytes, 256);
    T_CHECK(deltas_of_a_working_set(roomy, 256) > 240);
    DeltaCache small(page_bytes, 64 * slot_bytes, 256);
    const unsigned kept = deltas_of_a_working_set(small, 256);
    T_CHECK(kept > 56 && kept <= 64);
}

// A cache full of pages that were sent once makes room for those that are rewritten.
void test_rewritten_pages_take_the_place_of_cold_ones()
{
    DeltaCache cache(page_bytes, 64 * slot_bytes, 1000);
    uint8_t out[64];
    for (uint64_t page = 0; page < 1000; page++) {
        cache.exchange(sent(page, Page(page), page << 8, 0), out, sizeof(out));
    }
    unsigned found = 0;
    for (uint32_t round = 1; round < 4; round++) {
        for (uint64_t page = 960; page < 1000; page++) {
            Page content(page);
            content.bytes[9] = static_cast<uint8_t>(round);
            found += cache.exchange(sent_again(page, content, page << 8 | round,
                                               page << 8 | (round - 1), round),
                                    out, sizeof(out)) > 0 &&
                     round == 3;
        }
    }
    T_CHECK(found > 34);
}

void test_threads()
{
    DeltaCache cache(page_bytes, 64 * slot_bytes, 1000);
    std::vector<std::thread> threads;
    for (uint64_t thread = 0; thread < 4; thread++) {
        threads.emplace_back([&cache, thread] {
            uint8_t out[64];
            for (uint32_t round = 0; round < 4; round++) {
                for (uint64_t page = thread; page < 120; page += 4) {
                    Page content(page);
                    content.bytes[1] = static_cast<uint8_t>(round);
                    const size_t nbytes = cache.exchange(
                        sent_again(page, content, page << 8 | round, page << 8 | (round - 1), round),
                        out, sizeof(out));
                    T_CHECK(nbytes == 0 || nbytes == 3);
                }
            }
        });
    }
    for (std::thread &thread : threads) {
        thread.join();
    }
}

}  // namespace

int main()
{
    test_a_delta_against_what_landed();
    test_what_is_no_base();
    test_bounds();
    test_a_working_set_that_is_too_large_keeps_a_part_in();
    test_rewritten_pages_take_the_place_of_cold_ones();
    test_threads();
    return T_PASS;
}
