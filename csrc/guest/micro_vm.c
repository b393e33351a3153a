/* SPDX-License-Identifier: Apache-2.0 */
/* The micro VM: creation, the calls of its owner, and its end. */
#if defined(__x86_64__)
#define _GNU_SOURCE
#include "guest/micro_vm.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "guest/micro_vm_internal.h"

/* Intel's real-mode emulation wants these three plus one pages outside of every slot. */
#define IDENTITY_MAP_GPA UINT64_C(0xfffbc000)
#define TSS_GPA UINT64_C(0xfffbd000)
#define RING_ENTRIES 65536

/* ioctl() with the errno in the value. */
static int kvm_call(int fd, unsigned long request, uintptr_t argument)
{
    return vmth_kvm_kernel.ioctl(vmth_kvm_kernel.context, fd, request, (void *)argument);
}

static int kick_and_wait(void *context)
{
    struct vmth_micro_vm *vm = context;
    bool kicked[VMTH_MICRO_VM_VCPUS] = {false};
    uint64_t seen[VMTH_MICRO_VM_VCPUS];
    pthread_mutex_lock(&vm->lock);
    for (size_t i = 0; i < vm->nvcpus; i++) { /* all at once: they leave at the same time */
        struct vmth_vcpu *vcpu = &vm->vcpus[i];
        if (vcpu->in_guest) {
            kicked[i] = true;
            seen[i] = vcpu->guest_exits;
            vcpu->kick_waiters++;
            pthread_kill(vcpu->thread, VMTH_MICRO_VM_KICK);
        }
    }
    for (size_t i = 0; i < vm->nvcpus; i++) {
        struct vmth_vcpu *vcpu = &vm->vcpus[i];
        while (kicked[i] && vcpu->guest_exits == seen[i]) {
            pthread_cond_wait(&vm->from_vcpu, &vm->lock);
        }
        vcpu->kick_waiters -= kicked[i] ? 1 : 0;
    }
    pthread_mutex_unlock(&vm->lock);
    return 0;
}

