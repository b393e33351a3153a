/* SPDX-License-Identifier: Apache-2.0 */
#include "guest/walker_step.h"

#include <errno.h>
#include <string.h>

static uint32_t load_u32(const uint8_t *at)
{
    uint32_t value;

    memcpy(&value, at, sizeof(value));
    return value;
}

/* The value is looked at and used later: other vCPUs may write there meanwhile, so it must be loaded
 * once, whatever the optimiser would rather do. */
static uint32_t load_once_u32(const uint8_t *at)
{
    uint32_t value = load_u32(at);

    __asm__("" : "+r"(value));
    return value;
}

static void store_u32(uint8_t *at, uint32_t value)
{
    memcpy(at, &value, sizeof(value));
}

void vmth_walker_control_read(const uint8_t *memory, struct vmth_walker_registers *out)
{
    const uint8_t *at = memory + VMTH_WALKER_CONTROL_GPA;

    out->index = load_u32(at);
    out->entries = load_u32(at + 4);
    out->schedule_gpa = load_u32(at + 8);
    out->loops = load_u32(at + 12);
    out->beats = load_u32(at + 16);
    out->writes_per_beat = load_u32(at + 20);
    out->countdown = load_u32(at + 24);
    out->store_dwords = load_u32(at + 28);
    out->value_mask = load_u32(at + 32);
    out->pool_gpa = load_u32(at + 36);
    out->pool_mask = load_u32(at + 40);
    out->pool_step = load_u32(at + 44);
}

/* No value may lead a copy out of memory: a step does not look again. */
static bool pool_valid(const struct vmth_walker_registers *registers, uint64_t length)
{
    const uint64_t last = (uint64_t)registers->pool_gpa + registers->pool_mask;

    return registers->pool_gpa == 0 || (registers->pool_mask % 4 == 0 &&
                                        last + (uint64_t)registers->store_dwords * 4 <= length);
}

bool vmth_walker_registers_valid(const struct vmth_walker_registers *registers, uint64_t length)
{
    const uint64_t schedule_bytes = (uint64_t)registers->entries * VMTH_WALKER_ENTRY_BYTES;

    return registers->entries > 0 && registers->index < registers->entries &&
           schedule_bytes <= length && registers->schedule_gpa <= length - schedule_bytes &&
           registers->writes_per_beat > 0 && registers->countdown > 0 &&
           registers->countdown <= registers->writes_per_beat && registers->store_dwords > 0 &&
           registers->store_dwords <= VMTH_WALKER_STORE_DWORDS_MAX && pool_valid(registers, length);
}

int vmth_walker_store(uint8_t *memory, uint64_t length,
                      const struct vmth_walker_registers *registers, uint32_t *counter_gpa)
{
    const uint32_t dwords = registers->store_dwords;
    const uint8_t *entry = memory + registers->schedule_gpa +
                           (uint64_t)registers->index * VMTH_WALKER_ENTRY_BYTES;
    const uint32_t write_gpa = load_once_u32(entry);
    const uint32_t value = load_u32(entry + 4);
    uint8_t *at = memory + write_gpa;
    const uint32_t counter = load_once_u32(entry + 8);

    *counter_gpa = counter;
    if (write_gpa > length - (uint64_t)dwords * 4 || counter > length - 4) {
        return -EFAULT;
    }
    if (registers->pool_gpa == 0) {
        const uint32_t stored = value + (registers->loops & registers->value_mask);

        for (size_t i = 0; i < dwords; i++) {
            store_u32(at + i * 4, stored);
        }
    } else {
        const uint32_t offset =
            (value + registers->loops * registers->pool_step) & registers->pool_mask;
        const uint8_t *from = memory + registers->pool_gpa + offset;

        /* In ascending order also where a pool and its pages overlap: as a string move does. */
        for (size_t i = 0; i < dwords; i++) {
            store_u32(at + i * 4, load_u32(from + i * 4));
        }
    }
    return 0;
}
