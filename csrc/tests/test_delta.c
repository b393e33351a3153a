/* SPDX-License-Identifier: Apache-2.0 */
/* Deltas: golden bytes, every kernel against a byte-by-byte oracle, what does not fit, what is refused. */
#include <errno.h>
#include <string.h>

#include "t_check.h"
#include "vmth/delta.h"

#define PAGE_BYTES 4096u
#define MAX_PAGE_BYTES (64u << 10)
/* The dearest delta: a changed byte after every three that are not, three bytes each. */
#define MAX_DELTA_BYTES (MAX_PAGE_BYTES + 16)

static uint8_t base[MAX_PAGE_BYTES + 64];
static uint8_t now[MAX_PAGE_BYTES + 64];
static uint8_t applied[MAX_PAGE_BYTES];
static uint8_t delta[MAX_DELTA_BYTES];
static uint8_t want[MAX_DELTA_BYTES];
static uint64_t state = 1;

static size_t put_number(uint8_t *to, size_t value)
{
    size_t n = 0;

    for (; value > 127; value /= 128) {
        to[n++] = (uint8_t)(value % 128 + 128);
    }
    to[n++] = (uint8_t)value;
    return n;
}

/* The delta by its definition, one byte at a time. */
static size_t oracle(const uint8_t *from, const uint8_t *to, size_t page_bytes)
{
    size_t used = 0;
    size_t last_end = 0;

    for (size_t at = 0; at < page_bytes; at++) {
        size_t end;
        size_t quiet = 0;

        if (from[at] == to[at]) {
            continue;
        }
        end = at + 1;
        for (size_t i = end; i < page_bytes && quiet < VMTH_DELTA_MIN_SKIP; i++) {
            quiet = from[i] == to[i] ? quiet + 1 : 0;
            end = quiet == 0 ? i + 1 : end;
        }
        used += put_number(want + used, at - last_end);
        used += put_number(want + used, end - at);
        memcpy(want + used, to + at, end - at);
        used += end - at;
        last_end = end;
        at = end - 1;
    }
    return used;
}

static void expect_as_oracle(const uint8_t *from, const uint8_t *to, size_t page_bytes)
{
    const size_t size = oracle(from, to, page_bytes);
    size_t nbytes = 99;

    memset(delta, 0x5a, sizeof(delta));
    T_EQUAL(vmth_delta_encode(from, to, page_bytes, delta, size, &nbytes), 0);
    T_EQUAL(nbytes, size);
    T_CHECK(memcmp(delta, want, size) == 0);
    T_EQUAL(delta[size], 0x5a);
    memcpy(applied, from, page_bytes);
    T_EQUAL(vmth_delta_apply(applied, page_bytes, delta, size), 0);
    T_CHECK(memcmp(applied, to, page_bytes) == 0);
    T_EQUAL(vmth_delta_apply(applied, page_bytes, delta, size), 0); /* twice does no harm */
    T_CHECK(memcmp(applied, to, page_bytes) == 0);
    if (size > 0) {
        nbytes = 99;
        T_EQUAL(vmth_delta_encode(from, to, page_bytes, delta, size - 1, &nbytes),
                (uint64_t)-ENOSPC);
        T_EQUAL(nbytes, 99);
    }
}

/* docs/protocol.md has these bytes. */
static void test_golden(void)
{
    static const uint8_t golden[] = {0x00, 0x01, 0xaa, 0xc7, 0x01, 0x04, 0x10, 0x11, 0xca, 0x12,
                                     0xb2, 0x1e, 0x01, 0xff};
    size_t nbytes;

    for (size_t i = 0; i < PAGE_BYTES; i++) {
        base[i] = (uint8_t)i;
    }
    memcpy(now, base, PAGE_BYTES);
    now[0] = 0xaa;
    now[200] = 0x10;
    now[201] = 0x11;
    now[203] = 0x12; /* 202 is unchanged, alone between two changes */
    now[4094] = 0xff;
    T_EQUAL(vmth_delta_encode(base, now, PAGE_BYTES, delta, sizeof(delta), &nbytes), 0);
    T_EQUAL(nbytes, sizeof(golden));
    T_CHECK(memcmp(delta, golden, sizeof(golden)) == 0);
}

static void test_equal_pages_need_nothing(void)
{
    t_fill(&state, base, PAGE_BYTES);
    memcpy(now, base, PAGE_BYTES);
    expect_as_oracle(base, now, PAGE_BYTES);
}

