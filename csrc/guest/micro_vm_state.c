/* SPDX-License-Identifier: Apache-2.0 */
/* The state of the micro VM's vCPUs: fresh registers, and all that moves with the guest beside its
 * memory. */
#if defined(__x86_64__)
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "guest/micro_vm_internal.h"

#define CR0_PE UINT64_C(0x01)
#define CR0_ET UINT64_C(0x10)
#define RFLAGS_ALWAYS_SET UINT64_C(0x2)

/* Time stamp counter, MISC_ENABLE, PAT: those that real hardware would carry on with. */
static const uint32_t saved_msrs[VMTH_MICRO_VM_MSRS] = {0x10, 0x1a0, 0x277};

struct msr_list {
    struct kvm_msrs head;
    struct kvm_msr_entry entries[VMTH_MICRO_VM_MSRS];
};

static int vcpu_ioctl(const struct vmth_vcpu *vcpu, unsigned long request, void *argument)
{
    return vmth_kvm_kernel.ioctl(vmth_kvm_kernel.context, vcpu->fd, request, argument);
}

/* 0 when registers may be touched. The lock is held. */
static int check_parked_locked(const struct vmth_micro_vm *vm)
{
    if (vm->crashed) {
        return -EIO;
    }
    return vm->wish == VMTH_VCPU_PARK && vmth_micro_vm_parked_locked(vm) ? 0 : -EBUSY;
}

static struct kvm_segment flat_segment(uint64_t base, uint16_t selector, uint8_t type)
{
    return (struct kvm_segment){
        .base = base,
        .limit = UINT32_MAX,
        .selector = selector,
        .type = type,
        .present = 1,
        .db = 1,
        .s = 1,
        .g = 1,
    };
}

static int set_fresh_registers(const struct vmth_vcpu *vcpu, uint64_t entry_gpa)
{
    const uint64_t lane = vcpu->index * VMTH_MICRO_VM_LANE_BYTES;
    struct kvm_sregs sregs;
    int rc = vcpu_ioctl(vcpu, KVM_GET_SREGS, &sregs);
    if (rc < 0) {
        return rc;
    }
    const struct kvm_segment code = flat_segment(0, 0x08, 0xb);    /* execute, read, accessed */
    const struct kvm_segment data = flat_segment(lane, 0x10, 0x3); /* read, write, accessed */
    sregs.cs = code;
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.cr0 = CR0_PE | CR0_ET; /* protected mode, no paging */
    sregs.cr4 = 0;
    sregs.efer = 0;
    rc = vcpu_ioctl(vcpu, KVM_SET_SREGS, &sregs);
    if (rc < 0) {
        return rc;
    }
    struct kvm_regs regs = {.rip = entry_gpa, .rflags = RFLAGS_ALWAYS_SET};
    return vcpu_ioctl(vcpu, KVM_SET_REGS, &regs);
}

static void set_fresh_beats_locked(struct vmth_vcpu *vcpu, const struct vmth_pace *paces,
                                   size_t npaces)
{
    memset(&vcpu->beats, 0, sizeof(vcpu->beats));
    vcpu->running_base_ns = 0;
    vcpu->due_ns = 0;
    vcpu->at_beat = false;
    vcpu->npaces = (uint32_t)npaces;
    for (size_t i = 0; i < npaces; i++) {
        vcpu->paces[i] = paces[i];
    }
}

int vmth_micro_vm_start_fresh(struct vmth_micro_vm *vm, uint64_t entry_gpa,
                              const struct vmth_pace *paces, size_t npaces,
                              const struct vmth_pace *other_paces, size_t nother_paces)
{
    if (npaces > VMTH_MICRO_VM_PACES || !vmth_pace_ordered(paces, npaces) ||
        nother_paces > VMTH_MICRO_VM_PACES || !vmth_pace_ordered(other_paces, nother_paces)) {
        return -EINVAL;
    }
    pthread_mutex_lock(&vm->lock);
    int rc = check_parked_locked(vm);
    for (size_t i = 0; rc == 0 && i < vm->nvcpus; i++) {
        rc = set_fresh_registers(&vm->vcpus[i], entry_gpa);
    }
    for (size_t i = 0; rc == 0 && i < vm->nvcpus; i++) {
        if (i == 0) {
            set_fresh_beats_locked(&vm->vcpus[i], paces, npaces);
        } else {
            set_fresh_beats_locked(&vm->vcpus[i], other_paces, nother_paces);
        }
    }
    pthread_mutex_unlock(&vm->lock);
    return rc < 0 ? rc : vmth_micro_vm_resume(vm);
}

static int get_msrs(const struct vmth_vcpu *vcpu, struct vmth_micro_vm_state *out)
{
    struct msr_list list = {0};
    out->nmsrs = 0;
    for (size_t i = 0; i < VMTH_MICRO_VM_MSRS; i++) {
        list.head.nmsrs = 1;
        list.entries[0] = (struct kvm_msr_entry){.index = saved_msrs[i]};
        const int got = vcpu_ioctl(vcpu, KVM_GET_MSRS, &list);
        if (got < 0) {
            return got;
        }
        if (got == 1) { /* 0: this KVM has no such MSR */
            out->msrs[out->nmsrs++] = list.entries[0];
        }
    }
    return 0;
}

