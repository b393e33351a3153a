# SPDX-License-Identifier: Apache-2.0
# cython: boundscheck=True, wraparound=False
"""The micro VM and the KVM dirty trackers for Python: checks, GIL release, exceptions."""

from libc.errno cimport EBUSY, ENOSYS, ETIMEDOUT
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

import os


cdef extern from "<stdbool.h>" nogil:
    ctypedef unsigned char c_bool "bool"

cdef extern from "sys/kvm_ops.h" nogil:
    struct vmth_kvm_slot:
        uint32_t slot
        uint64_t gpa
        uint64_t npages
        uint64_t hva

cdef extern from "errno.h" nogil:
    int ENOTSUP

cdef extern from "sys/kvm_dirty_log.h" nogil:
    struct vmth_kvm_log:
        pass
    int VMTH_KVM_LOG_MANUAL
    int VMTH_KVM_LOG_MANUAL_ALL_SET
    int vmth_kvm_log_start(vmth_kvm_log *log)
    int vmth_kvm_log_fetch(vmth_kvm_log *log, uint64_t **bitmaps)
    int vmth_kvm_log_peek(vmth_kvm_log *log, uint64_t **bitmaps)
    int vmth_kvm_log_rearm(vmth_kvm_log *log, size_t index, uint64_t page, uint64_t npages)
    int vmth_kvm_log_stop(vmth_kvm_log *log)

cdef extern from "sys/kvm_dirty_ring.h" nogil:
    struct vmth_kvm_ring:
        pass
    int vmth_kvm_ring_start(vmth_kvm_ring *ring)
    int vmth_kvm_ring_fetch(vmth_kvm_ring *ring, uint64_t **bitmaps)
    int vmth_kvm_ring_peek(vmth_kvm_ring *ring, uint64_t **bitmaps)
    uint64_t vmth_kvm_ring_overflows(vmth_kvm_ring *ring)
    uint64_t vmth_kvm_ring_dirtied(vmth_kvm_ring *ring, size_t vcpu)
    int vmth_kvm_ring_stop(vmth_kvm_ring *ring)

cdef extern from "guest/walker_program.h" nogil:
    const uint8_t vmth_walker_program[]
    const size_t vmth_walker_program_bytes

cdef extern from "guest/micro_vm.h" nogil:
    enum:
        VMTH_MICRO_VM_SLOTS
        VMTH_MICRO_VM_VCPUS
        VMTH_MICRO_VM_LANE_BYTES
        VMTH_MICRO_VM_PACES
        VMTH_MICRO_VM_MSRS
        KVM_MAX_XCRS
    enum vmth_micro_vm_tracker:
        VMTH_MICRO_VM_LOG
        VMTH_MICRO_VM_RING
    struct vmth_pace:
        uint64_t from_ns
        uint64_t beat_interval_ns
    struct vmth_beat_report:
        uint64_t beats
        uint64_t first_beat_at_ns
        uint64_t last_beat_at_ns
        uint64_t max_gap_ns
        uint64_t running_ns
        uint64_t out_of_order
    struct kvm_regs:
        pass
    struct kvm_sregs:
        pass
    struct kvm_fpu:
        pass
    struct kvm_mp_state:
        pass
    struct kvm_vcpu_events:
        pass
    struct kvm_xcrs:
        pass
    struct kvm_msr_entry:
        uint32_t index
        uint64_t data
    struct vmth_micro_vm_state:
        kvm_regs regs
        kvm_sregs sregs
        kvm_fpu fpu
        kvm_mp_state mp_state
        kvm_vcpu_events events
        kvm_xcrs xcrs
        uint32_t nmsrs
        kvm_msr_entry msrs[3]
        uint64_t beats
        uint64_t out_of_order
        uint64_t running_ns
        uint64_t due_ns
        c_bool at_beat
        uint32_t npaces
        vmth_pace paces[16]
    struct vmth_micro_vm:
        pass
    int vmth_micro_vm_create(const vmth_kvm_slot *slots, size_t nslots,
                             vmth_micro_vm_tracker tracker, size_t nvcpus, vmth_micro_vm **out)
    void vmth_micro_vm_free(vmth_micro_vm *vm)
    size_t vmth_micro_vm_vcpus(const vmth_micro_vm *vm)
    int vmth_micro_vm_start_fresh(vmth_micro_vm *vm, uint64_t entry_gpa, const vmth_pace *paces,
                                  size_t npaces, const vmth_pace *other_paces,
                                  size_t nother_paces)
    int vmth_micro_vm_pause(vmth_micro_vm *vm, c_bool *was_running)
    int vmth_micro_vm_resume(vmth_micro_vm *vm)
    int vmth_micro_vm_pause_at_beat(vmth_micro_vm *vm, uint64_t timeout_ns)
    int vmth_micro_vm_get_state(vmth_micro_vm *vm, size_t vcpu, vmth_micro_vm_state *out)
    int vmth_micro_vm_set_state(vmth_micro_vm *vm, size_t vcpu, const vmth_micro_vm_state *state)
    int vmth_micro_vm_throttle(vmth_micro_vm *vm, size_t vcpu, unsigned int percent)
    void vmth_micro_vm_report(vmth_micro_vm *vm, size_t vcpu, vmth_beat_report *out)
    const char *vmth_micro_vm_crash(vmth_micro_vm *vm)
    vmth_kvm_log *vmth_micro_vm_log(vmth_micro_vm *vm)
    vmth_kvm_ring *vmth_micro_vm_ring(vmth_micro_vm *vm)
    int vmth_micro_vm_log_mode(const vmth_micro_vm *vm)


