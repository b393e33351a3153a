/* SPDX-License-Identifier: Apache-2.0 */
/* Any bytes are a delta that stays inside the page or are refused; what one made, encoding finds again. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "vmth/delta.h"

#define PAGE_BYTES 4096u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes);

static void require(int holds)
{
    if (!holds) {
        abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
    static uint8_t base[PAGE_BYTES];
    static uint8_t page[PAGE_BYTES + 64];
    static uint8_t again[2 * PAGE_BYTES];
    size_t size;
    int result;

    for (size_t i = 0; i < PAGE_BYTES; i++) {
        base[i] = (uint8_t)(i * 7);
    }
    memcpy(page, base, PAGE_BYTES);
    memset(page + PAGE_BYTES, 0x5a, 64);
    result = vmth_delta_apply(page, PAGE_BYTES, data, nbytes);
    require(result == 0 || result == -EPROTO);
    for (size_t i = PAGE_BYTES; i < sizeof(page); i++) {
        require(page[i] == 0x5a);
    }
    require(vmth_delta_encode(base, page, PAGE_BYTES, again, sizeof(again), &size) == 0);
    require(vmth_delta_apply(base, PAGE_BYTES, again, size) == 0);
    require(memcmp(base, page, PAGE_BYTES) == 0);
    return 0;
}
