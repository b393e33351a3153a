/* SPDX-License-Identifier: Apache-2.0 */
/* When heartbeats are due: a table of paces and moments. */
#include "guest/beat_pace.h"

#include "t_check.h"

#define SECOND VMTH_PACE_BURST_NS

static const struct vmth_pace steady[] = {{0, 10}};
static const struct vmth_pace changing[] = {{0, 10}, {35, 5}, {60, 0}, {100, 7}};
static const struct vmth_pace late[] = {{50, 10}};
static const struct vmth_pace endless[] = {{0, UINT64_MAX}};

static const struct {
    const char *what;
    const struct vmth_pace *paces;
    size_t npaces;
    uint64_t last_due;
    uint64_t now;
    uint64_t due;
} moments[] = {
    {"first beat, early", steady, 1, 0, 3, 10},
    {"first beat, late: still due at its time", steady, 1, 0, 17, 10},
    {"late beats catch up", steady, 1, 10, 39, 20},
    {"not more than a second", steady, 1, 10, SECOND + 500, 500},
    {"a second exactly", steady, 1, 490, SECOND + 500, 500},
    {"no pace: at once", steady, 0, 5, 99, 99},
    {"a change of pace is not slept through", changing, 4, 30, 31, 35},
    {"the new pace", changing, 4, 35, 36, 40},
    {"to an unpaced stretch", changing, 4, 58, 59, 60},
    {"unpaced", changing, 4, 60, 61, 61},
    {"unpaced, though the next pace began meanwhile", changing, 4, 90, 110, 110},
    {"paced again", changing, 4, 110, 111, 117},
    {"before the first pace", late, 1, 20, 21, 21},
    {"no wrap into the past", endless, 1, 7, 8, UINT64_MAX},
};

int main(void)
{
    for (size_t i = 0; i < sizeof(moments) / sizeof(moments[0]); i++) {
        fprintf(stderr, "%s\n", moments[i].what);
        T_EQUAL(
            vmth_pace_due(moments[i].paces, moments[i].npaces, moments[i].last_due, moments[i].now),
            moments[i].due);
    }
    const struct vmth_pace twice[] = {{0, 1}, {5, 1}, {5, 2}};
    T_CHECK(vmth_pace_ordered(changing, 4));
    T_CHECK(vmth_pace_ordered(twice, 2));
    T_CHECK(vmth_pace_ordered(NULL, 0));
    T_CHECK(!vmth_pace_ordered(twice, 3));
    return T_PASS;
}
