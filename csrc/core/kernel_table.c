/* SPDX-License-Identifier: Apache-2.0 */
/* The table of implementations, CPU detection and the selection. */
#include "vmth/kernels.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "core/kernel_ops.h"

#define MAX_IMPLEMENTATIONS 4

/* Taking the address of an implementation that this build lacks would not link. */
#if defined(__x86_64__)
#define ON_X86(ops) (&(ops))
#define CPU_HAS(feature) (__builtin_cpu_supports(feature) != 0)
#else
#define ON_X86(ops) NULL
#define CPU_HAS(feature) false
#endif
#if defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define ON_AARCH64(ops) (&(ops))
#else
#define ON_AARCH64(ops) NULL
#endif

static bool cpu_any(void)
{
    return true;
}

static bool cpu_avx2(void)
{
    return CPU_HAS("avx2") && CPU_HAS("bmi") && CPU_HAS("popcnt");
}

static bool cpu_avx512(void)
{
    return cpu_avx2() && CPU_HAS("avx512f") && CPU_HAS("avx512bw") && CPU_HAS("avx512vl");
}

static bool cpu_avx512_popcnt(void)
{
    return cpu_avx512() && CPU_HAS("avx512vpopcntdq") && CPU_HAS("avx512vbmi2") &&
           CPU_HAS("avx512bitalg");
}

struct implementation {
    const char *name;
    const void *ops;       /* of the family's type; NULL: not in this build */
    bool (*cpu_can)(void); /* asked only when ops is there */
};

struct family {
    const char *name;
    struct implementation implementations[MAX_IMPLEMENTATIONS]; /* best first; scalar runs anywhere; the rest is NULL */
};

enum family_index { FAMILY_BITMAP, FAMILY_ZERO, FAMILY_HASH, FAMILY_DELTA, FAMILY_CONTENT, NFAMILIES };

/* Why each order, measured with bench/kernels_table.py (CPU time, interleaved, medians; one core of an
 * "Intel(R) Xeon(R) Processor" of model 6.167 that others kept busy; speed relative to what is named):
 *
 *                                     baseline             avx512    avx2    scalar
 *   bitmap: runs, empty               plain read              1.0     0.9       0.4
 *   bitmap: runs, 1 % random bits     NumPy's best             25      10       4.3
 *   zero:   zero pages                plain read              1.0     1.0       0.7
 *   hash:   random pages              plain read              0.9     0.9       0.3
 *   hash:   fused with the zero test  the same hash alone     1.0     1.0       1.0
 *
 *
 * and with bench/kernels_forms.py, pages of which 1 to 64 bytes changed, relative to avx512:
 *   delta:  encode                                            1.0   1.0 to 1.1       0.6
 *
 * and with the first of them on an "AMD EPYC", relative to scalar (8.4 us a page of 4 KiB):
 *   content: random pages                                       -       4.1       1.0
 *
 * content's AVX-512 was compiled and compared with the scalar twin, not measured there.
 * The zero test, the hash and the delta meet the memory's speed with AVX2 already; AVX-512 is ahead in
 * the caches.
 * NEON was compiled and not measured: there was no such machine. */
static const struct family families[NFAMILIES] = {
    [FAMILY_BITMAP] = {"bitmap",
                       {{"avx512", ON_X86(bitmap_avx512), cpu_avx512_popcnt},
                        {"avx2", ON_X86(bitmap_avx2), cpu_avx2},
                        {"neon", ON_AARCH64(bitmap_neon), cpu_any},
                        {"scalar", &bitmap_scalar, cpu_any}}},
    [FAMILY_ZERO] = {"zero",
                     {{"avx512", ON_X86(zero_avx512), cpu_avx512},
                      {"avx2", ON_X86(zero_avx2), cpu_avx2},
                      {"neon", ON_AARCH64(zero_neon), cpu_any},
                      {"scalar", &zero_scalar, cpu_any}}},
    [FAMILY_HASH] = {"hash",
                     {{"avx512", ON_X86(hash_avx512), cpu_avx512},
                      {"avx2", ON_X86(hash_avx2), cpu_avx2},
                      {"neon", ON_AARCH64(hash_neon), cpu_any},
                      {"scalar", &hash_scalar, cpu_any}}},
    [FAMILY_DELTA] = {"delta",
                      {{"avx512", ON_X86(delta_avx512), cpu_avx512},
                       {"avx2", ON_X86(delta_avx2), cpu_avx2},
                       {"neon", ON_AARCH64(delta_neon), cpu_any},
                       {"scalar", &delta_scalar, cpu_any}}},
    [FAMILY_CONTENT] = {"content",
                        {{"avx512", ON_X86(content_avx512), cpu_avx512},
                         {"avx2", ON_X86(content_avx2), cpu_avx2},
                         {"scalar", &content_scalar, cpu_any}}},
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

const struct delta_ops *kernel_delta(void)
{
    return resolve(FAMILY_DELTA)->ops;
}

const struct content_ops *kernel_content(void)
{
    return resolve(FAMILY_CONTENT)->ops;
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

        if (candidate->name == NULL || strcmp(candidate->name, name) != 0) {
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