/* One change of each length at each place, and a gap of each length across the edges of cache lines. */
static void test_every_place(void)
{
    memset(base, 0, sizeof(base));
    memset(now, 0, sizeof(now));
    for (size_t at = 0; at < PAGE_BYTES; at += at < 70 || at > PAGE_BYTES - 70 ? 1 : 331) {
        static const size_t lengths[] = {1, 2, 3, 8, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300};

        for (size_t l = 0; l < sizeof(lengths) / sizeof(lengths[0]); l++) {
            for (size_t gap = 0; gap <= 4; gap++) {
                const size_t length = lengths[l];

                if (at + length + gap + 1 > PAGE_BYTES) {
                    continue;
                }
                memset(now + at, 0x33, length);
                now[at + length + gap] = 0x44;
                expect_as_oracle(base, now, PAGE_BYTES);
                memset(now + at, 0, length + gap + 1);
            }
        }
    }
}

static void test_random_changes(void)
{
    for (unsigned round = 0; round < 600; round++) {
        const size_t page_bytes = round % 8 == 0 ? MAX_PAGE_BYTES : PAGE_BYTES;
        const size_t offset = t_random(&state) % 64;
        const unsigned changes = (unsigned)(t_random(&state) % (round % 2 == 0 ? 8 : 1500));

        t_fill(&state, base + offset, page_bytes);
        memcpy(now + offset, base + offset, page_bytes);
        for (unsigned i = 0; i < changes; i++) {
            const size_t at = t_random(&state) % page_bytes;
            const size_t length = 1 + t_random(&state) % (round % 3 == 0 ? 4 : 40);

            t_fill(&state, now + offset + at,
                   length < page_bytes - at ? length : page_bytes - at);
        }
        expect_as_oracle(base + offset, now + offset, page_bytes);
    }
}

static void test_everything_changed(void)
{
    memset(base, 0, MAX_PAGE_BYTES);
    for (size_t i = 0; i < MAX_PAGE_BYTES; i++) {
        now[i] = (uint8_t)(1 + i % 255);
    }
    expect_as_oracle(base, now, PAGE_BYTES);
    expect_as_oracle(base, now, MAX_PAGE_BYTES);
    for (size_t i = 0; i < MAX_PAGE_BYTES; i++) {
        now[i] = (uint8_t)(i % 4 == 3); /* the dearest: three bytes for one */
    }
    expect_as_oracle(base, now, MAX_PAGE_BYTES);
}

static void test_apply_refuses(void)
{
    static const struct {
        const char *name;
        uint8_t bytes[8];
        size_t nbytes;
    } cases[] = {
        {"number cut short", {0x80}, 1},
        {"length missing", {0x00}, 1},
        {"number too long", {0x80, 0x80, 0x80, 0x80, 0x00, 0x01, 0xaa}, 7},
        {"empty run", {0x01, 0x00}, 2},
        {"skip to the end", {0x80, 0x20, 0x01, 0xaa}, 4},
        {"skip past the end", {0x81, 0x20, 0x01, 0xaa}, 4},
        {"longest skip", {0xff, 0xff, 0xff, 0x7f, 0x01, 0xaa}, 6},
        {"run past the end", {0xff, 0x1f, 0x02, 0xaa, 0xbb}, 5},
        {"longest run", {0x00, 0xff, 0xff, 0xff, 0x7f, 0xaa}, 6},
        {"bytes missing", {0x00, 0x03, 0xaa, 0xbb}, 4},
        {"second run past the end", {0xfe, 0x1f, 0x01, 0xaa, 0x01, 0x01, 0xbb}, 7},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        fprintf(stderr, "%s\n", cases[i].name);
        T_EQUAL(vmth_delta_apply(applied, PAGE_BYTES, cases[i].bytes, cases[i].nbytes),
                (uint64_t)-EPROTO);
    }
    T_EQUAL(vmth_delta_apply(applied, PAGE_BYTES, delta, 0), 0);
}

static void test_page_sizes(void)
{
    size_t nbytes;

    T_EQUAL(vmth_delta_encode(base, now, 2048, delta, 10, &nbytes), (uint64_t)-EINVAL);
    T_EQUAL(vmth_delta_encode(base, now, 12288, delta, 10, &nbytes), (uint64_t)-EINVAL);
}

int main(void)
{
    t_each_kernel("delta", test_golden);
    t_each_kernel("delta", test_equal_pages_need_nothing);
    t_each_kernel("delta", test_every_place);
    t_each_kernel("delta", test_random_changes);
    t_each_kernel("delta", test_everything_changed);
    test_apply_refuses();
    test_page_sizes();
    return T_PASS;
}
