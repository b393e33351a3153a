/* SPDX-License-Identifier: Apache-2.0 */
/* A micro VM of several vCPUs: each walks a schedule of its own, and all are parked, saved, crashed
 * and looked at together. */
#include "guest/micro_vm.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "guest/walker_program.h"
#include "t_check.h"
#include "vmth/bitmap.h"

/* page 0     1        2     16 ..            24      32 ..
 *      none  control  code  a schedule page  pool    data: 24 pages a vCPU, of at most 8
 *            blocks         a vCPU                                                           */
#define NPAGES 256
#define PAGE UINT32_C(4096)
#define BYTES (NPAGES * (size_t)PAGE)
#define WORDS VMTH_BITMAP_WORDS(NPAGES)
#define CONTROL 0x1000
#define CODE 0x2000
#define SCHEDULE 0x10000
#define POOL 0x18000
#define DATA_PAGE 32
#define LANE_PAGES 24
#define MANY 24
#define WRITES_PER_BEAT 7
#define NEVER UINT32_MAX
#define OUTSIDE UINT32_C(0x7ff00000)
#define TIMEOUT_NS UINT64_C(60000000000)

/* u32 fields of the control block; vmth/guests/machine.py has them all. */
enum field {
    SCHEDULE_ENTRIES = 1,
    SCHEDULE_ADDRESS,
    BEATS = 4,
    PER_BEAT,
    COUNTDOWN,
    STORE_DWORDS,
    VALUE_MASK,
    POOL_ADDRESS,
    POOL_MASK,
    POOL_STEP,
};

static const enum vmth_micro_vm_tracker trackers[] = {VMTH_MICRO_VM_LOG, VMTH_MICRO_VM_RING};
static enum vmth_micro_vm_tracker tracker;

static uint8_t *map_memory(void)
{
    uint8_t *memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    T_CHECK(memory != MAP_FAILED);
    return memory;
}

static uint8_t *make_memory(void)
{
    uint8_t *memory = map_memory();
    memcpy(memory + CODE, vmth_walker_program, vmth_walker_program_bytes);
    return memory;
}

static void put(uint8_t *memory, size_t vcpu, enum field field, uint32_t value)
{
    const size_t at = CONTROL + vcpu * VMTH_MICRO_VM_LANE_BYTES + field * sizeof(value);
    memcpy(memory + at, &value, sizeof(value));
}

static uint32_t get(const uint8_t *memory, size_t vcpu, enum field field)
{
    uint32_t value;
    const size_t at = CONTROL + vcpu * VMTH_MICRO_VM_LANE_BYTES + field * sizeof(value);
    memcpy(&value, memory + at, sizeof(value));
    return value;
}

/* A walk over the first `npages` data pages of that vCPU: addresses are offsets from its lane. */
static void put_walk(uint8_t *memory, size_t vcpu, uint32_t npages, uint32_t writes_per_beat)
{
    const uint32_t lane = (uint32_t)vcpu * VMTH_MICRO_VM_LANE_BYTES;
    const uint32_t schedule = SCHEDULE + (uint32_t)vcpu * PAGE;
    for (uint32_t i = 0; i < npages; i++) {
        const uint32_t page = (DATA_PAGE + (uint32_t)vcpu * LANE_PAGES + i) * PAGE;
        const uint32_t entry[4] = {page + 64 - lane, i, page - lane, 0};
        memcpy(memory + schedule + sizeof(entry) * i, entry, sizeof(entry));
    }
    put(memory, vcpu, SCHEDULE_ENTRIES, npages);
    put(memory, vcpu, SCHEDULE_ADDRESS, schedule - lane);
    put(memory, vcpu, PER_BEAT, writes_per_beat);
    put(memory, vcpu, COUNTDOWN, writes_per_beat);
    put(memory, vcpu, STORE_DWORDS, 1);
    put(memory, vcpu, VALUE_MASK, UINT32_MAX);
}

/* vCPU 0 walks over many pages, every other one writes one page again and again. */
static uint8_t *make_walks(size_t nvcpus)
{
    uint8_t *memory = make_memory();
    for (size_t i = 0; i < nvcpus; i++) {
        put_walk(memory, i, i == 0 ? MANY : 1, WRITES_PER_BEAT);
    }
    return memory;
}

