/* SPDX-License-Identifier: Apache-2.0 */
/* KVM's dirty ring behind start, collect, fetch and stop. */
#include "sys/kvm_dirty_ring.h"

#include <errno.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "vmth/bitmap.h"

/* One full-ring exit may find its ring just emptied by a fetch; two in a row that find nothing mean
 * that the kernel counts entries as in use which are not there any more. */
#define STUCK_FULLS 2

struct ring_slot {
    struct vmth_kvm_slot slot;
    uint64_t *collected; /* harvested and RESET, not handed out yet */
};

struct vcpu_ring {
    struct kvm_dirty_gfn *entries; /* shared with the kernel: flags only through atomics */
    uint32_t next;                 /* first entry not harvested; wraps at 2^32, a power of two */
    bool gap;                      /* overflowed once: the kernel may write ahead of `next` */
    unsigned int idle_fulls;       /* full-ring exits in a row that found nothing to harvest */
    uint64_t dirtied;              /* pages whose bit in `collected` this ring set */
};

struct vmth_kvm_ring {
    /* Written only by create and free. */
    const struct vmth_kvm_ops *ops;
    int vm_fd;
    uint32_t nentries;
    vmth_kvm_kick kick;
    void *kick_context;
    size_t nrings;
    size_t nslots;

    /* Protected by `lock`: the vCPU threads and the fetching thread meet here. */
    pthread_mutex_t lock;
    bool started;
    bool reset_due; /* entries were marked RESET and the kernel has not been told yet */
    uint64_t overflows;
    struct vcpu_ring *rings;
    struct ring_slot *slots;
};

int vmth_kvm_ring_enable(const struct vmth_kvm_ops *ops, int vm_fd, uint32_t max_entries,
                         uint32_t *entries)
{
    const int max_bytes = ops->ioctl(ops->context, vm_fd, KVM_CHECK_EXTENSION,
                                     (void *)(uintptr_t)KVM_CAP_DIRTY_LOG_RING_ACQ_REL);
    if (max_bytes < 0) {
        return max_bytes;
    }
    if (max_bytes == 0) {
        return -ENOTSUP;
    }
    const uint32_t allowed = (uint32_t)max_bytes / (uint32_t)sizeof(struct kvm_dirty_gfn);
    const uint32_t chosen = max_entries < allowed ? max_entries : allowed;
    struct kvm_enable_cap cap = {
        .cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
        .args = {(uint64_t)chosen * sizeof(struct kvm_dirty_gfn)},
    };
    const int rc = ops->ioctl(ops->context, vm_fd, KVM_ENABLE_CAP, &cap);
    if (rc < 0) {
        return rc;
    }
    *entries = chosen;
    return 0;
}

int vmth_kvm_ring_create(const struct vmth_kvm_ops *ops, int vm_fd,
                         struct kvm_dirty_gfn *const *rings, size_t nrings, uint32_t entries,
                         const struct vmth_kvm_slot *slots, size_t nslots, vmth_kvm_kick kick,
                         void *kick_context, struct vmth_kvm_ring **out)
{
    if (nrings == 0 || nslots == 0 || entries == 0 || (entries & (entries - 1)) != 0) {
        return -EINVAL;
    }
    for (size_t i = 0; i < nslots; i++) {
        if (slots[i].npages == 0) {
            return -EINVAL;
        }
    }
    struct vmth_kvm_ring *ring = calloc(1, sizeof(*ring));
    if (ring == NULL) {
        return -ENOMEM;
    }
    ring->ops = ops;
    ring->vm_fd = vm_fd;
    ring->nentries = entries;
    ring->kick = kick;
    ring->kick_context = kick_context;
    const int rc = pthread_mutex_init(&ring->lock, NULL);
    if (rc != 0) {
        free(ring);
        return -rc;
    }
    ring->rings = calloc(nrings, sizeof(ring->rings[0]));
    ring->slots = calloc(nslots, sizeof(ring->slots[0]));
    if (ring->rings == NULL || ring->slots == NULL) {
        vmth_kvm_ring_free(ring);
        return -ENOMEM;
    }
    for (ring->nrings = 0; ring->nrings < nrings; ring->nrings++) {
        ring->rings[ring->nrings].entries = rings[ring->nrings];
    }
    for (ring->nslots = 0; ring->nslots < nslots; ring->nslots++) {
        struct ring_slot *tracked = &ring->slots[ring->nslots];
        tracked->slot = slots[ring->nslots];
        tracked->collected =
            calloc((size_t)VMTH_BITMAP_WORDS(tracked->slot.npages), sizeof(uint64_t));
        if (tracked->collected == NULL) {
            vmth_kvm_ring_free(ring);
            return -ENOMEM;
        }
    }
    *out = ring;
    return 0;
}

