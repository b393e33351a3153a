/* SPDX-License-Identifier: Apache-2.0 */
/* The walker thread under pauses, reports and moves from other threads: run it under TSan, too. */
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "guest/walker.h"
#include "t_check.h"

#define MEMORY_BYTES (1u << 16)
#define SCHEDULE_GPA 0x2000u
#define ENTRIES 8u
#define BEAT_TIMEOUT_NS 60000000000ull

static void put(uint8_t *memory, uint32_t gpa, uint32_t value)
{
    memcpy(memory + gpa, &value, sizeof(value));
}

static uint32_t get(const uint8_t *memory, uint32_t gpa)
{
    uint32_t value;

    memcpy(&value, memory + gpa, sizeof(value));
    return value;
}

/* Entry i stores 4 dwords at 0x4040 + i pages and counts at 0x4000 + i pages. */
static uint8_t *program(void)
{
    static const uint32_t control[] = {0, ENTRIES, SCHEDULE_GPA, 0, 0, 3, 3, 4, 0xffffffffu, 0, 0, 0};
    uint8_t *memory = calloc(1, MEMORY_BYTES);

    T_CHECK(memory != NULL);
    memcpy(memory + VMTH_WALKER_CONTROL_GPA, control, sizeof(control));
    for (uint32_t i = 0; i < ENTRIES; i++) {
        put(memory, SCHEDULE_GPA + i * 16, 0x4040 + i * 4096);
        put(memory, SCHEDULE_GPA + i * 16 + 4, i);
        put(memory, SCHEDULE_GPA + i * 16 + 8, 0x4000 + i * 4096);
    }
    return memory;
}

static uint64_t beats_of(struct vmth_walker *walker)
{
    struct vmth_walker_report report;

    vmth_walker_report(walker, &report);
    return report.beats;
}

static void wait_for_beats(struct vmth_walker *walker, uint64_t beats)
{
    while (beats_of(walker) < beats) {
        (void)sched_yield();
    }
}

static void check_counters(const uint8_t *memory, const struct vmth_walker_registers *at)
{
    for (uint32_t i = 0; i < ENTRIES; i++) {
        T_CHECK(get(memory, 0x4000 + i * 4096) == at->loops + (i < at->index ? 1 : 0));
    }
    T_CHECK(((uint64_t)at->loops * ENTRIES + at->index) % 3 == (3 - at->countdown) % 3);
}

static void test_pauses_lose_no_step(void)
{
    static const struct vmth_walker_pace paces[] = {{0, 20000}, {2000000, 0}};
    uint8_t *memory = program();
    struct vmth_walker_state state;
    struct vmth_walker *walker;

    T_CHECK(vmth_walker_create(memory, MEMORY_BYTES, &walker) == 0);
    T_CHECK(vmth_walker_resume(walker) == -EINVAL);
    T_CHECK(vmth_walker_reset(walker, paces, 2) == 0);
    for (uint64_t i = 1; i <= 50; i++) {
        T_CHECK(vmth_walker_resume(walker) == 0);
        T_CHECK(vmth_walker_save(walker, &state) == -EBUSY);
        T_CHECK(vmth_walker_throttle(walker, i % 10 == 0 ? 50 : 0) == 0);
        wait_for_beats(walker, i);
        T_CHECK(vmth_walker_pause(walker));
        T_CHECK(!vmth_walker_pause(walker));
        T_CHECK(vmth_walker_save(walker, &state) == 0);
        check_counters(memory, &state.registers);
    }
    T_CHECK(vmth_walker_resume(walker) == 0);
    T_CHECK(vmth_walker_pause_at_beat(walker, BEAT_TIMEOUT_NS));
    T_CHECK(vmth_walker_save(walker, &state) == 0);
    T_CHECK(memcmp(memory + VMTH_WALKER_CONTROL_GPA, &state.registers, sizeof(state.registers)) ==
            0);
    vmth_walker_free(walker);
    free(memory);
}

