/* SPDX-License-Identifier: Apache-2.0 */
/* Zero pages: the test, the scan of a batch, the partition of a batch. The reading is a kernel. */
#include "vmth/zero_page.h"

#include <errno.h>
#include <string.h>

#include "core/kernel_ops.h"
#include "core/page_size.h"

bool vmth_is_zero(const uint8_t *bytes, size_t nbytes)
{
    return kernel_zero()->zero_prefix(bytes, nbytes) == nbytes;
}

int vmth_zero_scan(const uint8_t *pages, size_t page_bytes, size_t npages, uint64_t *zero_words,
                   size_t *nzero)
{
    const struct zero_ops *zero = kernel_zero();
    size_t zeros = 0;

    if (!page_size_valid(page_bytes)) {
        return -EINVAL;
    }
    for (size_t first = 0; first < npages; first += 64) {
        const size_t n = npages - first < 64 ? npages - first : 64;
        uint64_t word = 0;

        for (size_t i = 0; i < n; i++) {
            const uint8_t *page = pages + (first + i) * page_bytes;
            const bool is_zero = zero->zero_prefix(page, page_bytes) == page_bytes;

            word |= (uint64_t)is_zero << i;
            zeros += is_zero;
        }
        zero_words[first / 64] = word;
    }
    *nzero = zeros;
    return 0;
}

int vmth_zero_partition(const uint8_t *host, size_t page_bytes, uint64_t *ids, size_t n,
                        uint64_t *scratch, size_t *nnormal)
{
    const struct zero_ops *zero = kernel_zero();
    size_t normal = 0;
    size_t zeros = 0;

    if (!page_size_valid(page_bytes)) {
        return -EINVAL;
    }
    for (size_t i = 0; i < n; i++) {
        const uint64_t id = ids[i];

        if (zero->zero_prefix(host + id * page_bytes, page_bytes) == page_bytes) {
            scratch[zeros++] = id;
        } else {
            ids[normal++] = id; /* normal <= i: nothing unread is overwritten */
        }
    }
    if (zeros != 0) {
        memcpy(ids + normal, scratch, zeros * sizeof(*ids));
    }
    *nnormal = normal;
    return 0;
}