static int get_registers(const struct vmth_vcpu *vcpu, struct vmth_micro_vm_state *out)
{
    const struct {
        unsigned long request;
        void *argument;
    } parts[] = {
        {KVM_GET_REGS, &out->regs},
        {KVM_GET_SREGS, &out->sregs},
        {KVM_GET_FPU, &out->fpu},
        {KVM_GET_MP_STATE, &out->mp_state},
        {KVM_GET_VCPU_EVENTS, &out->events},
        {vcpu->vm->has_xcrs ? KVM_GET_XCRS : 0, &out->xcrs},
    };
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        const int rc =
            parts[i].request == 0 ? 0 : vcpu_ioctl(vcpu, parts[i].request, parts[i].argument);
        if (rc < 0) {
            return rc;
        }
    }
    return get_msrs(vcpu, out);
}

int vmth_micro_vm_get_state(struct vmth_micro_vm *vm, size_t index, struct vmth_micro_vm_state *out)
{
    if (index >= vm->nvcpus) {
        return -EINVAL;
    }
    const struct vmth_vcpu *vcpu = &vm->vcpus[index];
    struct vmth_micro_vm_state state;
    memset(&state, 0, sizeof(state)); /* padding too: it is copied out */

    pthread_mutex_lock(&vm->lock);
    int rc = check_parked_locked(vm);
    if (rc == 0) {
        rc = get_registers(vcpu, &state);
    }
    state.beats = vcpu->beats.beats;
    state.out_of_order = vcpu->beats.out_of_order;
    state.running_ns = vcpu->running_base_ns;
    state.due_ns = vcpu->due_ns;
    state.at_beat = vcpu->at_beat;
    state.npaces = vcpu->npaces;
    memcpy(state.paces, vcpu->paces, sizeof(state.paces));
    pthread_mutex_unlock(&vm->lock);
    if (rc == 0) {
        *out = state;
    }
    return rc;
}

static int set_msrs(const struct vmth_vcpu *vcpu, const struct vmth_micro_vm_state *state)
{
    struct msr_list list = {.head = {.nmsrs = state->nmsrs}};
    memcpy(list.entries, state->msrs, sizeof(list.entries));
    if (state->nmsrs == 0) {
        return 0;
    }
    const int set = vcpu_ioctl(vcpu, KVM_SET_MSRS, &list);
    if (set < 0) {
        return set;
    }
    return (uint32_t)set == state->nmsrs ? 0 : -EINVAL;
}

static bool known_msrs(const struct vmth_micro_vm_state *state)
{
    for (uint32_t i = 0; i < state->nmsrs; i++) {
        bool known = false;
        for (size_t j = 0; j < VMTH_MICRO_VM_MSRS; j++) {
            known = known || state->msrs[i].index == saved_msrs[j];
        }
        if (!known) {
            return false;
        }
    }
    return true;
}

static int set_registers(const struct vmth_vcpu *vcpu, const struct vmth_micro_vm_state *state)
{
    struct vmth_micro_vm_state copy = *state; /* the kernel's structs are not const */
    const struct {
        unsigned long request;
        void *argument;
    } parts[] = {
        {KVM_SET_SREGS, &copy.sregs},
        {KVM_SET_REGS, &copy.regs},
        {KVM_SET_FPU, &copy.fpu},
        {vcpu->vm->has_xcrs && copy.xcrs.nr_xcrs > 0 ? KVM_SET_XCRS : 0, &copy.xcrs},
        {KVM_SET_MP_STATE, &copy.mp_state},
        {KVM_SET_VCPU_EVENTS, &copy.events},
    };
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        const int rc =
            parts[i].request == 0 ? 0 : vcpu_ioctl(vcpu, parts[i].request, parts[i].argument);
        if (rc < 0) {
            return rc;
        }
    }
    return set_msrs(vcpu, state);
}

int vmth_micro_vm_set_state(struct vmth_micro_vm *vm, size_t index,
                            const struct vmth_micro_vm_state *state)
{
    if (index >= vm->nvcpus || state->nmsrs > VMTH_MICRO_VM_MSRS ||
        state->npaces > VMTH_MICRO_VM_PACES || state->beats > UINT32_MAX ||
        !vmth_pace_ordered(state->paces, state->npaces) || !known_msrs(state)) {
        return -EINVAL;
    }
    struct vmth_vcpu *vcpu = &vm->vcpus[index];
    pthread_mutex_lock(&vm->lock);
    int rc = check_parked_locked(vm);
    if (rc == 0) {
        rc = set_registers(vcpu, state);
    }
    if (rc == 0) {
        memset(&vcpu->beats, 0, sizeof(vcpu->beats));
        vcpu->beats.beats = state->beats;
        vcpu->beats.out_of_order = state->out_of_order;
        vcpu->running_base_ns = state->running_ns;
        vcpu->due_ns = state->due_ns;
        vcpu->at_beat = state->at_beat;
        vcpu->npaces = state->npaces;
        memcpy(vcpu->paces, state->paces, sizeof(vcpu->paces));
    }
    pthread_mutex_unlock(&vm->lock);
    return rc;
}

#else
typedef int micro_vm_state_is_not_built_here;
#endif
