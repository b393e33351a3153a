/* SPDX-License-Identifier: Apache-2.0 */
/* When the next heartbeat is due: pure arithmetic over a guest's running time.
 *
 *   paces:   {from 0, every 10}            {from 35, every 5}
 *   due:     10   20   30                  35   40   45 ...     (a change is never slept through)
 *
 * Pure: no clock, no I/O. All times are ns of running time. */
#ifndef VMTH_GUEST_BEAT_PACE_H
#define VMTH_GUEST_BEAT_PACE_H

#include <stdbool.h>
#include <stddef.h>

#include "vmth/common.h"

VMTH_BEGIN_DECLS

/* The most behind its schedule that a guest may catch up. */
#define VMTH_PACE_BURST_NS UINT64_C(1000000000)

/* From `from_ns` on: a beat every `beat_interval_ns` (0: unpaced). */
struct vmth_pace {
    uint64_t from_ns;
    uint64_t beat_interval_ns;
};

/* Ascending from_ns? (An empty table is: it means unpaced.) */
bool vmth_pace_ordered(const struct vmth_pace *paces, size_t npaces);

/* A heartbeat happened at `now_ns`; the one before was due at `last_due_ns`. Returns when this one
 * is due: one interval later, or at the next change of pace if that comes first, but never more
 * than VMTH_PACE_BURST_NS ago; `now_ns` where the pace is unpaced. */
uint64_t vmth_pace_due(const struct vmth_pace *paces, size_t npaces, uint64_t last_due_ns,
                       uint64_t now_ns);

VMTH_END_DECLS

#endif
