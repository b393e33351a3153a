/* SPDX-License-Identifier: Apache-2.0 */
/* Any bytes are runs within their blocks and within the input, or are refused with a named field;
 * runs can be written again, and what was written reads the same. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "vmth/qemu_ram.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes);

enum { PAGE = 1024, CAP = 8 };

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

static void check_run(const struct vmth_qemu_run *run, size_t used)
{
    require(run->block < blocks.nblocks && run->npages > 0);
    require(run->kind >= VMTH_QEMU_ZERO && run->kind <= VMTH_QEMU_COMPRESS);
    require((run->page + run->npages - 1) * PAGE < lengths[run->block]);
    if (run->kind != VMTH_QEMU_ZERO) {
        require(run->at + (run->npages - 1) * run->stride + run->nbytes <= used);
    }
}

static void write_again(const struct vmth_qemu_run *runs, size_t nruns, const uint8_t *data,
                        size_t nbytes)
{
    struct vmth_qemu_run again[CAP];
    struct vmth_qemu_parsed parsed;
    struct vmth_qemu_error error;
    uint32_t block = VMTH_QEMU_NO_BLOCK;
    const size_t room = vmth_qemu_ram_encoded_bytes(&blocks, block, runs, nruns, nbytes);
    uint8_t *out = malloc(room);

    require(room > 0 && out != NULL);
    vmth_qemu_ram_encode(&blocks, &block, runs, nruns, data, out);
    block = VMTH_QEMU_NO_BLOCK;
    require(vmth_qemu_ram_parse(&blocks, &block, out, room, again, CAP, &parsed, &error) == 0);
    /* Runs may grow together, the first begins with the same page. */
    require(parsed.nruns > 0 && parsed.nruns <= nruns && parsed.used == room);
    require(again[0].page == runs[0].page && again[0].kind == runs[0].kind);
    if (again[0].kind != VMTH_QEMU_ZERO) {
        require(memcmp(out + again[0].at, data + runs[0].at, runs[0].nbytes) == 0);
    }
    free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
    uint32_t block = VMTH_QEMU_NO_BLOCK;
    size_t at = 0;

    for (;;) {
        struct vmth_qemu_run runs[CAP];
        struct vmth_qemu_parsed parsed;
        struct vmth_qemu_error error = {0};
        const int result = vmth_qemu_ram_parse(&blocks, &block, data + at, nbytes - at, runs, CAP,
                                               &parsed, &error);

        if (result != 0) {
            require(result == -EPROTO && error.field != NULL);
            return 0;
        }
        require(parsed.nruns <= CAP && parsed.used <= nbytes - at);
        require(block == VMTH_QEMU_NO_BLOCK || block < blocks.nblocks);
        for (size_t i = 0; i < parsed.nruns; i++) {
            check_run(&runs[i], parsed.used);
        }
        if (parsed.nruns > 0) {
            write_again(runs, parsed.nruns, data + at, parsed.used);
        }
        at += parsed.used;
        if (parsed.stop == VMTH_QEMU_SHORT) {
            require(parsed.need > nbytes - at);
            return 0;
        }
        require(parsed.used > 0);
    }
}
