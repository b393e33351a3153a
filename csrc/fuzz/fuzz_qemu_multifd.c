/* SPDX-License-Identifier: Apache-2.0 */
/* Any bytes of a multifd channel are runs within their blocks and within the input, or are left. */
#include <stdlib.h>

#include "vmth/qemu_multifd.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes);

enum { PAGE = 65536, MOST = VMTH_MULTIFD_PACKET_BYTES / PAGE, CAP = 2 * MOST };

static const uint64_t lengths[2] = {16 * PAGE, 3 * PAGE - 1};
static const uint8_t names[2 * VMTH_QEMU_NAME_BYTES] = {
    [0] = 3, 'r', 'a', 'm', [VMTH_QEMU_NAME_BYTES] = 4, 'b', 'i', 'o', 's'};
static const struct vmth_qemu_blocks blocks = {
    .page_bytes = PAGE, .nblocks = 2, .used_length = lengths, .names = names};

static void require(int holds)
{
    if (!holds) {
        abort();
    }
}

static uint64_t check_run(const struct vmth_qemu_run *run, size_t used)
{
    require(run->block < blocks.nblocks && run->npages > 0);
    require((run->page + run->npages - 1) * PAGE < lengths[run->block]);
    if (run->kind == VMTH_QEMU_ZERO) {
        require(run->nbytes == 0);
        return 0;
    }
    require(run->kind == VMTH_QEMU_PAGE && run->nbytes == PAGE && run->stride == PAGE);
    require(run->at + run->npages * PAGE <= used);
    return run->npages * PAGE;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
    struct vmth_multifd_parsed parsed = {0, 0, VMTH_MULTIFD_FULL};

    for (size_t at = 0; parsed.stop == VMTH_MULTIFD_FULL; at += parsed.used) {
        struct vmth_qemu_run runs[CAP];
        uint64_t payload = 0;

        require(vmth_multifd_parse(&blocks, data + at, nbytes - at, runs, CAP, &parsed) == 0);
        require(parsed.nruns <= CAP && parsed.used <= nbytes - at);
        require(parsed.stop != VMTH_MULTIFD_FULL || parsed.used > 0);
        for (size_t i = 0; i < parsed.nruns; i++) {
            payload += check_run(&runs[i], parsed.used);
        }
        require(payload <= parsed.used);
    }
    return 0;
}