void vmth_kvm_ring_free(struct vmth_kvm_ring *ring)
{
    if (ring == NULL) {
        return;
    }
    (void)vmth_kvm_ring_stop(ring);
    if (ring->slots != NULL) {
        for (size_t i = 0; i < ring->nslots; i++) {
            free(ring->slots[i].collected);
        }
    }
    free(ring->slots);
    free(ring->rings);
    pthread_mutex_destroy(&ring->lock);
    free(ring);
}

static int note_page(struct vmth_kvm_ring *ring, struct vcpu_ring *vcpu, uint32_t slot,
                     uint64_t page)
{
    for (size_t i = 0; i < ring->nslots; i++) {
        if (ring->slots[i].slot.slot == slot && page < ring->slots[i].slot.npages) {
            uint64_t *word = &ring->slots[i].collected[page / 64];
            const uint64_t bit = UINT64_C(1) << (page % 64);
            /* By the bit: a KVM that emulates appends an entry at every write. */
            vcpu->dirtied += (*word & bit) == 0 ? 1 : 0;
            *word |= bit;
            return 0;
        }
    }
    return -EPROTO;
}

static struct kvm_dirty_gfn *entry_at(const struct vmth_kvm_ring *ring,
                                      const struct vcpu_ring *vcpu, uint32_t ahead)
{
    return &vcpu->entries[(vcpu->next + ahead) & (ring->nentries - 1)];
}

static bool is_dirty(const struct kvm_dirty_gfn *entry)
{
    /* Acquire pairs with the kernel's release: slot and offset are written before DIRTY. */
    return (__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_DIRTY) != 0;
}

static void give_back(struct kvm_dirty_gfn *entry)
{
    /* Release: the kernel may overwrite the entry once it sees RESET. */
    __atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
}

/* Entries from `next` on before the first dirty one, at most `limit`. */
static uint32_t clean_ahead(const struct vmth_kvm_ring *ring, const struct vcpu_ring *vcpu,
                            uint32_t limit)
{
    uint32_t n = 0;
    while (n < limit && !is_dirty(entry_at(ring, vcpu, n))) {
        n++;
    }
    return n;
}

/* After an overflow: move `next` to where the kernel writes. `stuck`: this vCPU cannot run. */
static void skip_gap(struct vmth_kvm_ring *ring, struct vcpu_ring *vcpu, bool stuck)
{
    /* Twice: a vCPU may write behind the first scan, but who saw a later entry sees the first. */
    uint32_t skip = clean_ahead(ring, vcpu, clean_ahead(ring, vcpu, ring->nentries));
    if (skip == ring->nentries) {
        if (!stuck) {
            return; /* nothing written since: wait for it, it shows the place */
        }
        /* The vCPU stands still because the kernel counts nearly a ringful or more as in use (the
         * overflow was several rings long): half of that can be given back without a doubt. */
        skip = ring->nentries / 2;
        vcpu->gap = true;
    }
    for (uint32_t i = 0; i < skip; i++) {
        give_back(entry_at(ring, vcpu, i));
    }
    vcpu->next += skip;
    ring->reset_due = ring->reset_due || skip > 0;
}

/* The dirty entries from `next` on, at most `limit`. */
static uint32_t harvest_run(struct vmth_kvm_ring *ring, struct vcpu_ring *vcpu, uint32_t limit,
                            int *error)
{
    uint32_t n = 0;
    for (; n < limit && is_dirty(entry_at(ring, vcpu, 0)); n++) {
        struct kvm_dirty_gfn *entry = entry_at(ring, vcpu, 0);
        const int rc = note_page(ring, vcpu, entry->slot, entry->offset);
        if (rc < 0) {
            *error = rc;
        }
        give_back(entry);
        vcpu->next++;
    }
    return n;
}

/* At most one ringful: what the vCPU appends after that is a later write. Behind a gap the kernel
 * may have wrapped around into it, so that there are two runs. */
