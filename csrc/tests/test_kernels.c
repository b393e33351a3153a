/* SPDX-License-Identifier: Apache-2.0 */
/* Every kernel against its scalar twin, golden hashes, and the four outcomes of a selection. */
#include <errno.h>
#include <string.h>

#include "t_check.h"
#include "vmth/bitmap.h"
#include "vmth/content_hash.h"
#include "vmth/page_hash.h"
#include "vmth/zero_page.h"

#define NWORDS 700u
#define NPAGES 20u
#define PAGE_BYTES 4096u

static uint8_t memory[NPAGES * PAGE_BYTES + 64];
static uint64_t state = 1;

static void select_or_fail(const char *family, const char *name)
{
    T_EQUAL(vmth_kernel_select(family, name), 0);
}

/* Content byte i of a page: what tests/test_kernels_pages.py uses as well. */
static void fill_golden(uint8_t *page, size_t page_bytes)
{
    for (size_t i = 0; i < page_bytes; i++) {
        page[i] = (uint8_t)(i * 31 + (i >> 8) * 17);
    }
}

static void test_golden_hashes(void)
{
    static const struct {
        size_t page_bytes;
        uint64_t seed;
        struct vmth_u128 content;
        struct vmth_u128 zero;
    } cases[] = {
        {4096, 0, {0xd98c68f2019713dd, 0xed994646a8b27883}, {0x93d76fe148c689ba, 0x3ee8dc4f9e7ee495}},
        {4096,
         0x9e3779b97f4a7c15,
         {0x8b7ec95dbb47cf69, 0x711260e3fb5dab9d},
         {0x4d19d904ddfc17a5, 0xef03f2342c726cb8}},
        {65536,
         0x9e3779b97f4a7c15,
         {0x061b542f105c9387, 0x7839a71fa5eb8874},
         {0xd435f83863bfebc3, 0x393d3e20ccbae045}},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct vmth_hash_key key;
        struct vmth_u128 hash;
        uint64_t zero_word;
        size_t nzero;

        vmth_hash_key_init(&key, cases[i].seed);
        fill_golden(memory, cases[i].page_bytes);
        T_EQUAL(vmth_page_hash(&key, memory, cases[i].page_bytes, 1, &hash), 0);
        T_EQUAL(hash.lo, cases[i].content.lo);
        T_EQUAL(hash.hi, cases[i].content.hi);
        memset(memory, 0, cases[i].page_bytes);
        T_EQUAL(vmth_page_hash_zero(&key, memory, cases[i].page_bytes, 1, &hash, &zero_word, &nzero),
                0);
        T_EQUAL(hash.lo, cases[i].zero.lo);
        T_EQUAL(hash.hi, cases[i].zero.hi);
        T_EQUAL(zero_word, 1);
        T_EQUAL(nzero, 1);
    }
}

static void test_hash_equals_scalar(void)
{
    const char *name = vmth_kernel_selected("hash");
    struct vmth_hash_key key;
    struct vmth_u128 want[NPAGES];
    struct vmth_u128 got[NPAGES];
    uint64_t zero_word;
    size_t nzero;

    vmth_hash_key_init(&key, 77);
    for (size_t offset = 0; offset < 64; offset++) {
        uint8_t *pages = memory + offset;

        t_fill(&state, pages, NPAGES * PAGE_BYTES);
        for (size_t page = 0; page < NPAGES; page++) {
            memset(pages + page * PAGE_BYTES, 0, page * 211 % PAGE_BYTES);
        }
        memset(pages, 0, PAGE_BYTES);
        select_or_fail("hash", "scalar");
        T_EQUAL(vmth_page_hash(&key, pages, PAGE_BYTES, NPAGES, want), 0);
        select_or_fail("hash", name);
        T_EQUAL(vmth_page_hash(&key, pages, PAGE_BYTES, NPAGES, got), 0);
        T_CHECK(memcmp(got, want, sizeof(got)) == 0);
        memset(got, 0, sizeof(got));
        T_EQUAL(vmth_page_hash_zero(&key, pages, PAGE_BYTES, NPAGES, got, &zero_word, &nzero), 0);
        T_CHECK(memcmp(got, want, sizeof(got)) == 0);
        T_EQUAL(zero_word, 1);
        T_EQUAL(nzero, 1);
    }
}

