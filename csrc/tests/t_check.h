/* SPDX-License-Identifier: Apache-2.0 */
/* What the C tests share: checks that print both values, seeded random numbers, every kernel.
 *
 * A test program exits with T_PASS, T_SKIP (after printing why) or, at the first failed check, T_FAIL. */
#ifndef VMTH_TESTS_T_CHECK_H
#define VMTH_TESTS_T_CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "vmth/kernels.h"

enum { T_PASS = 0, T_FAIL = 1, T_SKIP = 77 };

#define T_CHECK(condition)                                                                         \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);                \
            exit(T_FAIL);                                                                          \
        }                                                                                          \
    } while (0)

#define T_EQUAL(got, want)                                                                         \
    do {                                                                                           \
        const uint64_t t_got = (uint64_t)(got);                                                    \
        const uint64_t t_want = (uint64_t)(want);                                                  \
        if (t_got != t_want) {                                                                     \
            fprintf(stderr, "%s:%d: %s is 0x%llx, want 0x%llx (%s)\n", __FILE__, __LINE__, #got,   \
                    (unsigned long long)t_got, (unsigned long long)t_want, #want);                 \
            exit(T_FAIL);                                                                          \
        }                                                                                          \
    } while (0)

/* splitmix64: the whole sequence follows from the seed. */
static inline uint64_t t_random(uint64_t *state)
{
    uint64_t value = (*state += 0x9e3779b97f4a7c15u);

    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
    return value ^ (value >> 31);
}

static inline void t_fill(uint64_t *state, uint8_t *to, size_t nbytes)
{
    for (size_t i = 0; i < nbytes; i++) {
        to[i] = (uint8_t)t_random(state);
    }
}

/* Run test() once for each implementation of the family that this CPU can run, then restore the
 * default. */
static inline void t_each_kernel(const char *family, void (*test)(void))
{
    const char *name;

    for (size_t i = 0; (name = vmth_kernel_name(family, i)) != NULL; i++) {
        fprintf(stderr, "%s=%s\n", family, name);
        T_EQUAL(vmth_kernel_select(family, name), 0);
        test();
    }
    T_EQUAL(vmth_kernel_select(family, vmth_kernel_name(family, 0)), 0);
}

#endif