static uint32_t harvest(struct vmth_kvm_ring *ring, struct vcpu_ring *vcpu, bool stuck, int *error)
{
    uint32_t n = 0;
    uint32_t more;
    do {
        if (vcpu->gap || stuck) {
            skip_gap(ring, vcpu, stuck && n == 0);
        }
        more = harvest_run(ring, vcpu, ring->nentries - n, error);
        n += more;
    } while (vcpu->gap && more > 0 && n < ring->nentries);
    return n;
}

/* Entries were lost: protect every page anew, and only then count all as dirty. */
static int resync_locked(struct vmth_kvm_ring *ring)
{
    ring->overflows++;
    for (size_t i = 0; i < ring->nslots && ring->started; i++) {
        struct ring_slot *tracked = &ring->slots[i];
        int rc = vmth_kvm_set_slot(ring->ops, ring->vm_fd, &tracked->slot, 0);
        if (rc == 0) {
            rc = vmth_kvm_set_slot(ring->ops, ring->vm_fd, &tracked->slot, KVM_MEM_LOG_DIRTY_PAGES);
        }
        if (rc < 0) {
            return rc;
        }
        vmth_bitmap_set_range(tracked->collected, 0, tracked->slot.npages);
    }
    return 0;
}

/* `full` is the ring of a vCPU that had a full-ring exit, or NULL. Returns the number of entries,
 * or an error: what was collected then is kept. */
static int collect_locked(struct vmth_kvm_ring *ring, struct vcpu_ring *full)
{
    uint32_t harvested = 0;
    bool overflowed = false;
    int error = 0;

    for (size_t r = 0; r < ring->nrings; r++) {
        struct vcpu_ring *vcpu = &ring->rings[r];
        const bool stuck = vcpu == full && vcpu->idle_fulls >= STUCK_FULLS;
        const uint32_t n = harvest(ring, vcpu, stuck, &error);
        if (n > 0) {
            vcpu->idle_fulls = 0;
        } else if (vcpu == full) {
            vcpu->idle_fulls++;
        }
        if (n == ring->nentries) {
            overflowed = true;
            vcpu->gap = true;
        }
        harvested += n;
    }
    ring->reset_due = ring->reset_due || harvested > 0;
    if (ring->reset_due) {
        const int rc =
            ring->ops->ioctl(ring->ops->context, ring->vm_fd, KVM_RESET_DIRTY_RINGS, NULL);
        if (rc < 0) {
            return rc;
        }
        ring->reset_due = false;
    }
    if (overflowed) {
        const int rc = resync_locked(ring);
        if (rc < 0) {
            return rc;
        }
    }
    return error < 0 ? error : (int)harvested;
}

static void forget_locked(struct vmth_kvm_ring *ring)
{
    for (size_t i = 0; i < ring->nslots; i++) {
        memset(ring->slots[i].collected, 0,
               (size_t)VMTH_BITMAP_WORDS(ring->slots[i].slot.npages) * sizeof(uint64_t));
    }
}

int vmth_kvm_ring_start(struct vmth_kvm_ring *ring)
{
    int rc = -EALREADY;

    pthread_mutex_lock(&ring->lock);
    if (!ring->started) {
        forget_locked(ring);
        size_t i = 0;
        for (rc = 0; rc == 0 && i < ring->nslots; i++) {
            rc = vmth_kvm_set_slot(ring->ops, ring->vm_fd, &ring->slots[i].slot,
                                   KVM_MEM_LOG_DIRTY_PAGES);
        }
        if (rc < 0) {
            for (size_t j = 0; j + 1 < i; j++) {
                /* Best effort: the first error is the one to report. */
                if (vmth_kvm_set_slot(ring->ops, ring->vm_fd, &ring->slots[j].slot, 0) < 0) {
                    continue;
                }
            }
        }
        ring->started = rc == 0;
    }
    pthread_mutex_unlock(&ring->lock);
    return rc;
}

int vmth_kvm_ring_collect(struct vmth_kvm_ring *ring, size_t vcpu)
{
    if (vcpu >= ring->nrings) {
        return -EINVAL;
    }
    pthread_mutex_lock(&ring->lock);
    const int rc = collect_locked(ring, &ring->rings[vcpu]);
    pthread_mutex_unlock(&ring->lock);
    return rc;
}

