/* SPDX-License-Identifier: Apache-2.0 */
/* KVM's dirty ring against a model of the kernel, with one that looks for a full ring too seldom.
 */
#include "sys/kvm_dirty_ring.h"

#include <errno.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <string.h>

#include "t_check.h"
#include "vmth/bitmap.h"

#define ENTRIES 256
#define SOFT_LIMIT (ENTRIES - 64)
#define NPAGES 203
#define WORDS VMTH_BITMAP_WORDS(NPAGES)
#define SLOT 5

static const struct vmth_kvm_slot slots[] = {
    {.slot = SLOT, .gpa = 0, .npages = NPAGES, .hva = 0x10000}};

/* The kernel's side as it is, and what a mover knows. A page is logged when it is protected; the
 * write then makes it writable. Only RESET and the switching on of the logging protect. */
struct model {
    struct kvm_dirty_gfn entries[ENTRIES];
    uint32_t dirty_index;
    uint32_t reset_index;
    bool logging;
    bool protected[NPAGES];
    unsigned int calls;
    unsigned int failing_call;
    unsigned int kicks;
    int kick_result;
    uint64_t enabled_bytes;
    int max_bytes;
    /* the mover's side */
    unsigned int written[NPAGES];
    unsigned int landed[NPAGES];
    uint64_t known_dirty[WORDS];
};

static void guest_writes(struct model *model, uint64_t page)
{
    model->written[page]++;
    if (model->logging && model->protected[page]) {
        struct kvm_dirty_gfn *entry = &model->entries[model->dirty_index++ % ENTRIES];
        *entry =
            (struct kvm_dirty_gfn){.flags = KVM_DIRTY_GFN_F_DIRTY, .slot = SLOT, .offset = page};
        model->protected[page] = false;
    }
}

static bool soft_full(const struct model *model)
{
    return model->dirty_index - model->reset_index >= SOFT_LIMIT;
}

static int model_reset(struct model *model)
{
    int n = 0;
    for (;; n++) {
        struct kvm_dirty_gfn *entry = &model->entries[model->reset_index % ENTRIES];
        if ((entry->flags & KVM_DIRTY_GFN_F_RESET) == 0) {
            return n;
        }
        model->protected[entry->offset] = true;
        entry->flags = 0;
        model->reset_index++;
    }
}

static int model_ioctl(void *context, int fd, unsigned long request, void *argument)
{
    struct model *model = context;
    T_EQUAL(fd, 42);
    if (++model->calls == model->failing_call) {
        return -EIO;
    }
    switch (request) {
    case KVM_CHECK_EXTENSION:
        T_EQUAL((uintptr_t)argument, KVM_CAP_DIRTY_LOG_RING_ACQ_REL);
        return model->max_bytes;
    case KVM_ENABLE_CAP:
        model->enabled_bytes = ((const struct kvm_enable_cap *)argument)->args[0];
        return 0;
    case KVM_SET_USER_MEMORY_REGION: {
        const struct kvm_userspace_memory_region *region = argument;
        T_EQUAL(region->slot, SLOT);
        model->logging = (region->flags & KVM_MEM_LOG_DIRTY_PAGES) != 0;
        for (uint64_t page = 0; page < NPAGES; page++) {
            model->protected[page] = model->logging;
        }
        return 0;
    }
    case KVM_RESET_DIRTY_RINGS:
        return model_reset(model);
    default:
        return -ENOTTY;
    }
}

static int kick(void *context)
{
    struct model *model = context;
    model->kicks++;
    return model->kick_result;
}

static struct vmth_kvm_ring *make(struct model *model, struct vmth_kvm_ops *ops)
{
    struct vmth_kvm_ring *ring = NULL;
    struct kvm_dirty_gfn *entries = model->entries;
    *model = (struct model){.max_bytes = 1 << 20};
    *ops = (struct vmth_kvm_ops){.ioctl = model_ioctl, .context = model};
    T_EQUAL(vmth_kvm_ring_create(ops, 42, &entries, 1, ENTRIES, slots, 1, kick, model, &ring), 0);
    return ring;
}

