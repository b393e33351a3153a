/* SPDX-License-Identifier: Apache-2.0 */
/* What one step of the walker stores (guest/walker.h draws it), for both guests: the process guest's
 * thread, and the micro VM, whose guest lets the host copy what comes from a pool.
 *
 * Memory is the guest's, [memory, memory + length) with length up to 4 GiB; every address in it may be
 * anything, and others may write to it meanwhile. Pure but for that memory; no locks. */
#ifndef VMTH_GUEST_WALKER_STEP_H
#define VMTH_GUEST_WALKER_STEP_H

#include <stdbool.h>

#include "guest/walker.h"

VMTH_BEGIN_DECLS

#define VMTH_WALKER_ENTRY_BYTES 16u

/* The control block in memory, which is longer than that. */
void vmth_walker_control_read(const uint8_t *memory, struct vmth_walker_registers *out);

/* May vmth_walker_store work with them? */
bool vmth_walker_registers_valid(const struct vmth_walker_registers *registers, uint64_t length);

/* Store what the entry at registers->index says, with valid registers. Its counter stays, and lies in
 * memory at *counter_gpa. Returns 0, or -EFAULT: store or counter lie outside of memory, nothing was
 * stored. */
VMTH_MUST_CHECK int vmth_walker_store(uint8_t *memory, uint64_t length,
                                      const struct vmth_walker_registers *registers,
                                      uint32_t *counter_gpa);

VMTH_END_DECLS

#endif
