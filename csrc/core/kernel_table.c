/* SPDX-License-Identifier: Apache-2.0 */
/* Which implementation of each kernel family runs. */
#include "core/kernel_ops.h"

const struct bitmap_ops *kernel_bitmap(void)
{
    return &bitmap_scalar;
}

const struct zero_ops *kernel_zero(void)
{
    return &zero_scalar;
}

const struct hash_ops *kernel_hash(void)
{
    return &hash_scalar;
}
