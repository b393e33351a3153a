/* SPDX-License-Identifier: Apache-2.0 */
/* The micro VM's structs, shared by its three files: setup and calls, vCPU threads, state. */
#ifndef VMTH_GUEST_MICRO_VM_INTERNAL_H
#define VMTH_GUEST_MICRO_VM_INTERNAL_H

#include <pthread.h>
#include <signal.h>

#include "guest/micro_vm.h"

/* Kicks a vCPU thread out of KVM_RUN. It is blocked in that thread and only let through by the
 * signal mask of KVM_RUN itself, so it never runs a handler and no handler is installed. */
#define VMTH_MICRO_VM_KICK SIGUSR1

enum vmth_vcpu_wish {
    VMTH_VCPU_PARK = 1,
    VMTH_VCPU_RUN,
    VMTH_VCPU_RUN_TO_BEAT,
    VMTH_VCPU_QUIT,
};

struct vmth_micro_vm;

struct vmth_vcpu {
    /* Written only by create and free. */
    struct vmth_micro_vm *vm;
    size_t index;
    int fd;
    struct kvm_run *run;                /* the vCPU thread's while not parked */
    struct kvm_dirty_gfn *ring_entries; /* NULL without a dirty ring */
    pthread_t thread;
    bool thread_started;

    /* The vCPU thread's own. */
    timer_t slice_timer;   /* throttle: the end of the running part of a period */
    timer_t ring_timer;    /* dirty ring: look at it, whatever the guest does */
    uint64_t slice_end_ns; /* monotonic; 0: no throttled slice under way */
    uint64_t nap_until_ns; /* monotonic */
    bool io_pending;       /* KVM finishes the last OUT at the next entry */
    bool copied; /* the host wrote to pages that the guest has yet to write to: no pause */

    /* Protected by the VM's `lock`. */
    bool thread_ready;
    bool parked;
    bool in_guest;
    bool at_beat;
    unsigned int kick_waiters;
    unsigned int throttle_percent;
    uint64_t guest_exits;
    uint64_t running_base_ns; /* running time up to the last unparking */
    uint64_t unparked_at_ns;  /* monotonic */
    uint64_t due_ns;
    struct vmth_beat_report beats; /* running_ns is filled on report */
    uint32_t npaces;
    struct vmth_pace paces[VMTH_MICRO_VM_PACES];
};

struct vmth_micro_vm {
    /* Written only by create and free. */
    int vm_fd;
    size_t nvcpus;
    size_t run_bytes;
    size_t ring_bytes;
    uint8_t *memory; /* the first slot's, from gpa 0 on; NULL if it lies elsewhere */
    uint64_t memory_bytes;
    struct vmth_kvm_log *log;
    struct vmth_kvm_ring *ring;
    enum vmth_kvm_log_mode log_mode;
    bool has_xcrs;

    /* Protected by `lock`. */
    pthread_mutex_t lock;
    pthread_cond_t to_vcpu;   /* wish or throttle changed, or a vCPU crashed */
    pthread_cond_t from_vcpu; /* parked, or left the guest while someone waits for that */
    enum vmth_vcpu_wish wish; /* one for all vCPUs */
    bool crashed;
    char crash_text[176]; /* constant once `crashed` */

    struct vmth_vcpu vcpus[VMTH_MICRO_VM_VCPUS]; /* the first nvcpus of them are there */
};

uint64_t vmth_clock_ns(clockid_t clock);

/* Running time now. The lock is held. */
uint64_t vmth_vcpu_running_locked(const struct vmth_vcpu *vcpu);

/* Are all vCPUs parked? The lock is held. */
bool vmth_micro_vm_parked_locked(const struct vmth_micro_vm *vm);

/* Make every vCPU thread look at the VM again, wherever it is. The lock is held. */
void vmth_micro_vm_nudge_locked(struct vmth_micro_vm *vm);

/* A vCPU's thread: parks at once, sets thread_ready, serves wishes until QUIT. */
void *vmth_vcpu_main(void *vcpu);

#endif
