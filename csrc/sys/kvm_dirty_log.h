/* SPDX-License-Identifier: Apache-2.0 */
/* KVM's dirty log: which pages the vCPUs wrote, fetched as bitmaps and re-armed range by range.
 *
 * With manual protect, fetching leaves the kernel's bits set and pages writable at full speed; a
 * page is clean again only after rearm(), which must precede the reading of its content:
 *
 *   kernel's log   0 1 1 0 1          fetch: 0 1 1 0 1 (log unchanged, `pending` remembers it)
 *   guest writes 0 1 1 1 0 1          rearm(1, 2): clears bits 1 and 2, because they are pending;
 *   rearm(1, 3)    0 0 0 1 1                 bit 3 stays: nobody was told of that write yet
 *
 * Not seen: writes that do not come from a vCPU or from KVM itself - the VMM's own threads through
 * its mapping, pwrite(), vhost back ends, DMA, hole punching.
 *
 * One thread at a time; vCPUs run beside it. Works only in the process that created the VM. */
#ifndef VMTH_SYS_KVM_DIRTY_LOG_H
#define VMTH_SYS_KVM_DIRTY_LOG_H

#include <stddef.h>

#include "sys/kvm_ops.h"

VMTH_BEGIN_DECLS

enum vmth_kvm_log_mode {
    VMTH_KVM_LOG_FETCH_CLEARS = 1, /* no manual protect: fetch re-arms all, rearm() nothing */
    VMTH_KVM_LOG_MANUAL,           /* starts clean, every page write-protected at start() */
    VMTH_KVM_LOG_MANUAL_ALL_SET,   /* starts with every page dirty and none protected */
};

/* Turn on the best mode that the kernel offers for this VM; call it once, before any slot is
 * logged. Not together with a dirty ring (start() of a ring relies on pages being protected at
 * once). Returns the mode, or a negative errno. */
VMTH_MUST_CHECK int vmth_kvm_log_enable(const struct vmth_kvm_ops *ops, int vm_fd);

struct vmth_kvm_log;

/* A tracker over `nslots` slots (copied), stopped. Holds 3 bits a page. Returns 0, -EINVAL for an
 * empty table, slot or mode, -ENOMEM. */
VMTH_MUST_CHECK int vmth_kvm_log_create(const struct vmth_kvm_ops *ops, int vm_fd,
                                        enum vmth_kvm_log_mode mode,
                                        const struct vmth_kvm_slot *slots, size_t nslots,
                                        struct vmth_kvm_log **out);

/* Stops it first. NULL is allowed. */
void vmth_kvm_log_free(struct vmth_kvm_log *log);

/* Every vCPU write after its return is logged. Returns 0, -EALREADY when started, or the kernel's
 * error; then no slot is logged. */
VMTH_MUST_CHECK int vmth_kvm_log_start(struct vmth_kvm_log *log);

/* OR each slot's dirty pages into bitmaps[slot index] (whole uint64 words, bits past the end
 * clear). Returns 0, -ENODEV when not started, or the kernel's error: what was merged until then is
 * true, the rest is not lost unless the mode is FETCH_CLEARS, where the job should end. */
VMTH_MUST_CHECK int vmth_kvm_log_fetch(struct vmth_kvm_log *log, uint64_t *const *bitmaps);

/* OR in what a fetch would, and change nothing: a re-arm clears no bit that only a peek has shown.
 * Returns 0, -ENODEV when not started, -ENOTSUP where looking clears (FETCH_CLEARS), or the
 * kernel's error. */
VMTH_MUST_CHECK int vmth_kvm_log_peek(struct vmth_kvm_log *log, uint64_t *const *bitmaps);

/* Re-arm the pages of [page, page + npages) of one slot that a fetch reported and that were not
 * re-armed since (with MANUAL_ALL_SET every page counts as reported at start()). The kernel wants
 * ranges of 64 pages; the range is widened with clear bits, which the kernel leaves alone.
 * Returns 0, -EINVAL outside the slot, -ENODEV when not started, or the kernel's error: then the
 * pages may count as dirty still. */
VMTH_MUST_CHECK int vmth_kvm_log_rearm(struct vmth_kvm_log *log, size_t index, uint64_t page,
                                       uint64_t npages);

/* End the logging; idempotent. Returns the first error of the kernel after trying every slot. */
int vmth_kvm_log_stop(struct vmth_kvm_log *log);

VMTH_END_DECLS

#endif
