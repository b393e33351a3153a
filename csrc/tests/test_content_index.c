/* SPDX-License-Identifier: Apache-2.0 */
/* The content index against a plain table of what was told; lossy, but never wrong. */
#include <errno.h>
#include <string.h>

#include "t_check.h"
#include "vmth/content_index.h"

#define NBUCKETS 64u
#define NCONTENTS 4096u

static _Alignas(64) uint8_t memory[(NBUCKETS + 3) * VMTH_CONTENT_BUCKET_BYTES];
static uint64_t state = 1;

static struct vmth_u128 hash_of(uint64_t content)
{
    uint64_t seed = content;
    struct vmth_u128 hash;

    hash.lo = t_random(&seed);
    hash.hi = t_random(&seed);
    return hash;
}

static void test_one_content(void)
{
    struct vmth_content_index index;
    const struct vmth_u128 hash = hash_of(1);
    const struct vmth_u128 other = {hash.lo, hash.hi + 1};
    const struct vmth_u128 none = {0, 0};
    uint16_t block = 7;
    uint64_t page = 7;

    T_EQUAL(vmth_content_index_init(&index, memory, VMTH_CONTENT_BUCKET_BYTES), 0);
    T_CHECK(!vmth_content_index_find(&index, &hash, &block, &page));
    T_EQUAL(block, 7);
    vmth_content_index_insert(&index, &hash, 4095, VMTH_CONTENT_MAX_PAGE);
    T_CHECK(vmth_content_index_find(&index, &hash, &block, &page));
    T_EQUAL(block, 4095);
    T_EQUAL(page, VMTH_CONTENT_MAX_PAGE);
    T_CHECK(!vmth_content_index_find(&index, &other, &block, &page));
    vmth_content_index_insert(&index, &hash, 0, 0); /* the first place stays */
    T_CHECK(vmth_content_index_find(&index, &hash, &block, &page));
    T_EQUAL(block, 4095);
    vmth_content_index_forget(&index, &hash, 0, 0); /* which is not the place it has */
    T_CHECK(vmth_content_index_find(&index, &hash, &block, &page));
    vmth_content_index_forget(&index, &hash, 4095, VMTH_CONTENT_MAX_PAGE);
    T_CHECK(!vmth_content_index_find(&index, &hash, &block, &page));
    vmth_content_index_insert(&index, &hash, 0, 0);
    T_CHECK(vmth_content_index_find(&index, &hash, &block, &page));
    T_EQUAL(block, 0);
    T_EQUAL(page, 0);
    vmth_content_index_insert(&index, &none, 1, 1);
    T_CHECK(!vmth_content_index_find(&index, &none, &block, &page));
    vmth_content_index_insert(&index, &other, 1, VMTH_CONTENT_MAX_PAGE + 1);
    T_CHECK(!vmth_content_index_find(&index, &other, &block, &page));
}

/* Far more contents than entries: what is found is where it was told and not forgotten. */
static void test_full_and_never_wrong(void)
{
    static uint64_t place[NCONTENTS]; /* page + 1, 0: nowhere */
    struct vmth_content_index index;
    uint64_t found = 0;

    memset(memory, 0, sizeof(memory));
    T_EQUAL(vmth_content_index_init(&index, memory, sizeof(memory)), 0);
    T_EQUAL(index.bucket_mask, NBUCKETS - 1);
    for (unsigned step = 0; step < 100000; step++) {
        const uint64_t content = t_random(&state) % NCONTENTS;
        const struct vmth_u128 hash = hash_of(content);
        uint16_t block;
        uint64_t page;
        const bool known = vmth_content_index_find(&index, &hash, &block, &page);

        if (known) {
            T_EQUAL(block, content % 5);
            T_EQUAL(page + 1, place[content]);
            found++;
        }
        if (step % 3 == 0 && place[content] != 0) {
            vmth_content_index_forget(&index, &hash, (uint16_t)(content % 5), place[content] - 1);
            T_CHECK(!vmth_content_index_find(&index, &hash, &block, &page));
            place[content] = 0;
        } else if (!known) {
            place[content] = 1 + t_random(&state) % 1000000;
            vmth_content_index_insert(&index, &hash, (uint16_t)(content % 5), place[content] - 1);
            T_CHECK(vmth_content_index_find(&index, &hash, &block, &page));
        }
    }
    /* 256 entries for 4096 contents: it stays full. */
    T_CHECK(found > 100000 / 40);
}

static void test_what_fits_is_kept(void)
{
    struct vmth_content_index index;
    unsigned kept = 0;

    memset(memory, 0, sizeof(memory));
    T_EQUAL(vmth_content_index_init(&index, memory, NBUCKETS * VMTH_CONTENT_BUCKET_BYTES), 0);
    for (uint64_t content = 0; content < 2 * NBUCKETS; content++) {
        const struct vmth_u128 hash = hash_of(content);

        vmth_content_index_insert(&index, &hash, 0, content);
    }
    for (uint64_t content = 0; content < 2 * NBUCKETS; content++) {
        const struct vmth_u128 hash = hash_of(content);
        uint16_t block;
        uint64_t page;

        kept += vmth_content_index_find(&index, &hash, &block, &page);
    }
    /* Half full: few buckets of four overflow. */
    T_CHECK(kept >= 2 * NBUCKETS * 9 / 10);
}

static void test_refusals(void)
{
    struct vmth_content_index index;

    T_EQUAL(vmth_content_index_init(&index, memory, VMTH_CONTENT_BUCKET_BYTES - 1),
            (uint64_t)-EINVAL);
    T_EQUAL(vmth_content_index_init(&index, memory + 8, VMTH_CONTENT_BUCKET_BYTES),
            (uint64_t)-EINVAL);
}

int main(void)
{
    test_one_content();
    test_full_and_never_wrong();
    test_what_fits_is_kept();
    test_refusals();
    return T_PASS;
}
