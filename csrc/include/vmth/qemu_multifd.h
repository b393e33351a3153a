/* SPDX-License-Identifier: Apache-2.0 */
/* Packets of pages on one of QEMU's multifd channels, to runs of pages:
 *
 *   be32 magic, version, flags, pages_alloc, normal, payload bytes | be64 number | be32 zero | ...
 *   char block[256] at 64 | be64 offset[pages that fit 512 KiB], normal ones first | payload
 *
 *   input   [hdr pages 0-127][payload][hdr pages 128-255][payload][hdr SYNC][hdr pages 25
 *   runs    {PAGE, page 0, npages 128, at}  {PAGE, page 128, npages 128, at}  then OTHER
 *
 * Only packets of plain pages are read here, whole; any other is left to who reads all of them
 * (vmth/qemu/stream/multifd.py, this parser's twin, which has the words for what is wrong).
 * docs/qemu-stream.md has the format. Pure; nothing in the input is trusted. */
#ifndef VMTH_QEMU_MULTIFD_H
#define VMTH_QEMU_MULTIFD_H

#include "vmth/common.h"
#include "vmth/qemu_ram.h"

VMTH_BEGIN_DECLS

#define VMTH_MULTIFD_PACKET_BYTES (512u << 10) /* pages of one packet */
#define VMTH_MULTIFD_FIELDS_BYTES 320u         /* in front of the offsets */
/* However few pages a packet has: 1,344 with pages of 4 KiB. */
#define VMTH_MULTIFD_HEADER_BYTES(page_bytes) \
    (VMTH_MULTIFD_FIELDS_BYTES + 8u * (VMTH_MULTIFD_PACKET_BYTES / (page_bytes)))

/* Where the parser stopped. */
enum vmth_multifd_stop {
    VMTH_MULTIFD_SHORT = 1, /* the input ends within a packet, or with one */
    VMTH_MULTIFD_FULL = 2,  /* `out` may have no room for the next packet's runs */
    VMTH_MULTIFD_OTHER = 3  /* the next packet does something else: a synchronisation, compressed
                               pages, device state, pages that are in no block, or it is none */
};

struct vmth_multifd_parsed {
    size_t nruns;
    size_t used; /* bytes of whole packets */
    uint32_t stop;
};

/* Parse whole packets from `in` and write their runs, each packet's normal pages before its zeros,
 * in the order of the channel. `at` counts from `in`. `cap` is at least the pages of one packet
 * (VMTH_MULTIFD_PACKET_BYTES / page_bytes). Returns 0, or -EINVAL for a block table or a cap outside
 * its bounds, with outputs untouched. */
VMTH_MUST_CHECK int vmth_multifd_parse(const struct vmth_qemu_blocks *blocks, const uint8_t *in,
                                       size_t nbytes, struct vmth_qemu_run *out, size_t cap,
                                       struct vmth_multifd_parsed *parsed);

VMTH_END_DECLS

#endif