/* The same values as in tests/test_kernels_content.py, which takes them from another implementation. */
static void test_content_hash_equals_scalar_and_golden(void)
{
    const char *name = vmth_kernel_selected("content");
    uint8_t secret[VMTH_CONTENT_KEY_BYTES];
    const uint8_t *pages[NPAGES];
    struct vmth_content_key key;
    struct vmth_u128 want[NPAGES];
    struct vmth_u128 got[NPAGES];

    for (size_t i = 0; i < sizeof(secret); i++) {
        secret[i] = (uint8_t)i;
    }
    vmth_content_key_init(&key, secret);
    fill_golden(memory, PAGE_BYTES);
    T_EQUAL(vmth_content_hash_run(&key, memory, PAGE_BYTES, 1, got), 0);
    T_EQUAL(got[0].lo, 0xe9c5c4b4a6fac5f3);
    T_EQUAL(got[0].hi, 0xb78cba2d72283678);
    t_fill(&state, memory, NPAGES * PAGE_BYTES);
    for (size_t i = 0; i < NPAGES; i++) {
        pages[i] = memory + i * 7 % NPAGES * PAGE_BYTES; /* in an order of their own */
    }
    for (size_t npages = 0; npages <= NPAGES; npages++) {
        select_or_fail("content", "scalar");
        T_EQUAL(vmth_content_hash(&key, pages, PAGE_BYTES, npages, want), 0);
        select_or_fail("content", name);
        memset(got, 0, sizeof(got));
        T_EQUAL(vmth_content_hash(&key, pages, PAGE_BYTES, npages, got), 0);
        T_CHECK(memcmp(got, want, npages * sizeof(got[0])) == 0);
        T_CHECK(npages == NPAGES || (got[npages].lo == 0 && got[npages].hi == 0));
    }
    T_EQUAL(vmth_content_hash(&key, pages, PAGE_BYTES - 1, 1, got), -EINVAL);
    T_EQUAL(vmth_content_hash_run(&key, memory, PAGE_BYTES / 2, 1, got), -EINVAL);
}

/* Buffers end where the memory ends, so that a sanitizer sees any byte read past it. */
static void test_zero_at_every_length_and_position(void)
{
    for (size_t nbytes = 64; nbytes <= 1024; nbytes += 64) {
        uint8_t *bytes = calloc(1, nbytes);

        T_CHECK(bytes != NULL);
        T_CHECK(vmth_is_zero(bytes, nbytes));
        for (size_t at = 0; at < nbytes; at++) {
            bytes[at] = (uint8_t)(1u << (at % 8));
            T_CHECK(!vmth_is_zero(bytes, nbytes));
            bytes[at] = 0;
        }
        free(bytes);
    }
}

/* Runs through calls with `cap` entries each, marked in `back`; checks what each call promises. */
static void mark_runs(const uint64_t *words, uint64_t npages, size_t cap, uint64_t *back)
{
    struct vmth_run *out = malloc(cap * sizeof(*out));
    uint64_t at = 0;
    uint64_t last_end = 0;

    T_CHECK(out != NULL);
    while (at < npages) {
        size_t n;
        uint64_t resume;

        T_EQUAL(vmth_bitmap_runs(words, npages, at, out, cap, &n, &resume), 0);
        T_CHECK(n <= cap && resume > at && resume <= npages);
        T_CHECK(n == cap || resume == npages);
        for (size_t i = 0; i < n; i++) {
            T_CHECK(out[i].npages > 0 && out[i].page + out[i].npages <= npages);
            T_CHECK(last_end == 0 || out[i].page > last_end); /* maximal: a gap lies between */
            last_end = out[i].page + out[i].npages;
            vmth_bitmap_set_range(back, out[i].page, out[i].npages);
        }
        at = resume;
    }
    free(out);
}

static void test_runs_cover_the_bitmap(void)
{
    static const size_t caps[] = {1, 2, 34, 35, 36, 70, 300, 511, 512, 600, 1500, 9000, 30000};
    const unsigned ncaps = sizeof(caps) / sizeof(caps[0]);
    uint64_t *words = malloc(NWORDS * sizeof(*words));
    uint64_t back[NWORDS];

    T_CHECK(words != NULL);
    for (unsigned round = 0; round < 16 * ncaps; round++) {
        const uint64_t npages = 1 + t_random(&state) % (64 * NWORDS);
        const size_t nwords = VMTH_BITMAP_WORDS(npages);

        for (size_t i = 0; i < nwords; i++) {
            const uint64_t a = t_random(&state);
            const uint64_t b = t_random(&state);
            const uint64_t kinds[8] = {0,      ~UINT64_C(0), UINT64_C(1) << (a % 64), a,
                                       a & b & (a >> 7), a | b, a << 63, a >> 63};

            words[i] = kinds[t_random(&state) % (round % 8 + 1)];
        }
        memset(back, 0, sizeof(back));
        mark_runs(words, npages, caps[round / 8 % ncaps], back);
        if (npages % 64 != 0) {
            words[nwords - 1] &= (UINT64_C(1) << (npages % 64)) - 1;
        }
        T_CHECK(memcmp(words, back, nwords * sizeof(*words)) == 0);
    }
    free(words);
}

