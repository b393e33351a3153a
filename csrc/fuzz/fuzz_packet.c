/* SPDX-License-Identifier: Apache-2.0 */
/* Any bytes are a packet within its bounds or are refused with -EPROTO and a named field. */
#include <errno.h>
#include <stdlib.h>

#include "vmth/packet.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes);

static const uint64_t block_npages[3] = {10, 78, 1516};

static const struct vmth_packet_limits limits = {
    .page_bytes = 4096, .nblocks = 3, .block_npages = block_npages, .forms = 0x3fe, .channel = 1};

static void require(int holds)
{
    if (!holds) {
        abort();
    }
}

/* 0, or -EPROTO that names a field. */
static int accepted(int result, const struct vmth_packet_error *error)
{
    require(result == 0 || (result == -EPROTO && error->field != NULL));
    return result == 0;
}

static void walk_pages(const struct vmth_packet_header *header, const uint8_t *desc)
{
    struct vmth_packet_error error = {0};
    uint64_t payload_bytes = 0;
    size_t at = 0;

    if (!accepted(vmth_packet_check(header, desc, &limits, &error), &error)) {
        return;
    }
    for (uint32_t i = 0; i < header->ndesc; i++) {
        struct vmth_desc one;
        uint8_t again[VMTH_DESC_REF_BYTES];
        size_t used;

        /* What the check accepted each decode accepts, within the block and the payload. */
        require(vmth_desc_decode(desc + at, header->desc_bytes - at, header->block, &limits, &one,
                                 &used, &error) == 0);
        require(one.npages > 0 && one.page + one.npages <= block_npages[header->block]);
        require(one.base_block < limits.nblocks && one.base_page < block_npages[one.base_block]);
        payload_bytes += one.payload_bytes;
        require(payload_bytes <= header->payload_bytes);
        /* A descriptor has one encoding. */
        require(vmth_desc_encode(&one, again, sizeof(again)) == used);
        for (size_t k = 0; k < used; k++) {
            require(again[k] == desc[at + k]);
        }
        at += used;
    }
    require(at == header->desc_bytes);
}

static void walk_acks(const struct vmth_packet_header *header, const uint8_t *desc)
{
    struct vmth_packet_error error = {0};
    size_t at = 0;

    for (uint32_t i = 0; i < header->ndesc; i++, at += VMTH_ACK_BYTES) {
        struct vmth_ack ack;

        require(at + VMTH_ACK_BYTES <= header->desc_bytes);
        if (accepted(vmth_ack_decode(desc + at, &ack, &error), &error)) {
            require(ack.seq > 0 && ack.block < VMTH_MAX_BLOCKS);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
    struct vmth_packet_header header;
    struct vmth_packet_error error = {0};

    if (nbytes < VMTH_PACKET_HEADER_BYTES ||
        !accepted(vmth_packet_decode_header(data, &limits, &header, &error), &error)) {
        return 0;
    }
    require(header.desc_bytes <= VMTH_PACKET_MAX_DESC_BYTES);
    require(header.payload_bytes <= VMTH_PACKET_MAX_PAYLOAD_BYTES);
    /* A receiver has all descriptors before it looks at one. */
    if (nbytes - VMTH_PACKET_HEADER_BYTES < header.desc_bytes) {
        return 0;
    }
    const uint8_t *desc = data + VMTH_PACKET_HEADER_BYTES;

    (void)accepted(vmth_packet_verify(data, desc, header.desc_bytes, 1, &error), &error);
    if (header.kind == VMTH_PACKET_PAGES) {
        walk_pages(&header, desc);
    } else if (header.kind == VMTH_PACKET_ACK) {
        walk_acks(&header, desc);
    }
    return 0;
}