static int create_vm(struct vmth_micro_vm *vm, int kvm_fd)
{
    const int version = kvm_call(kvm_fd, KVM_GET_API_VERSION, 0);
    if (version != KVM_API_VERSION) {
        return version < 0 ? version : -ENOTSUP;
    }
    vm->vm_fd = kvm_call(kvm_fd, KVM_CREATE_VM, 0);
    if (vm->vm_fd < 0) {
        return vm->vm_fd;
    }
    if (kvm_call(kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_SET_TSS_ADDR) > 0) {
        uint64_t identity_map = IDENTITY_MAP_GPA;
        int rc = kvm_call(vm->vm_fd, KVM_SET_IDENTITY_MAP_ADDR, (uintptr_t)&identity_map);
        if (rc == 0) {
            rc = kvm_call(vm->vm_fd, KVM_SET_TSS_ADDR, (uintptr_t)TSS_GPA);
        }
        if (rc < 0) {
            return rc;
        }
    }
    vm->has_xcrs = kvm_call(kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_XCRS) > 0;
    const int run_bytes = kvm_call(kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (run_bytes < (int)sizeof(struct kvm_run)) {
        return run_bytes < 0 ? run_bytes : -ENOTSUP;
    }
    vm->run_bytes = (size_t)run_bytes;
    return 0;
}

static int create_vcpu(struct vmth_vcpu *vcpu)
{
    const size_t run_bytes = vcpu->vm->run_bytes;
    vcpu->fd = kvm_call(vcpu->vm->vm_fd, KVM_CREATE_VCPU, vcpu->index);
    if (vcpu->fd < 0) {
        return vcpu->fd;
    }
    void *run = mmap(NULL, run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
    if (run == MAP_FAILED) {
        return -errno;
    }
    vcpu->run = run;

    /* Inside KVM_RUN only the kick comes through; the kernel's sigset is 8 bytes. */
    uint64_t blocked = ~(UINT64_C(1) << (VMTH_MICRO_VM_KICK - 1));
    union {
        struct kvm_signal_mask head;
        uint8_t bytes[sizeof(struct kvm_signal_mask) + sizeof(uint64_t)];
    } mask = {.head = {.len = sizeof(blocked)}};
    memcpy(mask.bytes + sizeof(mask.head), &blocked, sizeof(blocked));
    return kvm_call(vcpu->fd, KVM_SET_SIGNAL_MASK, (uintptr_t)&mask);
}

static int create_ring(struct vmth_micro_vm *vm, uint32_t entries,
                       const struct vmth_kvm_slot *slots, size_t nslots)
{
    struct kvm_dirty_gfn *rings[VMTH_MICRO_VM_VCPUS];
    vm->ring_bytes = entries * sizeof(struct kvm_dirty_gfn);
    for (size_t i = 0; i < vm->nvcpus; i++) {
        void *ring = mmap(NULL, vm->ring_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vm->vcpus[i].fd,
                          (off_t)(KVM_DIRTY_LOG_PAGE_OFFSET * VMTH_KVM_PAGE_BYTES));
        if (ring == MAP_FAILED) {
            return -errno;
        }
        vm->vcpus[i].ring_entries = ring;
        rings[i] = ring;
    }
    return vmth_kvm_ring_create(&vmth_kvm_kernel, vm->vm_fd, rings, vm->nvcpus, entries, slots,
                                nslots, kick_and_wait, vm, &vm->ring);
}

/* The parts of a VM in the order in which the kernel wants them. */
static int assemble(struct vmth_micro_vm *vm, int kvm_fd, const struct vmth_kvm_slot *slots,
                    size_t nslots, enum vmth_micro_vm_tracker tracker)
{
    uint32_t ring_entries = 0;
    int rc = create_vm(vm, kvm_fd);
    if (rc < 0) {
        return rc;
    }
    if (tracker == VMTH_MICRO_VM_RING) {
        rc = vmth_kvm_ring_enable(&vmth_kvm_kernel, vm->vm_fd, RING_ENTRIES, &ring_entries);
    } else {
        rc = vmth_kvm_log_enable(&vmth_kvm_kernel, vm->vm_fd);
        vm->log_mode = rc > 0 ? (enum vmth_kvm_log_mode)rc : VMTH_KVM_LOG_FETCH_CLEARS;
    }
    for (size_t i = 0; rc >= 0 && i < nslots; i++) {
        rc = vmth_kvm_set_slot(&vmth_kvm_kernel, vm->vm_fd, &slots[i], 0);
    }
    for (size_t i = 0; rc >= 0 && i < vm->nvcpus; i++) {
        rc = create_vcpu(&vm->vcpus[i]);
    }
    if (rc < 0) {
        return rc;
    }
    if (tracker == VMTH_MICRO_VM_RING) {
        return create_ring(vm, ring_entries, slots, nslots);
    }
    return vmth_kvm_log_create(&vmth_kvm_kernel, vm->vm_fd, vm->log_mode, slots, nslots, &vm->log);
}

static int start_thread(struct vmth_vcpu *vcpu)
{
    struct vmth_micro_vm *vm = vcpu->vm;
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* inherited: the process's signals go elsewhere */
    const int rc = pthread_create(&vcpu->thread, NULL, vmth_vcpu_main, vcpu);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc != 0) {
        return -rc;
    }
    vcpu->thread_started = true;
    pthread_mutex_lock(&vm->lock);
    while (!vcpu->thread_ready) {
        pthread_cond_wait(&vm->from_vcpu, &vm->lock);
    }
    const bool failed = vm->wish == VMTH_VCPU_QUIT;
    pthread_mutex_unlock(&vm->lock);
    return failed ? -EAGAIN : 0;
}

static int init_locks(struct vmth_micro_vm *vm)
{
    pthread_condattr_t monotonic;
    int rc = pthread_condattr_init(&monotonic);
    if (rc != 0) {
        return -rc;
    }
    (void)pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    (void)pthread_mutex_init(&vm->lock, NULL); /* on Linux neither these nor destroy can fail */
    (void)pthread_cond_init(&vm->to_vcpu, &monotonic);
    (void)pthread_cond_init(&vm->from_vcpu, &monotonic);
    pthread_condattr_destroy(&monotonic);
    return 0;
}

int vmth_micro_vm_create(const struct vmth_kvm_slot *slots, size_t nslots,
                         enum vmth_micro_vm_tracker tracker, size_t nvcpus,
                         struct vmth_micro_vm **out)
{
    if (nslots == 0 || nslots > VMTH_MICRO_VM_SLOTS || nvcpus == 0 ||
        nvcpus > VMTH_MICRO_VM_VCPUS) {
        return -EINVAL;
    }
    struct vmth_micro_vm *vm = calloc(1, sizeof(*vm));
    if (vm == NULL) {
        return -ENOMEM;
    }
    vm->vm_fd = -1;
    vm->wish = VMTH_VCPU_PARK;
    vm->nvcpus = nvcpus;
    for (size_t i = 0; i < nvcpus; i++) {
        vm->vcpus[i].vm = vm;
        vm->vcpus[i].index = i;
        vm->vcpus[i].fd = -1;
        vm->vcpus[i].parked = true;
    }
    if (slots[0].gpa == 0) {
        vm->memory = (uint8_t *)(uintptr_t)slots[0].hva;
        vm->memory_bytes = slots[0].npages * VMTH_KVM_PAGE_BYTES;
    }
    int rc = init_locks(vm);
    if (rc < 0) {
        free(vm);
        return rc;
    }
    const int kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm_fd < 0) {
        rc = -errno;
    } else {
        rc = assemble(vm, kvm_fd, slots, nslots, tracker);
        close(kvm_fd);
    }
    for (size_t i = 0; rc == 0 && i < nvcpus; i++) {
        rc = start_thread(&vm->vcpus[i]);
    }
    if (rc < 0) {
        vmth_micro_vm_free(vm);
        return rc;
    }
    *out = vm;
    return 0;
}

