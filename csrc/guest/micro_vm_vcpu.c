/* SPDX-License-Identifier: Apache-2.0 */
/* The thread of a micro VM's vCPU: park, wait for the beat, nap if throttled, or run the guest. */
#if defined(__x86_64__)
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "guest/micro_vm_internal.h"
#include "guest/walker_step.h"

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

#define NS_PER_S UINT64_C(1000000000)
/* How often a vCPU with a dirty ring is made to look at it. Emulated string stores append five
 * million entries a second: ten thousand in this time, where the ring has 65,536. */
#define RING_PERIOD_NS UINT64_C(2000000)

uint64_t vmth_clock_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

static struct timespec to_timespec(uint64_t ns)
{
    return (struct timespec){.tv_sec = (time_t)(ns / NS_PER_S), .tv_nsec = (long)(ns % NS_PER_S)};
}

uint64_t vmth_vcpu_running_locked(const struct vmth_vcpu *vcpu)
{
    if (vcpu->parked) {
        return vcpu->running_base_ns;
    }
    return vcpu->running_base_ns + vmth_clock_ns(CLOCK_MONOTONIC) - vcpu->unparked_at_ns;
}

bool vmth_micro_vm_parked_locked(const struct vmth_micro_vm *vm)
{
    for (size_t i = 0; i < vm->nvcpus; i++) {
        if (!vm->vcpus[i].parked) {
            return false;
        }
    }
    return true;
}

void vmth_micro_vm_nudge_locked(struct vmth_micro_vm *vm)
{
    pthread_cond_broadcast(&vm->to_vcpu);
    for (size_t i = 0; i < vm->nvcpus; i++) {
        if (vm->vcpus[i].in_guest) {
            pthread_kill(vm->vcpus[i].thread, VMTH_MICRO_VM_KICK);
        }
    }
}

/* Wait for a wish, at most until a monotonic time. Far times are cut: the caller looks again. */
static void wait_until_locked(struct vmth_vcpu *vcpu, uint64_t until_ns)
{
    const uint64_t horizon = vmth_clock_ns(CLOCK_MONOTONIC) + 3600 * NS_PER_S;
    const struct timespec at = to_timespec(until_ns < horizon ? until_ns : horizon);
    (void)pthread_cond_timedwait(&vcpu->vm->to_vcpu, &vcpu->vm->lock, &at);
}

static void crash_locked(const struct vmth_vcpu *vcpu, const char *what, uint64_t first,
                         uint64_t second)
{
    struct vmth_micro_vm *vm = vcpu->vm;
    if (vm->crashed) {
        return; /* the first text stays: someone may be reading it */
    }
    struct kvm_regs regs = {0};
    const bool have_regs = ioctl(vcpu->fd, KVM_GET_REGS, &regs) == 0;
    char name[16] = "";
    if (vm->nvcpus > 1) {
        (void)snprintf(name, sizeof(name), "vCPU %u: ", (unsigned int)vcpu->index);
    }
    (void)snprintf(vm->crash_text, sizeof(vm->crash_text),
                   "%s%s (%" PRIu64 ", %#" PRIx64 ") at rip %#llx%s", name, what, first, second,
                   (unsigned long long)regs.rip, have_regs ? "" : " (unreadable)");
    vm->crashed = true;
    vmth_micro_vm_nudge_locked(vm); /* the others park as well */
}

/* KVM completes an OUT only when the vCPU is entered again: enter without running. */
static void complete_io_locked(struct vmth_vcpu *vcpu)
{
    if (!vcpu->io_pending || vcpu->vm->crashed) {
        return;
    }
    vcpu->run->immediate_exit = 1;
    const int rc = ioctl(vcpu->fd, KVM_RUN, NULL);
    const int error = errno;
    vcpu->run->immediate_exit = 0;
    vcpu->io_pending = false;
    if (rc == 0 || error != EINTR) {
        crash_locked(vcpu, "I/O did not complete: exit reason, errno", vcpu->run->exit_reason,
                     rc == 0 ? 0 : (uint64_t)error);
    }
}