STATE_SIZES = {
    "regs": sizeof(kvm_regs),
    "sregs": sizeof(kvm_sregs),
    "fpu": sizeof(kvm_fpu),
    "mp_state": sizeof(kvm_mp_state),
    "events": sizeof(kvm_vcpu_events),
    "xcrs": sizeof(kvm_xcrs),
}
MAX_MSRS = VMTH_MICRO_VM_MSRS
MAX_PACES = VMTH_MICRO_VM_PACES
MAX_XCRS = KVM_MAX_XCRS
MAX_VCPUS = VMTH_MICRO_VM_VCPUS
LANE_BYTES = VMTH_MICRO_VM_LANE_BYTES


def walker_code():
    return vmth_walker_program[:vmth_walker_program_bytes]


cdef int check(int rc, str what) except -1:
    if rc < 0:
        raise OSError(-rc, f"{what}: {os.strerror(-rc)}")
    return rc


cdef int take(void *into, size_t size, object state, str name) except -1:
    cdef bytes data = state[name]
    if <size_t>len(data) != size:
        raise ValueError(f"{name}: {len(data)} bytes, exactly {size} wanted")
    memcpy(into, <const char *>data, size)
    return 0


cdef size_t take_paces(vmth_pace *into, object paces) except? 0:
    if len(paces) > VMTH_MICRO_VM_PACES:
        raise ValueError(f"{len(paces)} paces, at most {VMTH_MICRO_VM_PACES}")
    for i, (from_ns, interval_ns) in enumerate(paces):
        into[i].from_ns = from_ns
        into[i].beat_interval_ns = interval_ns
    return <size_t>len(paces)