int vmth_kvm_ring_relieve(struct vmth_kvm_ring *ring, size_t vcpu)
{
    if (vcpu >= ring->nrings) {
        return -EINVAL;
    }
    pthread_mutex_lock(&ring->lock);
    const bool due = is_dirty(entry_at(ring, &ring->rings[vcpu], ring->nentries / 4));
    const int rc = due ? collect_locked(ring, NULL) : 0;
    ring->rings[vcpu].idle_fulls = 0; /* it ran */
    pthread_mutex_unlock(&ring->lock);
    return rc;
}

static void add_collected_locked(const struct vmth_kvm_ring *ring, uint64_t *const *bitmaps)
{
    for (size_t i = 0; i < ring->nslots; i++) {
        const uint64_t words = VMTH_BITMAP_WORDS(ring->slots[i].slot.npages);
        for (uint64_t w = 0; w < words; w++) {
            bitmaps[i][w] |= ring->slots[i].collected[w];
        }
    }
}

int vmth_kvm_ring_fetch(struct vmth_kvm_ring *ring, uint64_t *const *bitmaps)
{
    /* Outside the lock: a vCPU on its way out may be in collect(). */
    const int kicked = ring->kick(ring->kick_context);
    if (kicked < 0) {
        return kicked;
    }
    pthread_mutex_lock(&ring->lock);
    int rc = ring->started ? collect_locked(ring, NULL) : -ENODEV;
    if (rc >= 0) {
        add_collected_locked(ring, bitmaps);
        forget_locked(ring);
        rc = 0;
    }
    pthread_mutex_unlock(&ring->lock);
    return rc;
}

/* The entries that nobody has harvested, which stay as they are. */
static void peek_entries(const struct vmth_kvm_ring *ring, const struct vcpu_ring *vcpu,
                         uint64_t *const *bitmaps)
{
    for (uint32_t n = 0; n < ring->nentries && is_dirty(entry_at(ring, vcpu, n)); n++) {
        const struct kvm_dirty_gfn *entry = entry_at(ring, vcpu, n);
        for (size_t i = 0; i < ring->nslots; i++) {
            const struct vmth_kvm_slot *slot = &ring->slots[i].slot;
            if (slot->slot == entry->slot && entry->offset < slot->npages) {
                vmth_bitmap_set_range(bitmaps[i], entry->offset, 1);
            }
        }
    }
}

int vmth_kvm_ring_peek(struct vmth_kvm_ring *ring, uint64_t *const *bitmaps)
{
    pthread_mutex_lock(&ring->lock);
    const int rc = ring->started ? 0 : -ENODEV;
    if (rc == 0) {
        add_collected_locked(ring, bitmaps);
        for (size_t r = 0; r < ring->nrings; r++) {
            peek_entries(ring, &ring->rings[r], bitmaps);
        }
    }
    pthread_mutex_unlock(&ring->lock);
    return rc;
}

uint64_t vmth_kvm_ring_overflows(struct vmth_kvm_ring *ring)
{
    pthread_mutex_lock(&ring->lock);
    const uint64_t overflows = ring->overflows;
    pthread_mutex_unlock(&ring->lock);
    return overflows;
}

uint64_t vmth_kvm_ring_dirtied(struct vmth_kvm_ring *ring, size_t vcpu)
{
    if (vcpu >= ring->nrings) {
        return 0;
    }
    pthread_mutex_lock(&ring->lock);
    const uint64_t dirtied = ring->rings[vcpu].dirtied;
    pthread_mutex_unlock(&ring->lock);
    return dirtied;
}

int vmth_kvm_ring_stop(struct vmth_kvm_ring *ring)
{
    int first_error = 0;

    pthread_mutex_lock(&ring->lock);
    if (ring->started) {
        ring->started = false;
        for (size_t i = 0; i < ring->nslots; i++) {
            const int rc = vmth_kvm_set_slot(ring->ops, ring->vm_fd, &ring->slots[i].slot, 0);
            if (rc < 0 && first_error == 0) {
                first_error = rc;
            }
        }
        /* Entries that remain would fill the rings and be taken for writes of a later start(). */
        const int rc = collect_locked(ring, NULL);
        if (rc < 0 && first_error == 0) {
            first_error = rc;
        }
        forget_locked(ring);
    }
    pthread_mutex_unlock(&ring->lock);
    return first_error;
}
