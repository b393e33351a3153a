/* SPDX-License-Identifier: Apache-2.0 */
/* A micro virtual machine on /dev/kvm: memory slots, 1 to 8 vCPUs, an output port, a pace a vCPU.
 *
 *   caller's thread             each vCPU's thread (the VM's own, vmth-vcpu or vmth-vcpu-0, -1 ..)
 *   create, start_fresh ---->   parked
 *   resume ----------------->   KVM_RUN ... OUT 0x510 -> heartbeat: count, wait until due
 *   pause: kick all -------->   complete the I/O, park; registers can be read once all are parked
 *
 * The guest runs flat unpaged 32-bit code from an entry gpa (KVM that only emulates runs that too)
 * and beats its heart by OUT of a dword to port 0x510; the instruction returns when the next beat
 * is due. "Running time" is time not parked; beats are due by running time, so a pause is no reason
 * to catch up (guest/beat_pace.h).
 *
 * All vCPUs run the same program, whose data addresses are absolute. What gives each one a control
 * block of its own is the base of its data segments, its lane: 0x40 a vCPU. Addresses in its
 * control block and schedule are offsets from that base too: whoever writes these subtracts it.
 *
 *   gpa 0x1000  control block of vCPU 0    base 0x00      gpa = base + address
 *       0x1040                    vCPU 1    base 0x40      (code: base 0, the same bytes for all)
 *       0x1080                    vCPU 2    base 0x80
 *
 * A guest with a pool (vmth/guests/machine.py) lets its host copy, as a device with DMA would: OUT
 * of the dword n to port 0x514 stores what the next n entries of its schedule say, before the
 * instruction returns. Neither dirty log nor ring sees that, so the guest itself writes to each of
 * these pages (it counts in them) before its next beat, and only there does a pause take hold:
 * whoever looks at a paused guest's dirty pages finds all of them. Emulated code would need near
 * 1 us a dword. The host reads the control block at gpa 0x1000 for it: only vCPU 0 may have a pool.
 *
 * A vCPU that stops for a reason that this VM does not have (internal error, triple fault, unknown
 * exit) parks for good, and all others with it: the VM is crashed, and calls return -EIO until it
 * is freed.
 *
 * The program is x86 code: elsewhere vmth_micro_vm_create returns -ENOSYS, and nothing else is of
 * use.
 *
 * All calls come from one thread at a time, in the process that created the VM; those of its
 * tracker may come from another one. Calls return 0 or a negative errno. Memory is the caller's and
 * outlives the VM. */
#ifndef VMTH_GUEST_MICRO_VM_H
#define VMTH_GUEST_MICRO_VM_H

#include <linux/kvm.h>
#include <stdbool.h>
#include <stddef.h>

#include "guest/beat_pace.h"
#include "sys/kvm_dirty_log.h"
#include "sys/kvm_dirty_ring.h"
#include "vmth/common.h"

VMTH_BEGIN_DECLS

#define VMTH_MICRO_VM_SLOTS 2
#define VMTH_MICRO_VM_VCPUS 8
#define VMTH_MICRO_VM_LANE_BYTES 0x40 /* segment base of vCPU k: k of these; a control block fits */
#define VMTH_MICRO_VM_PACES 16
#define VMTH_MICRO_VM_MSRS 3
#define VMTH_MICRO_VM_BEAT_PORT 0x510
#define VMTH_MICRO_VM_COPY_PORT 0x514
#define VMTH_MICRO_VM_THROTTLE_PERIOD_NS UINT64_C(10000000)

#if !defined(__x86_64__)
/* linux/kvm.h has these on x86 only; here they let users of the state compile. */
#define KVM_MAX_XCRS 16
struct kvm_xcrs {
    uint32_t nr_xcrs;
};
struct kvm_msr_entry {
    uint32_t index;
    uint64_t data;
};
#endif

enum vmth_micro_vm_tracker {
    VMTH_MICRO_VM_LOG = 1,
    VMTH_MICRO_VM_RING, /* must be chosen at creation: it excludes the log */
};

/* Times are CLOCK_REALTIME ns, 0 for none yet. */
struct vmth_beat_report {
    uint64_t beats;
    uint64_t first_beat_at_ns;
    uint64_t last_beat_at_ns;
    uint64_t max_gap_ns;
    uint64_t running_ns;
    uint64_t out_of_order; /* beats that did not follow their predecessor by exactly one */
};

