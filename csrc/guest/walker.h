/* SPDX-License-Identifier: Apache-2.0 */
/* The walker as a native thread: the "vCPU" of the process guest.
 *
 * It runs the program that vmth/guests/machine.py draws, over mapped memory, with plain stores:
 *
 *   gpa 0x1000  control block: u32 index, entries, schedule_gpa, loops, beats, writes_per_beat,
 *               countdown, store_dwords, value_mask, pool_gpa, pool_mask, pool_step
 *   schedule    entries of {u32 write_gpa, u32 value, u32 counter_gpa, u32 0}
 *
 *   step:  memory[write_gpa ..] = value + (loops & value_mask), store_dwords times
 *          or, unless pool_gpa is 0, store_dwords dwords copied in ascending order from
 *          pool_gpa + ((value + loops * pool_step) & pool_mask)
 *          memory[counter_gpa] += 1
 *          index + 1 (or 0 and loops + 1);  countdown - 1, at 0: writes_per_beat and a beat
 *
 * The twelve fields live in the thread's registers; memory has them at every beat, as with the KVM
 * program. They move with the guest in struct vmth_walker_state, so that a guest paused between two
 * beats goes on with the very next step.
 *
 * walker_step.h has what a step stores, beats and pace are this file's.
 *
 * Addresses in the schedule are the guest's own and may be anything (the pool's are checked when the
 * registers are loaded): a store that would leave the mapping stops the walker with -EFAULT (the guest
 * crashed), it never reaches the host's memory.
 *
 * Threads: one caller at a time for everything except vmth_walker_report, which any thread may call. */
#ifndef VMTH_GUEST_WALKER_H
#define VMTH_GUEST_WALKER_H

#include <stdbool.h>

#include "vmth/common.h"

VMTH_BEGIN_DECLS

#define VMTH_WALKER_CONTROL_GPA 0x1000u
#define VMTH_WALKER_PACES_MAX 16u
#define VMTH_WALKER_STORE_DWORDS_MAX 1023u
/* A guest that fell behind its pace by more than this does not try to catch up. */
#define VMTH_WALKER_LAG_MAX_NS 100000000u

/* The control block, and the registers. Field order and width are those in memory. */
struct vmth_walker_registers {
    uint32_t index;
    uint32_t entries;
    uint32_t schedule_gpa;
    uint32_t loops;
    uint32_t beats;
    uint32_t writes_per_beat;
    uint32_t countdown;
    uint32_t store_dwords;
    uint32_t value_mask;
    uint32_t pool_gpa;  /* 0: no pool */
    uint32_t pool_mask; /* bytes: a multiple of 4 */
    uint32_t pool_step;
};

/* From from_ns of running time on, a beat every beat_interval_ns; 0: unpaced. */
struct vmth_walker_pace {
    uint64_t from_ns;
    uint64_t beat_interval_ns;
};

/* Everything that moves with the guest beside its memory. */
struct vmth_walker_state {
    struct vmth_walker_registers registers;
    uint32_t npaces;
    struct vmth_walker_pace paces[VMTH_WALKER_PACES_MAX];
    uint64_t running_ns;  /* running time so far */
    uint64_t next_due_ns; /* running time at which the next step after a beat may begin */
};

struct vmth_walker_report {
    uint64_t beats; /* number of the last beat (the guest's own count) */
    int64_t first_beat_at_ns;
    int64_t last_beat_at_ns;
    uint64_t max_gap_ns;
    uint64_t running_ns;
    uint64_t out_of_order;
    uint64_t seen; /* beats seen by this walker object */
    int fault;     /* 0, or the negative errno that stopped the walker */
};

struct vmth_walker;

/* A stopped walker over memory [host, host + length); the caller keeps it mapped and writable until
 * vmth_walker_free. Starts the thread ("vmth-vcpu-0"), which waits. 0, -EINVAL (null, length below two
 * pages or above 4 GiB), -ENOMEM, or pthread_create's error. */
VMTH_MUST_CHECK int vmth_walker_create(uint8_t *host, uint64_t length, struct vmth_walker **out);

/* Stops and joins the thread. NULL is allowed. */
void vmth_walker_free(struct vmth_walker *walker);

/* Load the registers from the control block in memory, set the paces, running time 0. Stopped
 * walkers only: -EBUSY. -EINVAL: the control block or the paces make no sense; nothing changed. */
VMTH_MUST_CHECK int vmth_walker_reset(struct vmth_walker *walker,
                                      const struct vmth_walker_pace *paces, uint32_t npaces);

/* Copy the state out of / into a stopped walker (-EBUSY if it runs). Load checks every field
 * against its bounds (-EINVAL, nothing changed): the bytes came from another host. */
VMTH_MUST_CHECK int vmth_walker_save(struct vmth_walker *walker, struct vmth_walker_state *out);
VMTH_MUST_CHECK int vmth_walker_load(struct vmth_walker *walker,
                                     const struct vmth_walker_state *state);

/* Let it run. 0 (also when it runs already), -EINVAL before reset or load, or the fault that
 * stopped it. */
VMTH_MUST_CHECK int vmth_walker_resume(struct vmth_walker *walker);

/* Stop; true if it was running. When it returns no store is under way and none follows. */
bool vmth_walker_pause(struct vmth_walker *walker);

/* Stop right after a beat, where the control block in memory equals the registers. True when it
 * stands there (also if it stood there before the call); false at the timeout (it runs on), or
 * when it is paused between two beats or has crashed (it stays as it is). */
bool vmth_walker_pause_at_beat(struct vmth_walker *walker, uint64_t timeout_ns);

/* Take `percent` (0 to 99) of its time from the next slice of 10 ms on. What was taken also delays its
 * pace, so that the rate falls by as much. -EINVAL above 99. */
VMTH_MUST_CHECK int vmth_walker_throttle(struct vmth_walker *walker, uint32_t percent);

void vmth_walker_report(struct vmth_walker *walker, struct vmth_walker_report *out);

VMTH_END_DECLS

#endif
