/* SPDX-License-Identifier: Apache-2.0 */
/* KVM's dirty ring: each vCPU appends the pages it dirties; we harvest them into bitmaps.
 *
 *   ring of one vCPU   [reset][reset][DIRTY slot,page][DIRTY ..][empty]..     kernel appends ->
 *   collect            DIRTY -> bit in `collected`, entry marked RESET
 *   RESET_DIRTY_RINGS  the kernel write-protects exactly the pages of the entries marked RESET
 *   fetch              kick every vCPU (its ring is complete), collect, reset, hand the bits over
 *
 * The order is what makes it safe: a page is re-protected (RESET) before the bit that was collected
 * for it is handed out, so whoever reads the page after fetch() reads it armed, and a later write
 * is appended again. rearm() has therefore nothing to do. A write between collect and RESET needs
 * no entry of its own: its page's bit is not handed out before the RESET.
 *
 * The kernel promises to stop a vCPU before its ring is full to the last entry; a KVM that emulates
 * breaks that promise and wraps around. A ring found full to the last entry is therefore taken as
 * overflowed: logging is switched off and on, which protects every page, and all count as dirty.
 *
 *   after an overflow   [gap: reset, never to be filled][DIRTY ..]     the kernel's index is past a
 *                        ^ next                          ^ kernel      gap that we skip and reset
 *
 * Not seen: the same writes as with the dirty log (sys/kvm_dirty_log.h). */
#ifndef VMTH_SYS_KVM_DIRTY_RING_H
#define VMTH_SYS_KVM_DIRTY_RING_H

#include <stddef.h>

#include "sys/kvm_ops.h"

struct kvm_dirty_gfn;

VMTH_BEGIN_DECLS

/* Enable rings of at most `max_entries` (a power of two) for this VM; before the first vCPU is
 * created. *entries is what the kernel allowed. Returns 0, -ENOTSUP when the kernel has no rings
 * that are ordered (ACQ_REL), or a negative errno. */
VMTH_MUST_CHECK int vmth_kvm_ring_enable(const struct vmth_kvm_ops *ops, int vm_fd,
                                         uint32_t max_entries, uint32_t *entries);

/* Make every vCPU leave guest mode once, so that what it wrote before is in its ring. It need not
 * stay out. Called from fetch(), without locks. Returns 0 or a negative errno. */
typedef int (*vmth_kvm_kick)(void *context);

struct vmth_kvm_ring;

/* A tracker over the mapped rings of all vCPUs (borrowed until free; the table is copied) and over
 * the slots (copied), stopped. Holds 1 bit a page. Returns 0, -EINVAL for an empty table, slot or
 * a ring size that is no power of two, -ENOMEM. */
VMTH_MUST_CHECK int vmth_kvm_ring_create(const struct vmth_kvm_ops *ops, int vm_fd,
                                         struct kvm_dirty_gfn *const *rings, size_t nrings,
                                         uint32_t entries, const struct vmth_kvm_slot *slots,
                                         size_t nslots, vmth_kvm_kick kick, void *kick_context,
                                         struct vmth_kvm_ring **out);

/* Stops it first. No vCPU may run. NULL is allowed. */
void vmth_kvm_ring_free(struct vmth_kvm_ring *ring);

/* Every vCPU write after its return is reported. Returns 0, -EALREADY, or the kernel's error; then
 * no slot is tracked. */
VMTH_MUST_CHECK int vmth_kvm_ring_start(struct vmth_kvm_ring *ring);

/* Harvest into the bitmap kept here and let the rings be used again. The thread of vCPU number
 * `vcpu` calls it when KVM_RUN returned KVM_EXIT_DIRTY_RING_FULL, and re-enters. Any thread.
 * Returns the number of entries, -EPROTO for an entry outside every slot, or the kernel's error. */
VMTH_MUST_CHECK int vmth_kvm_ring_collect(struct vmth_kvm_ring *ring, size_t vcpu);

/* The same if a quarter of that vCPU's ring is used, else nothing. A vCPU thread calls it after
 * every exit: a KVM that emulates looks for a full ring only between KVM_RUN's outer turns, and
 * writes more in one turn than the spare entries hold. Such a vCPU must be kicked often enough. */
VMTH_MUST_CHECK int vmth_kvm_ring_relieve(struct vmth_kvm_ring *ring, size_t vcpu);

/* OR each slot's dirty pages into bitmaps[slot index] and forget them here. Returns 0, -ENODEV when
 * not started, or an error of kick or collect: nothing is forgotten then. */
VMTH_MUST_CHECK int vmth_kvm_ring_fetch(struct vmth_kvm_ring *ring, uint64_t *const *bitmaps);

/* OR in what a fetch would, as far as it can be told without one, and change nothing: no vCPU is
 * kicked, no page protected. Missing are writes that the processors have not handed to the kernel,
 * and, after an overflow, what lies behind the gap. Returns 0, -ENODEV when not started. */
VMTH_MUST_CHECK int vmth_kvm_ring_peek(struct vmth_kvm_ring *ring, uint64_t *const *bitmaps);

/* How often the kernel has overwritten entries that nobody had harvested. Every page then counts as
 * dirty and is protected anew: nothing is lost, but that round is a full one. */
uint64_t vmth_kvm_ring_overflows(struct vmth_kvm_ring *ring);

/* How many pages vCPU number `vcpu` was the first to dirty since a fetch took them last, summed up
 * since creation: it never falls, and a page counts for one vCPU between two fetches, however often
 * it is written. "First" is by harvest: of several vCPUs whose entries for a page are found in one
 * turn, the lowest number. Pages that only an overflow made dirty count for nobody. 0 for a number
 * out of range. Any thread. */
uint64_t vmth_kvm_ring_dirtied(struct vmth_kvm_ring *ring, size_t vcpu);

/* End the tracking; idempotent. Returns the first error of the kernel after trying every slot. */
int vmth_kvm_ring_stop(struct vmth_kvm_ring *ring);

VMTH_END_DECLS

#endif
