/* SPDX-License-Identifier: Apache-2.0 */
/* KVM's dirty log against a model of the kernel: every mode, every range, every failing call. */
#include "sys/kvm_dirty_log.h"

#include <errno.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <string.h>

#include "t_check.h"
#include "vmth/bitmap.h"

#define NSLOTS 2
#define MAX_PAGES 256
#define WORDS (MAX_PAGES / 64)

static const struct vmth_kvm_slot slots[NSLOTS] = {
    {.slot = 3, .gpa = 0, .npages = 203, .hva = 0x10000},
    {.slot = 1, .gpa = 1 << 20, .npages = 128, .hva = 0x900000},
};

/* What the kernel keeps, and what a mover knows. */
struct model {
    int offered; /* of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 */
    uint64_t enabled;
    bool logging[NSLOTS];
    uint64_t log[NSLOTS][WORDS];
    unsigned int calls;
    unsigned int failing_call; /* 0: none */
    unsigned int clears;
    /* the mover's side */
    unsigned int written[NSLOTS][MAX_PAGES];
    unsigned int landed[NSLOTS][MAX_PAGES];
    uint64_t known_dirty[NSLOTS][WORDS];
};

static size_t slot_index(uint32_t slot)
{
    for (size_t i = 0; i < NSLOTS; i++) {
        if (slots[i].slot == slot) {
            return i;
        }
    }
    T_CHECK(!"an unknown slot");
    return 0;
}

static int model_set_region(struct model *model, const struct kvm_userspace_memory_region *region)
{
    const size_t i = slot_index(region->slot);
    T_EQUAL(region->guest_phys_addr, slots[i].gpa);
    T_EQUAL(region->memory_size, slots[i].npages * 4096);
    T_EQUAL(region->userspace_addr, slots[i].hva);
    model->logging[i] = (region->flags & KVM_MEM_LOG_DIRTY_PAGES) != 0;
    memset(model->log[i], 0, sizeof(model->log[i]));
    if (model->logging[i] && (model->enabled & KVM_DIRTY_LOG_INITIALLY_SET) != 0) {
        vmth_bitmap_set_range(model->log[i], 0, slots[i].npages);
    }
    return 0;
}

static int model_get(struct model *model, const struct kvm_dirty_log *get)
{
    const size_t i = slot_index(get->slot);
    T_CHECK(model->logging[i]);
    memcpy(get->dirty_bitmap, model->log[i], VMTH_BITMAP_WORDS(slots[i].npages) * 8);
    if (model->enabled == 0) {
        memset(model->log[i], 0, sizeof(model->log[i]));
    }
    return 0;
}

static int model_clear(struct model *model, const struct kvm_clear_dirty_log *clear)
{
    const size_t i = slot_index(clear->slot);
    const uint64_t end = clear->first_page + clear->num_pages;
    T_CHECK(model->logging[i] && model->enabled != 0);
    /* The kernel's rule. */
    T_EQUAL(clear->first_page % 64, 0);
    T_CHECK(clear->num_pages > 0 && end <= slots[i].npages);
    T_CHECK(clear->num_pages % 64 == 0 || end == slots[i].npages);
    const uint64_t *bits = clear->dirty_bitmap;
    for (uint64_t page = clear->first_page; page < end; page++) {
        if (vmth_bitmap_test(bits, page - clear->first_page)) {
            vmth_bitmap_clear_range(model->log[i], page, 1);
        }
    }
    model->clears++;
    return 0;
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
        T_EQUAL((uintptr_t)argument, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
        return model->offered;
    case KVM_ENABLE_CAP:
        model->enabled = ((const struct kvm_enable_cap *)argument)->args[0];
        T_EQUAL(model->enabled & ~(uint64_t)model->offered, 0);
        return 0;
    case KVM_SET_USER_MEMORY_REGION:
        return model_set_region(model, argument);
    case KVM_GET_DIRTY_LOG:
        return model_get(model, argument);
    case KVM_CLEAR_DIRTY_LOG:
        return model_clear(model, argument);
    default:
        return -ENOTTY;
    }
}