static void fetch(struct model *model, struct vmth_kvm_ring *ring)
{
    uint64_t *const bitmaps[] = {model->known_dirty};
    T_EQUAL(vmth_kvm_ring_fetch(ring, bitmaps), 0);
}

/* A peek changes nothing on either side, and shows what the fetch after it gives: `whole`, or a
 * part of it. Nothing is left to be seen then. */
static void peek_and_fetch(struct model *model, struct vmth_kvm_ring *ring, bool whole)
{
    uint64_t seen[WORDS] = {0};
    uint64_t fetched[WORDS] = {0};
    struct kvm_dirty_gfn before[ENTRIES];
    uint64_t *const looked_at[] = {seen};
    uint64_t *const taken[] = {fetched};
    const unsigned int calls = model->calls + model->kicks;
    memcpy(before, model->entries, sizeof(before));
    T_EQUAL(vmth_kvm_ring_peek(ring, looked_at), 0);
    T_EQUAL(model->calls + model->kicks, calls);
    T_CHECK(memcmp(before, model->entries, sizeof(before)) == 0);
    T_EQUAL(vmth_kvm_ring_fetch(ring, taken), 0);
    for (size_t w = 0; w < WORDS; w++) {
        T_EQUAL(seen[w] & ~fetched[w], 0);
        T_CHECK(!whole || seen[w] == fetched[w]);
        model->known_dirty[w] |= fetched[w];
        seen[w] = 0;
    }
    T_EQUAL(vmth_kvm_ring_peek(ring, looked_at), 0);
    T_EQUAL(vmth_bitmap_count(seen, 0, NPAGES), 0);
}

static void read_pages(struct model *model, uint64_t page, uint64_t npages)
{
    for (uint64_t read = page; read < page + npages; read++) {
        model->landed[read] = model->written[read];
    }
    vmth_bitmap_clear_range(model->known_dirty, page, npages);
}

static void check_promise(const struct model *model)
{
    for (uint64_t page = 0; page < NPAGES; page++) {
        T_CHECK(model->landed[page] == model->written[page] ||
                vmth_bitmap_test(model->known_dirty, page));
    }
    T_EQUAL(vmth_bitmap_count(model->known_dirty, NPAGES, WORDS * 64 - NPAGES), 0);
}

static void test_enable(void)
{
    const struct {
        int max_bytes;
        uint32_t wanted;
        int rc;
        uint32_t entries;
    } table[] = {
        {1 << 20, 65536, 0, 65536}, {1 << 20, 1 << 20, 0, 65536}, {1 << 20, 1024, 0, 1024},
        {0, 65536, -ENOTSUP, 7},    {-EPERM, 65536, -EPERM, 7},
    };
    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        struct model model = {.max_bytes = table[i].max_bytes};
        const struct vmth_kvm_ops ops = {.ioctl = model_ioctl, .context = &model};
        uint32_t entries = 7;
        T_EQUAL(vmth_kvm_ring_enable(&ops, 42, table[i].wanted, &entries), table[i].rc);
        T_EQUAL(entries, table[i].entries);
        T_EQUAL(model.enabled_bytes, table[i].rc == 0 ? UINT64_C(16) * entries : 0);
    }
}