static int try_create(uint8_t *memory, size_t nvcpus, struct vmth_micro_vm **vm)
{
    const struct vmth_kvm_slot slot = {.npages = NPAGES, .hva = (uint64_t)(uintptr_t)memory};
    return vmth_micro_vm_create(&slot, 1, tracker, nvcpus, vm);
}

static struct vmth_micro_vm *create(uint8_t *memory, size_t nvcpus)
{
    struct vmth_micro_vm *vm = NULL;
    T_EQUAL(try_create(memory, nvcpus, &vm), 0);
    T_EQUAL(vmth_micro_vm_vcpus(vm), nvcpus);
    return vm;
}

static void start(struct vmth_micro_vm *vm)
{
    T_EQUAL(vmth_micro_vm_start_fresh(vm, CODE, NULL, 0, NULL, 0), 0);
}

static void end(struct vmth_micro_vm *vm, uint8_t *memory)
{
    vmth_micro_vm_free(vm);
    munmap(memory, BYTES);
}

static struct vmth_beat_report report(struct vmth_micro_vm *vm, size_t vcpu)
{
    struct vmth_beat_report got;
    vmth_micro_vm_report(vm, vcpu, &got);
    return got;
}

static void await_beats(struct vmth_micro_vm *vm, size_t vcpu, uint64_t beats)
{
    while (report(vm, vcpu).beats < beats) {
        if (vmth_micro_vm_crash(vm) != NULL) {
            fprintf(stderr, "crashed: %s\n", vmth_micro_vm_crash(vm));
            exit(T_FAIL);
        }
        sched_yield();
    }
}

static void pause_all(struct vmth_micro_vm *vm)
{
    bool was_running = false;
    T_EQUAL(vmth_micro_vm_pause(vm, &was_running), 0);
    T_CHECK(was_running);
}

static void check_still(const uint8_t *memory)
{
    static uint8_t before[BYTES];
    memcpy(before, memory, BYTES);
    for (unsigned int i = 0; i < 2000; i++) {
        sched_yield();
    }
    T_EQUAL(memcmp(before, memory, BYTES), 0);
}

static void check_exact_controls(struct vmth_micro_vm *vm, const uint8_t *memory)
{
    for (size_t i = 0; i < vmth_micro_vm_vcpus(vm); i++) {
        T_EQUAL(report(vm, i).beats, get(memory, i, BEATS));
        T_EQUAL(report(vm, i).out_of_order, 0);
        T_EQUAL(get(memory, i, COUNTDOWN), get(memory, i, PER_BEAT));
    }
}

static void test_numbers_out_of_range(void)
{
    uint8_t *memory = make_walks(2);
    struct vmth_micro_vm *vm = NULL;
    struct vmth_micro_vm_state state;
    T_EQUAL(try_create(memory, 0, &vm), -EINVAL);
    T_EQUAL(try_create(memory, VMTH_MICRO_VM_VCPUS + 1, &vm), -EINVAL);
    T_CHECK(vm == NULL);
    vm = create(memory, 2);
    T_EQUAL(vmth_micro_vm_get_state(vm, 2, &state), -EINVAL);
    T_EQUAL(vmth_micro_vm_get_state(vm, 1, &state), 0);
    T_EQUAL(vmth_micro_vm_set_state(vm, 2, &state), -EINVAL);
    T_EQUAL(vmth_micro_vm_throttle(vm, 2, 50), -EINVAL);
    T_EQUAL(vmth_micro_vm_throttle(vm, 1, 100), -EINVAL);

    const struct vmth_pace falling[] = {{5, 0}, {4, 0}};
    struct vmth_pace many[VMTH_MICRO_VM_PACES + 1] = {{0, 0}};
    T_EQUAL(vmth_micro_vm_start_fresh(vm, CODE, NULL, 0, falling, 2), -EINVAL);
    T_EQUAL(vmth_micro_vm_start_fresh(vm, CODE, NULL, 0, many, VMTH_MICRO_VM_PACES + 1), -EINVAL);
    end(vm, memory);
}

