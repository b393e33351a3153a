/* SPDX-License-Identifier: Apache-2.0 */
/* Page packets: encode and decode of header, descriptors and acknowledgements, side by side, field by
 * field as docs/protocol.md lists them. */
#include "vmth/packet.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "core/endian.h"
#include "core/xxh64.h"

enum {
    HEADER_MAGIC = 0,
    HEADER_KIND = 4,
    HEADER_FLAGS = 5,
    HEADER_BLOCK = 6,
    HEADER_ROUND = 8,
    HEADER_CHANNEL = 12,
    HEADER_RESERVED_14 = 14,
    HEADER_SEQ = 16,
    HEADER_DESC_BYTES = 24,
    HEADER_PAYLOAD_BYTES = 28,
    HEADER_NDESC = 32,
    HEADER_RESERVED_36 = 36,
    HEADER_NPAGES = 40,
    HEADER_RESERVED_48 = 48,
    HEADER_CHECKSUM = 56,

    DESC_PAGE = 0,
    DESC_NPAGES = 8,
    DESC_FORM = 12,
    DESC_FLAGS = 13,
    DESC_RESERVED_14 = 14,
    DESC_PAYLOAD_BYTES = 16,
    DESC_BASE_BLOCK = 20,
    DESC_RESERVED_22 = 22,
    DESC_BASE_PAGE = 24,
    DESC_RESULT = 32,

    ACK_SEQ = 0,
    ACK_DIGEST = 8,
    ACK_STATUS = 24,
    ACK_BLOCK = 28
};

static int refuse(struct vmth_packet_error *error, const char *field, uint64_t received,
                  uint64_t allowed)
{
    error->field = field;
    error->received = received;
    error->allowed = allowed;
    return -EPROTO;
}

/* ---- header ---------------------------------------------------------------------------------- */

static uint64_t checksum(const uint8_t *header, const uint8_t *desc, size_t desc_bytes, uint64_t seed)
{
    struct xxh64 state;

    xxh64_init(&state, seed);
    xxh64_update(&state, header, HEADER_CHECKSUM);
    xxh64_update(&state, desc, desc_bytes);
    return xxh64_final(&state);
}

void vmth_packet_encode_header(const struct vmth_packet_header *header, const uint8_t *desc,
                               uint64_t checksum_seed, uint8_t out[VMTH_PACKET_HEADER_BYTES])
{
    memset(out, 0, VMTH_PACKET_HEADER_BYTES);
    store_le32(out + HEADER_MAGIC, VMTH_PACKET_MAGIC);
    out[HEADER_KIND] = header->kind;
    out[HEADER_FLAGS] = header->flags;
    store_le16(out + HEADER_BLOCK, header->block);
    store_le32(out + HEADER_ROUND, header->round);
    store_le16(out + HEADER_CHANNEL, header->channel);
    store_le64(out + HEADER_SEQ, header->seq);
    store_le32(out + HEADER_DESC_BYTES, header->desc_bytes);
    store_le32(out + HEADER_PAYLOAD_BYTES, header->payload_bytes);
    store_le32(out + HEADER_NDESC, header->ndesc);
    store_le64(out + HEADER_NPAGES, header->npages);
    store_le64(out + HEADER_CHECKSUM, checksum(out, desc, header->desc_bytes, checksum_seed));
}

/* PAGES: a block of the table, and room for at least the smallest form of every descriptor. */
static int check_pages_header(const struct vmth_packet_header *header,
                              const struct vmth_packet_limits *limits,
                              struct vmth_packet_error *error)
{
    if (header->block >= limits->nblocks) {
        return refuse(error, "block", header->block, (uint64_t)limits->nblocks - 1);
    }
    if (header->ndesc == 0) {
        return refuse(error, "ndesc", 0, 1);
    }
    if (header->ndesc > header->desc_bytes / VMTH_DESC_BYTES) {
        return refuse(error, "ndesc", header->ndesc, header->desc_bytes / VMTH_DESC_BYTES);
    }
    if (header->npages < header->ndesc) {
        return refuse(error, "npages", header->npages, header->ndesc);
    }
    return 0;
}

