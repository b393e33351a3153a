/* SPDX-License-Identifier: Apache-2.0 */
/* Whole packets of plain pages, one after the other. */
#include "vmth/qemu_multifd.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "core/big_endian.h"
#include "core/qemu_blocks.h"

enum {
    MAGIC = 0x11223344,
    VERSION = 1,
    AT_VERSION = 4,
    AT_FLAGS = 8,
    AT_ALLOC = 12,
    AT_NORMAL = 16,
    AT_PAYLOAD = 20,
    AT_ZERO = 32,
    AT_BLOCK = 64,
    NAME_BYTES = 256
};

/* What a header says; normal and zero pages together are no more than a packet has room for. */
struct packet {
    uint32_t block;
    uint32_t normal;
    uint32_t zero;
    const uint8_t *offsets;
};

static uint32_t field(const uint8_t *header, size_t at)
{
    return (uint32_t)load_be(header + at, 4);
}

static bool is_name(const uint8_t *listed, const uint8_t *name, size_t nbytes)
{
    return listed[0] == nbytes && memcmp(listed + 1, name, nbytes) == 0;
}

/* The table has a name as u8 length and characters, the header as a string that may end early. */
static uint32_t find_block(const struct vmth_qemu_blocks *blocks, const uint8_t *name)
{
    const size_t nbytes = strnlen((const char *)name, NAME_BYTES);
    uint32_t block = 0;

    while (block < blocks->nblocks &&
           !is_name(blocks->names + (size_t)block * VMTH_QEMU_NAME_BYTES, name, nbytes)) {
        block++;
    }
    return block;
}

static uint64_t page_at(const struct packet *packet, uint32_t i, uint32_t page_bytes)
{
    return load_be64(packet->offsets + 8 * (size_t)i) / page_bytes;
}

/* Are all of them whole pages of their block? */
static bool are_within(const struct vmth_qemu_blocks *blocks, const struct packet *packet)
{
    for (uint32_t i = 0; i < packet->normal + packet->zero; i++) {
        const uint64_t offset = load_be64(packet->offsets + 8 * (size_t)i);

        if (offset % blocks->page_bytes != 0 || offset >= blocks->used_length[packet->block]) {
            return false;
        }
    }
    return true;
}

/* False for a header that is not one of plain pages only. */
static bool read_header(const struct vmth_qemu_blocks *blocks, const uint8_t *header,
                        struct packet *packet)
{
    const uint32_t most = VMTH_MULTIFD_PACKET_BYTES / blocks->page_bytes;

    /* Every flag is a synchronisation, a compression or device state. */
    if (field(header, 0) != MAGIC || field(header, AT_VERSION) != VERSION ||
        field(header, AT_FLAGS) != 0 || field(header, AT_ALLOC) > most) {
        return false;
    }
    packet->normal = field(header, AT_NORMAL);
    packet->zero = field(header, AT_ZERO);
    packet->offsets = header + VMTH_MULTIFD_FIELDS_BYTES;
    if (packet->normal > most || packet->zero > most - packet->normal ||
        packet->normal + packet->zero == 0) {
        return false;
    }
    /* Of a packet without normal pages, what the size says does not follow. */
    if (packet->normal > 0 && field(header, AT_PAYLOAD) != packet->normal * blocks->page_bytes) {
        return false;
    }
    packet->block = find_block(blocks, header + AT_BLOCK);
    return packet->block < blocks->nblocks && are_within(blocks, packet);
}

/* Runs of the packet's pages [i, end), all of one kind; `at` is where the first one's content is. */
static size_t write_runs(const struct packet *packet, uint32_t i, uint32_t end, uint64_t at,
                         uint32_t kind, uint32_t page_bytes, struct vmth_qemu_run *out)
{
    const uint32_t nbytes = kind == VMTH_QEMU_PAGE ? page_bytes : 0;
    size_t nruns = 0;

    while (i < end) {
        const uint64_t page = page_at(packet, i, page_bytes);
        uint32_t npages = 1;

        while (i + npages < end && page_at(packet, i + npages, page_bytes) == page + npages) {
            npages++;
        }
        out[nruns++] = (struct vmth_qemu_run){page, npages, nbytes > 0 ? at : 0, nbytes, nbytes,
                                              packet->block, kind};
        at += (uint64_t)npages * nbytes;
        i += npages;
    }
    return nruns;
}

int vmth_multifd_parse(const struct vmth_qemu_blocks *blocks, const uint8_t *in, size_t nbytes,
                       struct vmth_qemu_run *out, size_t cap, struct vmth_multifd_parsed *parsed)
{
    struct vmth_multifd_parsed done = {0, 0, VMTH_MULTIFD_SHORT};
    size_t header_bytes;
    size_t most;

    if (!qemu_blocks_valid(blocks)) {
        return -EINVAL;
    }
    header_bytes = VMTH_MULTIFD_HEADER_BYTES(blocks->page_bytes);
    most = VMTH_MULTIFD_PACKET_BYTES / blocks->page_bytes;
    if (cap < most) {
        return -EINVAL;
    }
    while (nbytes - done.used >= header_bytes) {
        struct packet packet;
        size_t payload;

        if (!read_header(blocks, in + done.used, &packet)) {
            done.stop = VMTH_MULTIFD_OTHER;
            break;
        }
        payload = (size_t)packet.normal * blocks->page_bytes;
        if (nbytes - done.used - header_bytes < payload) {
            break;
        }
        if (cap - done.nruns < most) {
            done.stop = VMTH_MULTIFD_FULL;
            break;
        }
        done.nruns += write_runs(&packet, 0, packet.normal, done.used + header_bytes, VMTH_QEMU_PAGE,
                                 blocks->page_bytes, out + done.nruns);
        done.nruns += write_runs(&packet, packet.normal, packet.normal + packet.zero, 0,
                                 VMTH_QEMU_ZERO, blocks->page_bytes, out + done.nruns);
        done.used += header_bytes + payload;
    }
    *parsed = done;
    return 0;
}
