/* SPDX-License-Identifier: Apache-2.0 */
/* When the next heartbeat is due. */
#include "guest/beat_pace.h"

bool vmth_pace_ordered(const struct vmth_pace *paces, size_t npaces)
{
    for (size_t i = 1; i < npaces; i++) {
        if (paces[i].from_ns <= paces[i - 1].from_ns) {
            return false;
        }
    }
    return true;
}

uint64_t vmth_pace_due(const struct vmth_pace *paces, size_t npaces, uint64_t last_due_ns,
                       uint64_t now_ns)
{
    uint64_t interval = 0;
    uint64_t change = UINT64_MAX;
    for (size_t i = 0; i < npaces; i++) {
        if (paces[i].from_ns > last_due_ns) {
            change = paces[i].from_ns;
            break;
        }
        interval = paces[i].beat_interval_ns;
    }
    if (interval == 0) {
        return now_ns;
    }
    /* Saturating: a hostile table must not wrap into the past. */
    uint64_t due = interval > UINT64_MAX - last_due_ns ? UINT64_MAX : last_due_ns + interval;
    if (due > change) {
        due = change;
    }
    if (now_ns > VMTH_PACE_BURST_NS && due < now_ns - VMTH_PACE_BURST_NS) {
        due = now_ns - VMTH_PACE_BURST_NS;
    }
    return due;
}