/* ACK: whole acknowledgements, then whole missed-page descriptors. */
static int check_ack_header(const struct vmth_packet_header *header, struct vmth_packet_error *error)
{
    if (header->ndesc == 0) {
        return refuse(error, "ndesc", 0, 1);
    }
    if (header->ndesc > header->desc_bytes / VMTH_ACK_BYTES) {
        return refuse(error, "ndesc", header->ndesc, header->desc_bytes / VMTH_ACK_BYTES);
    }
    if (header->desc_bytes % VMTH_DESC_BYTES != 0) {
        return refuse(error, "desc_bytes", header->desc_bytes,
                      header->desc_bytes - header->desc_bytes % VMTH_DESC_BYTES);
    }
    return 0;
}

/* Everything but a PAGES packet has no block and no payload. */
static int check_other_header(const struct vmth_packet_header *header,
                              struct vmth_packet_error *error)
{
    if (header->block != 0) {
        return refuse(error, "block", header->block, 0);
    }
    if (header->payload_bytes != 0) {
        return refuse(error, "payload_bytes", header->payload_bytes, 0);
    }
    if (header->kind == VMTH_PACKET_ACK) {
        return check_ack_header(header, error);
    }
    if (header->desc_bytes != 0) {
        return refuse(error, "desc_bytes", header->desc_bytes, 0);
    }
    if (header->ndesc != 0) {
        return refuse(error, "ndesc", header->ndesc, 0);
    }
    if (header->npages != 0) {
        return refuse(error, "npages", header->npages, 0);
    }
    return 0;
}

int vmth_packet_decode_header(const uint8_t in[VMTH_PACKET_HEADER_BYTES],
                              const struct vmth_packet_limits *limits,
                              struct vmth_packet_header *header, struct vmth_packet_error *error)
{
    const struct vmth_packet_header got = {
        .kind = in[HEADER_KIND],
        .flags = in[HEADER_FLAGS],
        .block = load_le16(in + HEADER_BLOCK),
        .round = load_le32(in + HEADER_ROUND),
        .channel = load_le16(in + HEADER_CHANNEL),
        .seq = load_le64(in + HEADER_SEQ),
        .desc_bytes = load_le32(in + HEADER_DESC_BYTES),
        .payload_bytes = load_le32(in + HEADER_PAYLOAD_BYTES),
        .ndesc = load_le32(in + HEADER_NDESC),
        .npages = load_le64(in + HEADER_NPAGES),
        .checksum = load_le64(in + HEADER_CHECKSUM),
    };
    const uint32_t magic = load_le32(in + HEADER_MAGIC);
    const uint64_t reserved = load_le16(in + HEADER_RESERVED_14) | load_le32(in + HEADER_RESERVED_36) |
                              load_le64(in + HEADER_RESERVED_48);
    int result;

    if (magic != VMTH_PACKET_MAGIC) {
        return refuse(error, "magic", magic, VMTH_PACKET_MAGIC);
    }
    if (got.kind < VMTH_PACKET_PAGES || got.kind > VMTH_PACKET_ACK) {
        return refuse(error, "kind", got.kind, VMTH_PACKET_ACK);
    }
    if (got.flags != 0) {
        return refuse(error, "flags", got.flags, 0);
    }
    if (reserved != 0) {
        return refuse(error, "reserved", reserved, 0);
    }
    if (got.channel != limits->channel) {
        return refuse(error, "channel", got.channel, limits->channel);
    }
    if (got.seq == 0) {
        return refuse(error, "seq", 0, 1);
    }
    if (got.desc_bytes > VMTH_PACKET_MAX_DESC_BYTES) {
        return refuse(error, "desc_bytes", got.desc_bytes, VMTH_PACKET_MAX_DESC_BYTES);
    }
    if (got.payload_bytes > VMTH_PACKET_MAX_PAYLOAD_BYTES) {
        return refuse(error, "payload_bytes", got.payload_bytes, VMTH_PACKET_MAX_PAYLOAD_BYTES);
    }
    result = got.kind == VMTH_PACKET_PAGES ? check_pages_header(&got, limits, error)
                                           : check_other_header(&got, error);
    if (result == 0) {
        *header = got;
    }
    return result;
}