static struct vmth_kvm_log *make(struct model *model, struct vmth_kvm_ops *ops, int offered)
{
    struct vmth_kvm_log *log = NULL;
    *model = (struct model){.offered = offered};
    *ops = (struct vmth_kvm_ops){.ioctl = model_ioctl, .context = model};
    const int mode = vmth_kvm_log_enable(ops, 42);
    T_CHECK(mode > 0);
    T_EQUAL(vmth_kvm_log_create(ops, 42, (enum vmth_kvm_log_mode)mode, slots, NSLOTS, &log), 0);
    return log;
}

static void guest_writes(struct model *model, size_t slot, uint64_t page)
{
    model->written[slot][page]++;
    if (model->logging[slot]) {
        vmth_bitmap_set_range(model->log[slot], page, 1);
    }
}

static void fetch(struct model *model, struct vmth_kvm_log *log)
{
    uint64_t *const bitmaps[NSLOTS] = {model->known_dirty[0], model->known_dirty[1]};
    T_EQUAL(vmth_kvm_log_fetch(log, bitmaps), 0);
}

/* What a peek shows is what the kernel holds, and it leaves both sides as they were. */
static void peek(struct model *model, struct vmth_kvm_log *log)
{
    static uint64_t seen[NSLOTS][WORDS];
    static uint64_t before[NSLOTS][WORDS];
    uint64_t *const bitmaps[NSLOTS] = {seen[0], seen[1]};
    memset(seen, 0, sizeof(seen));
    memcpy(before, model->log, sizeof(before));
    if (model->enabled == 0) {
        T_EQUAL(vmth_kvm_log_peek(log, bitmaps), -ENOTSUP);
        T_EQUAL(vmth_bitmap_count(seen[0], 0, MAX_PAGES), 0);
    } else {
        T_EQUAL(vmth_kvm_log_peek(log, bitmaps), 0);
        T_CHECK(memcmp(seen, model->log, sizeof(seen)) == 0);
    }
    T_CHECK(memcmp(before, model->log, sizeof(before)) == 0);
}

static void rearm_and_read(struct model *model, struct vmth_kvm_log *log, size_t slot,
                           uint64_t page, uint64_t npages)
{
    T_EQUAL(vmth_kvm_log_rearm(log, slot, page, npages), 0);
    for (uint64_t read = page; read < page + npages; read++) {
        model->landed[slot][read] = model->written[slot][read];
    }
    vmth_bitmap_clear_range(model->known_dirty[slot], page, npages);
}

static void check_promise(const struct model *model)
{
    for (size_t i = 0; i < NSLOTS; i++) {
        for (uint64_t page = 0; page < slots[i].npages; page++) {
            T_CHECK(model->landed[i][page] == model->written[i][page] ||
                    vmth_bitmap_test(model->known_dirty[i], page));
        }
        T_EQUAL(
            vmth_bitmap_count(model->known_dirty[i], slots[i].npages, MAX_PAGES - slots[i].npages),
            0);
    }
}

static void test_enable(void)
{
    const struct {
        int offered;
        int mode;
    } table[] = {
        {0, VMTH_KVM_LOG_FETCH_CLEARS},
        {KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, VMTH_KVM_LOG_MANUAL},
        {KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET,
         VMTH_KVM_LOG_MANUAL_ALL_SET},
        {0xff, VMTH_KVM_LOG_MANUAL_ALL_SET}, /* bits of a later kernel are left alone */
        {-EPERM, -EPERM},
    };
    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        struct model model = {.offered = table[i].offered};
        const struct vmth_kvm_ops ops = {.ioctl = model_ioctl, .context = &model};
        T_EQUAL(vmth_kvm_log_enable(&ops, 42), table[i].mode);
    }
}

