/* SPDX-License-Identifier: Apache-2.0 */
/* The page packet: what travels on a page channel, in both directions.
 *
 *   +-- header, 64 bytes --+-- descriptors, desc_bytes --+-- payload, payload_bytes --+
 *   | who, how much, sum   | one a run of pages          | pages back to back         |
 *   +----------------------+-----------------------------+----------------------------+
 *
 * docs/protocol.md has the field table; the golden bytes are in csrc/tests and tests/. All integers
 * are little-endian; zero is an invalid kind and form. `checksum` covers header and descriptors
 * (XXH64 with the session's seed), so that a flipped bit there never moves a page to a wrong place;
 * the payload is covered by the acknowledgement's digest.
 *
 * Decoding trusts nothing: every count is compared with its bound before it is used, and the error
 * tells which field held what and what was allowed. Pure. */
#ifndef VMTH_PACKET_H
#define VMTH_PACKET_H

#include "vmth/common.h"

VMTH_BEGIN_DECLS

#define VMTH_PACKET_MAGIC 0x50544d56u /* "VMTP" */
#define VMTH_PACKET_HEADER_BYTES 64u
#define VMTH_DESC_BYTES 16u          /* normal, zero, hole, free, same, reuse */
#define VMTH_DESC_ZSTD_BYTES 32u
#define VMTH_DESC_REF_BYTES 48u      /* dedup, delta */
#define VMTH_ACK_BYTES 32u
#define VMTH_REUSE_HASH_BYTES 16u    /* a page, in the payload */
#define VMTH_PACKET_MAX_DESC_BYTES (1u << 20)
#define VMTH_PACKET_MAX_PAYLOAD_BYTES (8u << 20)
#define VMTH_PACKET_MAX_FRAME_BYTES (2u << 20) /* content of one zstd frame: the largest page */
#define VMTH_MAX_BLOCKS 4096u
#define VMTH_MAX_CHANNELS 64u

enum vmth_packet_kind {
    VMTH_PACKET_PAGES = 1,
    VMTH_PACKET_BARRIER = 2, /* ends a round on this channel; acknowledged when all before has landed */
    VMTH_PACKET_END = 3,     /* the sender will send nothing more */
    VMTH_PACKET_ACK = 4      /* receiver to sender */
};

enum vmth_page_form {
    VMTH_FORM_NORMAL = 1, /* npages pages in the payload */
    VMTH_FORM_ZERO = 2,   /* zero bytes only */
    VMTH_FORM_HOLE = 3,   /* never populated at the source: zero bytes, nothing was read */
    VMTH_FORM_FREE = 4,   /* the guest calls it free: no content, left out of the digest */
    VMTH_FORM_SAME = 5,   /* unchanged since it landed */
    VMTH_FORM_DEDUP = 6,  /* content of another page that landed */
    VMTH_FORM_DELTA = 7,  /* against what landed before at this page */
    VMTH_FORM_ZSTD = 8,   /* npages pages of a frame, which comes with the last descriptor of its pages */
    VMTH_FORM_REUSE = 9   /* content that a file at the receiver has: npages content hashes in the payload */
};

enum vmth_desc_flag {
    VMTH_DESC_PACKED = 1 /* delta: the payload is a zstd frame of the delta */
};

enum vmth_ack_status {
    VMTH_ACK_LANDED = 1, /* all pages are in guest memory; the digest is of what landed */
    VMTH_ACK_MISSED = 2  /* landed except the missed pages that follow the acks */
};

struct vmth_packet_header {
    uint8_t kind;
    uint8_t flags;          /* 0 */
    uint16_t block;         /* index in the block table; PAGES only, else 0 */
    uint32_t round;
    uint16_t channel;
    uint64_t seq;           /* per channel and direction; from 1. ACK: all up to here have landed */
    uint32_t desc_bytes;
    uint32_t payload_bytes;
    uint32_t ndesc;         /* PAGES: descriptors. ACK: acks; missed descriptors fill the rest */
    uint64_t npages;        /* sum over the descriptors */
    uint64_t checksum;
};

