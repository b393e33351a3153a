# SPDX-License-Identifier: Apache-2.0
"""The native walker thread of the process guest (csrc/guest/walker.h)."""

import os

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "<stdbool.h>":
    ctypedef int bool_t "bool"

cdef extern from "guest/walker.h":
    enum: VMTH_WALKER_PACES_MAX

    struct vmth_walker:
        pass

    struct vmth_walker_registers:
        uint32_t index
        uint32_t entries
        uint32_t schedule_gpa
        uint32_t loops
        uint32_t beats
        uint32_t writes_per_beat
        uint32_t countdown
        uint32_t store_dwords
        uint32_t value_mask
        uint32_t pool_gpa
        uint32_t pool_mask
        uint32_t pool_step

    struct vmth_walker_pace:
        uint64_t from_ns
        uint64_t beat_interval_ns

    struct vmth_walker_state:
        vmth_walker_registers registers
        uint32_t npaces
        vmth_walker_pace paces[VMTH_WALKER_PACES_MAX]
        uint64_t running_ns
        uint64_t next_due_ns

    struct vmth_walker_report_t "vmth_walker_report":
        uint64_t beats
        int64_t first_beat_at_ns
        int64_t last_beat_at_ns
        uint64_t max_gap_ns
        uint64_t running_ns
        uint64_t out_of_order
        uint64_t seen
        int fault

    int vmth_walker_create(uint8_t *host, uint64_t length, vmth_walker **out) nogil
    void vmth_walker_free(vmth_walker *walker) nogil
    int vmth_walker_reset(
        vmth_walker *walker, const vmth_walker_pace *paces, uint32_t npaces
    ) nogil
    int vmth_walker_save(vmth_walker *walker, vmth_walker_state *out) nogil
    int vmth_walker_load(vmth_walker *walker, const vmth_walker_state *state) nogil
    int vmth_walker_resume(vmth_walker *walker) nogil
    bool_t vmth_walker_pause(vmth_walker *walker) nogil
    bool_t vmth_walker_pause_at_beat(vmth_walker *walker, uint64_t timeout_ns) nogil
    int vmth_walker_throttle(vmth_walker *walker, uint32_t percent) nogil
    void vmth_walker_report(vmth_walker *walker, vmth_walker_report_t *out) nogil

PACES_MAX = VMTH_WALKER_PACES_MAX


cdef int check(int rc) except -1:
    if rc != 0:
        raise OSError(-rc, os.strerror(-rc))
    return 0


cdef uint32_t fill_paces(vmth_walker_pace *out, paces) except? 0xffffffff:
    if len(paces) > VMTH_WALKER_PACES_MAX:
        raise ValueError(f"{len(paces)} paces: at most {VMTH_WALKER_PACES_MAX}")
    for i, (from_ns, beat_interval_ns) in enumerate(paces):
        out[i].from_ns = from_ns
        out[i].beat_interval_ns = beat_interval_ns
    return <uint32_t>len(paces)


cdef class Walker:
    cdef vmth_walker *_walker
    cdef object _memory

    def __cinit__(self, uint8_t[::1] memory not None):
        cdef int rc
        if memory.shape[0] == 0:
            raise ValueError("no memory")
        self._memory = memory
        rc = vmth_walker_create(&memory[0], <uint64_t>memory.shape[0], &self._walker)
        check(rc)

    def __dealloc__(self):
        if self._walker != NULL:
            with nogil:
                vmth_walker_free(self._walker)

    cdef vmth_walker *_open(self) except NULL:
        if self._walker == NULL:
            raise ValueError("the walker is closed")
        return self._walker

    def close(self):
        cdef vmth_walker *walker = self._walker
        self._walker = NULL
        if walker != NULL:
            with nogil:
                vmth_walker_free(walker)
        self._memory = None

    def reset(self, paces):
        cdef vmth_walker_pace native[VMTH_WALKER_PACES_MAX]
        check(vmth_walker_reset(self._open(), native, fill_paces(native, paces)))

    def resume(self):
        check(vmth_walker_resume(self._open()))

    def pause(self):
        cdef vmth_walker *walker = self._open()
        cdef bint was_running
        with nogil:
            was_running = vmth_walker_pause(walker)
        return was_running

    def pause_at_beat(self, uint64_t timeout_ns):
        cdef vmth_walker *walker = self._open()
        cdef bint stands
        with nogil:
            stands = vmth_walker_pause_at_beat(walker, timeout_ns)
        return stands

    def throttle(self, uint32_t percent):
        check(vmth_walker_throttle(self._open(), percent))

    def save(self):
        cdef vmth_walker_state state
        check(vmth_walker_save(self._open(), &state))
        registers = (
            state.registers.index,
            state.registers.entries,
            state.registers.schedule_gpa,
            state.registers.loops,
            state.registers.beats,
            state.registers.writes_per_beat,
            state.registers.countdown,
            state.registers.store_dwords,
            state.registers.value_mask,
            state.registers.pool_gpa,
            state.registers.pool_mask,
            state.registers.pool_step,
        )
        paces = [
            (state.paces[i].from_ns, state.paces[i].beat_interval_ns)
            for i in range(state.npaces)
        ]
        return registers, paces, state.running_ns, state.next_due_ns

    def load(self, registers, paces, uint64_t running_ns, uint64_t next_due_ns):
        cdef vmth_walker_state state
        (
            state.registers.index,
            state.registers.entries,
            state.registers.schedule_gpa,
            state.registers.loops,
            state.registers.beats,
            state.registers.writes_per_beat,
            state.registers.countdown,
            state.registers.store_dwords,
            state.registers.value_mask,
            state.registers.pool_gpa,
            state.registers.pool_mask,
            state.registers.pool_step,
        ) = registers
        state.npaces = fill_paces(state.paces, paces)
        state.running_ns = running_ns
        state.next_due_ns = next_due_ns
        check(vmth_walker_load(self._open(), &state))

    def report(self):
        cdef vmth_walker_report_t report
        vmth_walker_report(self._open(), &report)
        return {
            "beats": report.beats,
            "first_beat_at_ns": report.first_beat_at_ns,
            "last_beat_at_ns": report.last_beat_at_ns,
            "max_gap_ns": report.max_gap_ns,
            "running_ns": report.running_ns,
            "out_of_order": report.out_of_order,
            "seen": report.seen,
            "fault": report.fault,
        }