static void test_bad_arguments(void)
{
    struct vmth_kvm_slot empty = slots[0];
    struct vmth_kvm_log *log = NULL;
    empty.npages = 0;
    T_EQUAL(vmth_kvm_log_create(&vmth_kvm_kernel, 42, VMTH_KVM_LOG_MANUAL, slots, 0, &log),
            -EINVAL);
    T_EQUAL(vmth_kvm_log_create(&vmth_kvm_kernel, 42, VMTH_KVM_LOG_MANUAL, &empty, 1, &log),
            -EINVAL);
    T_EQUAL(vmth_kvm_log_create(&vmth_kvm_kernel, 42, (enum vmth_kvm_log_mode)0, slots, 1, &log),
            -EINVAL);
    T_CHECK(log == NULL);
    vmth_kvm_log_free(NULL);

    struct model model;
    struct vmth_kvm_ops ops;
    uint64_t *const bitmaps[NSLOTS] = {model.known_dirty[0], model.known_dirty[1]};
    log = make(&model, &ops, 3);
    T_EQUAL(vmth_kvm_log_fetch(log, bitmaps), -ENODEV);
    T_EQUAL(vmth_kvm_log_peek(log, bitmaps), -ENODEV);
    T_EQUAL(vmth_kvm_log_rearm(log, 0, 0, 1), -ENODEV);
    T_EQUAL(vmth_kvm_log_stop(log), 0);
    T_EQUAL(vmth_kvm_log_start(log), 0);
    T_EQUAL(vmth_kvm_log_start(log), -EALREADY);
    T_EQUAL(vmth_kvm_log_rearm(log, 2, 0, 1), -EINVAL);
    T_EQUAL(vmth_kvm_log_rearm(log, 0, 203, 1), -EINVAL);
    T_EQUAL(vmth_kvm_log_rearm(log, 0, 204, 0), -EINVAL);
    T_EQUAL(vmth_kvm_log_rearm(log, 0, 1, UINT64_MAX), -EINVAL);
    T_EQUAL(vmth_kvm_log_rearm(log, 0, 203, 0), 0);
    vmth_kvm_log_free(log);
    T_CHECK(!model.logging[0] && !model.logging[1]);
}

