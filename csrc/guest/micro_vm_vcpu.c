/* SPDX-License-Identifier: Apache-2.0 */
/* The micro VM's vCPU thread: park, wait for the beat, nap when throttled, or run the guest. */
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

uint64_t vmth_micro_vm_running_locked(const struct vmth_micro_vm *vm)
{
    if (vm->parked) {
        return vm->running_base_ns;
    }
    return vm->running_base_ns + vmth_clock_ns(CLOCK_MONOTONIC) - vm->unparked_at_ns;
}

/* Wait for a wish, at most until a monotonic time. Far times are cut: the caller looks again. */
static void wait_until_locked(struct vmth_micro_vm *vm, uint64_t until_ns)
{
    const uint64_t horizon = vmth_clock_ns(CLOCK_MONOTONIC) + 3600 * NS_PER_S;
    const struct timespec at = to_timespec(until_ns < horizon ? until_ns : horizon);
    (void)pthread_cond_timedwait(&vm->to_vcpu, &vm->lock, &at);
}

static void crash_locked(struct vmth_micro_vm *vm, const char *what, uint64_t first,
                         uint64_t second)
{
    struct kvm_regs regs = {0};
    const bool have_regs = ioctl(vm->vcpu_fd, KVM_GET_REGS, &regs) == 0;
    vm->crashed = true;
    (void)snprintf(vm->crash_text, sizeof(vm->crash_text),
                   "%s (%" PRIu64 ", %#" PRIx64 ") at rip %#llx%s", what, first, second,
                   (unsigned long long)regs.rip, have_regs ? "" : " (unreadable)");
}

/* KVM completes an OUT only when the vCPU is entered again: enter without running. */
static void complete_io_locked(struct vmth_micro_vm *vm)
{
    if (!vm->io_pending || vm->crashed) {
        return;
    }
    vm->run->immediate_exit = 1;
    const int rc = ioctl(vm->vcpu_fd, KVM_RUN, NULL);
    const int error = errno;
    vm->run->immediate_exit = 0;
    vm->io_pending = false;
    if (rc == 0 || error != EINTR) {
        crash_locked(vm, "I/O did not complete: exit reason, errno", vm->run->exit_reason,
                     rc == 0 ? 0 : (uint64_t)error);
    }
}

static void park_locked(struct vmth_micro_vm *vm)
{
    if (!vm->parked) {
        complete_io_locked(vm);
        vm->running_base_ns = vmth_micro_vm_running_locked(vm);
        vm->parked = true;
        pthread_cond_broadcast(&vm->from_vcpu);
    }
    pthread_cond_wait(&vm->to_vcpu, &vm->lock);
}

static void beat_locked(struct vmth_micro_vm *vm, uint32_t value)
{
    const uint64_t now = vmth_clock_ns(CLOCK_REALTIME);
    struct vmth_beat_report *beats = &vm->beats;
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
    vm->due_ns = vmth_pace_due(vm->paces, vm->npaces, vm->due_ns, vmth_micro_vm_running_locked(vm));
    vm->at_beat = true;
}

/* The guest's OUT of `steps` to the copy port: its control block and schedule may hold anything. */
static void copy_locked(struct vmth_micro_vm *vm, uint32_t steps)
{
    struct vmth_walker_registers registers;
    if (vm->memory == NULL || vm->memory_bytes < 2 * VMTH_WALKER_CONTROL_GPA) {
        crash_locked(vm, "no memory to copy in: bytes, steps", vm->memory_bytes, steps);
        return;
    }
    vmth_walker_control_read(vm->memory, &registers);
    if (!vmth_walker_registers_valid(&registers, vm->memory_bytes) ||
        steps > registers.entries - registers.index) {
        crash_locked(vm, "bad control block at a copy: index, steps", registers.index, steps);
        return;
    }
    vm->copied = true;
    for (uint32_t step = 0; step < steps; step++) {
        uint32_t counter_gpa;
        if (vmth_walker_store(vm->memory, vm->memory_bytes, &registers, &counter_gpa) != 0) {
            crash_locked(vm, "copy outside of memory: index, steps", registers.index, steps);
            return;
        }
        registers.index++;
    }
}