static void wish_locked(struct vmth_micro_vm *vm, enum vmth_vcpu_wish wish)
{
    vm->wish = wish;
    vmth_micro_vm_nudge_locked(vm);
}

/* Here, not in the threads: who asks next must not take the old parking for a new one. */
static void unpark_locked(struct vmth_micro_vm *vm)
{
    const uint64_t now = vmth_clock_ns(CLOCK_MONOTONIC);
    for (size_t i = 0; i < vm->nvcpus; i++) {
        if (vm->vcpus[i].parked) {
            vm->vcpus[i].parked = false;
            vm->vcpus[i].unparked_at_ns = now;
        }
    }
    wish_locked(vm, VMTH_VCPU_RUN);
}

static void release_vcpu(struct vmth_vcpu *vcpu)
{
    if (vcpu->ring_entries != NULL) {
        munmap(vcpu->ring_entries, vcpu->vm->ring_bytes);
    }
    if (vcpu->run != NULL) {
        munmap(vcpu->run, vcpu->vm->run_bytes);
    }
    if (vcpu->fd >= 0) {
        close(vcpu->fd);
    }
}

void vmth_micro_vm_free(struct vmth_micro_vm *vm)
{
    if (vm == NULL) {
        return;
    }
    pthread_mutex_lock(&vm->lock);
    wish_locked(vm, VMTH_VCPU_QUIT);
    pthread_mutex_unlock(&vm->lock);
    for (size_t i = 0; i < vm->nvcpus; i++) {
        if (vm->vcpus[i].thread_started) {
            pthread_join(vm->vcpus[i].thread, NULL);
        }
    }
    vmth_kvm_log_free(vm->log);
    vmth_kvm_ring_free(vm->ring);
    for (size_t i = 0; i < vm->nvcpus; i++) {
        release_vcpu(&vm->vcpus[i]);
    }
    if (vm->vm_fd >= 0) {
        close(vm->vm_fd);
    }
    pthread_cond_destroy(&vm->from_vcpu);
    pthread_cond_destroy(&vm->to_vcpu);
    pthread_mutex_destroy(&vm->lock);
    free(vm);
}

