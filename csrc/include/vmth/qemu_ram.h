/* SPDX-License-Identifier: Apache-2.0 */
/* The payload of a `ram` section in QEMU's migration stream: records to runs of pages, and back.
 *
 *   +-- be64 --------+-- unless CONTINUE ----+-- by kind ---------------------------------------+
 *   | offset | flags | u8 n, n bytes (idstr) | ZERO: u8 0, PAGE: page, XBZRLE: u8 1, be16 n, .. |
 *   +----------------+-----------------------+--------------------------------------------------+
 *
 *   input   [hdr page 7][hdr page 8][hdr page 9][hdr 0][hdr 0][EOS]
 *   runs    {PAGE, page 7, npages 3, at -> first page's bytes, stride}  {ZERO, page 10, npages 2}
 *
 * Payload is never copied: a run says where in the input it lies. Records without pages (EOS,
 * FLUSH, MEM_SIZE) stop the parser, so that their place in the order is kept. Nothing in the input
 * is trusted: a name must be in the block table, a page within its block. docs/qemu-stream.md has the
 * format. Pure. */
#ifndef VMTH_QEMU_RAM_H
#define VMTH_QEMU_RAM_H

#include "vmth/common.h"

VMTH_BEGIN_DECLS

#define VMTH_QEMU_NAME_BYTES 256u    /* u8 length, then the name: as on the wire */
#define VMTH_QEMU_MAX_BLOCKS 4096u
#define VMTH_QEMU_MIN_PAGE_BYTES 1024u /* the record flags need ten bits below the offset */
#define VMTH_QEMU_MAX_PAGE_BYTES 65536u
#define VMTH_QEMU_MAX_COMPRESSED(page_bytes) (2u * (page_bytes)) /* zlib's bound is far below */

enum vmth_qemu_kind {
    VMTH_QEMU_ZERO = 1,
    VMTH_QEMU_PAGE = 2,
    VMTH_QEMU_XBZRLE = 3,   /* delta against what the page held before */
    VMTH_QEMU_COMPRESS = 4  /* one zlib stream */
};

/* Where the parser stopped. */
enum vmth_qemu_stop {
    VMTH_QEMU_SHORT = 1,   /* the input ends within a record; `need` bytes from `used` would do */
    VMTH_QEMU_FULL = 2,    /* `out` is full: call again from `used` */
    VMTH_QEMU_EOS = 3,     /* end of the section's payload, after `used` */
    VMTH_QEMU_FLUSH = 4,   /* multifd channels must have synchronised here */
    VMTH_QEMU_MEM_SIZE = 5 /* the block list follows; its total is in `value` */
};

/* npages pages from `page` of one block, of one kind. XBZRLE and COMPRESS runs have one page. */
struct vmth_qemu_run {
    uint64_t page;
    uint64_t npages;
    uint64_t at;     /* in the input: first payload byte of the first page; 0 for ZERO */
    uint32_t stride; /* from one page's payload to the next; 0 for ZERO */
    uint32_t nbytes; /* payload bytes of one page; 0 for ZERO */
    uint32_t block;  /* index in the block table */
    uint32_t kind;
};

/* The stream's block table. `names` has VMTH_QEMU_NAME_BYTES for each block. */
struct vmth_qemu_blocks {
    uint32_t page_bytes; /* power of two within the bounds above */
    uint32_t nblocks;
    const uint64_t *used_length;
    const uint8_t *names;
};

struct vmth_qemu_parsed {
    size_t nruns;
    size_t used;    /* bytes of whole records */
    size_t need;    /* SHORT only */
    uint64_t value; /* MEM_SIZE only */
    uint32_t stop;
};

/* What was wrong: `field` had `received`, at most (or exactly) `allowed`. */
struct vmth_qemu_error {
    const char *field;
    uint64_t received;
    uint64_t allowed;
};

/* No page record was seen yet, so CONTINUE has nothing to go on. */
#define VMTH_QEMU_NO_BLOCK UINT32_MAX

/* Parse whole records from `in` until one of the stops, and write at most `cap` (> 0) runs in the
 * order of the stream. `*block` is the block that CONTINUE means: keep it from call to call, over
 * sections too. Returns 0, -EINVAL for a block table outside its bounds, or -EPROTO with *error
 * filled. A bad record is refused only by a call that found nothing before it: what was good is
 * returned first, however the input was cut. Outputs are untouched on error. */
VMTH_MUST_CHECK int vmth_qemu_ram_parse(const struct vmth_qemu_blocks *blocks, uint32_t *block,
                                        const uint8_t *in, size_t nbytes, struct vmth_qemu_run *out,
                                        size_t cap, struct vmth_qemu_parsed *parsed,
                                        struct vmth_qemu_error *error);

/* Bytes that the records of `runs` take, or 0 if a run is not within its block, or its payload not
 * within the `nbytes` that `at` points into, or the sum would not fit size_t. `block` as for
 * encode. */
size_t vmth_qemu_ram_encoded_bytes(const struct vmth_qemu_blocks *blocks, uint32_t block,
                                   const struct vmth_qemu_run *runs, size_t nruns, size_t nbytes);

/* Write the records of `runs` at `out`, which has the room that encoded_bytes() asked for with the
 * same arguments (never 0). `*block` is the block of the last record written before, or
 * VMTH_QEMU_NO_BLOCK: a record of the same block leaves its name out. */
void vmth_qemu_ram_encode(const struct vmth_qemu_blocks *blocks, uint32_t *block,
                          const struct vmth_qemu_run *runs, size_t nruns, const uint8_t *data,
                          uint8_t *out);

VMTH_END_DECLS

#endif