static void io_exit_locked(struct vmth_micro_vm *vm)
{
    const struct kvm_run *run = vm->run;
    const bool copy = run->io.port == VMTH_MICRO_VM_COPY_PORT;
    vm->io_pending = true;
    if (run->io.direction != KVM_EXIT_IO_OUT || (run->io.port != VMTH_MICRO_VM_BEAT_PORT && !copy) ||
        run->io.size != sizeof(uint32_t) || run->io.count != 1) {
        crash_locked(vm, "unexpected I/O: port, size", run->io.port, run->io.size);
        return;
    }
    uint32_t value;
    memcpy(&value, (const uint8_t *)run + run->io.data_offset, sizeof(value));
    if (copy) {
        copy_locked(vm, value);
    } else {
        vm->copied = false;
        beat_locked(vm, value);
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
static int empty_ring(const struct vmth_micro_vm *vm, bool full)
{
    if (vm->ring == NULL) {
        return 0;
    }
    return full ? vmth_kvm_ring_collect(vm->ring, 0) : vmth_kvm_ring_relieve(vm->ring, 0);
}

static void run_guest_locked(struct vmth_micro_vm *vm)
{
    vm->in_guest = true;
    pthread_mutex_unlock(&vm->lock);
    const int rc = ioctl(vm->vcpu_fd, KVM_RUN, NULL);
    const int error = errno;
    const int emptied = empty_ring(vm, rc == 0 && vm->run->exit_reason == KVM_EXIT_DIRTY_RING_FULL);
    pthread_mutex_lock(&vm->lock);
    vm->in_guest = false;
    vm->guest_exits++;
    if (vm->kick_waiters > 0) {
        pthread_cond_broadcast(&vm->from_vcpu);
    }
    vm->io_pending = false;
    if (emptied < 0) {
        crash_locked(vm, "dirty ring failed: errno", (uint64_t)-emptied, 0);
        return;
    }
    if (rc < 0) {
        if (error != EINTR && error != EAGAIN) {
            crash_locked(vm, "KVM_RUN failed: errno", (uint64_t)error, 0);
        }
        drain_kick();
        return;
    }
    switch (vm->run->exit_reason) {
    case KVM_EXIT_IO:
        io_exit_locked(vm);
        break;
    case KVM_EXIT_INTR:
        drain_kick();
        break;
    case KVM_EXIT_DIRTY_RING_FULL:
        break;
    case KVM_EXIT_INTERNAL_ERROR:
        crash_locked(vm, "KVM_EXIT_INTERNAL_ERROR: suberror, data", vm->run->internal.suberror,
                     vm->run->internal.ndata > 0 ? vm->run->internal.data[0] : 0);
        break;
    case KVM_EXIT_FAIL_ENTRY:
        crash_locked(vm, "KVM_EXIT_FAIL_ENTRY: cpu, hardware reason", vm->run->fail_entry.cpu,
                     vm->run->fail_entry.hardware_entry_failure_reason);
        break;
    case KVM_EXIT_SHUTDOWN:
        crash_locked(vm, "KVM_EXIT_SHUTDOWN (triple fault)", 0, 0);
        break;
    case KVM_EXIT_MMIO:
        crash_locked(vm, "access outside of memory: bytes, gpa", vm->run->mmio.len,
                     vm->run->mmio.phys_addr);
        break;
    default:
        crash_locked(vm, "unexpected KVM exit: reason", vm->run->exit_reason, 0);
        break;
    }
}

/* Throttled: run (100 - percent) of each period, nap the rest. True if this turn was a nap. */
static bool napped_locked(struct vmth_micro_vm *vm)
{
    if (vm->throttle_percent == 0) {
        vm->slice_end_ns = 0;
        vm->nap_until_ns = 0;
        return false;
    }
    const uint64_t now = vmth_clock_ns(CLOCK_MONOTONIC);
    if (now < vm->nap_until_ns) {
        wait_until_locked(vm, vm->nap_until_ns);
        return true;
    }
    const uint64_t nap_ns = VMTH_MICRO_VM_THROTTLE_PERIOD_NS / 100 * vm->throttle_percent;
    if (vm->slice_end_ns == 0) {
        vm->slice_end_ns = now + VMTH_MICRO_VM_THROTTLE_PERIOD_NS - nap_ns;
        const struct itimerspec at = {.it_value = to_timespec(vm->slice_end_ns)};
        (void)timer_settime(vm->slice_timer, TIMER_ABSTIME, &at, NULL);
        return false;
    }
    if (now >= vm->slice_end_ns) {
        vm->slice_end_ns = 0;
        vm->nap_until_ns = now + nap_ns;
        return true;
    }
    return false;
}

static bool waited_for_beat_locked(struct vmth_micro_vm *vm)
{
    if (!vm->at_beat) {
        return false;
    }
    const uint64_t running = vmth_micro_vm_running_locked(vm);
    if (running >= vm->due_ns) {
        vm->at_beat = false;
        return false;
    }
    const uint64_t left = vm->due_ns - running;
    const uint64_t now = vmth_clock_ns(CLOCK_MONOTONIC);
    wait_until_locked(vm, left > UINT64_MAX - now ? UINT64_MAX : now + left);
    return true;
}

/* The timers kick this thread; parked or waiting, it does not wake for them. */
static bool create_timers(struct vmth_micro_vm *vm)
{
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = VMTH_MICRO_VM_KICK};
    event.sigev_notify_thread_id = gettid();
    if (timer_create(CLOCK_MONOTONIC, &event, &vm->slice_timer) != 0) {
        return false;
    }
    if (timer_create(CLOCK_MONOTONIC, &event, &vm->ring_timer) != 0) {
        timer_delete(vm->slice_timer);
        return false;
    }
    if (vm->ring != NULL) {
        const struct timespec period = to_timespec(RING_PERIOD_NS);
        const struct itimerspec every = {.it_value = period, .it_interval = period};
        (void)timer_settime(vm->ring_timer, 0, &every, NULL);
    }
    return true;
}

void *vmth_micro_vm_vcpu_main(void *argument)
{
    struct vmth_micro_vm *vm = argument;
    (void)pthread_setname_np(pthread_self(), "vmth-vcpu");
    const bool have_timers = create_timers(vm);

    pthread_mutex_lock(&vm->lock);
    vm->thread_ready = true;
    if (!have_timers) {
        vm->wish = VMTH_VCPU_QUIT;
    }
    pthread_cond_broadcast(&vm->from_vcpu);
    while (vm->wish != VMTH_VCPU_QUIT) {
        if (vm->copied && !vm->crashed) {
            run_guest_locked(vm);
            continue;
        }
        if (vm->crashed || vm->wish == VMTH_VCPU_PARK ||
            (vm->wish == VMTH_VCPU_RUN_TO_BEAT && vm->at_beat)) {
            park_locked(vm);
            continue;
        }
        if (!waited_for_beat_locked(vm) && !napped_locked(vm)) {
            run_guest_locked(vm);
        }
    }
    pthread_mutex_unlock(&vm->lock);
    if (have_timers) {
        timer_delete(vm->ring_timer);
        timer_delete(vm->slice_timer);
    }
    return NULL;
}

#else
typedef int micro_vm_vcpu_is_not_built_here;
#endif