int vmth_micro_vm_pause(struct vmth_micro_vm *vm, bool *was_running)
{
    pthread_mutex_lock(&vm->lock);
    const bool ran = vm->wish != VMTH_VCPU_PARK && !vm->crashed;
    wish_locked(vm, VMTH_VCPU_PARK);
    while (!vmth_micro_vm_parked_locked(vm)) {
        pthread_cond_wait(&vm->from_vcpu, &vm->lock);
    }
    const int rc = vm->crashed ? -EIO : 0;
    pthread_mutex_unlock(&vm->lock);
    *was_running = ran;
    return rc;
}

int vmth_micro_vm_resume(struct vmth_micro_vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    const int rc = vm->crashed ? -EIO : 0;
    if (rc == 0 && vm->wish == VMTH_VCPU_PARK) {
        unpark_locked(vm);
    }
    pthread_mutex_unlock(&vm->lock);
    return rc;
}

static bool all_at_beat_locked(const struct vmth_micro_vm *vm)
{
    for (size_t i = 0; i < vm->nvcpus; i++) {
        if (!vm->vcpus[i].at_beat) {
            return false;
        }
    }
    return true;
}

int vmth_micro_vm_pause_at_beat(struct vmth_micro_vm *vm, uint64_t timeout_ns)
{
    const uint64_t now = vmth_clock_ns(CLOCK_MONOTONIC);
    const uint64_t hour = UINT64_C(3600) * 1000000000;
    const uint64_t until = now + (timeout_ns < hour ? timeout_ns : hour);
    const struct timespec at = {.tv_sec = (time_t)(until / 1000000000),
                                .tv_nsec = (long)(until % 1000000000)};
    int rc = 0;

    pthread_mutex_lock(&vm->lock);
    if (vm->wish == VMTH_VCPU_PARK) {
        rc = all_at_beat_locked(vm) ? 0 : -EBUSY;
    } else {
        wish_locked(vm, VMTH_VCPU_RUN_TO_BEAT);
        int waited = 0;
        while (!vmth_micro_vm_parked_locked(vm) && waited == 0) {
            waited = pthread_cond_timedwait(&vm->from_vcpu, &vm->lock, &at);
        }
        if (vmth_micro_vm_parked_locked(vm)) {
            vm->wish = VMTH_VCPU_PARK;
        } else {
            unpark_locked(vm); /* those that got to their beat */
            rc = -ETIMEDOUT;
        }
    }
    if (vm->crashed) {
        rc = -EIO;
    }
    pthread_mutex_unlock(&vm->lock);
    return rc;
}

int vmth_micro_vm_throttle(struct vmth_micro_vm *vm, size_t vcpu, unsigned int percent)
{
    if (vcpu >= vm->nvcpus || percent > 99) {
        return -EINVAL;
    }
    pthread_mutex_lock(&vm->lock);
    vm->vcpus[vcpu].throttle_percent = percent;
    vmth_micro_vm_nudge_locked(vm); /* wakes a nap, and kicks a vCPU that has no slice yet */
    const int rc = vm->crashed ? -EIO : 0;
    pthread_mutex_unlock(&vm->lock);
    return rc;
}

size_t vmth_micro_vm_vcpus(const struct vmth_micro_vm *vm)
{
    return vm->nvcpus;
}

void vmth_micro_vm_report(struct vmth_micro_vm *vm, size_t vcpu, struct vmth_beat_report *out)
{
    assert(vcpu < vm->nvcpus);
    pthread_mutex_lock(&vm->lock);
    *out = vm->vcpus[vcpu].beats;
    out->running_ns = vmth_vcpu_running_locked(&vm->vcpus[vcpu]);
    pthread_mutex_unlock(&vm->lock);
}

const char *vmth_micro_vm_crash(struct vmth_micro_vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    const char *text = vm->crashed ? vm->crash_text : NULL;
    pthread_mutex_unlock(&vm->lock);
    return text;
}

struct vmth_kvm_log *vmth_micro_vm_log(struct vmth_micro_vm *vm)
{
    return vm->log;
}

struct vmth_kvm_ring *vmth_micro_vm_ring(struct vmth_micro_vm *vm)
{
    return vm->ring;
}

enum vmth_kvm_log_mode vmth_micro_vm_log_mode(const struct vmth_micro_vm *vm)
{
    return vm->log_mode;
}

#else
typedef int micro_vm_is_not_built_here;
#endif