static void test_all_beat_and_park(void)
{
    const size_t numbers[] = {2, VMTH_MICRO_VM_VCPUS};
    for (size_t n = 0; n < sizeof(numbers) / sizeof(numbers[0]); n++) {
        uint8_t *memory = make_walks(numbers[n]);
        struct vmth_micro_vm *vm = create(memory, numbers[n]);
        start(vm);
        for (unsigned int turn = 0; turn < 3; turn++) {
            for (size_t i = 0; i < numbers[n]; i++) {
                await_beats(vm, i, report(vm, i).beats + 10);
            }
            pause_all(vm);
            check_still(memory);
            T_EQUAL(vmth_micro_vm_resume(vm), 0);
        }
        for (size_t i = 0; i < numbers[n]; i++) {
            T_EQUAL(report(vm, i).out_of_order, 0);
        }
        end(vm, memory);
    }
}

/* Both states into another VM over a copy of memory. */
static void test_the_walks_go_on_elsewhere(void)
{
    uint8_t *memory = make_walks(2);
    uint8_t *there = map_memory();
    struct vmth_micro_vm *vm = create(memory, 2);
    struct vmth_micro_vm *other = create(there, 2);
    struct vmth_micro_vm_state states[2];
    start(vm);
    for (unsigned int turn = 0; turn < 5; turn++) {
        await_beats(vm, 0, report(vm, 0).beats + 10);
        await_beats(vm, 1, report(vm, 1).beats + 10);
        pause_all(vm);
        memcpy(there, memory, BYTES);
        for (size_t i = 0; i < 2; i++) {
            T_EQUAL(vmth_micro_vm_get_state(vm, i, &states[i]), 0);
            T_EQUAL(vmth_micro_vm_set_state(other, i, &states[i]), 0);
        }
        check_still(memory);
        T_EQUAL(memcmp(there, memory, BYTES), 0);
        T_EQUAL(vmth_micro_vm_resume(other), 0);
        await_beats(other, 0, states[0].beats + 10);
        await_beats(other, 1, states[1].beats + 10);
        T_EQUAL(vmth_micro_vm_pause_at_beat(other, TIMEOUT_NS), 0);
        check_exact_controls(other, there);
        T_EQUAL(vmth_micro_vm_resume(vm), 0);
    }
    T_EQUAL(report(vm, 0).out_of_order + report(vm, 1).out_of_order, 0);
    end(other, there);
    end(vm, memory);
}

static void test_pause_at_beat_waits_for_all(void)
{
    uint8_t *memory = make_walks(3);
    struct vmth_micro_vm *vm = create(memory, 3);
    start(vm);
    for (unsigned int turn = 0; turn < 20; turn++) {
        T_EQUAL(vmth_micro_vm_pause_at_beat(vm, TIMEOUT_NS), 0);
        check_exact_controls(vm, memory);
        T_EQUAL(vmth_micro_vm_pause_at_beat(vm, 0), 0);
        T_EQUAL(vmth_micro_vm_resume(vm), 0);
    }
    T_EQUAL(vmth_micro_vm_pause_at_beat(vm, TIMEOUT_NS), 0);
    check_still(memory);
    end(vm, memory);
}

/* vCPU 1 never beats: the other one waits for it in vain, and then runs on. */
static void test_pause_at_beat_times_out_for_all(void)
{
    uint8_t *memory = make_memory();
    put_walk(memory, 0, MANY, WRITES_PER_BEAT);
    put_walk(memory, 1, 1, NEVER);
    struct vmth_micro_vm *vm = create(memory, 2);
    start(vm);
    await_beats(vm, 0, 10);
    T_EQUAL(vmth_micro_vm_pause_at_beat(vm, 20000000), -ETIMEDOUT);
    const uint64_t waited_ns = report(vm, 0).running_ns; /* the clock of a parked vCPU stands */
    await_beats(vm, 0, report(vm, 0).beats + 10);
    T_CHECK(report(vm, 0).running_ns > waited_ns);
    T_EQUAL(report(vm, 0).out_of_order, 0);
    pause_all(vm);
    check_still(memory);
    T_EQUAL(vmth_micro_vm_pause_at_beat(vm, TIMEOUT_NS), -EBUSY);
    T_EQUAL(report(vm, 1).beats, 0);
    end(vm, memory);
}