static void test_state_moves_to_another_walker(void)
{
    uint8_t *memory = program();
    uint8_t *arrived = malloc(MEMORY_BYTES);
    struct vmth_walker_state state;
    struct vmth_walker_report report;
    struct vmth_walker *source;
    struct vmth_walker *destination;

    T_CHECK(arrived != NULL);
    T_CHECK(vmth_walker_create(memory, MEMORY_BYTES, &source) == 0);
    T_CHECK(vmth_walker_create(arrived, MEMORY_BYTES, &destination) == 0);
    T_CHECK(vmth_walker_reset(source, NULL, 0) == 0);
    T_CHECK(vmth_walker_resume(source) == 0);
    wait_for_beats(source, 10);
    T_CHECK(vmth_walker_pause(source));
    T_CHECK(vmth_walker_save(source, &state) == 0);
    memcpy(arrived, memory, MEMORY_BYTES);
    T_CHECK(vmth_walker_load(destination, &state) == 0);
    T_CHECK(vmth_walker_resume(destination) == 0);
    wait_for_beats(destination, (uint64_t)state.registers.beats + 10);
    /* Freeing it stops it wherever it is. */
    vmth_walker_report(destination, &report);
    T_CHECK(report.out_of_order == 0 && report.fault == 0);
    vmth_walker_free(destination);
    vmth_walker_free(source);
    free(arrived);
    free(memory);
}

static void test_a_store_outside_of_memory_crashes_the_guest_only(void)
{
    uint8_t *memory = program();
    struct vmth_walker_report report;
    struct vmth_walker *walker;

    put(memory, SCHEDULE_GPA + 5 * 16, MEMORY_BYTES - 12);
    T_CHECK(vmth_walker_create(memory, MEMORY_BYTES, &walker) == 0);
    T_CHECK(vmth_walker_reset(walker, NULL, 0) == 0);
    T_CHECK(vmth_walker_resume(walker) == 0);
    do {
        (void)sched_yield();
        vmth_walker_report(walker, &report);
    } while (report.fault == 0);
    T_CHECK(report.fault == -EFAULT);
    T_CHECK(vmth_walker_resume(walker) == -EFAULT);
    T_CHECK(!vmth_walker_pause(walker) && !vmth_walker_pause_at_beat(walker, 0));
    vmth_walker_free(walker);
    vmth_walker_free(NULL);
    free(memory);
}

/* A pool of 64 bytes, each dword its own number, in which windows of 4 dwords go on by 12 a loop. */
static void test_copies_come_from_the_pool(void)
{
    static const uint32_t pool[] = {0x3000, 0x3c, 12};
    uint8_t *memory = program();
    struct vmth_walker_state state;
    struct vmth_walker *walker;

    memcpy(memory + VMTH_WALKER_CONTROL_GPA + 36, pool, sizeof(pool));
    for (uint32_t i = 0; i < 20; i++) {
        put(memory, 0x3000 + i * 4, 1000 + i);
    }
    T_CHECK(vmth_walker_create(memory, MEMORY_BYTES, &walker) == 0);
    T_CHECK(vmth_walker_reset(walker, NULL, 0) == 0);
    for (uint64_t beats = 20; beats <= 200; beats += 20) {
        T_CHECK(vmth_walker_resume(walker) == 0);
        wait_for_beats(walker, beats);
        T_CHECK(vmth_walker_pause(walker));
        T_CHECK(vmth_walker_save(walker, &state) == 0);
        check_counters(memory, &state.registers);
        for (uint32_t i = 0; i < ENTRIES; i++) {
            const uint32_t loops = state.registers.loops - (i < state.registers.index ? 0 : 1);
            const uint32_t first = ((i + loops * 12) & 0x3c) / 4;

            for (uint32_t dword = 0; dword < 4; dword++) {
                T_CHECK(get(memory, 0x4040 + i * 4096 + dword * 4) == 1000 + first + dword);
            }
        }
    }
    state.registers.pool_mask = 0x3e;
    T_CHECK(vmth_walker_load(walker, &state) == -EINVAL);
    state.registers.pool_mask = 0x3c;
    state.registers.pool_gpa = MEMORY_BYTES - 0x3c - 12;
    T_CHECK(vmth_walker_load(walker, &state) == -EINVAL);
    state.registers.pool_gpa -= 4;
    T_CHECK(vmth_walker_load(walker, &state) == 0);
    vmth_walker_free(walker);
    free(memory);
}

int main(void)
{
    test_pauses_lose_no_step();
    test_state_moves_to_another_walker();
    test_a_store_outside_of_memory_crashes_the_guest_only();
    test_copies_come_from_the_pool();
    return 0;
}
