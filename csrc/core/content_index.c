/* SPDX-License-Identifier: Apache-2.0 */
/* Buckets of four entries, searched whole: one cache line a call. */
#include "vmth/content_index.h"

#include <errno.h>

enum { ENTRIES = VMTH_CONTENT_BUCKET_BYTES / VMTH_CONTENT_ENTRY_BYTES, WORDS = 2 * ENTRIES };

#define PAGE_BITS 48

/* Never 0, since block + 1 is not. */
static uint64_t place_of(uint16_t block, uint64_t page)
{
    return ((uint64_t)block + 1) << PAGE_BITS | page;
}

static uint64_t load(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static void store(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

static uint64_t *bucket_of(const struct vmth_content_index *index, const struct vmth_u128 *hash)
{
    return index->words + WORDS * (hash->lo & index->bucket_mask);
}

static bool holds(const uint64_t *entry, uint64_t tag, uint64_t *place)
{
    *place = load(entry + 1);
    return *place != 0 && (load(entry) ^ *place) == tag;
}

int vmth_content_index_init(struct vmth_content_index *index, void *memory, size_t nbytes)
{
    uint64_t nbuckets = 1;

    if (nbytes < VMTH_CONTENT_BUCKET_BYTES || (uintptr_t)memory % VMTH_CONTENT_BUCKET_BYTES != 0) {
        return -EINVAL;
    }
    while (2 * nbuckets <= nbytes / VMTH_CONTENT_BUCKET_BYTES) {
        nbuckets *= 2;
    }
    index->words = memory;
    index->bucket_mask = nbuckets - 1;
    return 0;
}

void vmth_content_index_insert(struct vmth_content_index *index, const struct vmth_u128 *hash,
                               uint16_t block, uint64_t page)
{
    uint64_t *bucket = bucket_of(index, hash);
    uint64_t *into = NULL;
    uint64_t place;

    if (page > VMTH_CONTENT_MAX_PAGE || (hash->lo | hash->hi) == 0) {
        return;
    }
    for (unsigned i = 0; i < ENTRIES; i++) {
        uint64_t *entry = bucket + 2 * i;

        if (holds(entry, hash->hi, &place)) {
            return;
        }
        if (place == 0 && into == NULL) {
            into = entry;
        }
    }
    if (into == NULL) {
        into = bucket + 2 * (hash->hi % ENTRIES); /* by the newcomer: as good as at random */
    }
    place = place_of(block, page);
    store(into, hash->hi ^ place);
    store(into + 1, place);
}

bool vmth_content_index_find(const struct vmth_content_index *index, const struct vmth_u128 *hash,
                             uint16_t *block, uint64_t *page)
{
    const uint64_t *bucket = bucket_of(index, hash);

    for (unsigned i = 0; i < ENTRIES; i++) {
        uint64_t place;

        if (holds(bucket + 2 * i, hash->hi, &place)) {
            *block = (uint16_t)((place >> PAGE_BITS) - 1);
            *page = place & VMTH_CONTENT_MAX_PAGE;
            return true;
        }
    }
    return false;
}

void vmth_content_index_forget(struct vmth_content_index *index, const struct vmth_u128 *hash,
                               uint16_t block, uint64_t page)
{
    uint64_t *bucket = bucket_of(index, hash);

    for (unsigned i = 0; i < ENTRIES; i++) {
        uint64_t *entry = bucket + 2 * i;
        uint64_t place;

        if (holds(entry, hash->hi, &place) && place == place_of(block, page)) {
            store(entry + 1, 0);
        }
    }
}
