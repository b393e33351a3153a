/* SPDX-License-Identifier: Apache-2.0 */
/* Parts of a filter: golden bytes, every set comes back, and what no encoder writes is refused. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "t_check.h"
#include "vmth/content_filter.h"

#define MOST (3 * VMTH_FILTER_PART_ENTRIES)

static uint64_t prints[MOST];
static uint64_t got[VMTH_FILTER_PART_ENTRIES];
static uint8_t part[VMTH_FILTER_PART_BYTES];
static uint64_t state = 7;

static void test_width(void)
{
    T_EQUAL(vmth_filter_bits(0), 20);
    T_EQUAL(vmth_filter_bits(16), 20);
    T_EQUAL(vmth_filter_bits(17), 21);
    T_EQUAL(vmth_filter_bits(1u << 18), 34);
    T_EQUAL(vmth_filter_bits((1u << 18) + 1), 35);
    T_EQUAL(vmth_filter_bits(VMTH_FILTER_MAX_ENTRIES), 42);
}

static void test_golden(void)
{
    /* Gaps 0, 0x10002, 0x3ffff: lows, then 0 | 10 | 1110 from the least significant bit on. */
    static const uint64_t set[] = {5, 6, 0x10009, 0x50009};
    static const uint8_t want[] = {0x00, 0x00, 0x02, 0x00, 0xff, 0xff, 0x3a};
    size_t nbytes;

    T_EQUAL(vmth_filter_encode(set, 4, part, &nbytes), 4);
    T_EQUAL(nbytes, sizeof(want));
    T_CHECK(memcmp(part, want, sizeof(want)) == 0);
}

/* Each part from a buffer of its own length, so that a sanitizer sees any byte read past it. */
static void check_all(size_t n, unsigned bits)
{
    size_t done = 0;
    size_t parts = 0;

    while (done < n) {
        size_t nbytes;
        const size_t count = vmth_filter_encode(prints + done, n - done, part, &nbytes);
        uint8_t *copy = malloc(nbytes + (nbytes == 0));

        T_CHECK(copy != NULL && count > 0 && nbytes <= sizeof(part));
        memcpy(copy, part, nbytes);
        T_EQUAL(vmth_filter_decode(prints[done], count, copy, nbytes, bits, got), 0);
        T_CHECK(memcmp(got, prints + done, count * sizeof(got[0])) == 0);
        free(copy);
        done += count;
        parts++;
    }
    T_CHECK(parts >= n / VMTH_FILTER_PART_ENTRIES);
}

/* Wide ones lie at the upper end of their width: what a gap takes grows with it, 2^48 takes 512 MiB. */
static void test_every_set_comes_back(void)
{
    for (unsigned bits = 20; bits <= 48; bits += 4) {
        const size_t n = bits < 24 ? 1000 : MOST;
        const uint64_t span = UINT64_C(1) << (bits < 40 ? bits : 40);
        const uint64_t first = (UINT64_C(1) << bits) - span;
        const uint64_t spread = span / n;

        for (size_t i = 0; i < n; i++) {
            uint64_t random;

            t_fill(&state, (uint8_t *)&random, sizeof(random));
            prints[i] = first + i * spread + random % spread;
        }
        check_all(n, bits);
    }
    for (size_t i = 0; i < MOST; i++) {
        prints[i] = i;
    }
    check_all(MOST, 48);
    for (size_t i = 0; i < 100; i++) {
        prints[i] = (uint64_t)i * i << 31; /* gaps that fill a part by a few */
    }
    check_all(100, 48);
}

static void test_what_is_refused(void)
{
    static const uint64_t set[] = {5, 6, 0x10009, 0x50009};
    size_t nbytes;

    T_EQUAL(vmth_filter_encode(set, 4, part, &nbytes), 4);
    T_EQUAL(vmth_filter_decode(5, 4, part, nbytes, 20, got), 0);
    T_EQUAL(vmth_filter_decode(5, 0, part, nbytes, 20, got), (uint64_t)-EPROTO);
    T_EQUAL(vmth_filter_decode(5, VMTH_FILTER_PART_ENTRIES + 1, part, sizeof(part), 20, got),
            (uint64_t)-EPROTO);
    T_EQUAL(vmth_filter_decode(UINT64_C(1) << 20, 1, part, 0, 20, got), (uint64_t)-EPROTO);
    T_EQUAL(vmth_filter_decode(0xfffff, 4, part, nbytes, 20, got), (uint64_t)-EPROTO);
    T_EQUAL(vmth_filter_decode(5, 4, part, nbytes, 49, got), (uint64_t)-EPROTO);
    for (size_t cut = 0; cut < nbytes; cut++) {
        T_EQUAL(vmth_filter_decode(5, 4, part, cut, 20, got), (uint64_t)-EPROTO);
    }
    part[nbytes] = 0;
    T_EQUAL(vmth_filter_decode(5, 4, part, nbytes + 1, 20, got), (uint64_t)-EPROTO);
    part[nbytes - 1] |= 0x80; /* behind the end of the last gap */
    T_EQUAL(vmth_filter_decode(5, 4, part, nbytes, 20, got), (uint64_t)-EPROTO);
    memset(part, 0xff, sizeof(part)); /* a gap without an end */
    T_EQUAL(vmth_filter_decode(5, 2, part, sizeof(part), 48, got), (uint64_t)-EPROTO);
}

/* Anything: either refused, or strictly rising and within the width. */
static void test_any_bytes(void)
{
    size_t taken = 0;

    for (unsigned round = 0; round < 20000; round++) {
        uint64_t random[3];

        t_fill(&state, (uint8_t *)random, sizeof(random));
        const size_t count = 1 + random[0] % 12;
        const size_t nbytes = random[1] % 40;

        t_fill(&state, part, nbytes);
        if (vmth_filter_decode(random[2] % (1u << 21), count, part, nbytes, 20, got) != 0) {
            continue;
        }
        taken++;
        for (size_t i = 0; i < count; i++) {
            T_CHECK(got[i] >> 20 == 0 && (i == 0 || got[i] > got[i - 1]));
        }
    }
    T_CHECK(taken > 0);
}

int main(void)
{
    test_width();
    test_golden();
    test_every_set_comes_back();
    test_what_is_refused();
    test_any_bytes();
    return T_PASS;
}
