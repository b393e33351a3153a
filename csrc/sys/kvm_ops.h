/* SPDX-License-Identifier: Apache-2.0 */
/* The only way the KVM dirty trackers reach the kernel, and the memory slots they track.
 *
 *   block 0:  pages 0 .. n0-1   <->  slot {slot id, gpa, n0 pages, hva}
 *   block 1:  pages 0 .. n1-1   <->  slot {...}
 *
 * A tracker's bitmaps are indexed by page inside one slot, one bitmap a slot, in table order. */
#ifndef VMTH_SYS_KVM_OPS_H
#define VMTH_SYS_KVM_OPS_H

#include <stdint.h>

#include "vmth/common.h"

VMTH_BEGIN_DECLS

#define VMTH_KVM_PAGE_BYTES UINT64_C(4096)

/* `ioctl` returns the call's value, or a negative errno; it may be called from any thread. The
 * `context` is the replacement's own (tests: a model of the kernel). */
struct vmth_kvm_ops {
    int (*ioctl)(void *context, int fd, unsigned long request, void *argument);
    void *context;
};

/* The real kernel. */
extern const struct vmth_kvm_ops vmth_kvm_kernel;

/* One memory slot of address space 0, as it was given to KVM_SET_USER_MEMORY_REGION. */
struct vmth_kvm_slot {
    uint32_t slot;
    uint64_t gpa;
    uint64_t npages;
    uint64_t hva;
};

/* Set the slot's flags (0 or KVM_MEM_LOG_DIRTY_PAGES). Returns 0 or a negative errno. */
VMTH_MUST_CHECK int vmth_kvm_set_slot(const struct vmth_kvm_ops *ops, int vm_fd,
                                      const struct vmth_kvm_slot *slot, uint32_t flags);

VMTH_END_DECLS

#endif