/* The pace of the others is not the first one's: they wait an hour in their first beat. */
static void test_paces_of_the_others(void)
{
    const struct vmth_pace hour = {0, UINT64_C(3600) * 1000000000};
    uint8_t *memory = make_walks(3);
    struct vmth_micro_vm *vm = create(memory, 3);
    T_EQUAL(vmth_micro_vm_start_fresh(vm, CODE, NULL, 0, &hour, 1), 0);
    await_beats(vm, 0, 50);
    await_beats(vm, 1, 1);
    await_beats(vm, 2, 1);
    T_EQUAL(vmth_micro_vm_pause_at_beat(vm, TIMEOUT_NS), 0);
    check_exact_controls(vm, memory);
    T_EQUAL(report(vm, 1).beats, 1);
    T_EQUAL(report(vm, 2).beats, 1);

    struct vmth_micro_vm_state state;
    T_EQUAL(vmth_micro_vm_get_state(vm, 0, &state), 0);
    T_EQUAL(state.npaces, 0);
    T_EQUAL(vmth_micro_vm_get_state(vm, 2, &state), 0);
    T_EQUAL(state.npaces, 1);
    T_CHECK(state.at_beat);
    end(vm, memory);
}

/* The same walk for both; over twenty periods of the throttle and more, so that its first running
 * slices are nothing beside. */
static void test_a_throttle_is_one_vcpus(void)
{
    uint8_t *memory = make_memory();
    put_walk(memory, 0, MANY, WRITES_PER_BEAT);
    put_walk(memory, 1, MANY, WRITES_PER_BEAT);
    struct vmth_micro_vm *vm = create(memory, 2);
    start(vm);
    T_EQUAL(vmth_micro_vm_throttle(vm, 0, 90), 0);
    await_beats(vm, 0, 1);
    await_beats(vm, 1, 1);
    const struct vmth_beat_report slow = report(vm, 0);
    const struct vmth_beat_report fast = report(vm, 1);
    const uint64_t until_ns = slow.running_ns + 20 * VMTH_MICRO_VM_THROTTLE_PERIOD_NS;
    while (report(vm, 0).running_ns < until_ns || report(vm, 1).beats < fast.beats + 5000) {
        T_CHECK(vmth_micro_vm_crash(vm) == NULL);
        const struct timespec millisecond = {.tv_nsec = 1000000};
        (void)nanosleep(&millisecond, NULL); /* a spinning reader would be a third vCPU */
    }
    pause_all(vm);
    T_CHECK(report(vm, 1).beats - fast.beats > 2 * (report(vm, 0).beats - slow.beats));
    end(vm, memory);
}

/* Whoever crashes, all are parked for good and the text names it. */
static void check_crash(struct vmth_micro_vm *vm, const uint8_t *memory, const char *text)
{
    struct vmth_micro_vm_state state;
    bool was_running = true;
    while (vmth_micro_vm_crash(vm) == NULL) {
        sched_yield();
    }
    if (strncmp(vmth_micro_vm_crash(vm), text, strlen(text)) != 0) {
        fprintf(stderr, "%s\nwanted: %s\n", vmth_micro_vm_crash(vm), text);
        exit(T_FAIL);
    }
    for (size_t i = 0; i < vmth_micro_vm_vcpus(vm); i++) { /* unasked: running time is not parked */
        while (report(vm, i).running_ns != report(vm, i).running_ns) {
            sched_yield();
        }
    }
    check_still(memory);
    T_EQUAL(vmth_micro_vm_pause(vm, &was_running), -EIO);
    T_CHECK(!was_running);
    check_still(memory);
    T_EQUAL(vmth_micro_vm_pause_at_beat(vm, TIMEOUT_NS), -EIO);
    T_EQUAL(vmth_micro_vm_resume(vm), -EIO);
    T_EQUAL(vmth_micro_vm_throttle(vm, 0, 1), -EIO);
    T_EQUAL(vmth_micro_vm_get_state(vm, 0, &state), -EIO);
    T_EQUAL(vmth_micro_vm_start_fresh(vm, CODE, NULL, 0, NULL, 0), -EIO);
    check_still(memory);
}

