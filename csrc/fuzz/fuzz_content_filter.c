/* SPDX-License-Identifier: Apache-2.0 */
/* Any bytes are a part of a filter that rises within its width or are refused; what one holds, encoding
 * gives back. The first nine bytes say base and count. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "vmth/content_filter.h"

#define BITS 40u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes);

static void require(int holds)
{
    if (!holds) {
        abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
    static uint64_t prints[VMTH_FILTER_PART_ENTRIES];
    static uint8_t again[VMTH_FILTER_PART_BYTES];
    uint64_t base;
    size_t size;
    size_t count;
    int result;

    if (nbytes < 9) {
        return 0;
    }
    memcpy(&base, data, sizeof(base));
    count = data[8] == 255 ? VMTH_FILTER_PART_ENTRIES + 1 : data[8];
    result = vmth_filter_decode(base, count, data + 9, nbytes - 9, BITS, prints);
    require(result == 0 || result == -EPROTO);
    if (result != 0) {
        return 0;
    }
    require(count > 0 && count < 255 && prints[0] == base);
    for (size_t i = 0; i < count; i++) {
        require(prints[i] >> BITS == 0 && (i == 0 || prints[i] > prints[i - 1]));
    }
    if (vmth_filter_encode(prints, count, again, &size) == count) {
        require(size == nbytes - 9 && memcmp(again, data + 9, size) == 0);
    }
    return 0;
}
