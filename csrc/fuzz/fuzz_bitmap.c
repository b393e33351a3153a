/* SPDX-License-Identifier: Apache-2.0 */
/* Any bytes as a bitmap: the runs of every implementation cover exactly its bits, in bounded pieces.
 *
 * Input: byte 0 the room of a call, byte 1 bits to leave off at the end, byte 2 the start, then bits. */
#include <stdlib.h>
#include <string.h>

#include "vmth/bitmap.h"
#include "vmth/kernels.h"

#define MAX_WORDS 512u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes);

static void require(int holds)
{
    if (!holds) {
        abort();
    }
}

static void check_runs(const uint64_t *words, uint64_t npages, uint64_t from, size_t room)
{
    uint64_t back[MAX_WORDS] = {0};
    uint64_t at = from;
    uint64_t total = 0;
    struct vmth_run *out = malloc(room * sizeof(*out));

    require(out != NULL);
    while (at < npages) {
        size_t n;
        uint64_t resume;

        require(vmth_bitmap_runs(words, npages, at, out, room, &n, &resume) == 0);
        require(n <= room && resume > at && resume <= npages);
        for (size_t i = 0; i < n; i++) {
            require(out[i].npages > 0 && out[i].page >= at);
            require(out[i].page + out[i].npages <= npages);
            require(vmth_bitmap_count(back, out[i].page, out[i].npages) == 0);
            vmth_bitmap_set_range(back, out[i].page, out[i].npages);
            total += out[i].npages;
        }
        at = resume;
    }
    require(total == vmth_bitmap_count(words, from, npages - from));
    for (uint64_t page = from; page < npages; page++) {
        require(vmth_bitmap_test(words, page) == vmth_bitmap_test(back, page));
    }
    free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
    uint64_t words[MAX_WORDS] = {0};
    const char *name;

    if (nbytes < 4) {
        return 0;
    }
    const size_t room = 1 + (size_t)data[0] * 8;
    uint64_t npages = 8 * (uint64_t)(nbytes - 3 < sizeof(words) ? nbytes - 3 : sizeof(words));

    npages -= data[1] % 64 < npages ? data[1] % 64 : 0;
    vmth_bitmap_from_bytes(words, data + 3, npages);
    for (size_t i = 0; (name = vmth_kernel_name("bitmap", i)) != NULL; i++) {
        require(vmth_kernel_select("bitmap", name) == 0);
        check_runs(words, npages, data[2] % npages, room);
    }
    return 0;
}