struct vmth_desc {
    uint64_t page;
    uint32_t npages;
    uint8_t form;
    uint8_t flags;            /* delta: VMTH_DESC_PACKED; else 0 */
    uint32_t payload_bytes;   /* of this descriptor; normal: npages * page size; reuse: npages *
                               * VMTH_REUSE_HASH_BYTES; zstd: 0 where the pages
                               * are in the frame of the next zstd descriptor that has a payload */
    uint16_t base_block;      /* dedup */
    uint64_t base_page;       /* dedup */
    struct vmth_u128 result;  /* dedup, delta: hash of the page produced */
};

struct vmth_ack {
    uint64_t seq;
    struct vmth_u128 digest;  /* sum of mix(block, page, hash of what landed) over the packet */
    uint32_t status;
    uint32_t block;           /* MISSED: index of the block whose pages are missed; else 0 */
};

/* What was wrong with a packet: `field` had `received`, at most (or exactly) `allowed`. */
struct vmth_packet_error {
    const char *field;
    uint64_t received;
    uint64_t allowed;
};

/* Bounds that the session knows. `forms`: bit f set = form f was negotiated. */
struct vmth_packet_limits {
    uint32_t page_bytes;
    uint32_t nblocks;
    const uint64_t *block_npages; /* nblocks entries */
    uint32_t forms;
    uint16_t channel;
};

/* Write the 64 header bytes, with the checksum over them and `desc` (desc_bytes long). */
void vmth_packet_encode_header(const struct vmth_packet_header *header, const uint8_t *desc,
                               uint64_t checksum_seed, uint8_t out[VMTH_PACKET_HEADER_BYTES]);

/* Read and bound-check a header: magic, kind, channel, desc_bytes, payload_bytes, block. The checksum
 * is verified later, when the descriptors are there. Returns 0 or -EPROTO with *error filled. */
VMTH_MUST_CHECK int vmth_packet_decode_header(const uint8_t in[VMTH_PACKET_HEADER_BYTES],
                                              const struct vmth_packet_limits *limits,
                                              struct vmth_packet_header *header,
                                              struct vmth_packet_error *error);

/* Verify the checksum over the 64 raw header bytes and the descriptors. */
VMTH_MUST_CHECK int vmth_packet_verify(const uint8_t raw[VMTH_PACKET_HEADER_BYTES], const uint8_t *desc,
                                       size_t desc_bytes, uint64_t checksum_seed,
                                       struct vmth_packet_error *error);

/* Bytes a descriptor of this form takes on the wire (16, 32 or 48), 0 for an unknown form. */
size_t vmth_desc_bytes(uint8_t form);

/* Append one descriptor at out; returns the bytes written, 0 if it does not fit in `room`. */
size_t vmth_desc_encode(const struct vmth_desc *desc, uint8_t *out, size_t room);

/* Decode the descriptor at `in`; *used gets its size. Checks form, npages > 0, page + npages within the
 * block, payload against page size (a zstd frame's: vmth_packet_check). Descriptors of one packet need
 * not be in page order. */
VMTH_MUST_CHECK int vmth_desc_decode(const uint8_t *in, size_t room, uint16_t block,
                                     const struct vmth_packet_limits *limits, struct vmth_desc *desc,
                                     size_t *used, struct vmth_packet_error *error);

/* Check a whole PAGES packet's descriptors against its header: count, sum of pages, sum of payload; and
 * the zstd frames: each has its payload, which is not larger than its content, and that is at most
 * VMTH_PACKET_MAX_FRAME_BYTES. */
VMTH_MUST_CHECK int vmth_packet_check(const struct vmth_packet_header *header, const uint8_t *desc,
                                      const struct vmth_packet_limits *limits,
                                      struct vmth_packet_error *error);

void vmth_ack_encode(const struct vmth_ack *ack, uint8_t out[VMTH_ACK_BYTES]);
VMTH_MUST_CHECK int vmth_ack_decode(const uint8_t in[VMTH_ACK_BYTES], struct vmth_ack *ack,
                                    struct vmth_packet_error *error);

VMTH_END_DECLS

#endif