static void park_locked(struct vmth_vcpu *vcpu)
{
    if (!vcpu->parked) {
        complete_io_locked(vcpu);
        vcpu->running_base_ns = vmth_vcpu_running_locked(vcpu);
        vcpu->parked = true;
        pthread_cond_broadcast(&vcpu->vm->from_vcpu);
    }
    pthread_cond_wait(&vcpu->vm->to_vcpu, &vcpu->vm->lock);
}

static void beat_locked(struct vmth_vcpu *vcpu, uint32_t value)
{
    const uint64_t now = vmth_clock_ns(CLOCK_REALTIME);
    struct vmth_beat_report *beats = &vcpu->beats;
    if (value != (uint32_t)(beats->beats + 1)) {
        beats->out_of_order++;
    }
    beats->beats = value;
    if (beats->first_beat_at_ns == 0) {
        beats->first_beat_at_ns = now;
    } else if (now > beats->last_beat_at_ns && now - beats->last_beat_at_ns > beats->max_gap_ns) {
        beats->max_gap_ns = now - beats->last_beat_at_ns;
    }
    beats->last_beat_at_ns = now;
    vcpu->due_ns =
        vmth_pace_due(vcpu->paces, vcpu->npaces, vcpu->due_ns, vmth_vcpu_running_locked(vcpu));
    vcpu->at_beat = true;
}

/* Moves registers->index on. False at a store outside of memory. */
static bool copy_steps(const struct vmth_micro_vm *vm, struct vmth_walker_registers *registers,
                       uint32_t steps)
{
    for (uint32_t step = 0; step < steps; step++) {
        uint32_t counter_gpa;
        if (vmth_walker_store(vm->memory, vm->memory_bytes, registers, &counter_gpa) != 0) {
            return false;
        }
        registers->index++;
    }
    return true;
}

/* The guest's OUT of `steps` to the copy port: its control block and schedule may hold anything.
 * The lock is let go meanwhile, for the other vCPUs' sake: `copied` keeps this one from parking. */
static void copy_locked(struct vmth_vcpu *vcpu, uint32_t steps)
{
    struct vmth_micro_vm *vm = vcpu->vm;
    struct vmth_walker_registers registers;
    if (vcpu->index != 0) {
        crash_locked(vcpu, "a copy of another vCPU than the first: vCPU, steps", vcpu->index,
                     steps);
        return;
    }
    if (vm->memory == NULL || vm->memory_bytes < 2 * VMTH_WALKER_CONTROL_GPA) {
        crash_locked(vcpu, "no memory to copy in: bytes, steps", vm->memory_bytes, steps);
        return;
    }
    vmth_walker_control_read(vm->memory, &registers);
    if (!vmth_walker_registers_valid(&registers, vm->memory_bytes) ||
        steps > registers.entries - registers.index) {
        crash_locked(vcpu, "bad control block at a copy: index, steps", registers.index, steps);
        return;
    }
    vcpu->copied = true;
    pthread_mutex_unlock(&vm->lock);
    const bool inside = copy_steps(vm, &registers, steps);
    pthread_mutex_lock(&vm->lock);
    if (!inside) {
        crash_locked(vcpu, "copy outside of memory: index, steps", registers.index, steps);
    }
}

static void io_exit_locked(struct vmth_vcpu *vcpu)
{
    const struct kvm_run *run = vcpu->run;
    const bool copy = run->io.port == VMTH_MICRO_VM_COPY_PORT;
    vcpu->io_pending = true;
    if (run->io.direction != KVM_EXIT_IO_OUT ||
        (run->io.port != VMTH_MICRO_VM_BEAT_PORT && !copy) || run->io.size != sizeof(uint32_t) ||
        run->io.count != 1) {
        crash_locked(vcpu, "unexpected I/O: port, size", run->io.port, run->io.size);
        return;
    }
    uint32_t value;
    memcpy(&value, (const uint8_t *)run + run->io.data_offset, sizeof(value));
    if (copy) {
        copy_locked(vcpu, value);
    } else {
        vcpu->copied = false;
        beat_locked(vcpu, value);
    }
}