int vmth_packet_verify(const uint8_t raw[VMTH_PACKET_HEADER_BYTES], const uint8_t *desc,
                       size_t desc_bytes, uint64_t checksum_seed, struct vmth_packet_error *error)
{
    const uint64_t expected = checksum(raw, desc, desc_bytes, checksum_seed);
    const uint64_t received = load_le64(raw + HEADER_CHECKSUM);

    return received == expected ? 0 : refuse(error, "checksum", received, expected);
}

/* ---- descriptors ----------------------------------------------------------------------------- */

size_t vmth_desc_bytes(uint8_t form)
{
    switch (form) {
    case VMTH_FORM_NORMAL:
    case VMTH_FORM_ZERO:
    case VMTH_FORM_HOLE:
    case VMTH_FORM_FREE:
    case VMTH_FORM_SAME:
    case VMTH_FORM_REUSE:
        return VMTH_DESC_BYTES;
    case VMTH_FORM_ZSTD:
        return VMTH_DESC_ZSTD_BYTES;
    case VMTH_FORM_DEDUP:
    case VMTH_FORM_DELTA:
        return VMTH_DESC_REF_BYTES;
    default:
        return 0;
    }
}

size_t vmth_desc_encode(const struct vmth_desc *desc, uint8_t *out, size_t room)
{
    const size_t nbytes = vmth_desc_bytes(desc->form);

    if (nbytes == 0 || nbytes > room) {
        return 0;
    }
    memset(out, 0, nbytes);
    store_le64(out + DESC_PAGE, desc->page);
    store_le32(out + DESC_NPAGES, desc->npages);
    out[DESC_FORM] = desc->form;
    out[DESC_FLAGS] = desc->flags;
    if (nbytes >= VMTH_DESC_ZSTD_BYTES) {
        store_le32(out + DESC_PAYLOAD_BYTES, desc->payload_bytes);
        store_le16(out + DESC_BASE_BLOCK, desc->base_block);
        store_le64(out + DESC_BASE_PAGE, desc->base_page);
    }
    if (nbytes >= VMTH_DESC_REF_BYTES) {
        store_le64(out + DESC_RESULT, desc->result.lo);
        store_le64(out + DESC_RESULT + 8, desc->result.hi);
    }
    return nbytes;
}

/* The second 16 bytes (forms 6, 7, 8) and the result hash (6, 7). */
static int read_long_desc(const uint8_t *in, size_t nbytes, struct vmth_desc *desc,
                          struct vmth_packet_error *error)
{
    const uint16_t reserved = load_le16(in + DESC_RESERVED_22);

    if (reserved != 0) {
        return refuse(error, "desc.reserved", reserved, 0);
    }
    desc->payload_bytes = load_le32(in + DESC_PAYLOAD_BYTES);
    desc->base_block = load_le16(in + DESC_BASE_BLOCK);
    desc->base_page = load_le64(in + DESC_BASE_PAGE);
    if (nbytes >= VMTH_DESC_REF_BYTES) {
        desc->result.lo = load_le64(in + DESC_RESULT);
        desc->result.hi = load_le64(in + DESC_RESULT + 8);
        if (desc->npages != 1) {
            return refuse(error, "desc.npages", desc->npages, 1);
        }
        if ((desc->result.lo | desc->result.hi) == 0) {
            return refuse(error, "desc.result", 0, 1);
        }
    }
    return 0;
}

/* What each form allows in payload and base. */
static int check_form(struct vmth_desc *desc, const struct vmth_packet_limits *limits,
                      struct vmth_packet_error *error)
{
    const uint64_t content_bytes = (uint64_t)desc->npages * limits->page_bytes;

