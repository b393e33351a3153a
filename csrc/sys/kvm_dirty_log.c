/* SPDX-License-Identifier: Apache-2.0 */
/* KVM's dirty log behind start, fetch, rearm and stop. */
#include "sys/kvm_dirty_log.h"

#include <errno.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "vmth/bitmap.h"

struct tracked_slot {
    struct vmth_kvm_slot slot;
    uint64_t *pending; /* reported by a fetch and not re-armed since */
    uint64_t *scratch; /* what the kernel reads or fills; same size */
};

struct vmth_kvm_log {
    const struct vmth_kvm_ops *ops;
    int vm_fd;
    enum vmth_kvm_log_mode mode;
    bool started;
    size_t nslots;
    struct tracked_slot slots[];
};

static int vm_ioctl(const struct vmth_kvm_log *log, unsigned long request, void *argument)
{
    return log->ops->ioctl(log->ops->context, log->vm_fd, request, argument);
}

int vmth_kvm_log_enable(const struct vmth_kvm_ops *ops, int vm_fd)
{
    const int offered = ops->ioctl(ops->context, vm_fd, KVM_CHECK_EXTENSION,
                                   (void *)(uintptr_t)KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
    if (offered < 0) {
        return offered;
    }
    if ((offered & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE) == 0) {
        return VMTH_KVM_LOG_FETCH_CLEARS;
    }
    const unsigned int wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    const unsigned int flags = (unsigned int)offered & wanted;
    struct kvm_enable_cap cap = {.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args = {flags}};
    const int rc = ops->ioctl(ops->context, vm_fd, KVM_ENABLE_CAP, &cap);
    if (rc < 0) {
        return rc;
    }
    return (flags & KVM_DIRTY_LOG_INITIALLY_SET) != 0 ? VMTH_KVM_LOG_MANUAL_ALL_SET
                                                      : VMTH_KVM_LOG_MANUAL;
}

int vmth_kvm_log_create(const struct vmth_kvm_ops *ops, int vm_fd, enum vmth_kvm_log_mode mode,
                        const struct vmth_kvm_slot *slots, size_t nslots, struct vmth_kvm_log **out)
{
    if (nslots == 0 || mode < VMTH_KVM_LOG_FETCH_CLEARS || mode > VMTH_KVM_LOG_MANUAL_ALL_SET) {
        return -EINVAL;
    }
    for (size_t i = 0; i < nslots; i++) {
        if (slots[i].npages == 0) {
            return -EINVAL;
        }
    }
    struct vmth_kvm_log *log = calloc(1, sizeof(*log) + nslots * sizeof(log->slots[0]));
    if (log == NULL) {
        return -ENOMEM;
    }
    log->ops = ops;
    log->vm_fd = vm_fd;
    log->mode = mode;
    log->nslots = nslots;
    for (size_t i = 0; i < nslots; i++) {
        struct tracked_slot *tracked = &log->slots[i];
        const size_t words = (size_t)VMTH_BITMAP_WORDS(slots[i].npages);
        tracked->slot = slots[i];
        tracked->pending = calloc(words, sizeof(uint64_t));
        tracked->scratch = calloc(words, sizeof(uint64_t));
        if (tracked->pending == NULL || tracked->scratch == NULL) {
            vmth_kvm_log_free(log);
            return -ENOMEM;
        }
    }
    *out = log;
    return 0;
}

void vmth_kvm_log_free(struct vmth_kvm_log *log)
{
    if (log == NULL) {
        return;
    }
    (void)vmth_kvm_log_stop(log);
    for (size_t i = 0; i < log->nslots; i++) {
        free(log->slots[i].pending);
        free(log->slots[i].scratch);
    }
    free(log);
}

/* Which bits of word `w` of a slot are pages [page, end). */
static uint64_t range_mask(uint64_t w, uint64_t page, uint64_t end)
{
    uint64_t mask = UINT64_MAX;
    if (page > 64 * w) {
        mask &= page - 64 * w >= 64 ? 0 : UINT64_MAX << (page - 64 * w);
    }
    if (end < 64 * w + 64) {
        mask &= end <= 64 * w ? 0 : UINT64_MAX >> (64 * w + 64 - end);
    }
    return mask;
}

int vmth_kvm_log_start(struct vmth_kvm_log *log)
{
    if (log->started) {
        return -EALREADY;
    }
    for (size_t i = 0; i < log->nslots; i++) {
        struct tracked_slot *tracked = &log->slots[i];
        const uint64_t words = VMTH_BITMAP_WORDS(tracked->slot.npages);
        for (uint64_t w = 0; w < words; w++) {
            tracked->pending[w] = log->mode == VMTH_KVM_LOG_MANUAL_ALL_SET
                                      ? range_mask(w, 0, tracked->slot.npages)
                                      : 0;
        }
        const int rc =
            vmth_kvm_set_slot(log->ops, log->vm_fd, &tracked->slot, KVM_MEM_LOG_DIRTY_PAGES);
        if (rc < 0) {
            while (i-- > 0) {
                /* Best effort: the first error is the one to report. */
                if (vmth_kvm_set_slot(log->ops, log->vm_fd, &log->slots[i].slot, 0) < 0) {
                    continue;
                }
            }
            return rc;
        }
    }
    log->started = true;
    return 0;
}

/* `report`: remember what was seen, so that it may be re-armed. */
static int read_log(struct vmth_kvm_log *log, uint64_t *const *bitmaps, bool report)
{
    if (!log->started) {
        return -ENODEV;
    }
    for (size_t i = 0; i < log->nslots; i++) {
        struct tracked_slot *tracked = &log->slots[i];
        struct kvm_dirty_log get = {
            .slot = tracked->slot.slot,
            .dirty_bitmap = tracked->scratch,
        };
        const int rc = vm_ioctl(log, KVM_GET_DIRTY_LOG, &get);
        if (rc < 0) {
            return rc;
        }
        const uint64_t words = VMTH_BITMAP_WORDS(tracked->slot.npages);
        for (uint64_t w = 0; w < words; w++) {
            const uint64_t dirty = tracked->scratch[w] & range_mask(w, 0, tracked->slot.npages);
            bitmaps[i][w] |= dirty;
            if (report) {
                tracked->pending[w] |= dirty;
            }
        }
    }
    return 0;
}

int vmth_kvm_log_fetch(struct vmth_kvm_log *log, uint64_t *const *bitmaps)
{
    return read_log(log, bitmaps, log->mode != VMTH_KVM_LOG_FETCH_CLEARS);
}

int vmth_kvm_log_peek(struct vmth_kvm_log *log, uint64_t *const *bitmaps)
{
    return log->mode == VMTH_KVM_LOG_FETCH_CLEARS ? -ENOTSUP : read_log(log, bitmaps, false);
}

int vmth_kvm_log_rearm(struct vmth_kvm_log *log, size_t index, uint64_t page, uint64_t npages)
{
    if (!log->started) {
        return -ENODEV;
    }
    if (index >= log->nslots) {
        return -EINVAL;
    }
    struct tracked_slot *tracked = &log->slots[index];
    if (page > tracked->slot.npages || npages > tracked->slot.npages - page) {
        return -EINVAL;
    }
    if (npages == 0 || log->mode == VMTH_KVM_LOG_FETCH_CLEARS) {
        return 0;
    }
    const uint64_t end = page + npages;
    uint64_t first = page / 64;
    uint64_t past = VMTH_BITMAP_WORDS(end);
    while (first < past && (tracked->pending[first] & range_mask(first, page, end)) == 0) {
        first++;
    }
    while (past > first && (tracked->pending[past - 1] & range_mask(past - 1, page, end)) == 0) {
        past--;
    }
    if (first == past) {
        return 0; /* nothing was reported here: there is nothing that may be cleared */
    }
    for (uint64_t w = first; w < past; w++) {
        tracked->scratch[w] = tracked->pending[w] & range_mask(w, page, end);
    }
    /* The count must be a multiple of 64 pages, or reach exactly the end of the slot. */
    const uint64_t last = 64 * past < tracked->slot.npages ? 64 * past : tracked->slot.npages;
    for (uint64_t from = 64 * first; from < last;) {
        /* num_pages is 32 bits wide; 1 Gi pages a call keep it a multiple of 64. */
        const uint64_t left = last - from;
        const uint64_t count = left < (UINT64_C(1) << 30) ? left : UINT64_C(1) << 30;
        struct kvm_clear_dirty_log clear = {
            .slot = tracked->slot.slot,
            .num_pages = (uint32_t)count,
            .first_page = from,
            .dirty_bitmap = &tracked->scratch[from / 64],
        };
        const int rc = vm_ioctl(log, KVM_CLEAR_DIRTY_LOG, &clear);
        if (rc < 0) {
            return rc;
        }
        from += count;
    }
    for (uint64_t w = first; w < past; w++) {
        tracked->pending[w] &= ~range_mask(w, page, end);
    }
    return 0;
}

int vmth_kvm_log_stop(struct vmth_kvm_log *log)
{
    int first_error = 0;
    if (!log->started) {
        return 0;
    }
    log->started = false;
    for (size_t i = 0; i < log->nslots; i++) {
        const int rc = vmth_kvm_set_slot(log->ops, log->vm_fd, &log->slots[i].slot, 0);
        if (rc < 0 && first_error == 0) {
            first_error = rc;
        }
    }
    return first_error;
}