static void drain_kick(void)
{
    const struct timespec now = {0};
    sigset_t kick;
    sigemptyset(&kick);
    sigaddset(&kick, VMTH_MICRO_VM_KICK);
    while (sigtimedwait(&kick, NULL, &now) > 0) {
        continue;
    }
}

/* Between KVM_RUN and everything else: 0, or the ring's error. */
static int empty_ring(const struct vmth_vcpu *vcpu, bool full)
{
    struct vmth_kvm_ring *ring = vcpu->vm->ring;
    if (ring == NULL) {
        return 0;
    }
    return full ? vmth_kvm_ring_collect(ring, vcpu->index)
                : vmth_kvm_ring_relieve(ring, vcpu->index);
}

static void run_guest_locked(struct vmth_vcpu *vcpu)
{
    struct vmth_micro_vm *vm = vcpu->vm;
    vcpu->in_guest = true;
    pthread_mutex_unlock(&vm->lock);
    const int rc = ioctl(vcpu->fd, KVM_RUN, NULL);
    const int error = errno;
    const bool full = rc == 0 && vcpu->run->exit_reason == KVM_EXIT_DIRTY_RING_FULL;
    const int emptied = empty_ring(vcpu, full);
    pthread_mutex_lock(&vm->lock);
    vcpu->in_guest = false;
    vcpu->guest_exits++;
    if (vcpu->kick_waiters > 0) {
        pthread_cond_broadcast(&vm->from_vcpu);
    }
    vcpu->io_pending = false;
    if (emptied < 0) {
        crash_locked(vcpu, "dirty ring failed: errno", (uint64_t)-emptied, 0);
        return;
    }
    if (rc < 0) {
        if (error != EINTR && error != EAGAIN) {
            crash_locked(vcpu, "KVM_RUN failed: errno", (uint64_t)error, 0);
        }
        drain_kick();
        return;
    }
    switch (vcpu->run->exit_reason) {
    case KVM_EXIT_IO:
        io_exit_locked(vcpu);
        break;
    case KVM_EXIT_INTR:
        drain_kick();
        break;
    case KVM_EXIT_DIRTY_RING_FULL:
        break;
    case KVM_EXIT_INTERNAL_ERROR:
        crash_locked(vcpu, "KVM_EXIT_INTERNAL_ERROR: suberror, data", vcpu->run->internal.suberror,
                     vcpu->run->internal.ndata > 0 ? vcpu->run->internal.data[0] : 0);
        break;
    case KVM_EXIT_FAIL_ENTRY:
        crash_locked(vcpu, "KVM_EXIT_FAIL_ENTRY: cpu, hardware reason", vcpu->run->fail_entry.cpu,
                     vcpu->run->fail_entry.hardware_entry_failure_reason);
        break;
    case KVM_EXIT_SHUTDOWN:
        crash_locked(vcpu, "KVM_EXIT_SHUTDOWN (triple fault)", 0, 0);
        break;
    case KVM_EXIT_MMIO:
        crash_locked(vcpu, "access outside of memory: bytes, gpa", vcpu->run->mmio.len,
                     vcpu->run->mmio.phys_addr);
        break;
    default:
        crash_locked(vcpu, "unexpected KVM exit: reason", vcpu->run->exit_reason, 0);
        break;
    }
}

