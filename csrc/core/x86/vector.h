/* SPDX-License-Identifier: Apache-2.0 */
/* Per-function instruction sets: the files are compiled with default flags, so that nothing outside
 * a kernel that was chosen at run time can contain an instruction the CPU lacks. */
#ifndef VMTH_CORE_X86_VECTOR_H
#define VMTH_CORE_X86_VECTOR_H

#include <immintrin.h>

#define BMI __attribute__((target("bmi,popcnt")))
#define AVX2 __attribute__((target("avx2,bmi,popcnt")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,bmi,popcnt")))
#define AVX512_POPCNT                                                                              \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vpopcntdq,avx512vbmi2,avx512bitalg,"   \
                          "bmi,popcnt")))

#endif
