/* SPDX-License-Identifier: Apache-2.0 */
/* Bits set in a word, without the instruction that baseline x86-64 lacks (the compiler's builtin
 * would become a library call there). */
#ifndef VMTH_CORE_POPCOUNT_H
#define VMTH_CORE_POPCOUNT_H

#include <stdint.h>

static inline uint64_t popcount64(uint64_t word)
{
    word -= (word >> 1) & 0x5555555555555555u;
    word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
    word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    return (word * 0x0101010101010101u) >> 56;
}

#endif