/* Everything of one vCPU, beside memory, that moves with the guest. */
struct vmth_micro_vm_state {
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_fpu fpu;
    struct kvm_mp_state mp_state;
    struct kvm_vcpu_events events;
    struct kvm_xcrs xcrs; /* nr_xcrs is 0 where this KVM has none */
    uint32_t nmsrs;
    struct kvm_msr_entry msrs[VMTH_MICRO_VM_MSRS];
    uint64_t beats;
    uint64_t out_of_order;
    uint64_t running_ns;
    uint64_t due_ns; /* running time at which the current or next beat is due */
    bool at_beat;    /* the OUT is complete, the guest waits for due_ns */
    uint32_t npaces;
    struct vmth_pace paces[VMTH_MICRO_VM_PACES]; /* ascending from_ns */
};

struct vmth_micro_vm;

/* A VM with its vCPUs (1 to VMTH_MICRO_VM_VCPUS), parked. Slots get the ids 0 .. nslots-1. Returns
 * 0, or what /dev/kvm said (-ENOENT, -EACCES: no KVM here), -EINVAL for a number of slots or vCPUs
 * out of range, -ENOTSUP for a tracker that this kernel has not, -ENOMEM, -ENOSYS where this
 * architecture does not run the guest's program. */
VMTH_MUST_CHECK int vmth_micro_vm_create(const struct vmth_kvm_slot *slots, size_t nslots,
                                         enum vmth_micro_vm_tracker tracker, size_t nvcpus,
                                         struct vmth_micro_vm **out);

/* Stops the vCPUs, joins their threads and frees everything but the memory. NULL is allowed. */
void vmth_micro_vm_free(struct vmth_micro_vm *vm);

size_t vmth_micro_vm_vcpus(const struct vmth_micro_vm *vm);

/* Every vCPU begins at `entry_gpa` with flat segments from its lane on: the first one with `paces`,
 * each other one with `other_paces` (either table may be empty, and NULL then: unpaced). Parked
 * only, else -EBUSY; -EINVAL for too many paces or descending ones. */
VMTH_MUST_CHECK int vmth_micro_vm_start_fresh(struct vmth_micro_vm *vm, uint64_t entry_gpa,
                                              const struct vmth_pace *paces, size_t npaces,
                                              const struct vmth_pace *other_paces,
                                              size_t nother_paces);

/* Park every vCPU; *was_running says whether the VM ran. The last I/O of each is complete
 * afterwards. With a pool that takes until the next beat at most, not counting the wait for its
 * time. */
VMTH_MUST_CHECK int vmth_micro_vm_pause(struct vmth_micro_vm *vm, bool *was_running);

VMTH_MUST_CHECK int vmth_micro_vm_resume(struct vmth_micro_vm *vm);

/* Park every vCPU at its own next heartbeat (the current one, if it waits in one); who is there
 * first waits, parked, for the others. Returns 0, or -ETIMEDOUT: all go on running. A parked VM is
 * not run: 0 if every vCPU stands at a beat, else -EBUSY. */
VMTH_MUST_CHECK int vmth_micro_vm_pause_at_beat(struct vmth_micro_vm *vm, uint64_t timeout_ns);

/* The state of vCPU number `vcpu`; -EINVAL if there is none such. Parked only, else -EBUSY. A
 * failed load leaves registers undefined: the VM must not run. */
VMTH_MUST_CHECK int vmth_micro_vm_get_state(struct vmth_micro_vm *vm, size_t vcpu,
                                            struct vmth_micro_vm_state *out);
VMTH_MUST_CHECK int vmth_micro_vm_set_state(struct vmth_micro_vm *vm, size_t vcpu,
                                            const struct vmth_micro_vm_state *state);

/* Take `percent` (0 .. 99) of that vCPU's time, by parking it inside every 10 ms. -EINVAL for a
 * vCPU or a percentage out of range. */
VMTH_MUST_CHECK int vmth_micro_vm_throttle(struct vmth_micro_vm *vm, size_t vcpu,
                                           unsigned int percent);

/* `vcpu` must be below vmth_micro_vm_vcpus(). */
void vmth_micro_vm_report(struct vmth_micro_vm *vm, size_t vcpu, struct vmth_beat_report *out);

/* Why the first vCPU that crashed did so (it is named where there are several), or NULL. Valid
 * until free. */
const char *vmth_micro_vm_crash(struct vmth_micro_vm *vm);

/* The tracker, owned by the VM; NULL for the other kind. A ring's vCPU numbers are this VM's. */
struct vmth_kvm_log *vmth_micro_vm_log(struct vmth_micro_vm *vm);
struct vmth_kvm_ring *vmth_micro_vm_ring(struct vmth_micro_vm *vm);
enum vmth_kvm_log_mode vmth_micro_vm_log_mode(const struct vmth_micro_vm *vm);

VMTH_END_DECLS

#endif