/* The room of a call around what the walk over many words needs, to the entry. */
static void test_runs_fill_the_room_exactly(void)
{
    uint64_t words[NWORDS];
    uint64_t back[NWORDS];
    const size_t block_runs = 256 * 32;

    for (size_t i = 0; i < NWORDS; i++) {
        words[i] = UINT64_C(0x5555555555555555);
    }
    words[40] ^= 1; /* so that the runs are no multiple of what is written at once */
    for (size_t cap = block_runs - 8; cap < block_runs + 48; cap++) {
        memset(back, 0, sizeof(back));
        mark_runs(words, 64 * NWORDS, cap, back);
        T_CHECK(memcmp(words, back, sizeof(words)) == 0);
    }
}

static void test_one_run_over_everything(void)
{
    uint64_t words[NWORDS];
    struct vmth_run out[600];
    size_t n;
    uint64_t resume;

    memset(words, 0xff, sizeof(words));
    T_EQUAL(vmth_bitmap_runs(words, 64 * NWORDS, 3, out, 600, &n, &resume), 0);
    T_EQUAL(n, 1);
    T_EQUAL(out[0].page, 3);
    T_EQUAL(out[0].npages, 64 * NWORDS - 3);
    T_EQUAL(resume, 64 * NWORDS);
    words[NWORDS - 20] = 0;
    T_EQUAL(vmth_bitmap_runs(words, 64 * NWORDS, 3, out, 600, &n, &resume), 0);
    T_EQUAL(n, 2);
    T_EQUAL(out[0].npages, 64 * (NWORDS - 20) - 3);
    T_EQUAL(out[1].page, 64 * (NWORDS - 19));
    T_EQUAL(out[1].npages, 64 * 19);
}

static void test_runs_refusals(void)
{
    const uint64_t word = 1;
    struct vmth_run out[1];
    size_t n;
    uint64_t resume;

    T_EQUAL(vmth_bitmap_runs(NULL, 1, 0, out, 1, &n, &resume), (uint64_t)-EINVAL);
    T_EQUAL(vmth_bitmap_runs(&word, 1, 2, out, 1, &n, &resume), (uint64_t)-EINVAL);
    T_EQUAL(vmth_bitmap_runs(&word, 1, 0, out, 0, &n, &resume), (uint64_t)-EINVAL);
    T_EQUAL(vmth_bitmap_runs(NULL, 0, 0, out, 1, &n, &resume), 0);
    T_EQUAL(n, 0);
    T_EQUAL(resume, 0);
}

static void test_count_and_merge_equal_scalar(void)
{
    const char *name = vmth_kernel_selected("bitmap");
    uint64_t a[NWORDS];
    uint64_t b[NWORDS];
    uint64_t want[NWORDS];

    for (uint64_t npages = 0; npages <= 64 * 40; npages += 37) {
        t_fill(&state, (uint8_t *)a, sizeof(a));
        t_fill(&state, (uint8_t *)b, sizeof(b));
        memcpy(want, a, sizeof(want));
        select_or_fail("bitmap", "scalar");
        const uint64_t count = vmth_bitmap_count(a, 5, npages);
        const uint64_t added = vmth_bitmap_merge(want, b, npages);

        select_or_fail("bitmap", name);
        T_EQUAL(vmth_bitmap_count(a, 5, npages), count);
        T_EQUAL(vmth_bitmap_merge(a, b, npages), added);
        T_CHECK(memcmp(a, want, sizeof(a)) == 0);
    }
}

static void test_selection_outcomes(void)
{
#if defined(__x86_64__)
    const char *not_built = "neon";
#else
    const char *not_built = "avx2";
#endif
    const char *before = vmth_kernel_selected("hash");

    T_EQUAL(vmth_kernel_select("speed", "scalar"), (uint64_t)-EINVAL);
    T_EQUAL(vmth_kernel_select("hash", "sse9"), (uint64_t)-ENOENT);
    T_EQUAL(vmth_kernel_select("hash", not_built), (uint64_t)-ENOSYS);
    T_CHECK(vmth_kernel_selected("hash") == before);
    T_CHECK(vmth_kernel_selected("speed") == NULL);
    T_CHECK(vmth_kernel_name("speed", 0) == NULL);
    T_CHECK(strcmp(vmth_kernel_name("hash", 0), before) == 0);
}

int main(void)
{
    test_selection_outcomes();
    t_each_kernel("hash", test_golden_hashes);
    t_each_kernel("hash", test_hash_equals_scalar);
    t_each_kernel("content", test_content_hash_equals_scalar_and_golden);
    t_each_kernel("zero", test_hash_equals_scalar);
    t_each_kernel("zero", test_zero_at_every_length_and_position);
    t_each_kernel("bitmap", test_runs_cover_the_bitmap);
    t_each_kernel("bitmap", test_runs_fill_the_room_exactly);
    t_each_kernel("bitmap", test_one_run_over_everything);
    t_each_kernel("bitmap", test_count_and_merge_equal_scalar);
    test_runs_refusals();
    return T_PASS;
}
