/* SPDX-License-Identifier: Apache-2.0 */
/* The table of implementations, CPU detection and the selection. */
#include "vmth/kernels.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "core/kernel_ops.h"

#define MAX_IMPLEMENTATIONS 4

static bool cpu_any(void)
{
    return true;
}

struct implementation {
    const char *name;
    const void *ops;       /* of the family's type; NULL: not in this build */
    bool (*cpu_can)(void); /* asked only when ops is there */
};

struct family {
    const char *name;
    struct implementation implementations[MAX_IMPLEMENTATIONS]; /* best first; scalar runs anywhere */
};

enum family_index { FAMILY_BITMAP, FAMILY_ZERO, FAMILY_HASH, NFAMILIES };

static const struct family families[NFAMILIES] = {
    [FAMILY_BITMAP] = {"bitmap",
                       {{"avx512", NULL, cpu_any},
                        {"avx2", NULL, cpu_any},
                        {"neon", NULL, cpu_any},
                        {"scalar", &bitmap_scalar, cpu_any}}},
    [FAMILY_ZERO] = {"zero",
                     {{"avx512", NULL, cpu_any},
                      {"avx2", NULL, cpu_any},
                      {"neon", NULL, cpu_any},
                      {"scalar", &zero_scalar, cpu_any}}},
    [FAMILY_HASH] = {"hash",
                     {{"avx512", NULL, cpu_any},
                      {"avx2", NULL, cpu_any},
                      {"neon", NULL, cpu_any},
                      {"scalar", &hash_scalar, cpu_any}}},
};

/* NULL until the first use or selection. Each holds one pointer to constant data and is read and
 * written atomically, so two threads that resolve the default at once store the same value. */
static const struct implementation *selected[NFAMILIES];

static bool runs_here(const struct implementation *implementation)
{
    return implementation->ops != NULL && implementation->cpu_can();
}

static const struct implementation *resolve(enum family_index index)
{
    const struct implementation *found = __atomic_load_n(&selected[index], __ATOMIC_RELAXED);

    if (found == NULL) {
        found = families[index].implementations;
        while (!runs_here(found)) {
            found++; /* ends at scalar at the latest */
        }
        __atomic_store_n(&selected[index], found, __ATOMIC_RELAXED);
    }
    return found;
}

const struct bitmap_ops *kernel_bitmap(void)
{
    return resolve(FAMILY_BITMAP)->ops;
}

const struct zero_ops *kernel_zero(void)
{
    return resolve(FAMILY_ZERO)->ops;
}

const struct hash_ops *kernel_hash(void)
{
    return resolve(FAMILY_HASH)->ops;
}

static enum family_index find_family(const char *name)
{
    enum family_index index = 0;

    while (index < NFAMILIES && strcmp(families[index].name, name) != 0) {
        index++;
    }
    return index;
}

int vmth_kernel_select(const char *family, const char *name)
{
    const enum family_index index = find_family(family);

    if (index == NFAMILIES) {
        return -EINVAL;
    }
    for (size_t i = 0; i < MAX_IMPLEMENTATIONS; i++) {
        const struct implementation *candidate = &families[index].implementations[i];

        if (strcmp(candidate->name, name) != 0) {
            continue;
        }
        if (candidate->ops == NULL) {
            return -ENOSYS;
        }
        if (!candidate->cpu_can()) {
            return -ENOTSUP;
        }
        __atomic_store_n(&selected[index], candidate, __ATOMIC_RELAXED);
        return 0;
    }
    return -ENOENT;
}

const char *vmth_kernel_selected(const char *family)
{
    const enum family_index index = find_family(family);

    return index == NFAMILIES ? NULL : resolve(index)->name;
}

const char *vmth_kernel_family(size_t index)
{
    return index < NFAMILIES ? families[index].name : NULL;
}

const char *vmth_kernel_name(const char *family, size_t index)
{
    const enum family_index found = find_family(family);

    if (found == NFAMILIES) {
        return NULL;
    }
    for (size_t i = 0; i < MAX_IMPLEMENTATIONS; i++) {
        const struct implementation *candidate = &families[found].implementations[i];

        if (runs_here(candidate) && index-- == 0) {
            return candidate->name;
        }
    }
    return NULL;
}