/* Throttled: run (100 - percent) of each period, nap the rest. True if this turn was a nap. */
static bool napped_locked(struct vmth_vcpu *vcpu)
{
    if (vcpu->throttle_percent == 0) {
        vcpu->slice_end_ns = 0;
        vcpu->nap_until_ns = 0;
        return false;
    }
    const uint64_t now = vmth_clock_ns(CLOCK_MONOTONIC);
    if (now < vcpu->nap_until_ns) {
        wait_until_locked(vcpu, vcpu->nap_until_ns);
        return true;
    }
    const uint64_t nap_ns = VMTH_MICRO_VM_THROTTLE_PERIOD_NS / 100 * vcpu->throttle_percent;
    if (vcpu->slice_end_ns == 0) {
        vcpu->slice_end_ns = now + VMTH_MICRO_VM_THROTTLE_PERIOD_NS - nap_ns;
        const struct itimerspec at = {.it_value = to_timespec(vcpu->slice_end_ns)};
        (void)timer_settime(vcpu->slice_timer, TIMER_ABSTIME, &at, NULL);
        return false;
    }
    if (now >= vcpu->slice_end_ns) {
        vcpu->slice_end_ns = 0;
        vcpu->nap_until_ns = now + nap_ns;
        return true;
    }
    return false;
}

static bool waited_for_beat_locked(struct vmth_vcpu *vcpu)
{
    if (!vcpu->at_beat) {
        return false;
    }
    const uint64_t running = vmth_vcpu_running_locked(vcpu);
    if (running >= vcpu->due_ns) {
        vcpu->at_beat = false;
        return false;
    }
    const uint64_t left = vcpu->due_ns - running;
    const uint64_t now = vmth_clock_ns(CLOCK_MONOTONIC);
    wait_until_locked(vcpu, left > UINT64_MAX - now ? UINT64_MAX : now + left);
    return true;
}

/* The timers kick this thread; parked or waiting, it does not wake for them. */
static bool create_timers(struct vmth_vcpu *vcpu)
{
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = VMTH_MICRO_VM_KICK};
    event.sigev_notify_thread_id = gettid();
    if (timer_create(CLOCK_MONOTONIC, &event, &vcpu->slice_timer) != 0) {
        return false;
    }
    if (timer_create(CLOCK_MONOTONIC, &event, &vcpu->ring_timer) != 0) {
        timer_delete(vcpu->slice_timer);
        return false;
    }
    if (vcpu->vm->ring != NULL) {
        const struct timespec period = to_timespec(RING_PERIOD_NS);
        const struct itimerspec every = {.it_value = period, .it_interval = period};
        (void)timer_settime(vcpu->ring_timer, 0, &every, NULL);
    }
    return true;
}

static void name_thread(const struct vmth_vcpu *vcpu)
{
    char name[16] = "vmth-vcpu";
    if (vcpu->vm->nvcpus > 1) {
        (void)snprintf(name, sizeof(name), "vmth-vcpu-%u", (unsigned int)(vcpu->index % 10));
    }
    (void)pthread_setname_np(pthread_self(), name);
}

void *vmth_vcpu_main(void *argument)
{
    struct vmth_vcpu *vcpu = argument;
    struct vmth_micro_vm *vm = vcpu->vm;
    name_thread(vcpu);
    const bool have_timers = create_timers(vcpu);

    pthread_mutex_lock(&vm->lock);
    vcpu->thread_ready = true;
    if (!have_timers) {
        vm->wish = VMTH_VCPU_QUIT;
    }
    pthread_cond_broadcast(&vm->from_vcpu);
    while (vm->wish != VMTH_VCPU_QUIT) {
        if (vcpu->copied && !vm->crashed) {
            run_guest_locked(vcpu);
            continue;
        }
        if (vm->crashed || vm->wish == VMTH_VCPU_PARK ||
            (vm->wish == VMTH_VCPU_RUN_TO_BEAT && vcpu->at_beat)) {
            park_locked(vcpu);
            continue;
        }
        if (!waited_for_beat_locked(vcpu) && !napped_locked(vcpu)) {
            run_guest_locked(vcpu);
        }
    }
    pthread_mutex_unlock(&vm->lock);
    if (have_timers) {
        timer_delete(vcpu->ring_timer);
        timer_delete(vcpu->slice_timer);
    }
    return NULL;
}

#else
typedef int micro_vm_vcpu_is_not_built_here;
#endif
