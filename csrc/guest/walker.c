/* SPDX-License-Identifier: Apache-2.0 */
/* The walker thread: steps, beats, pacing, throttle, pause. walker.h is the contract. */
#define _GNU_SOURCE
#include "guest/walker.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "guest/walker_step.h"

#define NS_PER_S 1000000000u
#define SLICE_NS 10000000u
#define STEAL_MAX_NS (10ull * NS_PER_S)
#define BEAT_INTERVAL_MAX_NS (3600ull * NS_PER_S)
#define RUNNING_MAX_NS (1ull << 62)
/* Steps between two looks at the throttle. */
#define THROTTLE_CHECK_STEPS 64u

struct vmth_walker {
    /* written at create only */
    uint8_t *host;
    uint64_t length;
    pthread_t thread;

    /* the walker thread's while `running`, the caller's otherwise (handed over under `lock`) */
    struct vmth_walker_registers registers;
    uint64_t next_due_ns;
    uint64_t slice_start_ns;
    bool expect_beat_from_memory; /* next beat is checked against the control block in memory */

    /* set by callers, read by the thread at every step */
    atomic_bool stop;
    atomic_bool stop_at_beat;
    atomic_uint throttle_percent;

    /* protected by lock */
    pthread_mutex_t lock;
    pthread_cond_t changed; /* CLOCK_MONOTONIC; any of the fields below, or an atomic above */
    bool loaded;
    bool run;     /* asked to run */
    bool running; /* the thread is between its first and last step of a stretch */
    bool quit;
    uint32_t npaces;
    struct vmth_walker_pace paces[VMTH_WALKER_PACES_MAX];
    uint64_t running_ns; /* up to resumed_at_ns */
    uint64_t resumed_at_ns;
    uint32_t expected_beat;
    struct vmth_walker_report report;
};

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec now;

    (void)clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

static uint32_t load_u32(const uint8_t *at)
{
    uint32_t value;

    memcpy(&value, at, sizeof(value));
    return value;
}

static void store_u32(uint8_t *at, uint32_t value)
{
    memcpy(at, &value, sizeof(value));
}

/* ---- paces and the control block ------------------------------------------------------------------- */

static bool paces_valid(const struct vmth_walker_pace *paces, uint32_t npaces)
{
    if (npaces > VMTH_WALKER_PACES_MAX || (npaces > 0 && paces == NULL)) {
        return false;
    }
    for (uint32_t i = 0; i < npaces; i++) {
        const uint64_t least = i == 0 ? 0 : paces[i - 1].from_ns + 1;

        if (paces[i].from_ns < least || paces[i].from_ns > RUNNING_MAX_NS ||
            paces[i].beat_interval_ns > BEAT_INTERVAL_MAX_NS) {
            return false;
        }
    }
    return npaces == 0 || paces[0].from_ns == 0;
}

/* What a beat makes current in memory; the constant fields are there since the start. */
static void control_write(struct vmth_walker *walker)
{
    uint8_t *at = walker->host + VMTH_WALKER_CONTROL_GPA;

    store_u32(at, walker->registers.index);
    store_u32(at + 12, walker->registers.loops);
    store_u32(at + 16, walker->registers.beats);
    store_u32(at + 24, walker->registers.countdown);
}

/* ---- time ----------------------------------------------------------------------------------------- */

/* Only the thread, and only while it runs: both fields stand still then. */
static uint64_t running_now(const struct vmth_walker *walker)
{
    return walker->running_ns + (clock_ns(CLOCK_MONOTONIC) - walker->resumed_at_ns);
}

static bool must_stop(const struct vmth_walker *walker)
{
    return atomic_load_explicit(&walker->stop, memory_order_relaxed);
}

/* Sleep until `until_ns` (monotonic) or until stop, or stop_at_beat where `at_beat`. */
static void sleep_until(struct vmth_walker *walker, uint64_t until_ns, bool at_beat)
{
    const struct timespec until = {
        .tv_sec = (time_t)(until_ns / NS_PER_S),
        .tv_nsec = (long)(until_ns % NS_PER_S),
    };
    int rc = 0;

    pthread_mutex_lock(&walker->lock);
    while (rc == 0 && !must_stop(walker) && !(at_beat && atomic_load(&walker->stop_at_beat))) {
        rc = pthread_cond_timedwait(&walker->changed, &walker->lock, &until);
    }
    pthread_mutex_unlock(&walker->lock);
}

