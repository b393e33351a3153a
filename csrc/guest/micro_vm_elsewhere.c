/* SPDX-License-Identifier: Apache-2.0 */
/* The micro VM where its x86 program cannot run: creation says so, and no other call has a VM. */
#if !defined(__x86_64__)
#include "guest/micro_vm.h"

#include <errno.h>

int vmth_micro_vm_create(const struct vmth_kvm_slot *slots, size_t nslots,
                         enum vmth_micro_vm_tracker tracker, size_t nvcpus,
                         struct vmth_micro_vm **out)
{
    (void)slots;
    (void)nslots;
    (void)tracker;
    (void)nvcpus;
    (void)out;
    return -ENOSYS;
}

void vmth_micro_vm_free(struct vmth_micro_vm *vm)
{
    (void)vm; /* always NULL here */
}

size_t vmth_micro_vm_vcpus(const struct vmth_micro_vm *vm)
{
    (void)vm;
    return 0;
}

int vmth_micro_vm_start_fresh(struct vmth_micro_vm *vm, uint64_t entry_gpa,
                              const struct vmth_pace *paces, size_t npaces,
                              const struct vmth_pace *other_paces, size_t nother_paces)
{
    (void)vm;
    (void)entry_gpa;
    (void)paces;
    (void)npaces;
    (void)other_paces;
    (void)nother_paces;
    return -ENOSYS;
}

int vmth_micro_vm_pause(struct vmth_micro_vm *vm, bool *was_running)
{
    (void)vm;
    (void)was_running;
    return -ENOSYS;
}

int vmth_micro_vm_resume(struct vmth_micro_vm *vm)
{
    (void)vm;
    return -ENOSYS;
}

int vmth_micro_vm_pause_at_beat(struct vmth_micro_vm *vm, uint64_t timeout_ns)
{
    (void)vm;
    (void)timeout_ns;
    return -ENOSYS;
}

int vmth_micro_vm_get_state(struct vmth_micro_vm *vm, size_t vcpu, struct vmth_micro_vm_state *out)
{
    (void)vm;
    (void)vcpu;
    (void)out;
    return -ENOSYS;
}

int vmth_micro_vm_set_state(struct vmth_micro_vm *vm, size_t vcpu,
                            const struct vmth_micro_vm_state *state)
{
    (void)vm;
    (void)vcpu;
    (void)state;
    return -ENOSYS;
}

int vmth_micro_vm_throttle(struct vmth_micro_vm *vm, size_t vcpu, unsigned int percent)
{
    (void)vm;
    (void)vcpu;
    (void)percent;
    return -ENOSYS;
}

void vmth_micro_vm_report(struct vmth_micro_vm *vm, size_t vcpu, struct vmth_beat_report *out)
{
    (void)vm;
    (void)vcpu;
    *out = (struct vmth_beat_report){0};
}

const char *vmth_micro_vm_crash(struct vmth_micro_vm *vm)
{
    (void)vm;
    return NULL;
}

struct vmth_kvm_log *vmth_micro_vm_log(struct vmth_micro_vm *vm)
{
    (void)vm;
    return NULL;
}

struct vmth_kvm_ring *vmth_micro_vm_ring(struct vmth_micro_vm *vm)
{
    (void)vm;
    return NULL;
}

enum vmth_kvm_log_mode vmth_micro_vm_log_mode(const struct vmth_micro_vm *vm)
{
    (void)vm;
    return VMTH_KVM_LOG_FETCH_CLEARS;
}

#else
typedef int micro_vm_elsewhere_is_not_built_here;
#endif
