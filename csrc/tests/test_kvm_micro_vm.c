/* SPDX-License-Identifier: Apache-2.0 */
/* The micro VM under the sanitizers: its thread against every call of its owner, with both
 * trackers. */
#include "guest/micro_vm.h"

#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>

#include "guest/walker_program.h"
#include "t_check.h"

#define NPAGES 64
#define BYTES (NPAGES * 4096)
#define ENTRIES 40
#define WRITES_PER_BEAT 25
#define TIMEOUT_NS UINT64_C(60000000000)

/* Zeroed memory with the walker and a schedule that goes over the pages from 32 on. */
static uint8_t *make_memory(void)
{
    uint8_t *memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    T_CHECK(memory != MAP_FAILED);
    memcpy(memory + 0x2000, vmth_walker_program, vmth_walker_program_bytes);
    for (uint32_t i = 0; i < ENTRIES; i++) {
        const uint32_t page = (32 + i % 32) * 4096;
        const uint32_t entry[4] = {page + 64, i, page, 0};
        memcpy(memory + 0x10000 + sizeof(entry) * i, entry, sizeof(entry));
    }
    const uint32_t control[9] = {0, ENTRIES,   0x10000, 0, 0, WRITES_PER_BEAT, WRITES_PER_BEAT,
                                 1, UINT32_MAX};
    memcpy(memory + 0x1000, control, sizeof(control));
    return memory;
}

static void walk(struct vmth_micro_vm *vm, const uint8_t *memory)
{
    struct vmth_beat_report report;
    struct vmth_micro_vm_state state;
    bool was_running = false;
    uint64_t dirty = 0;
    uint64_t *const bitmaps[] = {&dirty};
    struct vmth_kvm_ring *ring = vmth_micro_vm_ring(vm);
    struct vmth_kvm_log *log = vmth_micro_vm_log(vm);

    T_EQUAL(ring != NULL ? vmth_kvm_ring_start(ring) : vmth_kvm_log_start(log), 0);
    T_EQUAL(vmth_micro_vm_get_state(vm, 0, &state), 0);
    T_EQUAL(vmth_micro_vm_start_fresh(vm, 0x2000, NULL, 0, NULL, 0), 0);
    for (unsigned int turn = 0; turn < 20; turn++) {
        T_EQUAL(vmth_micro_vm_throttle(vm, 0, turn % 4 == 0 ? 50 : 0), 0);
        T_EQUAL(ring != NULL ? vmth_kvm_ring_fetch(ring, bitmaps)
                             : vmth_kvm_log_fetch(log, bitmaps),
                0);
        T_EQUAL(vmth_micro_vm_pause(vm, &was_running), 0);
        T_CHECK(was_running);
        T_EQUAL(vmth_micro_vm_get_state(vm, 0, &state), 0);
        T_EQUAL(vmth_micro_vm_set_state(vm, 0, &state), 0);
        T_EQUAL(vmth_micro_vm_resume(vm), 0);
        T_EQUAL(vmth_micro_vm_get_state(vm, 0, &state), -EBUSY);
        T_EQUAL(vmth_micro_vm_pause_at_beat(vm, TIMEOUT_NS), 0);
        vmth_micro_vm_report(vm, 0, &report);
        uint32_t beats;
        memcpy(&beats, memory + 0x1010, sizeof(beats));
        T_EQUAL(report.beats, beats);
        T_EQUAL(report.out_of_order, 0);
        T_EQUAL(vmth_micro_vm_resume(vm), 0);
    }
    do { /* twenty turns may be over before the walk has reached every page */
        sched_yield();
        vmth_micro_vm_report(vm, 0, &report);
        T_CHECK(vmth_micro_vm_crash(vm) == NULL);
    } while (report.beats * WRITES_PER_BEAT < ENTRIES);
    T_EQUAL(vmth_micro_vm_pause(vm, &was_running), 0);
    T_EQUAL(ring != NULL ? vmth_kvm_ring_fetch(ring, bitmaps) : vmth_kvm_log_fetch(log, bitmaps),
            0);
    T_EQUAL(dirty >> 32, UINT32_MAX); /* all 32 data pages were written */
    T_CHECK(vmth_micro_vm_crash(vm) == NULL);
    T_EQUAL(vmth_micro_vm_resume(vm), 0); /* freed while it runs */
}

int main(void)
{
    const enum vmth_micro_vm_tracker trackers[] = {VMTH_MICRO_VM_LOG, VMTH_MICRO_VM_RING};
    for (size_t i = 0; i < sizeof(trackers) / sizeof(trackers[0]); i++) {
        uint8_t *memory = make_memory();
        const struct vmth_kvm_slot slot = {.npages = NPAGES, .hva = (uint64_t)(uintptr_t)memory};
        struct vmth_micro_vm *vm = NULL;
        const int rc = vmth_micro_vm_create(&slot, 1, trackers[i], 1, &vm);
        if (rc < 0) {
            fprintf(stderr, "no KVM guest here: %s\n", strerror(-rc));
            munmap(memory, BYTES);
            return T_SKIP;
        }
        walk(vm, memory);
        vmth_micro_vm_free(vm);
        munmap(memory, BYTES);
    }
    return T_PASS;
}