static uint64_t pace_interval(const struct vmth_walker *walker, uint64_t running_ns)
{
    uint64_t interval_ns = 0;

    for (uint32_t i = 0; i < walker->npaces && walker->paces[i].from_ns <= running_ns; i++) {
        interval_ns = walker->paces[i].beat_interval_ns;
    }
    return interval_ns;
}

/* At a beat: when may the next step begin? */
static void pace_next(struct vmth_walker *walker)
{
    const uint64_t now_ns = running_now(walker);
    const uint64_t interval_ns = pace_interval(walker, now_ns);

    if (interval_ns == 0 || walker->next_due_ns + VMTH_WALKER_LAG_MAX_NS < now_ns) {
        walker->next_due_ns = now_ns;
    }
    walker->next_due_ns += interval_ns;
}

static void pace_wait(struct vmth_walker *walker)
{
    const uint64_t now_ns = running_now(walker);

    if (walker->next_due_ns > now_ns) {
        sleep_until(walker, clock_ns(CLOCK_MONOTONIC) + (walker->next_due_ns - now_ns), true);
    }
}

static void throttle_take(struct vmth_walker *walker)
{
    const uint64_t percent = atomic_load_explicit(&walker->throttle_percent, memory_order_relaxed);
    const uint64_t now_ns = clock_ns(CLOCK_MONOTONIC);
    const uint64_t ran_ns = now_ns - walker->slice_start_ns;
    uint64_t steal_ns;

    if (walker->slice_start_ns == 0) {
        walker->slice_start_ns = now_ns;
        return;
    }
    if (ran_ns * 100 < (uint64_t)SLICE_NS * (100 - percent)) {
        return;
    }
    steal_ns = ran_ns / (100 - percent) * percent;
    if (steal_ns > STEAL_MAX_NS) {
        steal_ns = STEAL_MAX_NS;
    }
    sleep_until(walker, now_ns + steal_ns, false);
    walker->slice_start_ns = clock_ns(CLOCK_MONOTONIC);
    walker->next_due_ns += walker->slice_start_ns - now_ns;
}

/* ---- the program ---------------------------------------------------------------------------------- */

/* One step; -EFAULT if the schedule points outside of memory (nothing stored then). */
static int step(struct vmth_walker *walker)
{
    struct vmth_walker_registers *const r = &walker->registers;
    uint32_t counter_gpa;
    const int rc = vmth_walker_store(walker->host, walker->length, r, &counter_gpa);

    if (rc != 0) {
        return rc;
    }
    store_u32(walker->host + counter_gpa, load_u32(walker->host + counter_gpa) + 1);
    if (++r->index == r->entries) {
        r->index = 0;
        r->loops++;
    }
    r->countdown--;
    return 0;
}

static void beat(struct vmth_walker *walker)
{
    struct vmth_walker_report *const report = &walker->report;
    int64_t now_ns;

    walker->registers.countdown = walker->registers.writes_per_beat;
    if (walker->expect_beat_from_memory) {
        /* After a move the registers came with the state and memory came page by page: the beat
         * number that memory holds must be the one before this. */
        walker->expected_beat = load_u32(walker->host + VMTH_WALKER_CONTROL_GPA + 16) + 1;
        walker->expect_beat_from_memory = false;
    }
    walker->registers.beats++;
    control_write(walker);
    now_ns = (int64_t)clock_ns(CLOCK_REALTIME);
    pthread_mutex_lock(&walker->lock);
    if (walker->registers.beats != walker->expected_beat) {
        report->out_of_order++;
    }
    walker->expected_beat = walker->registers.beats + 1;
    report->beats = walker->registers.beats;
    if (report->seen == 0) {
        report->first_beat_at_ns = now_ns;
    } else if (now_ns - report->last_beat_at_ns > (int64_t)report->max_gap_ns) {
        report->max_gap_ns = (uint64_t)(now_ns - report->last_beat_at_ns);
    }
    report->last_beat_at_ns = now_ns;
    report->seen++;
    pthread_mutex_unlock(&walker->lock);
    pace_next(walker);
}

static bool at_beat(const struct vmth_walker *walker)
{
    return walker->registers.countdown == walker->registers.writes_per_beat;
}

