/* SPDX-License-Identifier: Apache-2.0 */
/* The real kernel behind the KVM dirty trackers. */
#include "sys/kvm_ops.h"

#include <errno.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>

static int kernel_ioctl(void *context, int fd, unsigned long request, void *argument)
{
    (void)context;
    const int value = ioctl(fd, request, argument);
    return value < 0 ? -errno : value;
}

const struct vmth_kvm_ops vmth_kvm_kernel = {.ioctl = kernel_ioctl, .context = NULL};

int vmth_kvm_set_slot(const struct vmth_kvm_ops *ops, int vm_fd, const struct vmth_kvm_slot *slot,
                      uint32_t flags)
{
    struct kvm_userspace_memory_region region = {
        .slot = slot->slot,
        .flags = flags,
        .guest_phys_addr = slot->gpa,
        .memory_size = slot->npages * VMTH_KVM_PAGE_BYTES,
        .userspace_addr = slot->hva,
    };
    return ops->ioctl(ops->context, vm_fd, KVM_SET_USER_MEMORY_REGION, &region);
}