static void test_a_crash_of_one_is_the_vms(void)
{
    const struct {
        size_t vcpus;
        size_t crashing;
        enum field field;
        uint32_t value;
        const char *text;
    } table[] = {
        {2, 1, SCHEDULE_ADDRESS, OUTSIDE, "vCPU 1: access outside of memory"},
        {2, 0, SCHEDULE_ADDRESS, OUTSIDE, "vCPU 0: access outside of memory"},
        {3, 2, POOL_ADDRESS, POOL, "vCPU 2: a copy of another vCPU than the first"},
        {2, 0, POOL_ADDRESS, OUTSIDE, "vCPU 0: bad control block at a copy"},
        {1, 0, SCHEDULE_ADDRESS, OUTSIDE, "access outside of memory"},
    };
    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        uint8_t *memory = make_walks(table[i].vcpus);
        put(memory, table[i].crashing, table[i].field, table[i].value);
        struct vmth_micro_vm *vm = create(memory, table[i].vcpus);
        start(vm);
        check_crash(vm, memory, table[i].text);
        end(vm, memory);
    }
}

/* In the middle of a walk, while its neighbour waits in a beat for an hour. */
static void test_a_crash_wakes_who_waits(void)
{
    const struct vmth_pace hour = {0, UINT64_C(3600) * 1000000000};
    uint8_t *memory = make_walks(2);
    struct vmth_micro_vm *vm = create(memory, 2);
    T_EQUAL(vmth_micro_vm_start_fresh(vm, CODE, NULL, 0, &hour, 1), 0);
    await_beats(vm, 1, 1);
    T_EQUAL(vmth_micro_vm_pause_at_beat(vm, TIMEOUT_NS), 0);
    put(memory, 0, SCHEDULE_ADDRESS, OUTSIDE);
    T_EQUAL(vmth_micro_vm_resume(vm), 0);
    check_crash(vm, memory, "vCPU 0: access outside of memory");
    end(vm, memory);
}

/* What a mover does: the pages of each fetch to a copy, which in the end equals memory. */
struct mover {
    struct vmth_micro_vm *vm;
    const uint8_t *memory;
    uint8_t *landed;
    uint64_t pages; /* sum over all fetches */
};

static void move(struct mover *mover)
{
    uint64_t dirty[WORDS] = {0};
    uint64_t *const bitmaps[] = {dirty};
    struct vmth_kvm_ring *ring = vmth_micro_vm_ring(mover->vm);
    struct vmth_kvm_log *log = vmth_micro_vm_log(mover->vm);
    T_EQUAL(ring != NULL ? vmth_kvm_ring_fetch(ring, bitmaps) : vmth_kvm_log_fetch(log, bitmaps),
            0);
    for (uint64_t page = 0; page < NPAGES; page++) {
        if (vmth_bitmap_test(dirty, page)) {
            if (log != NULL) {
                T_EQUAL(vmth_kvm_log_rearm(log, 0, page, 1), 0);
            }
            memcpy(mover->landed + page * PAGE, mover->memory + page * PAGE, PAGE);
            mover->pages++;
        }
    }
}

static struct mover begin_moving(struct vmth_micro_vm *vm, const uint8_t *memory)
{
    const struct mover mover = {.vm = vm, .memory = memory, .landed = map_memory()};
    struct vmth_kvm_ring *ring = vmth_micro_vm_ring(vm);
    T_EQUAL(ring != NULL ? vmth_kvm_ring_start(ring) : vmth_kvm_log_start(vmth_micro_vm_log(vm)),
            0);
    memcpy(mover.landed, memory, BYTES);
    return mover;
}

static void test_moving_loses_nothing(void)
{
    uint8_t *memory = make_walks(3);
    struct vmth_micro_vm *vm = create(memory, 3);
    start(vm);
    struct mover mover = begin_moving(vm, memory);
    for (unsigned int turn = 0; turn < 30; turn++) {
        await_beats(vm, turn % 3, report(vm, turn % 3).beats + 5);
        move(&mover);
        if (turn % 3 == 0) {
            pause_all(vm);
            move(&mover);
            T_EQUAL(memcmp(mover.landed, memory, BYTES), 0);
            T_EQUAL(vmth_micro_vm_resume(vm), 0);
        }
    }
    munmap(mover.landed, BYTES);
    end(vm, memory);
}

