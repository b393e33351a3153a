/* SPDX-License-Identifier: Apache-2.0 */
/* The running digest equals the digest computed anew, after any sequence of changes. */
#include <string.h>

#include "t_check.h"
#include "vmth/memory_digest.h"

#define NPAGES 200u
#define BLOCK 3u

static void expect_equal(const struct vmth_digest *got, const struct vmth_digest *want)
{
    T_EQUAL(got->sum.lo, want->sum.lo);
    T_EQUAL(got->sum.hi, want->sum.hi);
    T_EQUAL(got->pages, want->pages);
}

/* docs/digest.md has these values. */
static void test_golden_terms(void)
{
    static const struct {
        uint32_t block;
        uint64_t page;
        struct vmth_u128 hash;
        struct vmth_u128 term;
    } cases[] = {
        {0, 0, {1, 0}, {0x4cd3024402483e15, 0xcf2b1ec8f235a2cf}},
        {0, 1, {1, 0}, {0xc2682c48cfd92fe9, 0x6671990716bf8e61}},
        {1, 0, {1, 0}, {0x60846a67e3d8bffe, 0x2a0c85f2fc1afde3}},
        {5,
         123456789,
         {0x0123456789abcdef, 0xfedcba9876543210},
         {0x7108a106c9585547, 0xb5565fba31e7d4e2}},
        {4095, (UINT64_C(1) << 40) - 1, {~UINT64_C(0), ~UINT64_C(0)}, {0x0fd5e822635f645e, 0xeb9a2c3cdb5eb67f}},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        const struct vmth_u128 term =
            vmth_digest_mix(cases[i].block, cases[i].page, &cases[i].hash);

        T_EQUAL(term.lo, cases[i].term.lo);
        T_EQUAL(term.hi, cases[i].term.hi);
    }
}

static void test_running_digest_equals_a_new_one(void)
{
    struct vmth_u128 table[NPAGES] = {{0, 0}};
    struct vmth_u128 hashes[NPAGES];
    struct vmth_digest digest = {{0, 0}, 0};
    uint64_t state = 5;

    for (unsigned step = 0; step < 2000; step++) {
        const uint64_t first = t_random(&state) % NPAGES;
        const size_t n = t_random(&state) % (NPAGES - first + 1);
        const struct vmth_u128 same = {t_random(&state), t_random(&state) % 2};
        struct vmth_digest fresh = {{9, 9}, 9};
        struct vmth_digest want_fresh = fresh;

        switch (t_random(&state) % 3) {
        case 0:
            for (size_t i = 0; i < n; i++) {
                hashes[i].lo = t_random(&state) % 4 == 0 ? 0 : t_random(&state);
                hashes[i].hi = hashes[i].lo == 0 ? 0 : t_random(&state);
            }
            vmth_digest_replace(&digest, BLOCK, first, n, table, hashes, &fresh);
            T_CHECK(memcmp(table + first, hashes, n * sizeof(*table)) == 0);
            break;
        case 1:
            vmth_digest_fill(&digest, BLOCK, first, n, table, &same, &fresh);
            break;
        default:
            vmth_digest_invalidate(&digest, BLOCK, first, n, table);
            for (size_t i = 0; i < n; i++) {
                T_EQUAL(table[first + i].lo | table[first + i].hi, 0);
            }
            want_fresh = fresh; /* nothing was added */
            expect_equal(&fresh, &want_fresh);
            continue;
        }
        /* What was added is the digest of the range as it stands now. */
        const struct vmth_digest added = vmth_digest_of(BLOCK, first, n, table);

        vmth_digest_merge(&want_fresh, &added);
        expect_equal(&fresh, &want_fresh);
        const struct vmth_digest anew = vmth_digest_of(BLOCK, 0, NPAGES, table);

        expect_equal(&digest, &anew);
    }
}

static void test_partial_digests_add_up(void)
{
    struct vmth_u128 table[NPAGES] = {{0, 0}};
    const struct vmth_u128 first_hash = {1, 2};
    const struct vmth_u128 second_hash = {3, 4};
    struct vmth_digest one = {{0, 0}, 0};
    struct vmth_digest two = {{0, 0}, 0};
    struct vmth_digest total = {{0, 0}, 0};

    vmth_digest_fill(&one, BLOCK, 0, NPAGES, table, &first_hash, NULL);
    /* Another worker takes over half of the pages: its partial digest goes below zero. */
    vmth_digest_fill(&two, BLOCK, 0, NPAGES / 2, table, &second_hash, NULL);
    vmth_digest_invalidate(&two, BLOCK, 0, NPAGES / 4, table);
    vmth_digest_merge(&total, &one);
    vmth_digest_merge(&total, &two);
    const struct vmth_digest anew = vmth_digest_of(BLOCK, 0, NPAGES, table);

    expect_equal(&total, &anew);
    T_EQUAL(total.pages, NPAGES - NPAGES / 4);
    const struct vmth_digest filled =
        vmth_digest_of_fill(BLOCK, NPAGES / 2, NPAGES / 2, &first_hash);
    const struct vmth_digest upper = vmth_digest_of(BLOCK, NPAGES / 2, NPAGES / 2, table);

    expect_equal(&filled, &upper);
}

int main(void)
{
    test_golden_terms();
    test_running_digest_equals_a_new_one();
    test_partial_digests_add_up();
    return T_PASS;
}