    if (desc->form == VMTH_FORM_NORMAL) {
        if (content_bytes > VMTH_PACKET_MAX_PAYLOAD_BYTES) {
            return refuse(error, "desc.npages", desc->npages,
                          VMTH_PACKET_MAX_PAYLOAD_BYTES / limits->page_bytes);
        }
        desc->payload_bytes = (uint32_t)content_bytes;
    }
    if (desc->form == VMTH_FORM_REUSE) {
        if (desc->npages > VMTH_PACKET_MAX_PAYLOAD_BYTES / VMTH_REUSE_HASH_BYTES) {
            return refuse(error, "desc.npages", desc->npages,
                          VMTH_PACKET_MAX_PAYLOAD_BYTES / VMTH_REUSE_HASH_BYTES);
        }
        desc->payload_bytes = desc->npages * VMTH_REUSE_HASH_BYTES;
    }
    if (desc->form == VMTH_FORM_DELTA) {
        if (desc->payload_bytes == 0) {
            return refuse(error, "desc.payload_bytes", 0, 1);
        }
        if (desc->payload_bytes > content_bytes) {
            return refuse(error, "desc.payload_bytes", desc->payload_bytes, content_bytes);
        }
    }
    if (desc->form == VMTH_FORM_DEDUP) {
        if (desc->payload_bytes != 0) {
            return refuse(error, "desc.payload_bytes", desc->payload_bytes, 0);
        }
        if (desc->base_block >= limits->nblocks) {
            return refuse(error, "desc.base_block", desc->base_block,
                          (uint64_t)limits->nblocks - 1);
        }
        if (desc->base_page >= limits->block_npages[desc->base_block]) {
            return refuse(error, "desc.base_page", desc->base_page,
                          limits->block_npages[desc->base_block] - 1);
        }
    } else if (desc->base_block != 0) {
        return refuse(error, "desc.base_block", desc->base_block, 0);
    } else if (desc->base_page != 0) {
        return refuse(error, "desc.base_page", desc->base_page, 0);
    }
    return 0;
}

int vmth_desc_decode(const uint8_t *in, size_t room, uint16_t block,
                     const struct vmth_packet_limits *limits, struct vmth_desc *desc, size_t *used,
                     struct vmth_packet_error *error)
{
    if (room < VMTH_DESC_BYTES) {
        return refuse(error, "desc_bytes", room, VMTH_DESC_BYTES);
    }
    if (block >= limits->nblocks) {
        return refuse(error, "block", block, (uint64_t)limits->nblocks - 1);
    }
    struct vmth_desc got = {
        .page = load_le64(in + DESC_PAGE),
        .npages = load_le32(in + DESC_NPAGES),
        .form = in[DESC_FORM],
        .flags = in[DESC_FLAGS],
    };
    const uint64_t block_npages = limits->block_npages[block];
    const size_t nbytes = vmth_desc_bytes(got.form);
    int result;

    if (nbytes == 0) {
        return refuse(error, "desc.form", got.form, VMTH_FORM_REUSE);
    }
    if (((limits->forms >> got.form) & 1) == 0) {
        return refuse(error, "desc.form (not negotiated)", got.form, limits->forms);
    }
    if (nbytes > room) {
        return refuse(error, "desc_bytes", room, nbytes);
    }
    const uint8_t allowed_flags = got.form == VMTH_FORM_DELTA ? VMTH_DESC_PACKED : 0;

    if (got.flags > allowed_flags) {
        return refuse(error, "desc.flags", got.flags, allowed_flags);
    }
    if (load_le16(in + DESC_RESERVED_14) != 0) {
        return refuse(error, "desc.reserved", load_le16(in + DESC_RESERVED_14), 0);
    }
    if (got.npages == 0) {
        return refuse(error, "desc.npages", 0, 1);
    }
    if (got.page >= block_npages) {
        return refuse(error, "desc.page", got.page, block_npages - 1);
    }
    if (got.npages > block_npages - got.page) {
        return refuse(error, "desc.npages", got.npages, block_npages - got.page);
    }
    if (nbytes > VMTH_DESC_BYTES) {
        result = read_long_desc(in, nbytes, &got, error);
        if (result != 0) {
            return result;
        }
    }
    result = check_form(&got, limits, error);
    if (result == 0) {
        *desc = got;
        *used = nbytes;
    }
    return result;
}