/* vCPU 0 has its host copy whole pages, and parks only where it has counted them. */
static void test_moving_beside_a_pool_loses_nothing(void)
{
    uint8_t *memory = make_walks(2);
    uint64_t random = 1;
    t_fill(&random, memory + POOL, 2 * PAGE);
    for (uint32_t i = 0; i < MANY; i++) { /* whole pages, but for the counter at their start */
        const uint32_t page = (DATA_PAGE + i) * PAGE;
        const uint32_t entry[4] = {page + 4, i * 64, page, 0};
        memcpy(memory + SCHEDULE + sizeof(entry) * i, entry, sizeof(entry));
    }
    put(memory, 0, POOL_ADDRESS, POOL);
    put(memory, 0, POOL_MASK, PAGE - 4);
    put(memory, 0, POOL_STEP, 4);
    put(memory, 0, STORE_DWORDS, PAGE / 4 - 1);
    struct vmth_micro_vm *vm = create(memory, 2);
    struct mover mover = begin_moving(vm, memory);
    start(vm);
    for (unsigned int turn = 0; turn < 30; turn++) {
        await_beats(vm, turn % 2, report(vm, turn % 2).beats + 5);
        pause_all(vm);
        move(&mover);
        T_EQUAL(memcmp(mover.landed, memory, BYTES), 0);
        T_EQUAL(vmth_micro_vm_resume(vm), 0);
    }
    T_EQUAL(report(vm, 0).out_of_order + report(vm, 1).out_of_order, 0);
    munmap(mover.landed, BYTES);
    end(vm, memory);
}

/* Who dirties many pages between two fetches counts many, whoever writes one page more often: that
 * one, and the page of the control blocks, which all share. */
static void test_pages_are_counted_for_who_dirtied_them(void)
{
    uint8_t *memory = make_walks(2);
    struct vmth_micro_vm *vm = create(memory, 2);
    struct vmth_kvm_ring *ring = vmth_micro_vm_ring(vm);
    struct mover mover = begin_moving(vm, memory);
    start(vm);
    const unsigned int turns = 20;
    uint64_t before[2] = {0};
    for (unsigned int turn = 1; turn <= turns; turn++) {
        /* MANY pages are WRITES_PER_BEAT a beat */
        await_beats(vm, 0, report(vm, 0).beats + MANY / WRITES_PER_BEAT + 2);
        await_beats(vm, 1, report(vm, 1).beats + 50);
        pause_all(vm);
        move(&mover);
        T_EQUAL(memcmp(mover.landed, memory, BYTES), 0);
        for (size_t i = 0; i < 2; i++) {
            const uint64_t dirtied = vmth_kvm_ring_dirtied(ring, i);
            T_CHECK(dirtied > before[i]);
            before[i] = dirtied;
        }
        T_CHECK(before[1] <= UINT64_C(2) * turn);
        if (vmth_kvm_ring_overflows(ring) == 0) {
            T_CHECK(before[0] >= (uint64_t)MANY * turn);
            T_EQUAL(before[0] + before[1], mover.pages);
        }
        T_EQUAL(vmth_micro_vm_resume(vm), 0);
    }
    T_EQUAL(vmth_kvm_ring_dirtied(ring, 2), 0);
    munmap(mover.landed, BYTES);
    end(vm, memory);
}

int main(void)
{
    for (size_t i = 0; i < sizeof(trackers) / sizeof(trackers[0]); i++) {
        tracker = trackers[i];
        uint8_t *memory = make_walks(2);
        struct vmth_micro_vm *vm = NULL;
        const int rc = try_create(memory, 2, &vm);
        end(vm, memory);
        if (rc < 0) {
            fprintf(stderr, "no KVM guest of two vCPUs here: %s\n", strerror(-rc));
            return T_SKIP;
        }
        test_numbers_out_of_range();
        test_all_beat_and_park();
        test_the_walks_go_on_elsewhere();
        test_pause_at_beat_waits_for_all();
        test_pause_at_beat_times_out_for_all();
        test_paces_of_the_others();
        test_a_throttle_is_one_vcpus();
        test_a_crash_of_one_is_the_vms();
        test_a_crash_wakes_who_waits();
        test_moving_loses_nothing();
        test_moving_beside_a_pool_loses_nothing();
        if (tracker == VMTH_MICRO_VM_RING) {
            test_pages_are_counted_for_who_dirtied_them();
        }
    }
    return T_PASS;
}