/* Runs until it is told to stop, or crashes: the return value. */
static int walk(struct vmth_walker *walker)
{
    uint32_t steps = 0;

    for (;;) {
        if (at_beat(walker)) {
            if (!atomic_load(&walker->stop_at_beat)) {
                pace_wait(walker);
            }
            if (atomic_load(&walker->stop_at_beat)) {
                return 0;
            }
        }
        if (must_stop(walker)) {
            return 0;
        }
        if (++steps >= THROTTLE_CHECK_STEPS || at_beat(walker)) {
            steps = 0;
            if (atomic_load_explicit(&walker->throttle_percent, memory_order_relaxed) > 0) {
                throttle_take(walker);
                if (must_stop(walker)) {
                    return 0;
                }
            }
        }
        const int rc = step(walker);

        if (rc != 0) {
            return rc;
        }
        if (walker->registers.countdown == 0) {
            beat(walker);
        }
    }
}

static void *walker_main(void *arg)
{
    struct vmth_walker *const walker = arg;

    pthread_mutex_lock(&walker->lock);
    for (;;) {
        int rc;

        while (!walker->run && !walker->quit) {
            pthread_cond_wait(&walker->changed, &walker->lock);
        }
        if (walker->quit) {
            break;
        }
        pthread_mutex_unlock(&walker->lock);
        rc = walk(walker);
        pthread_mutex_lock(&walker->lock);
        walker->running_ns += clock_ns(CLOCK_MONOTONIC) - walker->resumed_at_ns;
        walker->slice_start_ns = 0;
        walker->report.fault = rc;
        walker->run = false;
        walker->running = false;
        pthread_cond_broadcast(&walker->changed);
    }
    pthread_mutex_unlock(&walker->lock);
    return NULL;
}

/* ---- calls ---------------------------------------------------------------------------------------- */

static int create_thread(struct vmth_walker *walker)
{
    sigset_t all;
    sigset_t before;
    int rc;

    /* Signals belong to the program around us. */
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    rc = pthread_create(&walker->thread, NULL, walker_main, walker);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc == 0) {
        (void)pthread_setname_np(walker->thread, "vmth-vcpu-0");
    }
    return -rc;
}

int vmth_walker_create(uint8_t *host, uint64_t length, struct vmth_walker **out)
{
    pthread_condattr_t monotonic;
    struct vmth_walker *walker;
    int rc;

    if (host == NULL || out == NULL || length < 2ull * VMTH_WALKER_CONTROL_GPA ||
        length > 1ull << 32) {
        return -EINVAL;
    }
    walker = calloc(1, sizeof(*walker));
    if (walker == NULL) {
        return -ENOMEM;
    }
    walker->host = host;
    walker->length = length;
    (void)pthread_mutex_init(&walker->lock, NULL);
    (void)pthread_condattr_init(&monotonic);
    (void)pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    (void)pthread_cond_init(&walker->changed, &monotonic);
    (void)pthread_condattr_destroy(&monotonic);
    rc = create_thread(walker);
    if (rc != 0) {
        (void)pthread_cond_destroy(&walker->changed);
        (void)pthread_mutex_destroy(&walker->lock);
        free(walker);
        return rc;
    }
    *out = walker;
    return 0;
}

void vmth_walker_free(struct vmth_walker *walker)
{
    if (walker == NULL) {
        return;
    }
    pthread_mutex_lock(&walker->lock);
    walker->quit = true;
    atomic_store(&walker->stop, true);
    pthread_cond_broadcast(&walker->changed);
    pthread_mutex_unlock(&walker->lock);
    (void)pthread_join(walker->thread, NULL);
    (void)pthread_cond_destroy(&walker->changed);
    (void)pthread_mutex_destroy(&walker->lock);
    free(walker);
}

static int load_locked(struct vmth_walker *walker, const struct vmth_walker_state *state)
{
    if (walker->running) {
        return -EBUSY;
    }
    if (!vmth_walker_registers_valid(&state->registers, walker->length) ||
        !paces_valid(state->paces, state->npaces) || state->running_ns > RUNNING_MAX_NS ||
        state->next_due_ns > state->running_ns + BEAT_INTERVAL_MAX_NS) {
        return -EINVAL;
    }
    walker->registers = state->registers;
    walker->npaces = state->npaces;
    memcpy(walker->paces, state->paces, sizeof(walker->paces));
    walker->running_ns = state->running_ns;
    walker->next_due_ns = state->next_due_ns;
    walker->report = (struct vmth_walker_report){.beats = state->registers.beats};
    walker->expect_beat_from_memory = true;
    walker->loaded = true;
    return 0;
}