static void test_bad_arguments(void)
{
    struct model model = {0};
    struct vmth_kvm_ops ops = {.ioctl = model_ioctl, .context = &model};
    struct kvm_dirty_gfn *entries = model.entries;
    struct vmth_kvm_ring *ring = NULL;
    const struct {
        size_t nrings;
        uint32_t entries;
        size_t nslots;
    } table[] = {{0, ENTRIES, 1}, {1, 0, 1}, {1, 100, 1}, {1, ENTRIES, 0}};
    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        T_EQUAL(vmth_kvm_ring_create(&ops, 42, &entries, table[i].nrings, table[i].entries, slots,
                                     table[i].nslots, kick, &model, &ring),
                -EINVAL);
    }
    T_CHECK(ring == NULL);
    vmth_kvm_ring_free(NULL);

    uint64_t *const bitmaps[] = {model.known_dirty};
    ring = make(&model, &ops);
    T_EQUAL(vmth_kvm_ring_fetch(ring, bitmaps), -ENODEV);
    T_EQUAL(vmth_kvm_ring_peek(ring, bitmaps), -ENODEV);
    T_EQUAL(vmth_kvm_ring_collect(ring, 1), -EINVAL);
    T_EQUAL(vmth_kvm_ring_relieve(ring, 1), -EINVAL);
    T_EQUAL(vmth_kvm_ring_stop(ring), 0);
    T_EQUAL(vmth_kvm_ring_start(ring), 0);
    T_EQUAL(vmth_kvm_ring_start(ring), -EALREADY);
    vmth_kvm_ring_free(ring);
    T_CHECK(!model.logging);
}

static void test_a_fetched_page_is_protected_when_it_is_handed_out(void)
{
    struct model model;
    struct vmth_kvm_ops ops;
    struct vmth_kvm_ring *ring = make(&model, &ops);
    T_EQUAL(vmth_kvm_ring_start(ring), 0);
    guest_writes(&model, 9);
    T_CHECK(!model.protected[9]);
    fetch(&model, ring);
    T_EQUAL(model.kicks, 1);
    T_CHECK(vmth_bitmap_test(model.known_dirty, 9) && model.protected[9]);
    vmth_kvm_ring_free(ring);
}

static void test_collected_pages_wait_for_the_fetch(void)
{
    struct model model;
    struct vmth_kvm_ops ops;
    struct vmth_kvm_ring *ring = make(&model, &ops);
    T_EQUAL(vmth_kvm_ring_start(ring), 0);
    guest_writes(&model, 9);
    T_EQUAL(vmth_kvm_ring_relieve(ring, 0), 0); /* less than a quarter: left alone */
    T_EQUAL(model.reset_index, 0);
    T_EQUAL(vmth_kvm_ring_collect(ring, 0), 1);
    T_EQUAL(model.reset_index, 1);
    guest_writes(&model, 9);
    guest_writes(&model, 10);
    peek_and_fetch(&model, ring, true); /* 9 was collected, 10 is in the ring */
    T_EQUAL(vmth_bitmap_count(model.known_dirty, 9, 2), 2);
    fetch(&model, ring);
    check_promise(&model);
    for (uint64_t page = 0; page <= ENTRIES / 4; page++) {
        guest_writes(&model, page);
    }
    T_EQUAL(vmth_kvm_ring_relieve(ring, 0), ENTRIES / 4 + 1);
    vmth_kvm_ring_free(ring);
}

static void test_failing_calls_forget_nothing(void)
{
    struct model model;
    struct vmth_kvm_ops ops;
    uint64_t *const bitmaps[] = {model.known_dirty};
    struct vmth_kvm_ring *ring = make(&model, &ops);
    model.failing_call = 1;
    T_EQUAL(vmth_kvm_ring_start(ring), -EIO);
    T_EQUAL(vmth_kvm_ring_start(ring), 0);
    guest_writes(&model, 9);
    model.kick_result = -EINTR;
    T_EQUAL(vmth_kvm_ring_fetch(ring, bitmaps), -EINTR);
    model.kick_result = 0;
    model.failing_call = model.calls + 1; /* the RESET */
    T_EQUAL(vmth_kvm_ring_fetch(ring, bitmaps), -EIO);
    T_CHECK(!vmth_bitmap_test(model.known_dirty, 9));
    fetch(&model, ring); /* the RESET is made up for before the page is handed out */
    T_CHECK(vmth_bitmap_test(model.known_dirty, 9) && model.protected[9]);
    model.failing_call = model.calls + 1;
    T_EQUAL(vmth_kvm_ring_stop(ring), -EIO);
    T_EQUAL(vmth_kvm_ring_stop(ring), 0);
    vmth_kvm_ring_free(ring);
}