cdef class MicroVm:
    cdef vmth_micro_vm *vm
    cdef size_t nslots
    cdef uint64_t npages[VMTH_MICRO_VM_SLOTS]

    def __cinit__(self, slots, str tracker, Py_ssize_t vcpus=1):
        cdef vmth_kvm_slot table[VMTH_MICRO_VM_SLOTS]
        cdef vmth_micro_vm_tracker kind
        cdef int rc
        if not 0 < len(slots) <= VMTH_MICRO_VM_SLOTS:
            raise ValueError(f"{len(slots)} slots, 1 to {VMTH_MICRO_VM_SLOTS} allowed")
        if tracker not in ("log", "ring"):
            raise ValueError(f"tracker {tracker!r}, 'log' or 'ring' allowed")
        if not 0 < vcpus <= VMTH_MICRO_VM_VCPUS:
            raise ValueError(f"{vcpus} vCPUs, 1 to {VMTH_MICRO_VM_VCPUS} allowed")
        kind = VMTH_MICRO_VM_LOG if tracker == "log" else VMTH_MICRO_VM_RING
        self.nslots = <size_t>len(slots)
        for i, (gpa, npages, address) in enumerate(slots):
            table[i].slot = <uint32_t>i
            table[i].gpa = gpa
            table[i].npages = npages
            table[i].hva = address
            self.npages[i] = npages
        with nogil:
            rc = vmth_micro_vm_create(table, self.nslots, kind, <size_t>vcpus, &self.vm)
        if rc == -ENOSYS:
            raise OSError(ENOSYS, "kvm guest: not on this architecture")
        check(rc, "KVM micro VM")

    def __dealloc__(self):
        vmth_micro_vm_free(self.vm)

    cdef vmth_micro_vm *opened(self) except NULL:
        if self.vm == NULL:
            raise ValueError("the micro VM is closed")
        return self.vm

    cdef size_t chosen(self, Py_ssize_t vcpu) except? 0:
        cdef size_t nvcpus = vmth_micro_vm_vcpus(self.opened())
        if vcpu < 0 or <size_t>vcpu >= nvcpus:
            raise IndexError(f"vCPU {vcpu}: this VM has 0 to {nvcpus - 1}")
        return <size_t>vcpu

    def close(self):
        cdef vmth_micro_vm *vm = self.vm
        self.vm = NULL
        with nogil:
            vmth_micro_vm_free(vm)

    @property
    def vcpus(self):
        return vmth_micro_vm_vcpus(self.opened())

    def start_fresh(self, uint64_t entry_gpa, paces, other_paces=()):
        cdef vmth_micro_vm *vm = self.opened()
        cdef vmth_pace first[VMTH_MICRO_VM_PACES]
        cdef vmth_pace others[VMTH_MICRO_VM_PACES]
        cdef size_t nfirst = take_paces(first, paces)
        cdef size_t nothers = take_paces(others, other_paces)
        cdef int rc
        with nogil:
            rc = vmth_micro_vm_start_fresh(vm, entry_gpa, first, nfirst, others, nothers)
        check(rc, "start")

    def pause(self):
        cdef vmth_micro_vm *vm = self.opened()
        cdef c_bool was_running = 0
        cdef int rc
        with nogil:
            rc = vmth_micro_vm_pause(vm, &was_running)
        check(rc, "pause")
        return bool(was_running)

    def resume(self):
        check(vmth_micro_vm_resume(self.opened()), "resume")

    def pause_at_beat(self, uint64_t timeout_ns):
        cdef vmth_micro_vm *vm = self.opened()
        cdef int rc
        with nogil:
            rc = vmth_micro_vm_pause_at_beat(vm, timeout_ns)
        if rc == -ETIMEDOUT or rc == -EBUSY:
            return False
        check(rc, "pause at beat")
        return True

    def throttle(self, unsigned int percent, vcpu=None):
        for index in range(self.vcpus) if vcpu is None else (vcpu,):
            check(vmth_micro_vm_throttle(self.opened(), self.chosen(index), percent), "throttle")

    def report(self, Py_ssize_t vcpu=0):
        cdef vmth_beat_report got
        vmth_micro_vm_report(self.opened(), self.chosen(vcpu), &got)
        return (got.beats, got.first_beat_at_ns, got.last_beat_at_ns, got.max_gap_ns,
                got.running_ns, got.out_of_order)

    def crash(self):
        cdef const char *text = vmth_micro_vm_crash(self.opened())
        return None if text == NULL else text.decode()

    def get_state(self, Py_ssize_t vcpu=0):
        cdef vmth_micro_vm_state got
        check(vmth_micro_vm_get_state(self.opened(), self.chosen(vcpu), &got), "get state")
        return {
            "regs": (<char *>&got.regs)[:sizeof(got.regs)],
            "sregs": (<char *>&got.sregs)[:sizeof(got.sregs)],
            "fpu": (<char *>&got.fpu)[:sizeof(got.fpu)],
            "mp_state": (<char *>&got.mp_state)[:sizeof(got.mp_state)],
            "events": (<char *>&got.events)[:sizeof(got.events)],
            "xcrs": (<char *>&got.xcrs)[:sizeof(got.xcrs)],
            "msrs": [(got.msrs[i].index, got.msrs[i].data) for i in range(got.nmsrs)],
            "beats": got.beats,
            "out_of_order": got.out_of_order,
            "running_ns": got.running_ns,
            "due_ns": got.due_ns,
            "at_beat": bool(got.at_beat),
            "paces": [
                (got.paces[i].from_ns, got.paces[i].beat_interval_ns) for i in range(got.npaces)
            ],
        }

    def set_state(self, state, Py_ssize_t vcpu=0):
        cdef vmth_micro_vm *vm = self.opened()
        cdef size_t index = self.chosen(vcpu)
        cdef vmth_micro_vm_state given
        memset(&given, 0, sizeof(given))
        take(&given.regs, sizeof(given.regs), state, "regs")
        take(&given.sregs, sizeof(given.sregs), state, "sregs")
        take(&given.fpu, sizeof(given.fpu), state, "fpu")
        take(&given.mp_state, sizeof(given.mp_state), state, "mp_state")
        take(&given.events, sizeof(given.events), state, "events")
        take(&given.xcrs, sizeof(given.xcrs), state, "xcrs")
        if len(state["msrs"]) > VMTH_MICRO_VM_MSRS:
            raise ValueError(f"{len(state['msrs'])} MSRs, at most {VMTH_MICRO_VM_MSRS}")
        for i, (msr, data) in enumerate(state["msrs"]):
            given.msrs[i].index = msr
            given.msrs[i].data = data
        given.nmsrs = <uint32_t>len(state["msrs"])
        given.beats = state["beats"]
        given.out_of_order = state["out_of_order"]
        given.running_ns = state["running_ns"]
        given.due_ns = state["due_ns"]
        given.at_beat = 1 if state["at_beat"] else 0
        given.npaces = <uint32_t>take_paces(given.paces, state["paces"])
        check(vmth_micro_vm_set_state(vm, index, &given), "set state")

    @property
    def log_mode(self):
        cdef vmth_micro_vm *vm = self.opened()
        if vmth_micro_vm_ring(vm) != NULL:
            return "ring"
        mode = vmth_micro_vm_log_mode(vm)
        if mode == VMTH_KVM_LOG_MANUAL_ALL_SET:
            return "manual-all-set"
        return "manual" if mode == VMTH_KVM_LOG_MANUAL else "fetch-clears"

    @property
    def ring_overflows(self):
        cdef vmth_kvm_ring *ring = vmth_micro_vm_ring(self.opened())
        return 0 if ring == NULL else vmth_kvm_ring_overflows(ring)

    def dirtied(self):
        cdef vmth_micro_vm *vm = self.opened()
        cdef vmth_kvm_ring *ring = vmth_micro_vm_ring(vm)
        if ring == NULL:
            return []
        return [vmth_kvm_ring_dirtied(ring, i) for i in range(vmth_micro_vm_vcpus(vm))]

    def dirty_start(self):
        cdef vmth_micro_vm *vm = self.opened()
        cdef int rc
        with nogil:
            if vmth_micro_vm_ring(vm) != NULL:
                rc = vmth_kvm_ring_start(vmth_micro_vm_ring(vm))
            else:
                rc = vmth_kvm_log_start(vmth_micro_vm_log(vm))
        check(rc, "dirty tracking")

    cdef int take_table(self, bitmaps, uint64_t **table) except -1:
        """The words of `bitmaps`, which keeps the arrays alive."""
        cdef uint64_t[::1] words
        if <size_t>len(bitmaps) != self.nslots:
            raise ValueError(f"{len(bitmaps)} bitmaps for {self.nslots} slots")
        for i in range(self.nslots):
            words = bitmaps[i]
            if <uint64_t>words.shape[0] < (self.npages[i] + 63) // 64:
                raise ValueError(f"bitmap {i}: {words.shape[0]} words for {self.npages[i]} pages")
            table[i] = &words[0]
        return 0

    def dirty_fetch(self, bitmaps):
        cdef vmth_micro_vm *vm = self.opened()
        cdef uint64_t *table[VMTH_MICRO_VM_SLOTS]
        cdef int rc
        self.take_table(bitmaps, table)
        with nogil:
            if vmth_micro_vm_ring(vm) != NULL:
                rc = vmth_kvm_ring_fetch(vmth_micro_vm_ring(vm), table)
            else:
                rc = vmth_kvm_log_fetch(vmth_micro_vm_log(vm), table)
        check(rc, "dirty fetch")

    def dirty_peek(self, bitmaps):
        cdef vmth_micro_vm *vm = self.opened()
        cdef uint64_t *table[VMTH_MICRO_VM_SLOTS]
        cdef int rc
        self.take_table(bitmaps, table)
        with nogil:
            if vmth_micro_vm_ring(vm) != NULL:
                rc = vmth_kvm_ring_peek(vmth_micro_vm_ring(vm), table)
            else:
                rc = vmth_kvm_log_peek(vmth_micro_vm_log(vm), table)
        if rc == -ENOTSUP:
            return False
        check(rc, "dirty peek")
        return True

    def dirty_rearm(self, size_t slot, uint64_t page, uint64_t npages):
        cdef vmth_micro_vm *vm = self.opened()
        cdef int rc = 0
        if slot >= self.nslots or page > self.npages[slot] or npages > self.npages[slot] - page:
            raise ValueError(f"slot {slot}: pages {page} + {npages} are outside")
        with nogil:
            if vmth_micro_vm_log(vm) != NULL:
                rc = vmth_kvm_log_rearm(vmth_micro_vm_log(vm), slot, page, npages)
        check(rc, "dirty rearm")

    def dirty_stop(self):
        cdef vmth_micro_vm *vm = self.opened()
        cdef int rc
        with nogil:
            if vmth_micro_vm_ring(vm) != NULL:
                rc = vmth_kvm_ring_stop(vmth_micro_vm_ring(vm))
            else:
                rc = vmth_kvm_log_stop(vmth_micro_vm_log(vm))
        check(rc, "dirty stop")