int vmth_walker_reset(struct vmth_walker *walker, const struct vmth_walker_pace *paces,
                      uint32_t npaces)
{
    struct vmth_walker_state state = {.npaces = npaces};
    int rc;

    if (!paces_valid(paces, npaces)) {
        return -EINVAL;
    }
    if (npaces > 0) {
        memcpy(state.paces, paces, npaces * sizeof(*paces));
    }
    vmth_walker_control_read(walker->host, &state.registers);
    pthread_mutex_lock(&walker->lock);
    rc = load_locked(walker, &state);
    pthread_mutex_unlock(&walker->lock);
    return rc;
}

int vmth_walker_load(struct vmth_walker *walker, const struct vmth_walker_state *state)
{
    int rc;

    pthread_mutex_lock(&walker->lock);
    rc = load_locked(walker, state);
    pthread_mutex_unlock(&walker->lock);
    return rc;
}

int vmth_walker_save(struct vmth_walker *walker, struct vmth_walker_state *out)
{
    int rc = 0;

    pthread_mutex_lock(&walker->lock);
    if (walker->running) {
        rc = -EBUSY;
    } else if (!walker->loaded) {
        rc = -EINVAL;
    } else {
        *out = (struct vmth_walker_state){
            .registers = walker->registers,
            .npaces = walker->npaces,
            .running_ns = walker->running_ns,
            .next_due_ns = walker->next_due_ns,
        };
        memcpy(out->paces, walker->paces, sizeof(out->paces));
    }
    pthread_mutex_unlock(&walker->lock);
    return rc;
}

int vmth_walker_resume(struct vmth_walker *walker)
{
    int rc = 0;

    pthread_mutex_lock(&walker->lock);
    if (!walker->loaded) {
        rc = -EINVAL;
    } else if (walker->report.fault != 0) {
        rc = walker->report.fault;
    } else if (!walker->running) {
        atomic_store(&walker->stop, false);
        atomic_store(&walker->stop_at_beat, false);
        walker->resumed_at_ns = clock_ns(CLOCK_MONOTONIC);
        walker->run = true;
        walker->running = true;
        pthread_cond_broadcast(&walker->changed);
    }
    pthread_mutex_unlock(&walker->lock);
    return rc;
}

bool vmth_walker_pause(struct vmth_walker *walker)
{
    bool was_running;

    pthread_mutex_lock(&walker->lock);
    was_running = walker->running;
    if (was_running) {
        atomic_store(&walker->stop, true);
        pthread_cond_broadcast(&walker->changed);
        while (walker->running) {
            pthread_cond_wait(&walker->changed, &walker->lock);
        }
    }
    pthread_mutex_unlock(&walker->lock);
    return was_running;
}

bool vmth_walker_pause_at_beat(struct vmth_walker *walker, uint64_t timeout_ns)
{
    const uint64_t until_ns = clock_ns(CLOCK_MONOTONIC) + timeout_ns;
    const struct timespec until = {
        .tv_sec = (time_t)(until_ns / NS_PER_S),
        .tv_nsec = (long)(until_ns % NS_PER_S),
    };
    bool stands;
    int rc = 0;

    pthread_mutex_lock(&walker->lock);
    atomic_store(&walker->stop_at_beat, true);
    pthread_cond_broadcast(&walker->changed);
    while (walker->running && rc == 0) {
        rc = pthread_cond_timedwait(&walker->changed, &walker->lock, &until);
    }
    atomic_store(&walker->stop_at_beat, false);
    stands = !walker->running && walker->loaded && walker->report.fault == 0 && at_beat(walker);
    pthread_mutex_unlock(&walker->lock);
    return stands;
}

int vmth_walker_throttle(struct vmth_walker *walker, uint32_t percent)
{
    if (percent > 99) {
        return -EINVAL;
    }
    atomic_store(&walker->throttle_percent, percent);
    return 0;
}

void vmth_walker_report(struct vmth_walker *walker, struct vmth_walker_report *out)
{
    pthread_mutex_lock(&walker->lock);
    *out = walker->report;
    out->running_ns = walker->running_ns;
    if (walker->running) {
        out->running_ns += clock_ns(CLOCK_MONOTONIC) - walker->resumed_at_ns;
    }
    pthread_mutex_unlock(&walker->lock);
}