static void test_entries_outside_of_every_slot_are_an_error(void)
{
    const struct kvm_dirty_gfn wrong[] = {
        {.flags = KVM_DIRTY_GFN_F_DIRTY, .slot = SLOT, .offset = NPAGES},
        {.flags = KVM_DIRTY_GFN_F_DIRTY, .slot = SLOT + 1, .offset = 0},
    };
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        struct model model;
        struct vmth_kvm_ops ops;
        struct vmth_kvm_ring *ring = make(&model, &ops);
        T_EQUAL(vmth_kvm_ring_start(ring), 0);
        guest_writes(&model, 4);
        guest_writes(&model, 5);
        model.entries[0].slot = wrong[i].slot;
        model.entries[0].offset = wrong[i].offset;
        model.failing_call = model.calls + 1; /* keep the model from protecting page `offset` */
        T_CHECK(vmth_kvm_ring_collect(ring, 0) < 0);
        model.entries[0].offset = 4;
        fetch(&model, ring);
        T_CHECK(vmth_bitmap_test(model.known_dirty, 5));
        vmth_kvm_ring_free(ring);
    }
}

static void test_stale_entries_do_not_survive_a_restart(void)
{
    struct model model;
    struct vmth_kvm_ops ops;
    struct vmth_kvm_ring *ring = make(&model, &ops);
    T_EQUAL(vmth_kvm_ring_start(ring), 0);
    guest_writes(&model, 9);
    T_EQUAL(vmth_kvm_ring_stop(ring), 0);
    T_EQUAL(vmth_kvm_ring_start(ring), 0);
    fetch(&model, ring);
    T_EQUAL(vmth_bitmap_count(model.known_dirty, 0, NPAGES), 0);
    vmth_kvm_ring_free(ring);
}

/* A vCPU that comes back because its ring is full: it runs again after a bounded number of turns.
 */
static void run_until_not_full(const struct model *model, struct vmth_kvm_ring *ring)
{
    for (unsigned int turn = 0; soft_full(model); turn++) {
        T_CHECK(turn < 64);
        T_CHECK(vmth_kvm_ring_collect(ring, 0) >= 0);
    }
}

/* Turns of every length, up to four rings full, as an emulating KVM takes them: such a one logs
 * every write, protected or not. */
static void test_overflows_lose_nothing(void)
{
    for (uint64_t seed = 1; seed <= 40; seed++) {
        struct model model;
        struct vmth_kvm_ops ops;
        uint64_t random = seed;
        const bool emulates = seed % 2 == 0;
        struct vmth_kvm_ring *ring = make(&model, &ops);
        T_EQUAL(vmth_kvm_ring_start(ring), 0);
        for (unsigned int turn = 0; turn < 60; turn++) {
            const uint64_t longest = t_random(&random) % 5 == 0 ? 4 * ENTRIES : ENTRIES / 2;
            const uint64_t writes = t_random(&random) % longest;
            for (uint64_t n = 0; n < writes; n++) {
                const uint64_t page = t_random(&random) % NPAGES;
                model.protected[page] = model.protected[page] || emulates;
                guest_writes(&model, page);
            }
            run_until_not_full(&model, ring);
            const uint64_t page = t_random(&random) % NPAGES;
            switch (t_random(&random) % 4) {
            case 0:
                fetch(&model, ring);
                check_promise(&model);
                break;
            case 1:
                peek_and_fetch(&model, ring, !emulates);
                check_promise(&model);
                break;
            case 2:
                fetch(&model, ring);
                read_pages(&model, page, t_random(&random) % (NPAGES - page + 1));
                break;
            default:
                T_CHECK(vmth_kvm_ring_relieve(ring, 0) >= 0);
                break;
            }
            run_until_not_full(&model, ring);
        }
        fetch(&model, ring);
        check_promise(&model);
        T_CHECK(emulates ? vmth_kvm_ring_overflows(ring) > 0 : vmth_kvm_ring_overflows(ring) == 0);
        vmth_kvm_ring_free(ring);
    }
}