/* The frame that is open after `desc`: *open_bytes of content whose payload is still to come. */
static int check_frame(const struct vmth_desc *desc, uint32_t page_bytes, uint64_t *open_bytes,
                       struct vmth_packet_error *error)
{
    if (desc->form != VMTH_FORM_ZSTD) {
        return 0;
    }
    *open_bytes += (uint64_t)desc->npages * page_bytes;
    if (*open_bytes > VMTH_PACKET_MAX_FRAME_BYTES) {
        return refuse(error, "frame", *open_bytes, VMTH_PACKET_MAX_FRAME_BYTES);
    }
    if (desc->payload_bytes > *open_bytes) {
        return refuse(error, "desc.payload_bytes", desc->payload_bytes, *open_bytes);
    }
    if (desc->payload_bytes != 0) {
        *open_bytes = 0;
    }
    return 0;
}

int vmth_packet_check(const struct vmth_packet_header *header, const uint8_t *desc,
                      const struct vmth_packet_limits *limits, struct vmth_packet_error *error)
{
    uint64_t npages = 0;
    uint64_t payload_bytes = 0;
    uint64_t open_bytes = 0;
    size_t at = 0;

    for (uint32_t i = 0; i < header->ndesc; i++) {
        struct vmth_desc one;
        size_t used;
        int result = vmth_desc_decode(desc + at, header->desc_bytes - at, header->block, limits, &one,
                                      &used, error);

        if (result == 0) {
            result = check_frame(&one, limits->page_bytes, &open_bytes, error);
        }
        if (result != 0) {
            return result;
        }
        at += used;
        npages += one.npages;
        payload_bytes += one.payload_bytes;
    }
    if (at != header->desc_bytes) {
        return refuse(error, "desc_bytes", header->desc_bytes, at);
    }
    if (npages != header->npages) {
        return refuse(error, "npages", header->npages, npages);
    }
    if (payload_bytes != header->payload_bytes) {
        return refuse(error, "payload_bytes", header->payload_bytes, payload_bytes);
    }
    if (open_bytes != 0) {
        return refuse(error, "desc.payload_bytes", 0, open_bytes);
    }
    return 0;
}

/* ---- acknowledgements ------------------------------------------------------------------------ */

void vmth_ack_encode(const struct vmth_ack *ack, uint8_t out[VMTH_ACK_BYTES])
{
    memset(out, 0, VMTH_ACK_BYTES);
    store_le64(out + ACK_SEQ, ack->seq);
    store_le64(out + ACK_DIGEST, ack->digest.lo);
    store_le64(out + ACK_DIGEST + 8, ack->digest.hi);
    store_le32(out + ACK_STATUS, ack->status);
    store_le32(out + ACK_BLOCK, ack->block);
}

int vmth_ack_decode(const uint8_t in[VMTH_ACK_BYTES], struct vmth_ack *ack,
                    struct vmth_packet_error *error)
{
    const struct vmth_ack got = {
        .seq = load_le64(in + ACK_SEQ),
        .digest = {load_le64(in + ACK_DIGEST), load_le64(in + ACK_DIGEST + 8)},
        .status = load_le32(in + ACK_STATUS),
        .block = load_le32(in + ACK_BLOCK),
    };
    const uint32_t max_block = got.status == VMTH_ACK_MISSED ? VMTH_MAX_BLOCKS - 1 : 0;

    if (got.seq == 0) {
        return refuse(error, "ack.seq", 0, 1);
    }
    if (got.status < VMTH_ACK_LANDED || got.status > VMTH_ACK_MISSED) {
        return refuse(error, "ack.status", got.status, VMTH_ACK_MISSED);
    }
    if (got.block > max_block) {
        return refuse(error, "ack.block", got.block, max_block);
    }
    *ack = got;
    return 0;
}