/* Every single-page write and every re-arm range around it: neighbours that nobody fetched stay. */
static void test_rearm_clears_only_what_was_reported(void)
{
    struct model model;
    struct vmth_kvm_ops ops;
    struct vmth_kvm_log *log = make(&model, &ops, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
    T_EQUAL(vmth_kvm_log_start(log), 0);
    for (uint64_t page = 0; page < slots[0].npages; page++) {
        guest_writes(&model, 0, page);
        fetch(&model, log);
        for (uint64_t other = page < 3 ? 0 : page - 3; other < slots[0].npages && other < page + 3;
             other++) {
            guest_writes(&model, 0, other);
        }
        rearm_and_read(&model, log, 0, page, 1);
        T_CHECK(!vmth_bitmap_test(model.log[0], page));
        T_CHECK(page == 0 || vmth_bitmap_test(model.log[0], page - 1));
        /* Again without a fetch in between: the second write was reported to nobody, and that it
         * was looked at does not count. */
        guest_writes(&model, 0, page);
        peek(&model, log);
        T_EQUAL(vmth_kvm_log_rearm(log, 0, 0, slots[0].npages), 0);
        T_CHECK(vmth_bitmap_test(model.log[0], page));
        fetch(&model, log);
        check_promise(&model);
        rearm_and_read(&model, log, 0, 0, slots[0].npages);
    }
    vmth_kvm_log_free(log);
}

static void test_all_set_is_armed_before_the_first_fetch(void)
{
    struct model model;
    struct vmth_kvm_ops ops;
    struct vmth_kvm_log *log = make(&model, &ops, 3);
    T_EQUAL(vmth_kvm_log_start(log), 0);
    T_EQUAL(vmth_kvm_log_rearm(log, 0, 0, 203), 0);
    T_EQUAL(vmth_bitmap_count(model.log[0], 0, MAX_PAGES), 0);
    T_EQUAL(vmth_kvm_log_rearm(log, 1, 10, 20), 0);
    T_EQUAL(vmth_bitmap_count(model.log[1], 0, MAX_PAGES), 128 - 20);
    vmth_kvm_log_free(log);
}

static void test_nothing_pending_makes_no_call(void)
{
    struct model model;
    struct vmth_kvm_ops ops;
    struct vmth_kvm_log *log = make(&model, &ops, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
    T_EQUAL(vmth_kvm_log_start(log), 0);
    guest_writes(&model, 0, 5);
    T_EQUAL(vmth_kvm_log_rearm(log, 0, 0, 203), 0);
    T_EQUAL(model.clears, 0);
    fetch(&model, log);
    T_EQUAL(vmth_kvm_log_rearm(log, 0, 6, 197), 0);
    T_EQUAL(model.clears, 0);
    T_EQUAL(vmth_kvm_log_rearm(log, 0, 0, 203), 0);
    T_EQUAL(model.clears, 1);
    vmth_kvm_log_free(log);
}

static void test_random_schedules(int offered)
{
    for (uint64_t seed = 1; seed <= 20; seed++) {
        struct model model;
        struct vmth_kvm_ops ops;
        uint64_t random = seed;
        struct vmth_kvm_log *log = make(&model, &ops, offered);
        T_EQUAL(vmth_kvm_log_start(log), 0);
        for (size_t i = 0; i < NSLOTS; i++) {
            rearm_and_read(&model, log, i, 0, slots[i].npages);
        }
        for (unsigned int step = 0; step < 400; step++) {
            const size_t slot = t_random(&random) % NSLOTS;
            const uint64_t page = t_random(&random) % slots[slot].npages;
            switch (t_random(&random) % 5) {
            case 0:
                fetch(&model, log);
                check_promise(&model);
                break;
            case 1:
                peek(&model, log);
                break;
            case 2:
                rearm_and_read(&model, log, slot, page,
                               t_random(&random) % (slots[slot].npages - page + 1));
                break;
            default:
                guest_writes(&model, slot, page);
                break;
            }
        }
        fetch(&model, log);
        check_promise(&model);
        vmth_kvm_log_free(log);
    }
}

/* Each call of a short job fails in turn; nothing stays logged after free. */
static void test_every_failing_call(void)
{
    for (unsigned int failing = 1; failing <= 6; failing++) {
        struct model model;
        struct vmth_kvm_ops ops;
        uint64_t *const bitmaps[NSLOTS] = {model.known_dirty[0], model.known_dirty[1]};
        struct vmth_kvm_log *log = make(&model, &ops, 3);
        model.failing_call = model.calls + failing;
        int rc = vmth_kvm_log_start(log);
        T_EQUAL(rc, failing <= 2 ? -EIO : 0);
        if (rc < 0) {
            T_CHECK(!model.logging[0] && !model.logging[1]);
            T_EQUAL(vmth_kvm_log_fetch(log, bitmaps), -ENODEV);
        } else {
            rc = vmth_kvm_log_fetch(log, bitmaps);
            T_EQUAL(rc, failing <= 4 ? -EIO : 0);
            if (failing == 5) {
                T_EQUAL(vmth_kvm_log_rearm(log, 0, 0, 203), -EIO);
                T_EQUAL(vmth_bitmap_count(model.log[0], 0, MAX_PAGES), 203);
                T_EQUAL(vmth_kvm_log_rearm(log, 0, 0, 203), 0); /* still pending: tried again */
                T_EQUAL(vmth_bitmap_count(model.log[0], 0, MAX_PAGES), 0);
            }
            if (failing == 6) {
                T_EQUAL(vmth_kvm_log_rearm(log, 0, 0, 203), 0);
                model.failing_call = model.calls + 1;
                T_EQUAL(vmth_kvm_log_stop(log), -EIO);
                T_CHECK(model.logging[0] && !model.logging[1]); /* the others were tried */
                model.logging[0] = false;
            }
        }
        vmth_kvm_log_free(log);
        T_CHECK(!model.logging[0] && !model.logging[1]);
    }
}

int main(void)
{
    test_enable();
    test_bad_arguments();
    test_rearm_clears_only_what_was_reported();
    test_all_set_is_armed_before_the_first_fetch();
    test_nothing_pending_makes_no_call();
    test_random_schedules(0);
    test_random_schedules(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
    test_random_schedules(3);
    test_every_failing_call();
    return T_PASS;
}