/* A page counts for the vCPU that had it first since the last fetch, written and collected however
 * often: by an emulating KVM each write is an entry. */
static void test_pages_count_for_who_dirtied_them_first(void)
{
    struct model model = {0};
    static struct kvm_dirty_gfn others[ENTRIES]; /* filled here: the model's kernel has one ring */
    struct vmth_kvm_ops ops = {.ioctl = model_ioctl, .context = &model};
    struct kvm_dirty_gfn *rings[] = {model.entries, others};
    struct vmth_kvm_ring *ring = NULL;
    T_EQUAL(vmth_kvm_ring_create(&ops, 42, rings, 2, ENTRIES, slots, 1, kick, &model, &ring), 0);
    T_EQUAL(vmth_kvm_ring_start(ring), 0);
    for (unsigned int i = 0; i < 5; i++) {
        others[i] = (struct kvm_dirty_gfn){
            .flags = KVM_DIRTY_GFN_F_DIRTY, .slot = SLOT, .offset = i < 3 ? 100 : 101};
    }
    T_EQUAL(vmth_kvm_ring_collect(ring, 1), 5);
    T_EQUAL(vmth_kvm_ring_dirtied(ring, 0), 0);
    T_EQUAL(vmth_kvm_ring_dirtied(ring, 1), 2);
    for (uint64_t page = 90; page < 110; page++) { /* 100 and 101 are collected already */
        guest_writes(&model, page);
    }
    T_EQUAL(vmth_kvm_ring_collect(ring, 0), 20);
    T_EQUAL(vmth_kvm_ring_dirtied(ring, 0), 18);
    guest_writes(&model, 95);
    fetch(&model, ring);
    T_EQUAL(vmth_kvm_ring_dirtied(ring, 0), 18);
    guest_writes(&model, 95);
    fetch(&model, ring);
    T_EQUAL(vmth_kvm_ring_dirtied(ring, 0), 19);
    T_EQUAL(vmth_kvm_ring_dirtied(ring, 1), 2);
    T_EQUAL(vmth_kvm_ring_dirtied(ring, 2), 0);
    T_EQUAL(vmth_bitmap_count(model.known_dirty, 0, NPAGES), 20);
    vmth_kvm_ring_free(ring);
}

/* Neither what an overflow makes dirty counts, nor an entry outside of every slot. */
static void test_only_entries_are_counted(void)
{
    struct model model;
    struct vmth_kvm_ops ops;
    struct vmth_kvm_ring *ring = make(&model, &ops);
    T_EQUAL(vmth_kvm_ring_start(ring), 0);
    for (unsigned int n = 0; n < ENTRIES; n++) {
        model.protected[n % 10] = true; /* as an emulating KVM */
        guest_writes(&model, n % 10);
    }
    fetch(&model, ring);
    T_EQUAL(vmth_kvm_ring_overflows(ring), 1);
    T_EQUAL(vmth_bitmap_count(model.known_dirty, 0, NPAGES), NPAGES);
    T_EQUAL(vmth_kvm_ring_dirtied(ring, 0), 10);
    vmth_kvm_ring_free(ring);

    ring = make(&model, &ops);
    T_EQUAL(vmth_kvm_ring_start(ring), 0);
    guest_writes(&model, 4);
    model.entries[0].slot = SLOT + 1;
    T_EQUAL(vmth_kvm_ring_collect(ring, 0), -EPROTO);
    T_EQUAL(vmth_kvm_ring_dirtied(ring, 0), 0);
    vmth_kvm_ring_free(ring);
}

int main(void)
{
    test_enable();
    test_bad_arguments();
    test_a_fetched_page_is_protected_when_it_is_handed_out();
    test_collected_pages_wait_for_the_fetch();
    test_failing_calls_forget_nothing();
    test_entries_outside_of_every_slot_are_an_error();
    test_stale_entries_do_not_survive_a_restart();
    test_overflows_lose_nothing();
    test_pages_count_for_who_dirtied_them_first();
    test_only_entries_are_counted();
    return T_PASS;
}
